"""Compiled loops over the rows of a batch: the random draws of the maskers, and token indices.

numba compiles a function at its first call and stores the machine code in a cache folder, which
later processes read. Modules import this module inside functions, where masks are drawn: the
import of numba takes 0.3 s.

Letters of shapes are those of `grid.py`. The random bits are uint64 and everything else int64,
because numba converts a sum of both to float64. `no_type_check`: numba finds the types.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from math import sqrt
from typing import Any, no_type_check

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache
from typing_extensions import override

log = logging.getLogger(__name__)
# Problems of this process with the cache; only the first one is logged.
_problems: list[str] = []

# The constants of SplitMix64, and an odd constant for the keys of streams.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_STREAM = np.uint64(0xD1342543DE82EF95)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_11 = (np.uint64(shift) for shift in (30, 27, 31, 11))
_TO_UNIT = 2.0**-53


class _Cache(FunctionCache):
    """The machine code of a function on disk; a full disk or a damaged file stops no run."""

    @override
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file raises errors of any class
            _warn(f"the compiled loops of masks in {self.cache_path} cannot be read: {error!r}")
            with suppress(OSError):
                self.flush()
            return None

    @override
    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"the compiled loops of masks cannot be stored in {self.cache_path}: {error}")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, with a cache on disk if a folder for it can be written."""
    dispatcher = njit(function, nogil=True)
    try:
        dispatcher._cache = _Cache(function)  # type: ignore[attr-defined]
    except RuntimeError:  # numba finds no writable folder for the file of this function
        _warn("no folder to store the compiled loops of masks is writable")
    return dispatcher


def _warn(problem: str) -> None:
    """Log the first problem of a run with the cache.

    Worker processes log nothing: the process that starts them draws masks before it, when the
    settings are checked.
    """
    is_worker = multiprocessing.parent_process() is not None
    if not _problems and not is_worker and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning(
            "%s. Each process compiles them again, which takes some seconds. Set the environment "
            "variable NUMBA_CACHE_DIR to a writable folder",
            problem,
        )
    _problems.append(problem)


@compiled
@no_type_check
def mix(bits):
    """Hash 64 bits (the finaliser of SplitMix64, Steele et al., 2014, 10.1145/2660193.2660195)."""
    bits = (bits ^ (bits >> _SHIFT_30)) * _FIRST_FACTOR
    bits = (bits ^ (bits >> _SHIFT_27)) * _SECOND_FACTOR
    return bits ^ (bits >> _SHIFT_31)


@compiled
@no_type_check
def uniform(key, index):
    """Number `index` of a key: in [0, 1), with 53 random bits (SplitMix64 from the state `key`)."""
    return (mix(key + np.uint64(index + 1) * _GAMMA) >> _SHIFT_11) * _TO_UNIT


@compiled
@no_type_check
def stream(key, number):
    """The key of other numbers of the same row, independent for each stream number."""
    return mix(key + np.uint64(number + 1) * _STREAM)


@compiled
@no_type_check
def row_keys(step_key, rows):
    """The keys uint64 `[R]` of rows int64 `[R]`; `step_key` is a hash of (seed, step)."""
    keys = np.empty(len(rows), np.uint64)
    for i in range(len(rows)):
        keys[i] = mix(step_key + np.uint64(rows[i]) * _GAMMA)
    return keys


@compiled
@no_type_check
def choose(items, count, key):
    """Move `count` random items to the front (the first steps of a Fisher-Yates shuffle)."""
    for i in range(count):
        other = i + int(uniform(key, i) * (len(items) - i))
        items[i], items[other] = items[other], items[i]


@compiled
@no_type_check
def draw_tokens(keys, count, chosen):
    """Choose `count` random tokens in every row of `chosen`, bool `[R, N]`."""
    items = np.empty(chosen.shape[1], np.int64)
    for row in range(len(keys)):
        for token in range(len(items)):
            items[token] = token
            chosen[row, token] = False
        choose(items, count, keys[row])
        for i in range(count):
            chosen[row, items[i]] = True


@compiled
@no_type_check
def draw_blocks(keys, count, max_attempts, ranges, targets):
    """Cover `count` tokens of every row of `targets`, bool `[R, T, F]`, by blocks.

    The rows of `ranges`, float64 `[3, 2]`, are scale, long aspect and tall aspect of
    `BlockMasker`. Attempt a uses the numbers 5a to 5a + 4 of stream 0 of its row.
    """
    num_time, num_freq = targets.shape[1:]
    for row in range(len(keys)):
        key, missing = stream(keys[row], 0), count
        targets[row] = False
        for first in range(0, 5 * max_attempts, 5):
            scale = _between(ranges[0], uniform(key, first))
            aspect_range = ranges[1] if uniform(key, first + 1) < 0.5 else ranges[2]
            aspect = _between(aspect_range, uniform(key, first + 2))
            area = min(num_time * num_freq * scale, missing)
            height = min(max(int(sqrt(area * aspect)), 1), num_time)
            width = min(max(int(sqrt(area / aspect)), 1), num_freq)
            new = _add_rectangle(targets[row], height, width, key, first + 3, missing)
            missing -= max(new, 0)
            if new < 0 or missing == 0:
                break
        _complete(targets[row].reshape(-1), missing, stream(keys[row], 1))


