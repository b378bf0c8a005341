"""Maskers that draw rectangles on the time-frequency grid, for spectrogram models."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, UInt64
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import row_keys, step_uniform
from jepa_audio.steps.masking.sampling import (
    check_min_context,
    check_range,
    check_share,
    draw_accepted,
    floor_share,
)

# No clip makes so many; the compiled loops count with 64 bits.
_MOST_ATTEMPTS = 1 << 40


@dataclass(frozen=True)
class MultiBlockMasker(Masker):
    """Each target group is a block; the context is one large block without the targets.

    These are the masks of I-JEPA (Assran et al., 2023, arXiv:2301.08243), with three deviations:

    - Blocks can contain the last row and column; the published code never draws these.
    - Aspect ratios are relative to the shape of the grid, which is square in I-JEPA. If the grid
      limits one side of a block, the other side grows, so that the block has the drawn share.
    - Clips keep all context tokens; I-JEPA reduces them to the smallest number in the batch.

    Args:
        num_targets: number of target blocks M; blocks may overlap.
        target_scale: range of the share of the grid that a target block covers; one share is drawn
            per step, for all groups.
        target_aspect: range of the ratio (share of the time columns) / (share of the frequency
            rows) of a target block.
        context_scale: range of the share of the grid that the context block covers; the block has
            the aspect ratio of the grid.
        min_context: smallest share of context tokens; the masks of other clips are drawn again.
    """

    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_context: float = 0.1

    def __post_init__(self) -> None:
        check_bounds(self, 1, 1000, "num_targets")
        check_range("target_scale", self.target_scale, 1.0)
        check_range("target_aspect", self.target_aspect)
        check_range("context_scale", self.context_scale, 1.0)
        check_min_context(self.min_context)

    @override
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        from jepa_audio.steps import kernels  # noqa: PLC0415

        target_size, context_size = self._sizes(grid, seed, step)
        keys = row_keys(seed, step, rows)
        context = np.empty((len(keys), grid.num_time, grid.num_freq), bool)
        targets = np.empty((len(keys), self.num_targets, grid.num_time, grid.num_freq), bool)
        draw_accepted(
            lambda min_tokens, max_draws: kernels.draw_multi_blocks(
                keys, target_size, context_size, min_tokens, max_draws, context, targets
            ),
            len(keys),
            grid.num_tokens,
            self.min_context,
            self,
        )
        return Masks.from_bool(
            torch.from_numpy(context).flatten(-2),
            torch.from_numpy(targets).flatten(-2),
            self.expected_targets(grid, seed, step),
        )

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        """The exact number: all blocks of a step have the same size."""
        return float(self.num_targets * self._sizes(grid, seed, step)[0].prod())

    def _sizes(
        self, grid: Grid, seed: int, step: int
    ) -> tuple[Int64[np.ndarray, " 2"], Int64[np.ndarray, " 2"]]:
        """The (time, frequency) sizes of the target blocks and of the context block of a step."""
        uniform = step_uniform(seed, step, 3).tolist()
        ranges = (self.target_scale, self.target_aspect, self.context_scale)
        target_scale, target_aspect, context_scale = (
            low + (high - low) * number for (low, high), number in zip(ranges, uniform, strict=True)
        )
        targets = _block_size(grid, target_scale, target_aspect)
        return targets, _block_size(grid, context_scale, 1.0)


class _UnionMasker(Masker):
    """One target group, the union of rectangles; all other tokens are context.

    Rectangles are added until the next one would exceed the target share; random tokens complete
    the share. The size of a rectangle is limited by the number of missing tokens.

    Subclasses define the settings `target_share` and `max_attempts`.
    """

    target_share: float
    max_attempts: int

    @override
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        count = self._num_targets(grid)
        targets = torch.empty(len(rows), grid.num_time, grid.num_freq, dtype=torch.bool)
        self._draw(row_keys(seed, step, rows), count, targets.numpy())
        tokens = targets.flatten(1)
        return Masks.from_bool(~tokens, tokens[:, None], float(count))

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        return float(self._num_targets(grid))

    def _num_targets(self, grid: Grid) -> int:
        count = floor_share(self.target_share, grid.num_tokens)
        if count < 1:
            raise UserError(
                f"`target_share` ({self.target_share}) gives no target on {grid}: raise "
                "`target_share` or `data.crop_seconds`"
            )
        return count

    @abstractmethod
    def _draw(
        self, keys: UInt64[np.ndarray, " R"], count: int, targets: Bool[np.ndarray, "R T F"]
    ) -> None:
        """Cover `count` tokens of every row of `targets`."""


@dataclass(frozen=True)
class BlockMasker(_UnionMasker):
    """One target group, the union of many small blocks; all other tokens are context.

    These are the block masks of PupuJEPA (Gu et al., 2026, arXiv:2606.25713).

    Args:
        target_share: exact share of target tokens.
        scale: range of the share of the grid that a block covers; the last blocks are not larger
            than the number of missing target tokens.
        long_aspect: range of the ratio time columns / frequency rows of the blocks that are long in
            time, which are half of the blocks.
        tall_aspect: range of this ratio for the blocks that are long in frequency.
        max_attempts: maximum number of blocks per clip; single random tokens complete the share.
    """

    target_share: float = 0.8
    scale: tuple[float, float] = (0.01, 0.05)
    long_aspect: tuple[float, float] = (2.0, 5.0)
    tall_aspect: tuple[float, float] = (0.2, 0.5)
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_range("scale", self.scale, 1.0)
        check_range("long_aspect", self.long_aspect)
        check_range("tall_aspect", self.tall_aspect)
        check_bounds(self, 1, 1_000_000, "max_attempts")

    @override
    def _draw(
        self, keys: UInt64[np.ndarray, " R"], count: int, targets: Bool[np.ndarray, "R T F"]
    ) -> None:
        from jepa_audio.steps import kernels  # noqa: PLC0415

        ranges = np.array([self.scale, self.long_aspect, self.tall_aspect], np.float64)
        kernels.draw_blocks(keys, count, self.max_attempts, ranges, targets)


@dataclass(frozen=True)
class StripeMasker(_UnionMasker):
    """One target group, the union of stripes across the grid; all other tokens are context.

    These are the time-frequency masks of PupuJEPA (Gu et al., 2026, arXiv:2606.25713). A stripe
    covers complete time columns with probability T / (T + F), and complete frequency rows
    otherwise. The last stripes are not larger than the number of missing target tokens.

    Args:
        target_share: exact share of target tokens.
        max_time_width: maximum number of time columns of a stripe.
        max_freq_width: maximum number of frequency rows of a stripe.
        max_attempts: maximum number of stripes per clip; single random tokens complete the share.
    """

    target_share: float = 0.8
    max_time_width: int = 40
    max_freq_width: int = 1
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_bounds(self, 1, math.inf, "max_time_width", "max_freq_width", "max_attempts")

    @override
    def _draw(
        self, keys: UInt64[np.ndarray, " R"], count: int, targets: Bool[np.ndarray, "R T F"]
    ) -> None:
        from jepa_audio.steps import kernels  # noqa: PLC0415

        widths = float(self.max_time_width), float(self.max_freq_width)
        attempts = min(self.max_attempts, _MOST_ATTEMPTS)
        kernels.draw_stripes(keys, count, attempts, *widths, targets)


def _block_size(grid: Grid, scale: float, aspect: float) -> Int64[np.ndarray, " 2"]:
    """The (time, frequency) size of a block that covers about the share `scale` of the grid."""
    num_freq = min(max(round(grid.num_freq * math.sqrt(scale / aspect)), 1), grid.num_freq)
    num_time = min(max(round(grid.num_tokens * scale / num_freq), 1), grid.num_time)
    return np.array([num_time, num_freq])
