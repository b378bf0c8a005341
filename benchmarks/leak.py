"""How much context tokens of the raw waveform change with samples that no context token covers.

Statistics over complete clips carry information about masked samples into the context tokens. For
each setting of the front end of WavJEPA, the samples that no context token covers are replaced by
those of another clip. The table has the mean change of the context tokens in percent of their
spread, and the time of the front end.

    .venv/bin/python benchmarks/leak.py FOLDER_OR_TABLE
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.steps.front_ends import WaveformFrontEnd
from jepa_audio.steps.grid import TokenSet
from jepa_audio.steps.masking import SpanMasker

CONV_LAYERS = [(512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2)]
SETTINGS = [("group", True), ("group", False), ("layer", True), ("layer", False), ("none", False)]
NUM_CLIPS = 8


def covered_samples(front_end: WaveformFrontEnd, context: TokenSet, num_samples: int) -> Tensor:
    """True at the samples `[B, S]` in the receptive field of a context token."""
    num_tokens = front_end.grid(num_samples).num_tokens
    covered = torch.zeros(len(context.index), num_samples, dtype=torch.bool)
    for row, column in context.to_mask(num_tokens).nonzero().tolist():
        start = column * front_end.stride
        covered[row, start : start + front_end.receptive_field] = True
    return covered


@torch.no_grad()
def change_of_context(front_end: WaveformFrontEnd, waveform: Tensor) -> tuple[float, float]:
    """(RMS change of the context tokens / their RMS spread, share of uncovered samples)."""
    num_samples = waveform.shape[-1]
    grid = front_end.grid(num_samples)
    context = SpanMasker()(grid, torch.arange(len(waveform)), seed=0, step=0).context
    covered = covered_samples(front_end, context, num_samples)
    replaced = torch.where(covered[:, None], waveform, waveform.roll(1, dims=0))
    before, after = (front_end(clips) for clips in (waveform, replaced))
    mask = context.to_mask(grid.num_tokens)
    change = (after - before)[mask].square().sum(-1).mean().sqrt()
    spread = (before[mask] - before[mask].mean(0)).square().sum(-1).mean().sqrt()
    return float(change / spread), float(1 - covered.float().mean())


def main(root: str) -> None:
    """Print the table for clips of a corpus."""
    data = AudioDataModule(root, 16000, 2.01, batch_size=NUM_CLIPS, num_workers=0, valid_share=0.0)
    data.prepare_data()
    data.setup("fit")
    waveform = next(iter(data.train_dataloader())).waveform
    print("| norm | standardize | change of context tokens | seconds |\n|---|---|---|---|")
    for norm, standardize in SETTINGS:
        torch.manual_seed(0)
        front_end = WaveformFrontEnd(CONV_LAYERS, 768, norm=norm, standardize=standardize).eval()
        change, uncovered = change_of_context(front_end, waveform)
        start = time.perf_counter()
        with torch.no_grad():
            front_end(waveform)
        seconds = time.perf_counter() - start
        print(f"| {norm} | {standardize} | {100 * change:.1f} % | {seconds:.2f} |")
    print(f"{100 * uncovered:.0f} % of the samples are covered by no context token")


if __name__ == "__main__":
    main(sys.argv[1])
