"""Masks drawn clip by clip and token by token, as the papers describe them."""

import math
from collections.abc import Callable

from jepa_audio.steps.grid import Grid

Size = tuple[int, int]
DrawSize = Callable[[Grid, list[float], int], Size]

GAMMA, STREAM = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


def mix(bits: int) -> int:
    """The finaliser of SplitMix64 on Python's integers."""
    bits %= 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def row_key(seed: int, step: int, row: int) -> int:
    """The key of a row: a hash of (seed, step, row)."""
    return mix(mix(mix(mix(seed + GAMMA) + step) + GAMMA) + row * GAMMA)


def stream(key: int, number: int) -> int:
    """The key of a stream of the numbers of a row."""
    return mix(key + (number + 1) * STREAM)


def uniform(key: int, index: int) -> float:
    """Number `index` of a key, in [0, 1)."""
    return (mix(key + (index + 1) * GAMMA) >> 11) * 2.0**-53


def choose(items: list[int], count: int, key: int) -> list[int]:
    """The first `count` items after a Fisher-Yates shuffle."""
    items = list(items)
    for i in range(count):
        other = i + int(uniform(key, i) * (len(items) - i))
        items[i], items[other] = items[other], items[i]
    return items[:count]


def block_size(grid: Grid, uniform: list[float], missing: int) -> Size:
    """The (time, frequency) size of PupuJEPA's next block."""
    area = min(grid.num_tokens * (0.01 + 0.04 * uniform[0]), missing)
    aspect = 2 + 3 * uniform[2] if uniform[1] < 0.5 else 0.2 + 0.3 * uniform[2]
    return int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))


def stripe_size(grid: Grid, uniform: list[float], missing: int) -> Size:
    """The (time, frequency) size of PupuJEPA's next stripe."""
    if uniform[0] < grid.num_time / (grid.num_time + grid.num_freq):
        return min(1 + int(40 * uniform[1]), missing // grid.num_freq), grid.num_freq
    return grid.num_time, min(1, missing // grid.num_time)


def cover(
    draw_size: DrawSize, grid: Grid, count: int, key: int, max_attempts: int = 150
) -> tuple[set[int], list[Size]]:
    """The covered tokens of one clip, and the size of every rectangle that covered a new token.

    Attempt a uses the numbers 5a to 5a + 4 of `key`: three for the size, two for the place.
    """
    covered: set[int] = set()
    placed: list[Size] = []
    for attempt in range(max_attempts):
        missing = count - len(covered)
        if missing == 0:
            break
        numbers = [uniform(key, 5 * attempt + number) for number in range(5)]
        height, width = draw_size(grid, numbers[:3], missing)
        height, width = min(max(height, 1), grid.num_time), min(max(width, 1), grid.num_freq)
        first_time = int(numbers[3] * (grid.num_time - height + 1))
        first_freq = int(numbers[4] * (grid.num_freq - width + 1))
        rectangle = {
            time * grid.num_freq + freq
            for time in range(first_time, first_time + height)
            for freq in range(first_freq, first_freq + width)
        }
        if len(covered | rectangle) > count:
            break
        if rectangle - covered:
            placed.append((height, width))
        covered |= rectangle
    return covered, placed


def union(
    draw_size: DrawSize, grid: Grid, count: int, key: int, max_attempts: int = 150
) -> set[int]:
    """The target tokens of one clip: rectangles, completed by random tokens to `count`."""
    covered, _ = cover(draw_size, grid, count, stream(key, 0), max_attempts)
    free = [token for token in range(grid.num_tokens) if token not in covered]
    return covered | set(choose(free, count - len(covered), stream(key, 1)))


def spans(
    num_time: int, lengths: list[tuple[float, int]], num_groups: int, min_columns: int, key: int
) -> tuple[set[int], list[set[int]]]:
    """Context columns and target groups of one clip, from (probability, length) of each union."""
    for draw in range(1001):
        draw_key, unions = stream(key, draw), []
        for group, (probability, length) in enumerate(lengths):
            starts = list(range(num_time - length + 1))
            mean_count = probability * num_time / length
            count = int(mean_count + uniform(stream(draw_key, 0), group))
            chosen = choose(starts, count, stream(stream(draw_key, 1), group))
            unions.append({start + place for start in chosen for place in range(length)})
        context = set(range(num_time)).difference(*unions)
        if len(context) >= min_columns and all(unions[:num_groups]):
            return context, unions[:num_groups]
    raise AssertionError


def expected_span_columns(num_time: int, probability: float, length: int) -> float:
    """Expected number of columns in the union of random spans, if no row is rejected.

    A column is outside if all k starts are among those that do not reach it.
    """
    num_starts = num_time - length + 1
    exact = probability * num_time / length
    total = 0.0
    for count, weight in ((int(exact), 1 - exact % 1), (int(exact) + 1, exact % 1)):
        chosen = min(count, num_starts)
        for column in range(num_time):
            reaching = min(column, num_starts - 1) - max(column - length + 1, 0) + 1
            outside = math.comb(num_starts - reaching, chosen) / math.comb(num_starts, chosen)
            total += weight * (1 - outside)
    return total