@compiled
@no_type_check
def draw_stripes(keys, count, max_attempts, max_time_width, max_freq_width, targets):
    """Cover `count` tokens of every row of `targets`, bool `[R, T, F]`, by stripes.

    The maximum widths are floats, for settings above the largest int64. Attempt a
    uses the numbers 5a to 5a + 4 of stream 0 of its row.
    """
    num_time, num_freq = targets.shape[1:]
    for row in range(len(keys)):
        key, missing = stream(keys[row], 0), count
        targets[row] = False
        for first in range(0, 5 * max_attempts, 5):
            height, width = num_time, num_freq
            if uniform(key, first) * (num_time + num_freq) < num_time:
                drawn = 1 + int(uniform(key, first + 1) * max_time_width)
                height = max(min(drawn, num_time, missing // num_freq), 1)
            else:
                drawn = 1 + int(uniform(key, first + 1) * max_freq_width)
                width = max(min(drawn, num_freq, missing // num_time), 1)
            new = _add_rectangle(targets[row], height, width, key, first + 3, missing)
            missing -= max(new, 0)
            if new < 0 or missing == 0:
                break
        _complete(targets[row].reshape(-1), missing, stream(keys[row], 1))


@compiled
@no_type_check
def draw_multi_blocks(keys, target_size, context_size, min_context, max_draws, context, targets):
    """Draw a context block and target blocks, and draw rejected rows again.

    Draw d of a row uses stream d: two numbers for the place of the context, then two for that of
    each target. Sizes are (time, frequency), int64 `[2]`; `context` is bool `[R, T, F]`, `targets`
    bool `[R, M, T, F]`. Returns the number of rows with less than `min_context` tokens of context
    in all draws.
    """
    rejected = 0
    for row in range(len(keys)):
        for draw in range(max_draws):
            key = stream(keys[row], draw)
            context[row] = False
            _block(context[row], context_size, key, 0)[:] = True
            for group in range(targets.shape[1]):
                targets[row, group] = False
                _block(targets[row, group], target_size, key, 2 * group + 2)[:] = True
                _block(context[row], target_size, key, 2 * group + 2)[:] = False
            if context[row].sum() >= min_context:
                break
        else:
            rejected += 1
    return rejected


@compiled
@no_type_check
def draw_spans(keys, probability, length, min_run, min_context, max_draws, context, targets):
    """Draw unions of random spans, and draw rejected rows again.

    Union g has `floor(probability[g] * T / length[g] + U(0, 1))` spans of `length[g]` columns.
    Their starts are drawn without replacement from all columns at which a span fits. The first M
    unions are the target groups. The context is every gap of at least `min_run` columns between
    the spans of all unions. Draw d of a row uses stream d.

    `context` is bool `[R, T]`, `targets` bool `[R, M, T]`. Returns the number of rows with less
    than `min_context` columns of context or an empty target group in all draws.
    """
    num_groups, num_time = targets.shape[1:]
    starts = np.empty(num_time, np.int64)
    rejected = 0
    for row in range(len(keys)):
        for draw in range(max_draws):
            key = stream(keys[row], draw)
            counts, places = stream(key, 0), stream(key, 1)
            context[row] = True
            targets[row] = False
            has_targets = True
            for group in range(len(length)):
                mean_count = probability[group] * num_time / length[group]
                num_starts = num_time - length[group] + 1
                count = min(int(mean_count + uniform(counts, group)), num_starts)
                for start in range(num_starts):
                    starts[start] = start
                choose(starts[:num_starts], count, stream(places, group))
                for start in starts[:count]:
                    context[row, start : start + length[group]] = False
                    if group < num_groups:
                        targets[row, group, start : start + length[group]] = True
                has_targets &= count > 0 or group >= num_groups
            _remove_short_runs(context[row], min_run)
            if has_targets and context[row].sum() >= min_context:
                break
        else:
            rejected += 1
    return rejected


@compiled
@no_type_check
def token_indices(mask, min_length):
    """The tokens of a mask, bool `[R, N]`, in grid order, and their number in each row.

    K is the largest number, or `min_length` (at most N). The first other tokens of a row follow
    its tokens. Returns int64 `[R, K]` and `[R]`.
    """
    counts = np.empty(len(mask), np.int64)
    for row in range(len(mask)):
        counts[row] = mask[row].sum()
    index = np.empty((len(mask), max(counts.max(), min_length)), np.int64)
    for row in range(len(mask)):
        place = 0
        for is_member in (True, False):
            token = 0
            while place < index.shape[1] and token < mask.shape[1]:
                index[row, place] = token  # the next token replaces one of the other kind
                place += mask[row, token] == is_member
                token += 1
    return index, counts


@compiled
@no_type_check
def _between(bounds, number):
    return bounds[0] + (bounds[1] - bounds[0]) * number


@compiled
@no_type_check
def _block(plane, size, key, first):
    """The part of a plane `[T, F]` in a block; all places have the same probability."""
    time = int(uniform(key, first) * (plane.shape[0] - size[0] + 1))
    freq = int(uniform(key, first + 1) * (plane.shape[1] - size[1] + 1))
    return plane[time : time + size[0], freq : freq + size[1]]


@compiled
@no_type_check
def _add_rectangle(covered, height, width, key, first, missing):
    """Cover a rectangle at a random place of a plane `[T, F]`; returns the number of new tokens.

    If they are more than `missing`, the plane does not change, and the result is -1.
    """
    place = _block(covered, (height, width), key, first)
    new = height * width - place.sum()
    if new > missing:
        return -1
    place[:] = True
    return new


@compiled
@no_type_check
def _complete(covered, missing, key):
    """Cover `missing` random tokens of a row `[N]` that are not covered."""
    if missing > 0:
        free = np.flatnonzero(~covered)
        choose(free, missing, key)
        for token in free[:missing]:
            covered[token] = True


@compiled
@no_type_check
def _remove_short_runs(columns, min_run):
    """Set the runs of True of fewer than `min_run` columns to False."""
    run = 0
    for column in range(len(columns) + 1):
        if column < len(columns) and columns[column]:
            run += 1
        else:
            if run < min_run:
                columns[column - run : column] = False
            run = 0
