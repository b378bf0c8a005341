"""Tokens drawn one by one, and the draws that the other maskers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker

MAX_REDRAWS = 1000


@dataclass(frozen=True)
class RandomMasker(Masker):
    """Every token is context or target by chance; one target group.

    Args:
        target_share: share of the tokens to predict. A pair is a range, from which one share is
            drawn per call, so that all rows of a batch stay equally long (Audio-JEPA: 0.4 to 0.6).
    """

    target_share: float | tuple[float, float] = 0.8

    def __post_init__(self) -> None:
        low, high = self._range
        check_share("target_share", low)
        check_share("target_share", high)
        if low > high:
            raise UserError(
                f"`target_share` must rise, got {self.target_share}: give (lowest, highest)"
            )

    @property
    def _range(self) -> tuple[float, float]:
        return (
            self.target_share
            if isinstance(self.target_share, tuple)
            else (self.target_share, self.target_share)
        )

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`: `floor(N * (1 - target_share))` context tokens, at least one; the rest is targets."""
        if grid.num_tokens < 2:
            raise UserError(f"a masker needs at least two tokens, got {grid}: give longer clips")
        low, high = self._range
        share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        num_context = max(1, floor_share(1 - share, grid.num_tokens))
        nothing = torch.zeros(batch_size, grid.num_tokens, dtype=torch.bool)
        return single_group(fill_up(nothing, grid.num_tokens - num_context, generator))


def fill_up(
    chosen: Bool[Tensor, "B N"], count: int, generator: torch.Generator
) -> Bool[Tensor, "B N"]:
    """The chosen tokens and random others, exactly `count` in every row; no row may start with more."""
    score = chosen + torch.rand(chosen.shape, generator=generator, dtype=torch.float32)
    return torch.zeros_like(chosen).scatter_(-1, score.topk(count, dim=-1).indices, value=True)


def single_group(targets: Bool[Tensor, "B N"]) -> Masks:
    """One group of targets, and everything else as context."""
    return Masks.from_bool(~targets, targets[:, None])


def draw_accepted(
    draw: Callable[[int], tuple[Tensor, Tensor]],
    batch_size: int,
    min_context: float,
    masker: Masker,
) -> tuple[Bool[Tensor, "B N"], Bool[Tensor, "B M N"]]:
    """Context and target planes whose rows all hold enough context and no empty target group.

    Only the rejected rows are drawn again, each as a whole, so that an accepted row keeps its first
    draw.

    Args:
        draw: number of rows → (context `[R, N]`, targets `[R, M, N]`).
        batch_size: number of rows.
        min_context: smallest share of a row that is context; one token at least.
        masker: whose settings the error names.

    Raises:
        UserError: if rows are still rejected after `MAX_REDRAWS` draws.
    """
    context, targets = draw(batch_size)
    fewest = max(1, math.ceil(round(min_context * context.shape[-1], 6)))
    for _ in range(MAX_REDRAWS):
        rejected = ((context.sum(-1) < fewest) | ~targets.any(-1).all(-1)).nonzero().squeeze(-1)
        if not rejected.numel():
            return context, targets
        context[rejected], targets[rejected] = draw(rejected.numel())
    raise UserError(
        f"{rejected.numel()} of {batch_size} rows have an empty target group or less than `min_context` "
        f"({min_context}) of context after {MAX_REDRAWS} draws of {masker}: lower `min_context` or mask less"
    )


def floor_share(share: float, num_tokens: int) -> int:
    """Whole tokens in a share of them; rounded first, or 0.2 of 50 written as `1 - 0.8` would be 9."""
    return math.floor(round(share * num_tokens, 6))


def check_share(name: str, value: float) -> None:
    """`ValueError` unless something and not everything is meant."""
    if not 0 < value < 1:
        raise UserError(
            f"`{name}` must lie between 0 and 1, both excluded, got {value}: it is a share of the tokens"
        )
