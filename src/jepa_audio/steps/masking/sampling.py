"""Functions of several maskers: random draws, and checks of settings."""

from __future__ import annotations

import math
from collections.abc import Callable

from jepa_audio.errors import UserError
from jepa_audio.steps.masking.base import Masker

MAX_REDRAWS = 1000


def draw_accepted(
    draw: Callable[[int, int], int],
    num_rows: int,
    num_tokens: int,
    min_context: float,
    masker: Masker,
) -> None:
    """Call a loop that draws each row again until it is accepted, each time with other numbers.

    A row is rejected if it has no context, a smaller share of context than `min_context`, or an
    empty target group.

    Args:
        draw: gets the minimum number of context tokens and the maximum number of draws of a row;
            returns the number of rows that are rejected in all draws.
        num_rows: number of rows.
        num_tokens: number of tokens of a row.
        min_context: smallest share of context tokens.
        masker: the masker that the error message names.

    Raises:
        UserError: if some rows are rejected in all draws.
    """
    min_tokens = max(1, math.ceil(round(min_context * num_tokens, 6)))
    rejected = draw(min_tokens, 1 + MAX_REDRAWS)
    if rejected:
        raise UserError(
            f"{rejected} of {num_rows} rows have an empty target group or less context than "
            f"`min_context` ({min_context}) after {MAX_REDRAWS} draws of {masker}: lower "
            "`min_context` or the share of targets"
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
