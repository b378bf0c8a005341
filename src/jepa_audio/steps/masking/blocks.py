"""Maskers that draw rectangles on the time-frequency grid, for spectrogram models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, UInt64
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.cover import Attempts, UnionMasker, bits_below, num_bits, unpack_bits
from jepa_audio.steps.masking.numbers import RowNumbers, step_uniform
from jepa_audio.steps.masking.sampling import (
    Planes,
    check_min_context,
    check_range,
    check_share,
    draw_accepted,
    draw_rows,
)


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
        target_size, context_size = self._sizes(grid, seed, step)

        def draw(numbers: RowNumbers) -> Planes:
            position = numbers.uniform(2 * (self.num_targets + 1)).reshape(len(numbers), -1, 2)
            targets = _place_blocks(grid, target_size, position[:, 1:])
            context = _place_blocks(grid, context_size, position[:, 0])
            return context & ~targets.any(axis=1), targets

        return draw_rows(
            lambda numbers: draw_accepted(draw, numbers, self.min_context, self),
            RowNumbers.of(seed, step, rows.numpy()),
            grid,
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


@dataclass(frozen=True)
class BlockMasker(UnionMasker):
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

    _window: ClassVar[int] = 80

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_range("scale", self.scale, 1.0)
        check_range("long_aspect", self.long_aspect)
        check_range("tall_aspect", self.tall_aspect)
        check_bounds(self, 1, 1_000_000, "max_attempts")

    @override
    def draw_attempts(self, grid: Grid, uniform: Float64[np.ndarray, "5 A R"]) -> Attempts:
        area = grid.num_tokens * _interpolate(self.scale, uniform[0])
        aspect = np.where(
            uniform[1] < 0.5,
            _interpolate(self.long_aspect, uniform[2]),
            _interpolate(self.tall_aspect, uniform[2]),
        )
        return area, aspect, uniform[3], uniform[4]

    @override
    def limit_size(self, grid: Grid, attempts: Attempts, missing: np.ndarray) -> np.ndarray:
        """The sizes in time and frequency, √(area * aspect) and √(area / aspect), as one number."""
        area, aspect, *_ = attempts
        area = np.minimum(area, missing)
        num_time = np.sqrt(area * aspect).astype(np.int64)
        num_freq = np.sqrt(area / aspect).astype(np.int64)
        num_time = np.minimum(np.maximum(num_time, 1), grid.num_time)
        num_freq = np.minimum(np.maximum(num_freq, 1), grid.num_freq)
        return num_time << 32 | num_freq

    @override
    def pack(self, grid: Grid, attempts: Attempts, size: np.ndarray) -> np.ndarray:
        _, _, time_position, freq_position = attempts
        time_below, freq_below = _block_tables(grid)
        num_time, num_freq = size >> 32, size & 0xFFFFFFFF
        time = (time_position * (grid.num_time + 1 - num_time)).astype(np.int64)
        freq = (freq_position * (grid.num_freq + 1 - num_freq)).astype(np.int64)
        words = time_below.take(time + num_time, 0)
        words ^= time_below.take(time, 0)
        freqs = freq_below.take(freq + num_freq, 0)
        freqs ^= freq_below.take(freq, 0)
        words &= freqs
        return words

    @override
    def all_cells(self, grid: Grid) -> UInt64[np.ndarray, " W"]:
        """For each frequency row, the packed time columns."""
        return _block_tables(grid)[0][-1]

    @override
    def num_free(self, grid: Grid, free: np.ndarray) -> np.ndarray:
        return num_bits(free)

    @override
    def expand(self, grid: Grid, free: UInt64[np.ndarray, "R W"]) -> Bool[np.ndarray, "R N"]:
        rows = unpack_bits(free.reshape(len(free), grid.num_freq, -1), grid.num_time)
        return rows.swapaxes(1, 2).reshape(len(free), grid.num_tokens)


@dataclass(frozen=True)
class StripeMasker(UnionMasker):
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

    _window: ClassVar[int] = 48

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_bounds(self, 1, math.inf, "max_time_width", "max_freq_width", "max_attempts")

    @override
    def draw_attempts(self, grid: Grid, uniform: Float64[np.ndarray, "5 A R"]) -> Attempts:
        num_time, num_freq = grid.num_time, grid.num_freq
        is_time = uniform[0] * (num_time + num_freq) < num_time
        max_width = np.where(is_time, self.max_time_width, self.max_freq_width)
        length = np.where(is_time, num_time, num_freq)
        width = np.minimum(1 + (uniform[1] * max_width).astype(np.int64), length)
        position = np.where(is_time, uniform[3], uniform[4])
        # One column has `num_freq` tokens and one row has `num_time` tokens.
        tokens_per_line = num_time + num_freq - length
        first_line = np.where(is_time, 0, num_time + 1)
        return width, tokens_per_line, length + 1.0, first_line, position

    @override
    def limit_size(self, grid: Grid, attempts: Attempts, missing: np.ndarray) -> np.ndarray:
        """The widths of the stripes, in columns or rows."""
        width, tokens_per_line, *_ = attempts
        return np.maximum(np.minimum(width, missing // tokens_per_line), 1)

    @override
    def pack(self, grid: Grid, attempts: Attempts, size: np.ndarray) -> np.ndarray:
        _, _, room, first_line, position = attempts
        start = (position * (room - size)).astype(np.int64) + first_line
        below = _stripe_table(grid)
        return below.take(start + size, 0) ^ below.take(start, 0)

    @override
    def all_cells(self, grid: Grid) -> UInt64[np.ndarray, " W"]:
        """The packed time columns, and then the packed frequency rows."""
        return np.concatenate([bits_below(grid.num_time)[-1], bits_below(grid.num_freq)[-1]])

    @override
    def num_free(self, grid: Grid, free: np.ndarray) -> np.ndarray:
        columns = _num_words(grid.num_time)
        return num_bits(free[..., :columns]) * num_bits(free[..., columns:])

    @override
    def expand(self, grid: Grid, free: UInt64[np.ndarray, "R W"]) -> Bool[np.ndarray, "R N"]:
        columns = _num_words(grid.num_time)
        times = unpack_bits(free[:, :columns], grid.num_time)
        freqs = unpack_bits(free[:, columns:], grid.num_freq)
        return times.repeat(grid.num_freq, axis=1) & np.tile(freqs, grid.num_time)


@lru_cache(maxsize=64)
def _block_tables(grid: Grid) -> tuple[UInt64[np.ndarray, "T1 W"], UInt64[np.ndarray, "F1 W"]]:
    """Row n: the cells of the first n time columns; the cells of the first n frequency rows."""
    times = np.tile(bits_below(grid.num_time), grid.num_freq)
    freqs = np.arange(grid.num_freq) < np.arange(grid.num_freq + 1)[:, None]
    words = np.where(freqs, ~np.uint64(0), np.uint64(0))
    return times, words.repeat(_num_words(grid.num_time), axis=1)


@lru_cache(maxsize=64)
def _stripe_table(grid: Grid) -> UInt64[np.ndarray, "lines W"]:
    """Row n: the first n time columns; row T + 1 + n: the first n frequency rows."""
    times, freqs = bits_below(grid.num_time), bits_below(grid.num_freq)
    table = np.zeros((len(times) + len(freqs), times.shape[1] + freqs.shape[1]), np.uint64)
    table[: len(times), : times.shape[1]] = times
    table[len(times) :, times.shape[1] :] = freqs
    return table


def _num_words(length: int) -> int:
    return -(-length // 64)


def _place_blocks(
    grid: Grid, size: Int64[np.ndarray, " 2"], position: Float64[np.ndarray, "*rows 2"]
) -> Bool[np.ndarray, "*rows N"]:
    """Blocks of a (time, frequency) size; all places on the grid have the same probability."""
    start = (position * ((grid.num_time + 1, grid.num_freq + 1) - size)).astype(np.int64)
    time, freq = np.arange(grid.num_time), np.arange(grid.num_freq)
    in_time = (time >= start[..., :1]) & (time < start[..., :1] + size[0])
    in_freq = (freq >= start[..., 1:]) & (freq < start[..., 1:] + size[1])
    return (in_time[..., :, None] & in_freq[..., None, :]).reshape(*start.shape[:-1], -1)


def _block_size(grid: Grid, scale: float, aspect: float) -> Int64[np.ndarray, " 2"]:
    """The (time, frequency) size of a block that covers about the share `scale` of the grid."""
    num_freq = min(max(round(grid.num_freq * math.sqrt(scale / aspect)), 1), grid.num_freq)
    num_time = min(max(round(grid.num_tokens * scale / num_freq), 1), grid.num_time)
    return np.array([num_time, num_freq])


def _interpolate(bounds: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
