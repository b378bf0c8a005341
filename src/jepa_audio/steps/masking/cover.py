"""Cover a share of the grid by random rectangles, for many clips at once, on packed bits."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
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
"""What the random numbers of the attempts determine; all arrays begin with `[R, A]` or `[R]`."""


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

        return draw_rows(draw, RowNumbers.of(seed, step, rows.numpy()), float(count))

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
            attempts = self.draw_attempts(grid, uniform.reshape(len(rows), length, 5))
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
        size = self.limit_size(grid, attempts, state.missing[:, None])
        words = self.pack(grid, attempts, size)
        free = state.free[:, None] & ~np.bitwise_or.accumulate(words, axis=1)
        missing = self.num_free(grid, free) - limit  # [R, A]
        before = np.concatenate([state.missing[:, None], missing[:, :-1]], axis=1)
        is_final = size == self.limit_size(grid, attempts, np.maximum(before, 0))
        is_final = is_final.reshape(*missing.shape, -1).all(axis=-1) & (missing >= 0)
        num_attempts = is_final.shape[1]
        num_final = np.where(is_final.all(axis=1), num_attempts, is_final.argmin(axis=1))
        row, last = np.arange(len(num_final)), num_final - 1
        state = _State(
            np.where(num_final[:, None] > 0, free[row, last], state.free),
            np.where(num_final > 0, missing[row, last], state.missing),
        )
        is_open = np.arange(num_attempts) >= num_final[:, None]
        is_open &= (words & state.free[:, None]).any(axis=-1)
        return self._add_one_by_one(grid, limit, attempts, is_open, state)

    def _add_one_by_one(
        self,
        grid: Grid,
        limit: int,
        attempts: Attempts,
        is_open: Bool[np.ndarray, "R A"],
        state: _State,
    ) -> tuple[_State, Bool[np.ndarray, " R"]]:
        """Make the open attempts in their order, until a row is complete or an attempt exceeds."""
        # Rows with many open attempts first, so that the rows of a turn are a slice.
        num_open = np.count_nonzero(is_open, axis=1)
        rows = np.argsort(-num_open, kind="stable")
        order = np.argsort(~is_open[rows], axis=1, kind="stable")
        columns = [field[rows[:, None], order] for field in attempts]
        free, missing = state.free[rows], state.missing[rows]
        takes_more = missing > 0
        for turn in range(num_open.max()):
            part = slice(np.count_nonzero(num_open > turn))
            attempt = tuple(column[part, turn] for column in columns)
            size = self.limit_size(grid, attempt, missing[part])
            left = free[part] & ~self.pack(grid, attempt, size)
            num_left = self.num_free(grid, left) - limit
            takes_more[part] &= num_left >= 0
            np.copyto(free[part], left, where=takes_more[part, None])
            np.copyto(missing[part], num_left, where=takes_more[part])
            takes_more &= missing > 0
            if not takes_more[part].any():
                break
        back = np.argsort(rows)
        return _State(free[back], missing[back]), takes_more[back]

    @abstractmethod
    def draw_attempts(self, grid: Grid, uniform: Float64[np.ndarray, "R A 5"]) -> Attempts:
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


def unpack_bits(words: UInt64[np.ndarray, "*shape W"], length: int) -> Bool[np.ndarray, "*shape L"]:
    """The first `length` bits of packed words."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(packed, axis=-1, count=length, bitorder="little").view(bool)
