"""What does one more mask of a clip cost, as a share of the cost of a clip with one mask?

For the two demo recipes, the script times forward and backward passes of the same clips with
several numbers of masks, and counts their floating-point operations. With `targets.view: clip`, the
front end and the target encoder run once for all masks of a clip.

    python -m benchmarks.masks_per_clip [--recipes demo/wavjepa demo/pupujepa] [--batch 16]
    [--masks 1 2 4 8] [--repeats 5]
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
    """Print a line for each number of masks; the first number is the reference."""
    torch.manual_seed(0)
    jepa, num_samples = build(recipe)
    waveform = torch.randn(batch_size, jepa.front_end.num_channels, num_samples)
    steps = {str(number): step_with(jepa, waveform, number) for number in numbers}
    operations = {name: count_flops(step) for name, step in steps.items()}
    seconds = median_seconds(steps, repeats)
    first = str(numbers[0])
    for name in steps:
        more = int(name) - numbers[0]
        line = f"{recipe:>14}, {batch_size} clips, {name:>2} masks a clip: {seconds[name]:.3f} s"
        if more:
            time = (seconds[name] / seconds[first] - 1) / more * numbers[0]
            count = (operations[name] / operations[first] - 1) / more * numbers[0]
            line += f"; one more mask costs {time:.0%} of a clip (operations: {count:.0%})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=["demo/wavjepa", "demo/pupujepa"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--masks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.argv[1:] = []  # `JEPACLI`, which builds the models, must not read these arguments
    for recipe in args.recipes:
        measure_recipe(recipe, args.batch, args.masks, args.repeats)


if __name__ == "__main__":
    main()
