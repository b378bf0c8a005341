"""Maskers that draw spans over time, for speech and waveform models; all rows are equal."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import RowNumbers
from jepa_audio.steps.masking.sampling import (
    Planes,
    check_min_context,
    choose_tokens,
    draw_accepted,
    draw_rows,
)

# Rows of the sample from which the expected number of targets is computed, and their seed.
_SAMPLE_ROWS, _SAMPLE_SEED = 4096, 0


class _SpanGroupMasker(Masker):
    """Target groups of spans; subclasses define these settings and draw the context."""

    target_probability: float
    target_length: int
    num_groups: int
    min_context: float

    def __post_init__(self) -> None:
        _check_probability("target_probability", self.target_probability)
        check_bounds(self, 1, math.inf, "target_length")
        check_bounds(self, 1, 1000, "num_groups")
        check_min_context(self.min_context)

    @override
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        numbers = RowNumbers.of(seed, step, rows.numpy())
        return self._draw(grid, numbers, self.expected_targets(grid, seed, step))

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        """The mean over a fixed sample of 4,096 rows; its standard error is below 0.3 %.

        A formula exists only without `min_context`, which rejects rows with many targets.
        """
        return grid.num_freq * _mean_columns(self, grid.num_time)

    def _draw(self, grid: Grid, numbers: RowNumbers, targets_per_clip: float) -> Masks:
        _check_fits("target_length", self.target_length, grid.num_time)
        spans = [self._target_spans] * self.num_groups + self._context_spans(grid.num_time)

        def draw(numbers: RowNumbers) -> Planes:
            drawn = sample_spans(numbers, grid.num_time, spans)  # [R, groups, T]
            targets = drawn[:, : self.num_groups]
            return self._context(np.logical_or.reduce(drawn, axis=1)), targets

        def draw_on_grid(numbers: RowNumbers) -> Planes:
            context, targets = draw_accepted(draw, numbers, self.min_context, self)
            if grid.num_freq == 1:
                return context, targets
            # The order of tokens is time-major: the tokens of a time column are adjacent.
            return context.repeat(grid.num_freq, axis=-1), targets.repeat(grid.num_freq, axis=-1)

        return draw_rows(draw_on_grid, numbers, grid, targets_per_clip)

    @property
    def _target_spans(self) -> tuple[float, int]:
        return self.target_probability, self.target_length

    def _context_spans(self, num_time: int) -> list[tuple[float, int]]:
        """The spans that are hidden from the context, in addition to the targets."""
        return []

    @abstractmethod
    def _context(self, hidden: Bool[np.ndarray, "R T"]) -> Bool[np.ndarray, "R T"]:
        """The context columns; `hidden` is the union of all spans."""


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
    def _context_spans(self, num_time: int) -> list[tuple[float, int]]:
        _check_fits("context_length", self.context_length, num_time)
        return [(self.context_probability, self.context_length)]

    @override
    def _context(self, hidden: Bool[np.ndarray, "R T"]) -> Bool[np.ndarray, "R T"]:
        return ~hidden


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
    def _context_spans(self, num_time: int) -> list[tuple[float, int]]:
        _check_fits("min_run", self.min_run, num_time)
        return []

    @override
    def _context(self, hidden: Bool[np.ndarray, "R T"]) -> Bool[np.ndarray, "R T"]:
        # A run of length `min_run` starts where no hidden column follows in these columns.
        num_time = hidden.shape[1]
        padded = np.pad(hidden[:, ::-1], ((0, 0), (0, self.min_run - 1)))
        starts = ~_extend(padded, self.min_run)[:, num_time - 1 :: -1]
        starts[:, num_time - self.min_run + 1 :] = False
        return _extend(starts, self.min_run)


def sample_spans(
    numbers: RowNumbers, num_time: int, spans: list[tuple[float, int]]
) -> Bool[np.ndarray, "R groups T"]:
    """Draw several unions of random spans in every row, one for each (probability, length).

    A union has `floor(probability * num_time / length + U(0, 1))` spans. Their starts are drawn
    without replacement from all columns at which a span fits. Spans may overlap; therefore, a union
    may cover a smaller share than `probability`.
    """
    probability, length = (np.array(values) for values in zip(*spans, strict=True))
    num_starts = num_time - length + 1
    mean_count = probability * num_time / length
    rounding = numbers.stream(0).uniform(len(spans))
    count = np.minimum((mean_count + rounding).astype(np.int64), num_starts)  # [R, groups]
    fits = np.arange(num_time) < num_starts[:, None]
    allowed = np.broadcast_to(fits, (len(numbers), *fits.shape)).reshape(-1, num_time)
    starts = choose_tokens(allowed, count.ravel(), numbers.stream(1).streams(len(spans)))
    unions = starts.reshape(len(numbers), *fits.shape)
    lengths = sorted(set(length.tolist()))
    if len(lengths) == 1:
        return _extend(unions, lengths[0])
    for each in lengths:
        unions[:, length == each] = _extend(unions[:, length == each], each)
    return unions


def _extend(starts: Bool[np.ndarray, "*R T"], length: int) -> Bool[np.ndarray, "*R T"]:
    """Extend every start to a span of `length` columns; every span must fit into its row."""
    spans, reached = starts.ravel(), 1  # no span reaches the next row
    while reached < length:
        shift = min(reached, length - reached)
        longer = spans.copy()
        longer[shift:] |= spans[:-shift]
        spans, reached = longer, reached + shift
    return spans.reshape(starts.shape)


@lru_cache(maxsize=256)
def _mean_columns(masker: _SpanGroupMasker, num_time: int) -> float:
    """Mean number of target columns of a row, over all groups."""
    numbers = RowNumbers.of(_SAMPLE_SEED, 0, np.arange(_SAMPLE_ROWS))
    masks = masker._draw(Grid(1, num_time), numbers, 0.0)
    return float(masks.targets.counts.sum()) / _SAMPLE_ROWS


def _check_probability(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"`{name}` ({value}) must be above 0 and at most 1")


def _check_fits(name: str, length: int, num_time: int) -> None:
    if length >= num_time:
        raise UserError(
            f"`{name}` ({length}) must be below the number of time columns ({num_time}): lower "
            f"`{name}` or raise `data.crop_seconds`"
        )
