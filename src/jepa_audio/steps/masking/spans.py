"""Maskers that draw spans over time, for speech and waveform models; all rows are equal."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.sampling import check_min_context, draw_accepted


class _SpanGroupMasker(Masker):
    """Target groups of spans; subclasses define these settings and draw the context."""

    target_probability: float
    target_length: int
    num_groups: int
    min_context: float

    def __post_init__(self) -> None:
        _check_probability("target_probability", self.target_probability)
        check_bounds(self, 1, math.inf, "target_length", "num_groups")
        check_min_context(self.min_context)

    @override
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        _check_fits("target_length", self.target_length, grid.num_time)

        def draw(num_rows: int) -> tuple[Tensor, Tensor]:
            spans = (self.target_probability, self.target_length)
            groups = sample_spans(num_rows * self.num_groups, grid.num_time, *spans, generator)
            targets = groups.unflatten(0, (num_rows, self.num_groups))
            return self._draw_context(targets.any(1), generator), targets

        context, targets = draw_accepted(draw, batch_size, self.min_context, self)
        # The order of tokens is time-major: the `num_freq` tokens of a time column are adjacent.
        return Masks.from_bool(
            context.repeat_interleave(grid.num_freq, dim=-1),
            targets.repeat_interleave(grid.num_freq, dim=-1),
        )

    @abstractmethod
    def _draw_context(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """The context columns `[R, T]`; `targets` `[R, T]` is the union of the target groups."""


@dataclass(frozen=True)
class SpanMasker(_SpanGroupMasker):
    """Target groups of spans; the context is the complement of hidden spans and of all targets.

    These are the masks of WavJEPA (Yuksel et al., 2025, arXiv:2509.23238). The text of the paper
    describes context spans instead. Only the complement of hidden spans reproduces its Table 9.

    Args:
        context_probability: share of the time columns that the hidden spans would cover if they
            did not overlap.
        context_length: number of time columns of a hidden span.
        target_probability: share of the time columns that the spans of one target group would cover
            if they did not overlap.
        target_length: number of time columns of a target span.
        num_groups: number of target groups M; groups may overlap.
        min_context: rows with a smaller share of context are drawn again.
    """

    context_probability: float = 0.65
    context_length: int = 10
    target_probability: float = 0.25
    target_length: int = 10
    num_groups: int = 4
    min_context: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probability("context_probability", self.context_probability)
        check_bounds(self, 1, math.inf, "context_length")

    @override
    def _draw_context(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        num_rows, num_time = targets.shape
        _check_fits("context_length", self.context_length, num_time)
        spans = (self.context_probability, self.context_length)
        return ~(sample_spans(num_rows, num_time, *spans, generator) | targets)


@dataclass(frozen=True)
class TargetSpanMasker(_SpanGroupMasker):
    """Target groups of spans; the context is every gap between targets of at least `min_run`.

    These are the masks of SpeechJEPA, which is WavJEPA for speech. The time columns of shorter gaps
    are neither context nor target.

    Args:
        target_probability: share of the time columns that the spans of one target group would cover
            if they did not overlap.
        target_length: number of time columns of a target span.
        num_groups: number of target groups M; groups may overlap.
        min_context: rows with a smaller share of context are drawn again.
        min_run: minimum number of time columns of a gap that is context.
    """

    target_probability: float = 0.15
    target_length: int = 10
    num_groups: int = 4
    min_context: float = 0.5
    min_run: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, 1, math.inf, "min_run")

    @override
    def _draw_context(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        _check_fits("min_run", self.min_run, targets.shape[1])
        run_starts = (~targets).unfold(-1, self.min_run, 1).all(-1)
        return _extend_starts(run_starts, self.min_run)


def sample_spans(
    num_rows: int, num_time: int, probability: float, length: int, generator: torch.Generator
) -> Bool[Tensor, "R T"]:
    """Draw random spans in every row and return their union.

    A row has `floor(probability * num_time / length + U(0, 1))` spans. Their starts are drawn
    without replacement from all columns at which a span fits. Spans may overlap; therefore, a row
    may cover a smaller share than `probability`.
    """
    num_starts = num_time - length + 1
    rounding = torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    count = (probability * num_time / length + rounding).long().clamp(max=num_starts)
    score = torch.rand(num_rows, num_starts, generator=generator, dtype=torch.float32)
    chosen = score.topk(int(count.max()), dim=-1).indices
    starts = torch.zeros(num_rows, num_starts, dtype=torch.bool)
    starts.scatter_(-1, chosen, torch.arange(chosen.shape[-1]) < count)
    return _extend_starts(starts, length)


def _extend_starts(starts: Bool[Tensor, "R P"], length: int) -> Bool[Tensor, "R T"]:
    """Extend every start to a span of `length` columns; T = P + length - 1."""
    padded = F.pad(starts.float(), (length - 1, length - 1))
    return F.max_pool1d(padded, kernel_size=length, stride=1).bool()


def _check_probability(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"`{name}` ({value}) must be above 0 and at most 1")


def _check_fits(name: str, length: int, num_time: int) -> None:
    if length >= num_time:
        raise UserError(
            f"`{name}` ({length}) must be below the number of time columns ({num_time}): lower "
            f"`{name}` or raise `data.crop_seconds`"
        )
