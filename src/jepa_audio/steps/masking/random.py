"""A masker that draws tokens independently of their place on the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import row_keys, step_uniform
from jepa_audio.steps.masking.sampling import check_share, floor_share


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
        from jepa_audio.steps import kernels  # noqa: PLC0415

        num_targets = self._num_targets(grid, seed, step)
        context = torch.empty(len(rows), grid.num_tokens, dtype=torch.bool)
        num_context = grid.num_tokens - num_targets
        kernels.draw_tokens(row_keys(seed, step, rows), num_context, context.numpy())
        return Masks.from_bool(context, ~context[:, None], float(num_targets))

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
