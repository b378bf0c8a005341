"""Cover a share of the grid by random rectangles, for many clips at once, on packed bits."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, UInt64
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, count_true
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import RowNumbers
from jepa_audio.steps.masking.sampling import Planes, choose_tokens, draw_rows, floor_share

Attempts = tuple[np.ndarray, ...]
"""What the random numbers of attempts determine; all arrays begin with `[A, R]` or `[R]`."""


class _State(NamedTuple):
    """The cells of some rows that are still free, and the number of tokens that they still need."""

    free: UInt64[np.ndarray, "R W"]
    missing: Int64[np.ndarray, " R"]


class UnionMasker(Masker):
    """One target group, the union of rectangles; all other tokens are context.

    Rectangles are added until the next one would exceed the target share; random tokens complete
    the share. The size of a rectangle is limited by the number of missing tokens.

    Subclasses define the settings `target_share` and `max_attempts`, and how a rectangle is drawn
    and represented. A rectangle must shrink within its old place if fewer tokens are missing.
    """

    target_share: float
    max_attempts: int
    # Attempts that are examined together: about as many as most clips need.
    _window: ClassVar[int]

    @override
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        count = self._num_targets(grid)

        def draw(numbers: RowNumbers) -> Planes:
            covered = self.cover(grid, count, numbers.stream(0))
            missing = count - count_true(covered)
            targets = covered | choose_tokens(~covered, missing, numbers.stream(1))
            return ~targets, targets[:, None]

        return draw_rows(draw, RowNumbers.of(seed, step, rows.numpy()), grid, float(count))

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

    def cover(self, grid: Grid, count: int, numbers: RowNumbers) -> Bool[np.ndarray, "R N"]:
        """Add rectangles to every row until the next one would exceed `count` covered tokens.

        Attempt a uses the numbers 5a to 5a + 4 of its row: three for the size and two for the
        position of a rectangle.
        """
        rows, all_free = np.arange(len(numbers)), np.tile(self.all_cells(grid), (len(numbers), 1))
        state = _State(all_free, np.full(len(numbers), count))
        for first in range(0, self.max_attempts, self._window):
            length = min(self._window, self.max_attempts - first)
            uniform = numbers.rows(rows).uniform(5 * length, 5 * first)
            uniform = uniform.reshape(len(rows), length, 5).transpose(2, 1, 0)
            attempts = self.draw_attempts(grid, np.ascontiguousarray(uniform))
            state, takes_more = self._add(grid, count, attempts, state)
            all_free[rows] = state.free
            rows, state = rows[takes_more], _State(*(part[takes_more] for part in state))
            if not len(rows):
                break
        return ~self.expand(grid, all_free)

    def _add(
        self, grid: Grid, count: int, attempts: Attempts, state: _State
    ) -> tuple[_State, Bool[np.ndarray, " R"]]:
        """Make some attempts; returns the new state, and which rows can take more rectangles.

        First, all attempts are computed at once, with the sizes that the tokens missing now allow.
        An attempt is final if the tokens missing at its turn allow the same size. The others follow
        one by one, without those that cover no free token: they will not cover one later.
        """
        limit = grid.num_tokens - count  # the smallest number of free tokens
        size = self.limit_size(grid, attempts, state.missing)
        words = self.pack(grid, attempts, size)
        free = ~words
        free[0] &= state.free
        for earlier, later in pairwise(free):  # ten times faster than `np.bitwise_and.accumulate`
            np.bitwise_and(later, earlier, out=later)
        missing = self.num_free(grid, free) - limit  # [A, R]
        before = np.concatenate([state.missing[None], np.maximum(missing[:-1], 0)])
        is_final = (size == self.limit_size(grid, attempts, before)) & (missing >= 0)
        num_final = np.logical_and.accumulate(is_final, axis=0).sum(axis=0)
        last, row = np.maximum(num_final - 1, 0), np.arange(len(num_final))
        state = _State(
            np.where(num_final[:, None] > 0, free[last, row], state.free),
            np.where(num_final > 0, missing[last, row], state.missing),
        )
        first = int(num_final.min())
        is_open = np.arange(first, len(is_final))[:, None] >= num_final
        is_open &= (words[first:] & state.free).any(axis=-1)
        others = tuple(field[first:] for field in attempts)
        return self._add_one_by_one(grid, limit, others, is_open, state)

    def _add_one_by_one(
        self,
        grid: Grid,
        limit: int,
        attempts: Attempts,
        is_open: Bool[np.ndarray, "A R"],
        state: _State,
    ) -> tuple[_State, Bool[np.ndarray, " R"]]:
        """Make the open attempts in their order, until a row is complete or an attempt exceeds."""
        # Rows with many open attempts first, so that the rows of a turn are a slice.
        num_open = is_open.sum(axis=0)
        rows = np.argsort(-num_open, kind="stable")
        order = np.argsort(~is_open[:, rows], axis=0, kind="stable")[: num_open.max()]
        columns = [field[order, rows] for field in attempts]
        free, missing = state.free[rows], state.missing[rows]
        takes_more = missing > 0
        num_rows = (num_open > np.arange(len(order))[:, None]).sum(axis=1).tolist()
        for turn, num in enumerate(num_rows):
            attempt = tuple(column[turn, :num] for column in columns)
            size = self.limit_size(grid, attempt, missing[:num])
            left = free[:num] & ~self.pack(grid, attempt, size)
            num_left = self.num_free(grid, left) - limit
            takes_more[:num] &= num_left >= 0
            np.copyto(free[:num], left, where=takes_more[:num, None])
            np.copyto(missing[:num], num_left, where=takes_more[:num])
            takes_more[:num] &= missing[:num] > 0
            if not takes_more[:num].any():
                break
        back = np.argsort(rows)
        return _State(free[back], missing[back]), takes_more[back]

    @abstractmethod
    def draw_attempts(self, grid: Grid, uniform: Float64[np.ndarray, "5 A R"]) -> Attempts:
        """The part of the attempts that does not depend on the number of missing tokens."""

    @abstractmethod
    def limit_size(self, grid: Grid, attempts: Attempts, missing: np.ndarray) -> np.ndarray:
        """The sizes of the rectangles if each row still needs `missing` tokens."""

    @abstractmethod
    def pack(self, grid: Grid, attempts: Attempts, size: np.ndarray) -> np.ndarray:
        """The cells `[..., W]` of rectangles of these sizes at the places of the attempts."""

    @abstractmethod
    def all_cells(self, grid: Grid) -> UInt64[np.ndarray, " W"]:
        """The cells of the complete grid."""

    @abstractmethod
    def num_free(self, grid: Grid, free: np.ndarray) -> np.ndarray:
        """The number of tokens in the given free cells `[..., W]`."""

    @abstractmethod
    def expand(self, grid: Grid, free: UInt64[np.ndarray, "R W"]) -> Bool[np.ndarray, "R N"]:
        """A mask that is True at the tokens in the given free cells."""


@lru_cache(maxsize=64)
def bits_below(length: int) -> UInt64[np.ndarray, "lengths W"]:
    """Row n has the first n of `length` bits set, packed into words of 64 bits."""
    num_words = -(-length // 64)
    bits = np.arange(64 * num_words) < np.arange(length + 1)[:, None]
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


def num_bits(words: UInt64[np.ndarray, "*shape W"]) -> Int64[np.ndarray, "*shape"]:
    """Number of bits that are set."""
    counts = np.bitwise_count(words).astype(np.float32)
    # A product of matrices is faster than a sum, and exact for fewer than 2^24 bits.
    return (counts @ np.ones(counts.shape[-1], np.float32)).astype(np.int64)


def unpack_bits(words: UInt64[np.ndarray, "*shape W"], length: int) -> Bool[np.ndarray, "*shape L"]:
    """The first `length` bits of packed words."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(packed, axis=-1, count=length, bitorder="little").view(bool)
