"""Time that masks take: CPU microseconds for a crop, drawn by row or by the literal loop.

    python benchmarks/masks.py

Each line is a masker on a grid. The literal column is the loop over clips, rectangles and tokens in
`tests/oracles/masks_literal.py`. The last column is what remains on the training thread: the time
in which the training step takes the masks from a batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from jepa_audio.steps.grid import AudioBatch, Grid
from jepa_audio.steps.masking import (
    BlockMasker,
    Masker,
    MultiBlockMasker,
    RandomMasker,
    SpanMasker,
    StripeMasker,
    TargetSpanMasker,
)
from jepa_audio.training.masks import MaskingModule
from tests.oracles import masks_literal

PUPUJEPA, WAVJEPA = Grid(8, 256), Grid(1, 200)
CASES: list[tuple[Masker, Grid]] = [
    (SpanMasker(), WAVJEPA),
    (TargetSpanMasker(), WAVJEPA),
    *[
        (masker, grid)
        for masker in (RandomMasker(), StripeMasker(), BlockMasker(), MultiBlockMasker())
        for grid in (WAVJEPA, PUPUJEPA)
    ],
]


class StepOnly(MaskingModule):
    """A module at optimizer step 0 without a Trainer."""

    def mask_step(self) -> int:
        """Always step 0."""
        return 0


def median_micros(function: Callable[[int], object], repeats: int) -> float:
    """Median CPU time of a call; `function` gets the number of the call."""
    function(0)  # compiles; the expected number of targets is computed once
    times = []
    for number in range(1, repeats + 1):
        start = time.thread_time()
        function(number)
        times.append(time.thread_time() - start)
    return 1e6 * statistics.median(times)


def literal_micros(masker: Masker, grid: Grid) -> str:
    """Time of the literal loop for a crop."""
    if not isinstance(masker, BlockMasker | StripeMasker):
        return "-"
    size = (
        masks_literal.block_size if isinstance(masker, BlockMasker) else masks_literal.stripe_size
    )
    count = int(masker.expected_targets(grid, 0, 0))
    micros = median_micros(
        lambda row: masks_literal.union(size, grid, count, masks_literal.row_key(0, 0, row)), 20
    )
    return f"{micros:.0f}"


def draw_micros(masker: Masker, grid: Grid, rows: int, seconds: float) -> float:
    """Time of a crop, if this many rows are drawn together."""

    def draw(step: int) -> object:
        return masker(grid, torch.arange(rows), 0, step)

    repeats = max(3, int(1e6 * seconds / median_micros(draw, repeats=3)))
    return median_micros(draw, repeats) / rows


def training_thread_micros(masker: Masker, grid: Grid) -> float:
    """Time of a crop in the training step, for a batch that has its masks."""
    module, batch = StepOnly(), AudioBatch(torch.zeros(32, 1, 1), torch.arange(32))
    batch = batch._replace(masks=masker(grid, batch.row, 0, 0))
    return median_micros(lambda _: module.masks_of(batch), repeats=100) / 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256, 2048])
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time for each number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = "".join(f"{f'{rows} rows':>12}" for rows in args.rows)
    print(f"{'masker':<18}{'grid':>8}{columns}{'literal':>10}{'training thread':>18}")
    for masker, grid in CASES:
        name, size = type(masker).__name__, f"{grid.num_freq}x{grid.num_time}"
        drawn = [draw_micros(masker, grid, rows, args.seconds) for rows in args.rows]
        cells = "".join(f"{micros:>12.1f}" for micros in drawn)
        literal, thread = literal_micros(masker, grid), training_thread_micros(masker, grid)
        print(f"{name:<18}{size:>8}{cells}{literal:>10}{thread:>18.2f}")


if __name__ == "__main__":
    main()
