"""What does one more mask of a clip cost, as a share of one more clip with one mask?

For the two demo recipes, the script times forward and backward passes with the same number of
masks: R masks of each of B clips, and one mask of each of R * B clips. It also counts their
floating-point operations. With `targets.view: clip`, the front end and the target encoder run once
for all masks of a clip. With a cost c of a clip and m of a mask, the two steps cost B * (c + R * m)
and R * B * (c + m); the script prints m / (c + m).

    python -m benchmarks.masks_per_clip [--recipes demo/wavjepa demo/pupujepa] [--batch 8]
    [--masks 2 4 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from benchmarks.train_step import CONFIGS, count_flops, make_step, median_seconds

from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.steps.masking.source import MaskSource, MaskStream
from jepa_audio.training.jepa import JEPA


def build(recipe: str) -> tuple[JEPA, int]:
    """The model of a recipe and the samples of a crop."""
    config = f"--config={CONFIGS / recipe}.yaml"
    cli = JEPACLI([config, "--data.root=unused", "--trainer.logger=false"], run=False)
    return cli.model, cli.datamodule.clips.crop_samples


def step_with(jepa: JEPA, waveform: torch.Tensor, num_masks: int) -> Callable[[], float]:
    """A training step with `num_masks` masks of each clip, without the update of the weights."""
    source = MaskSource.of(jepa, waveform.shape[-1], MaskStream.TRAINING)
    # After the curriculum of a mixture.
    masks = replace(source, masks_per_clip=num_masks).draw(torch.arange(len(waveform)), step=1000)
    return make_step(jepa, lambda: jepa.loss(waveform, masks))


def measure_recipe(recipe: str, batch_size: int, numbers: list[int], repeats: int) -> None:
    """Print a line for each number of masks of a clip."""
    torch.manual_seed(0)
    jepa, num_samples = build(recipe)
    for number in numbers:
        clips = torch.randn(number * batch_size, jepa.front_end.num_channels, num_samples)
        steps = {
            "masks": step_with(jepa, clips[:batch_size], number),
            "clips": step_with(jepa, clips, 1),
        }
        operations = {name: count_flops(step) for name, step in steps.items()}
        seconds = median_seconds(steps, repeats)
        time, count = (
            (number * cost["masks"] / cost["clips"] - 1) / (number - 1)
            for cost in (seconds, operations)
        )
        print(
            f"{recipe:>14}: {batch_size} clips x {number} masks {seconds['masks']:.3f} s, "
            f"{number * batch_size} clips x 1 mask {seconds['clips']:.3f} s; one more mask costs "
            f"{time:.0%} of one more clip (operations: {count:.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["demo/wavjepa", "demo/pupujepa"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--masks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.argv[1:] = []  # `JEPACLI`, which builds the models, must not read these arguments
    for recipe in args.recipes:
        measure_recipe(recipe, args.batch, args.masks, args.repeats)


if __name__ == "__main__":
    main()
