"""Maskers that draw spans over time, for speech and waveform models; all rows are equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import row_keys
from jepa_audio.steps.masking.sampling import check_min_context, draw_accepted

# Rows of the sample from which the expected number of targets is computed, and their seed.
_SAMPLE_ROWS, _SAMPLE_SEED = 4096, 0


class _SpanGroupMasker(Masker):
    """Target groups of spans; subclasses define these settings and the context."""

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
        context, targets = self._draw(grid.num_time, row_keys(seed, step, rows))
        if grid.num_freq > 1:
            # The order of tokens is time-major: the tokens of a time column are adjacent.
            context, targets = (part.repeat(grid.num_freq, axis=-1) for part in (context, targets))
        return Masks.from_bool(
            torch.from_numpy(context),
            torch.from_numpy(targets),
            self.expected_targets(grid, seed, step),
        )

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        """The mean over a fixed sample of 4,096 rows; its standard error is below 0.3 %.

        A formula exists only without `min_context`, which rejects rows with many targets.
        """
        return grid.num_freq * _mean_columns(self, grid.num_time)

    def _draw(
        self, num_time: int, keys: UInt64[np.ndarray, " R"]
    ) -> tuple[Bool[np.ndarray, "R T"], Bool[np.ndarray, "R M T"]]:
        """Context columns and target columns of the rows with these keys."""
        from jepa_audio.steps import kernels  # noqa: PLC0415

        spans = [(self.target_probability, self.target_length)] * self.num_groups
        spans += self._hidden_spans
        self._check_lengths(num_time)
        probability = np.array([probability for probability, _ in spans], np.float64)
        length = np.array([length for _, length in spans], np.int64)
        context = np.empty((len(keys), num_time), bool)
        targets = np.empty((len(keys), self.num_groups, num_time), bool)
        draw_accepted(
            lambda min_columns, max_draws: kernels.draw_spans(
                keys, probability, length, self._min_gap, min_columns, max_draws, context, targets
            ),
            len(keys),
            num_time,
            self.min_context,
            self,
        )
        return context, targets

    @property
    def _hidden_spans(self) -> list[tuple[float, int]]:
        """The spans that are neither target nor context."""
        return []

    @property
    def _min_gap(self) -> int:
        """Minimum number of time columns of a gap between spans that is context."""
        return 1

    def _check_lengths(self, num_time: int) -> None:
        _check_fits("target_length", self.target_length, num_time)


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

    @property
    @override
    def _hidden_spans(self) -> list[tuple[float, int]]:
        return [(self.context_probability, self.context_length)]

    @override
    def _check_lengths(self, num_time: int) -> None:
        super()._check_lengths(num_time)
        _check_fits("context_length", self.context_length, num_time)


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

    @property
    @override
    def _min_gap(self) -> int:
        return self.min_run

    @override
    def _check_lengths(self, num_time: int) -> None:
        super()._check_lengths(num_time)
        _check_fits("min_run", self.min_run, num_time)


@lru_cache(maxsize=256)
def _mean_columns(masker: _SpanGroupMasker, num_time: int) -> float:
    """Mean number of target columns of a row, over all groups."""
    _, targets = masker._draw(num_time, row_keys(_SAMPLE_SEED, 0, torch.arange(_SAMPLE_ROWS)))
    return int(targets.sum()) / _SAMPLE_ROWS


def _check_probability(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"`{name}` ({value}) must be above 0 and at most 1")


def _check_fits(name: str, length: int, num_time: int) -> None:
    if length >= num_time:
        raise UserError(
            f"`{name}` ({length}) must be below the number of time columns ({num_time}): lower "
            f"`{name}` or raise `data.crop_seconds`"
        )
