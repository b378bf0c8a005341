"""Functions of several maskers: random draws, and checks of settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Int64

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, count_true
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import RowNumbers

MAX_REDRAWS = 1000
# Tokens of the rows that are drawn together: their arrays fit into the caches of a core.
_TOKENS_AT_ONCE = 1 << 18
# For so few rows, several attempts take about the time of one.
_FEW_ROWS = 64

Planes = tuple[Bool[np.ndarray, "R N"], Bool[np.ndarray, "R M N"]]
"""Context and target groups of some rows."""


def draw_rows(
    draw: Callable[[RowNumbers], Planes], numbers: RowNumbers, grid: Grid, targets_per_clip: float
) -> Masks:
    """The masks of all rows from a function that draws those of a few rows."""
    num_rows = max(16, _TOKENS_AT_ONCE // grid.num_tokens)
    starts = range(0, len(numbers), num_rows)
    parts = [draw(numbers.rows(slice(first, first + num_rows))) for first in starts]
    context, targets = parts[0]
    if len(parts) > 1:
        context, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Masks.from_bool(torch.from_numpy(context), torch.from_numpy(targets), targets_per_clip)


def choose_tokens(
    allowed: Bool[np.ndarray, "R N"], count: Int64[np.ndarray, " R"], numbers: RowNumbers
) -> Bool[np.ndarray, "R N"]:
    """Choose `count` random tokens of the allowed ones in every row.

    A row takes tokens from a sequence of random tokens, without those that are not allowed or that
    it already has. All subsets of `count` allowed tokens therefore have the same probability. Every
    row must have at least `count` allowed tokens.
    """
    num_tokens = allowed.shape[1]
    free = allowed.copy()
    rows, missing, first = np.flatnonzero(count), count[count > 0], 0
    share = max(1, int(np.count_nonzero(free))) / allowed.size
    # The place of a token in the sequence of its row.
    place = np.empty(allowed.size, dtype=np.int32)
    while len(rows):
        length = 2 * math.ceil(0.75 * missing.mean() / share + 4)
        order = np.arange(length, dtype=np.int32)
        bits = numbers.rows(rows).halves(length, first).astype(np.uint64)
        token = ((bits * np.uint64(num_tokens)) >> np.uint64(32)).view(np.int64)
        token += rows[:, None] * num_tokens  # index in the flat arrays
        # Of several assignments to one element, the last one holds: the first place of a token.
        # (numpy keeps the order for flat contiguous arrays, not for reversed views.)
        place[token[:, ::-1].ravel()] = np.tile(order[::-1], len(rows))
        taken = (place[token] == order) & free.reshape(-1)[token]
        rank = taken.cumsum(axis=1)
        taken &= rank <= missing[:, None]
        free.reshape(-1)[token[taken]] = False
        missing = missing - np.minimum(rank[:, -1], missing)
        rows, missing, first = rows[missing > 0], missing[missing > 0], first + length
    return allowed & ~free


def draw_accepted(
    draw: Callable[[RowNumbers], Planes], numbers: RowNumbers, min_context: float, masker: Masker
) -> Planes:
    """Draw context and targets, and draw rejected rows again, each with its own numbers.

    A row is rejected if it has no context, a smaller share of context than `min_context`, or an
    empty target group. The error message names `masker`.

    Raises:
        UserError: if some rows are rejected in all `MAX_REDRAWS` draws.
    """
    context, targets = draw(numbers.stream(0))
    min_tokens = max(1, math.ceil(round(min_context * context.shape[-1], 6)))

    def is_accepted(planes: Planes) -> Bool[np.ndarray, " R"]:
        return (count_true(planes[0]) >= min_tokens) & count_true(planes[1]).all(axis=-1)

    rows, attempt = np.flatnonzero(~is_accepted((context, targets))), 1
    while len(rows) and attempt <= MAX_REDRAWS:
        # A few rows make several attempts at once; the first accepted one counts.
        num_attempts = 4 if len(rows) <= _FEW_ROWS else 1
        new = draw(numbers.rows(rows).streams(num_attempts, first=attempt))
        accepted = is_accepted(new).reshape(len(rows), num_attempts)
        done = accepted.any(axis=1)
        chosen = (np.arange(0, accepted.size, num_attempts) + accepted.argmax(axis=1))[done]
        context[rows[done]], targets[rows[done]] = new[0][chosen], new[1][chosen]
        rows, attempt = rows[~done], attempt + num_attempts
    if not len(rows):
        return context, targets
    raise UserError(
        f"{len(rows)} of {len(numbers)} rows have an empty target group or less context than "
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
