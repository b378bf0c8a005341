"""A masker that draws tokens independently of their place on the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.sampling import (
    add_random_tokens,
    check_share,
    floor_share,
    single_group,
)


@dataclass(frozen=True)
class RandomMasker(Masker):
    """One target group of random tokens; all other tokens are context.

    Args:
        target_share: share of target tokens. For a range (a pair), one share is drawn per call, so
            that all rows of a batch have the same length (Audio-JEPA: 0.4 to 0.6).
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
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """Draw masks with max(1, `floor(N * (1 - target_share))`) context tokens per clip."""
        if grid.num_tokens < 2:
            raise UserError(
                f"a mask needs at least 2 tokens, got {grid}: raise `data.crop_seconds`"
            )
        low, high = self._range
        share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        num_context = max(1, floor_share(1 - share, grid.num_tokens))
        empty = torch.zeros(batch_size, grid.num_tokens, dtype=torch.bool)
        return single_group(add_random_tokens(empty, grid.num_tokens - num_context, generator))
