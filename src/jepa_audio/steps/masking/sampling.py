"""Functions of several maskers: random draws, and checks of settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Masks
from jepa_audio.steps.masking.base import Masker

MAX_REDRAWS = 1000


def add_random_tokens(
    chosen: Bool[Tensor, "B N"], count: int, generator: torch.Generator
) -> Bool[Tensor, "B N"]:
    """Add random tokens to `chosen` until every row has exactly `count` tokens.

    Every row of `chosen` must have at most `count` tokens.
    """
    score = chosen + torch.rand(chosen.shape, generator=generator, dtype=torch.float32)
    return torch.zeros_like(chosen).scatter_(-1, score.topk(count, dim=-1).indices, value=True)


def single_group(targets: Bool[Tensor, "B N"]) -> Masks:
    """Masks with one target group; all other tokens are context."""
    return Masks.from_bool(~targets, targets[:, None])


def draw_accepted(
    draw: Callable[[int], tuple[Tensor, Tensor]],
    batch_size: int,
    min_context: float,
    masker: Masker,
) -> tuple[Bool[Tensor, "B N"], Bool[Tensor, "B M N"]]:
    """Draw context and targets, and draw rejected rows again.

    `draw` is a function from the number of rows R to context `[R, N]` and targets `[R, M, N]`. A
    row is rejected if it has no context, a smaller share of context than `min_context`, or an empty
    target group. Accepted rows keep their first draw. The error message names `masker`.

    Raises:
        UserError: if some rows are rejected in all `MAX_REDRAWS` draws.
    """
    context, targets = draw(batch_size)
    min_tokens = max(1, math.ceil(round(min_context * context.shape[-1], 6)))
    for _ in range(MAX_REDRAWS):
        accepted = (context.sum(-1) >= min_tokens) & targets.any(-1).all(-1)
        rejected = (~accepted).nonzero().squeeze(-1)
        if not rejected.numel():
            return context, targets
        context[rejected], targets[rejected] = draw(rejected.numel())
    raise UserError(
        f"{rejected.numel()} of {batch_size} rows have an empty target group or less context than "
        f"`min_context` ({min_context}) after {MAX_REDRAWS} draws of {masker}: lower `min_context` "
        "or the share of targets"
    )


def floor_share(share: float, num_tokens: int) -> int:
    """The number of tokens in a share of `num_tokens`, rounded down.

    The product is first rounded to 6 digits. Without this, a share of `1 - 0.8` of 50 tokens would
    be 9 tokens, because of the floating-point error.
    """
    return math.floor(round(share * num_tokens, 6))


def check_share(name: str, value: float) -> None:
    """Raise `UserError` unless 0 < `value` < 1."""
    if not 0 < value < 1:
        raise UserError(
            f"`{name}` ({value}) must be above 0 and below 1: it is a share of the tokens"
        )


def check_min_context(value: float) -> None:
    """Raise `UserError` unless 0 <= `value` < 1."""
    if not 0 <= value < 1:
        raise UserError(f"`min_context` ({value}) must be at least 0 and below 1")


def check_range(name: str, bounds: tuple[float, float], limit: float = math.inf) -> None:
    """Raise `UserError` unless 0 < lowest <= highest <= `limit`."""
    low, high = bounds
    if not 0 < low <= high <= limit:
        raise UserError(f"`{name}` must be (lowest, highest) in (0, {limit}], got {bounds}")
