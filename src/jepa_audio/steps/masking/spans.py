"""Spans along time, shared by all frequency rows: the masks of speech and waveform models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.random import draw_accepted


@dataclass(frozen=True)
class SpanMasker(Masker):
    """Groups of target spans, and as context what another span mask and the targets leave free.

    The masks of WavJEPA (Yuksel et al., 2025, arXiv:2509.23238). Its text draws context spans; its
    Table 9 is matched by the complement of a span mask, as here, and not by the text.

    Args:
        context_probability: share of the time columns that the spans hidden from the context would
            cover without overlap.
        context_length: time columns of a hidden span.
        target_probability: the same share for the spans of one target group.
        target_length: time columns of a target span.
        num_groups: number of target groups M; groups may overlap.
        min_context: rows with less than this share of context are drawn again.
    """

    context_probability: float = 0.65
    context_length: int = 10
    target_probability: float = 0.25
    target_length: int = 10
    num_groups: int = 4
    min_context: float = 0.1

    def __post_init__(self) -> None:
        _check_spans("context", self.context_probability, self.context_length)
        _check_spans("target", self.target_probability, self.target_length)
        _check_groups(self.num_groups, self.min_context)

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`."""
        _check_fits("context_length", self.context_length, grid)
        _check_fits("target_length", self.target_length, grid)

        def draw(num_rows: int) -> tuple[Tensor, Tensor]:
            targets = _target_groups(self, num_rows, grid.num_time, generator)
            hidden = sample_spans(
                num_rows, grid.num_time, self.context_probability, self.context_length, generator
            )
            return ~(hidden | targets.any(1)), targets

        return _over_frequency(grid, *draw_accepted(draw, batch_size, self.min_context, self))


@dataclass(frozen=True)
class TargetSpanMasker(Masker):
    """Groups of target spans, and as context all the rest that is not in crumbs.

    The masks of SpeechJEPA, the speech sibling of WavJEPA. Crumbs are neither context nor target.

    Args:
        target_probability: share of the time columns that the spans of one group would cover
            without overlap.
        target_length: time columns of a target span.
        num_groups: number of target groups M; groups may overlap.
        min_context: rows with less than this share of context are drawn again.
        min_run: shorter runs of time columns between targets are dropped from the context.
    """

    target_probability: float = 0.15
    target_length: int = 10
    num_groups: int = 4
    min_context: float = 0.5
    min_run: int = 5

    def __post_init__(self) -> None:
        _check_spans("target", self.target_probability, self.target_length)
        _check_groups(self.num_groups, self.min_context)
        if self.min_run < 1:
            raise UserError(f"`min_run` must be at least 1, got {self.min_run}: 1 keeps every run")

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`."""
        _check_fits("target_length", self.target_length, grid)
        _check_fits("min_run", self.min_run, grid)

        def draw(num_rows: int) -> tuple[Tensor, Tensor]:
            targets = _target_groups(self, num_rows, grid.num_time, generator)
            run_starts = (~targets.any(1)).unfold(-1, self.min_run, 1).all(-1)
            return _stretch(run_starts, self.min_run), targets

        return _over_frequency(grid, *draw_accepted(draw, batch_size, self.min_context, self))


def _target_groups(
    masker: SpanMasker | TargetSpanMasker, num_rows: int, num_time: int, generator: torch.Generator
) -> Bool[Tensor, "R M T"]:
    spans = (masker.target_probability, masker.target_length)
    drawn = sample_spans(num_rows * masker.num_groups, num_time, *spans, generator)
    return drawn.unflatten(0, (num_rows, masker.num_groups))


def sample_spans(
    num_rows: int, num_time: int, probability: float, length: int, generator: torch.Generator
) -> Bool[Tensor, "R T"]:
    """The union of random spans in every row.

    A row gets `floor(probability * num_time / length + U(0, 1))` spans, with starts drawn without
    replacement from all places where a span fits. Spans may overlap, so a row may hold less than
    `probability`.
    """
    num_starts = num_time - length + 1
    count = probability * num_time / length + torch.rand(
        num_rows, 1, generator=generator, dtype=torch.float64
    )
    count = count.long().clamp(max=num_starts)
    score = torch.rand(num_rows, num_starts, generator=generator, dtype=torch.float32)
    chosen = score.topk(int(count.max()), dim=-1).indices
    starts = torch.zeros(num_rows, num_starts, dtype=torch.bool)
    return _stretch(starts.scatter_(-1, chosen, torch.arange(chosen.shape[-1]) < count), length)


def _stretch(starts: Bool[Tensor, "R P"], length: int) -> Bool[Tensor, "R T"]:
    """Every start becomes a run of `length` columns; T = P + length - 1."""
    padded = F.pad(starts.float(), (length - 1, length - 1))
    return F.max_pool1d(padded, kernel_size=length, stride=1).bool()


def _over_frequency(
    grid: Grid, context: Bool[Tensor, "B T"], targets: Bool[Tensor, "B M T"]
) -> Masks:
    # Tokens are counted time-major, so a column is `num_freq` neighbours.
    return Masks.from_bool(
        context.repeat_interleave(grid.num_freq, dim=-1),
        targets.repeat_interleave(grid.num_freq, dim=-1),
    )


def _check_spans(what: str, probability: float, length: int) -> None:
    if not 0 < probability <= 1:
        raise UserError(
            f"`{what}_probability` must lie in (0, 1], got {probability}: it is the share of time under spans"
        )
    if length < 1:
        raise UserError(f"`{what}_length` must be at least 1 time column, got {length}")


def _check_groups(num_groups: int, min_context: float) -> None:
    if num_groups < 1:
        raise UserError(
            f"`num_groups` must be at least 1, got {num_groups}: without targets nothing is predicted"
        )
    if not 0 <= min_context < 1:
        raise UserError(
            f"`min_context` must lie in [0, 1), got {min_context}: it is a share of the tokens"
        )


def _check_fits(name: str, length: int, grid: Grid) -> None:
    if length >= grid.num_time:
        raise UserError(
            f"`{name}` ({length}) must be below the {grid.num_time} time columns of {grid}: "
            f"lower it or give longer clips"
        )
