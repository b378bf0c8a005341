"""Masks drawn clip by clip and token by token, as the papers describe them."""

import math
from collections.abc import Callable

from jepa_audio.steps.grid import Grid

Size = tuple[int, int]


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
    draw_size: Callable[[Grid, list[float], int], Size],
    grid: Grid,
    count: int,
    uniform: list[list[float]],
) -> tuple[set[int], list[Size]]:
    """The covered tokens of one clip, and the size of every rectangle that covered a new token."""
    covered: set[int] = set()
    placed: list[Size] = []
    for attempt in uniform:
        missing = count - len(covered)
        if missing == 0:
            break
        height, width = draw_size(grid, attempt[:3], missing)
        height, width = min(max(height, 1), grid.num_time), min(max(width, 1), grid.num_freq)
        first_time = int(attempt[3] * (grid.num_time - height + 1))
        first_freq = int(attempt[4] * (grid.num_freq - width + 1))
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
