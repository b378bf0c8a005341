"""A masker that draws tokens independently of their place on the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, count_true
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import RowNumbers, step_uniform
from jepa_audio.steps.masking.sampling import (
    Planes,
    check_share,
    choose_tokens,
    draw_rows,
    floor_share,
)

# Binary digits of the probability with which a token is first chosen.
_DIGITS = 8


@dataclass(frozen=True)
class RandomMasker(Masker):
    """One target group of random tokens; all other tokens are context.

    Args:
        target_share: share of target tokens. For a range (a pair), one share is drawn per step, so
            that all rows of a step have the same length (Audio-JEPA: 0.4 to 0.6).
    """

    target_share: float | tuple[float, float] = 0.8

    def __post_init__(self) -> None:
        low, high = self._range
        check_share("target_share", low)
        check_share("target_share", high)
        if low > high:
            raise UserError(f"`target_share` must be (lowest, highest), got {self.target_share}")

    @property
    def _range(self) -> tuple[float, float]:
        share = self.target_share
        return share if isinstance(share, tuple) else (share, share)

    @override
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        """Draw masks with max(1, `floor(N * (1 - target_share))`) context tokens per clip."""
        num_targets = self._num_targets(grid, seed, step)
        num_context = grid.num_tokens - num_targets

        def draw(numbers: RowNumbers) -> Planes:
            chosen = random_tokens(numbers, grid.num_tokens, min(num_context, num_targets))
            context, targets = (
                (chosen, ~chosen) if num_context <= num_targets else (~chosen, chosen)
            )
            return context, targets[:, None]

        return draw_rows(draw, RowNumbers.of(seed, step, rows.numpy()), grid, float(num_targets))

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        return float(self._num_targets(grid, seed, step))

    def _num_targets(self, grid: Grid, seed: int, step: int) -> int:
        if grid.num_tokens < 2:
            raise UserError(
                f"a mask needs at least 2 tokens, got {grid}: raise `data.crop_seconds`"
            )
        low, high = self._range
        share = low + (high - low) * float(step_uniform(seed, step, 1)[0])
        return grid.num_tokens - max(1, floor_share(1 - share, grid.num_tokens))


def random_tokens(numbers: RowNumbers, num_tokens: int, count: int) -> Bool[np.ndarray, "R N"]:
    """Choose `count` random tokens in every row.

    First, every token is chosen with a probability slightly below `count / num_tokens`. The result
    is uniform over the subsets of its size, and random other tokens complete it to `count`.
    """
    deviation = math.sqrt(count * (1 - count / num_tokens))
    digits = int(max(count - 4 * deviation, 0) / num_tokens * 2**_DIGITS)
    num_words = -(-num_tokens // 64)
    words = numbers.stream(0).bits(num_words * _DIGITS).reshape(-1, _DIGITS, num_words)
    # Each digit of the probability, the last one first, halves the probability and adds it.
    packed = np.zeros_like(words[:, 0])
    for digit in range(_DIGITS):
        if digits >> digit & 1:
            packed |= words[:, digit]
        else:
            packed &= words[:, digit]
    chosen = np.unpackbits(packed.view(np.uint8), axis=1, count=num_tokens, bitorder="little")
    chosen = chosen.view(bool)
    missing = count - count_true(chosen)
    # In 1 of 30,000 rows too many tokens were chosen: the row starts without tokens.
    chosen[missing < 0], missing[missing < 0] = False, count
    return chosen | choose_tokens(~chosen, missing, numbers.stream(1))
