"""Time that masks take: CPU microseconds for a crop, drawn by row or by the literal loop.

    python benchmarks/masks.py

Each line is a masker on a grid. The literal column is the loop over clips, rectangles and tokens in
`tests/oracles/masks_literal.py`. Two further tables have the milliseconds for the masks of a step:
on the training thread, which takes the masks from its micro-batches of 32 rows (if the loader has
no worker process, this thread also draws them), and the share of the time in which the loader reads
the crops of wav files and draws their masks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.steps.grid import AudioBatch, Grid
from jepa_audio.steps.masking import (
    BlockMasker,
    Masker,
    MixtureMasker,
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
    (MixtureMasker([RandomMasker(), BlockMasker(), StripeMasker()], [0.4, 0.3, 0.3]), PUPUJEPA),
]
# Rows of a micro-batch, and of the two sizes of a step.
MICRO_BATCH, STEP_ROWS = 32, (32, 2048)
# How the recipes read: sample rate, seconds of a crop, of a clip, crops per clip.
READING = {WAVJEPA: (16000, 2.01, 10.0, 8), PUPUJEPA: (24000, 10.24, None, 1)}


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
    rows = torch.arange(MICRO_BATCH)
    module, batch = StepOnly(), AudioBatch(torch.zeros(MICRO_BATCH, 1, 1), rows)
    batch = batch._replace(masks=masker(grid, batch.row, 0, 0))
    return median_micros(lambda _: module.masks_of(batch), repeats=100) / MICRO_BATCH


def read_micros(grid: Grid) -> float:
    """Time in which the loader reads and collates a crop of a wav file, without masks."""
    rate, crop, clip, crops = READING[grid]
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(8):
            sf.write(
                f"{Path(folder) / str(number)}.wav", 0.1 * noise.standard_normal(12 * rate), rate
            )
        data = AudioDataModule(
            folder, rate, crop, clip_seconds=clip, crops_per_clip=crops, valid_share=0.0
        )
        data.prepare_data()
        data.setup("fit")
        dataset = data.dataset("train", random_crops=True)
        num_clips = MICRO_BATCH // crops

        def read(number: int) -> object:
            indices = [SampleIndex(number * num_clips + i, i % 8, 0) for i in range(num_clips)]
            return dataset.collate([dataset[index] for index in indices])

        return median_micros(read, repeats=10) / MICRO_BATCH


def print_steps(seconds: float) -> None:
    """The two tables of a step."""
    columns = "".join(f"{f'{rows} rows':>12}" for rows in STEP_ROWS)
    print(f"\n{'ms of the training thread':<34}{columns}{'without workers':>26}")
    reading = {grid: read_micros(grid) for grid in READING}
    shares = []
    for masker, grid in CASES:
        name = f"{type(masker).__name__} {grid.num_freq}x{grid.num_time}"
        thread, drawn = training_thread_micros(masker, grid), draw_micros(masker, grid, 32, seconds)
        cells = "".join(f"{1e-3 * thread * rows:>12.3f}" for rows in STEP_ROWS)
        drawn_here = " / ".join(f"{1e-3 * (thread + drawn) * rows:.1f}" for rows in STEP_ROWS)
        print(f"{name:<34}{cells}{drawn_here:>26}")
        share = drawn / (drawn + reading[grid])
        shares.append(f"{name:<34}{drawn:>10.1f}{reading[grid]:>12.0f}{share:>10.1%}")
    print(f"\n{'us of a loader process for a crop':<34}{'masks':>10}{'reading':>12}{'share':>10}")
    print("\n".join(shares))


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
    print_steps(args.seconds)


if __name__ == "__main__":
    main()
