"""How fast is a training step, and how much time is saved by computing only the selected tokens?

For both recipes, the script prints clips per second, and the floating-point operations per second
as a share of the peak of matrix multiplication on this machine. It also measures the literal,
key-masked steps of `tests/oracles` with the same weights, masks and losses. `--profile` prints the
share of the front end, which is the time of its own forward and backward pass, and the operations
that take most of the time of a step.

    python -m benchmarks.train_step [--size base|small] [--recipes wavjepa pupujepa] [--batch 8]
    [--repeats 5] [--profile] [--default_malloc]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.parallel import reuse_freed_memory
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.training.cost import MaskSizes, crop_flops
from jepa_audio.training.jepa import JEPA
from tests.oracles.literal import literal_of

CONFIGS = Path(__file__).parent.parent / "configs"
WIDTHS = {"base": (768, 384, 512), "small": (384, 192, 256)}


def build(recipe: str, size: str) -> tuple[JEPA, float]:
    """The model of a recipe and its crop length in seconds."""
    width, wave_trunk, mel_trunk = WIDTHS[size]
    trunk = wave_trunk if recipe == "wavjepa" else mel_trunk
    cli = JEPACLI(
        [
            f"--config={CONFIGS / recipe}.yaml",
            "--data.root=unused",
            "--trainer.logger=false",
            f"--model.encoder.embed_dim={width}",
            f"--model.encoder.num_heads={width // 64}",
            f"--model.predictor.init_args.trunk.init_args.embed_dim={trunk}",
        ],
        run=False,
    )
    return cli.model, cli.datamodule.clips.crop_samples / cli.model.front_end.sample_rate


def peak_flops(size: int = 2048, repeats: int = 7) -> float:
    """Operations per second of the fastest of several float32 matrix multiplications."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def make_step(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that runs forward and backward and returns the loss."""

    def step() -> float:
        module.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    return step


def median_seconds(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median time of each step; steps alternate, so that a slow minute affects every step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(WIDTHS), default="base")
    parser.add_argument(
        "--recipes", nargs="+", choices=["wavjepa", "pupujepa"], default=["wavjepa", "pupujepa"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--default_malloc", action="store_true", help="without `reuse_freed_memory`, which fit uses"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    sys.argv[1:] = []  # `JEPACLI`, which builds the models, must not read these arguments
    if not args.default_malloc:
        reuse_freed_memory()
    peak = peak_flops()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, "
        f"matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    for recipe in args.recipes:
        measure_recipe(recipe, args.size, args.batch, args.repeats, peak, args.profile)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process {kib / 2**20:.2f} GiB")


def measure_recipe(
    recipe: str, size: str, batch_size: int, repeats: int, peak: float, with_profile: bool
) -> None:
    """Time the training steps of a recipe and print a line for each."""
    torch.manual_seed(0)
    jepa, clip_seconds = build(recipe, size)
    waveform = torch.randn(batch_size, 1, round(clip_seconds * jepa.front_end.sample_rate))
    masks = jepa.draw_masks(AudioBatch(waveform, torch.arange(batch_size)))
    # The literal loss is the mean over the targets.
    num_targets = float(masks.targets.counts.sum())
    masks = replace(masks, targets_per_clip=num_targets / batch_size)
    steps = {
        recipe: make_step(jepa, lambda: jepa.loss(waveform, masks)),
        "literal key-masked": literal_step(jepa, waveform, masks),
    }
    losses = {name: step() for name, step in steps.items()}
    parts = crop_flops(jepa, waveform.shape[-1], MaskSizes.of([masks]))
    flops = batch_size * sum(part.total for part in parts.values())
    seconds = median_seconds(steps, repeats)
    for name, value in seconds.items():
        print(
            f"{name:>20} {size}, batch {batch_size} x {clip_seconds:.2f} s: {value:.2f} s per "
            f"step, {batch_size / value:.2f} clips/s, {flops / value / peak:.0%} of the peak "
            f"({flops / 1e9:.0f} GFLOP of the fast path), loss {losses[name]:.7f}"
        )
    ratio = seconds["literal key-masked"] / seconds[recipe]
    difference = abs(losses["literal key-masked"] / losses[recipe] - 1)
    print(f"{'':>20} time literal / fast: {ratio:.2f}; loss difference {difference:.1e}")
    if with_profile:
        front_end = make_step(jepa, lambda: jepa.front_end(waveform).square().mean())
        alone = median_seconds({"front end": front_end}, repeats)["front end"]
        share = parts["front end"].total * batch_size / flops
        rate = parts["front end"].total * batch_size / alone / peak
        print(
            f"{'':>20} front end alone: {alone / seconds[recipe]:.0%} of the time, {share:.0%} of "
            f"the operations of the step, {rate:.0%} of the peak"
        )
        print_operations(steps[recipe])


def print_operations(step: Callable[[], float], num_lines: int = 16) -> None:
    """Print the operations of a step with the longest time, and their shares."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    operations = sorted(recorded.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(operation.self_cpu_time_total for operation in operations)
    for operation in operations[:num_lines]:
        share = operation.self_cpu_time_total / total
        print(f"{share:>20.1%} {operation.key}, {operation.count} calls")


def literal_step(jepa: JEPA, waveform: torch.Tensor, masks: Masks) -> Callable[[], float]:
    """The literal step with the same weights and masks."""
    literal = literal_of(jepa, waveform.shape[-1])
    num_tokens = jepa.front_end.grid(waveform.shape[-1]).num_tokens
    context, targets = masks.context.to_mask(num_tokens), masks.targets.to_mask(num_tokens)
    return make_step(literal, lambda: literal(waveform, context, targets))


if __name__ == "__main__":
    main()
