"""How fast are the base recipes on this GPU? One command, under six minutes, a Markdown table.

    python -m benchmarks.gpu [--minutes 5.5] [--recipes wavjepa pupujepa]

A row is a complete optimizer step in bfloat16 with new masks in every step: forward and backward
pass, clipping, AdamW, momentum copy. Variants: padding masked or packed (equal rows need neither),
eager or compiled, and the literal step of `tests/oracles`. The batch of the fastest variant is
doubled until the next one would not fit into the memory. MFU counts the operations of
`training/cost.py`. Three further parts: masks, loader, embedding.

Each loss is compared with that in float32 for the same weights, masks and clips; packed rows with
masked ones. A difference above the tolerance ends the command with exit code 1. A part that takes
longer than its limit is cut and named at the end. `--device cpu --size tiny` is for tests.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import soundfile as sf
import torch
from benchmarks.masks import draw_micros, training_thread_micros
from torch import Tensor, nn

from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.inference.encoder import Encoder
from jepa_audio.steps.encoder import packing, transformer
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.training.cost import crop_flops, expected_sizes
from jepa_audio.training.device import prepare_modules, use_fused_kernel
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.optimizer import clip_gradients, parameter_groups
from jepa_audio.training.trial import measure_loader
from jepa_audio.training.watching.speed import peak_flops
from tests.oracles import packed_literal
from tests.oracles.literal import literal_of

CONFIGS = Path(__file__).parent.parent / "configs"
# Largest relative differences of the loss: bfloat16 from float32, packed from masked rows.
HALF_TOLERANCE, PACKED_TOLERANCE = 1e-2, 1e-3
FIRST_BATCH = {"base": {"wavjepa": 256, "pupujepa": 32}, "tiny": {"wavjepa": 2, "pupujepa": 2}}
# Steps before and during a measurement, and its longest time in seconds.
WARMUP, STEPS, STEP_SECONDS = 3, 10, 6.0
# Factor of all limits of parts.
PATIENCE = 1.0
TINY = [
    "--model.encoder.embed_dim=32",
    "--model.encoder.depth=2",
    "--model.encoder.num_heads=2",
    "--model.predictor.trunk.embed_dim=16",
    "--model.predictor.trunk.depth=1",
    "--model.predictor.trunk.num_heads=2",
    "--data.crop_seconds=0.64",
]
TINY_WAVJEPA = ["--model.targets.top_k=2", "--data.crops_per_clip=1"]
TINY_WAVJEPA += ["--model.front_end.conv_layers=[[8, 10, 5], [8, 8, 8]]"]
HEAD = ["recipe", "variant", "crops", "crops/s", "MFU", "GiB", "loss vs float32", "vs masked"]


class Cut(Exception):  # noqa: N818 (it is no error)
    """A part of the benchmark has taken longer than its limit."""


@dataclass
class Clock:
    """The time limits of the parts, and of all together."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)
    cut: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end of the command."""
        return self.started + self.seconds - time.perf_counter()

    @contextmanager
    def part(self, name: str, limit: float) -> Iterator[None]:
        """Stop the part after `limit` seconds, or at the end of the command."""

        def stop(number: int, frame: FrameType | None) -> None:
            raise Cut

        limit = max(min(PATIENCE * limit, self.left), 1e-3)
        try:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, limit)
            yield
        except Cut:
            self.cut.append(f"{name} (after {limit:.0f} s)")
        except torch.OutOfMemoryError:
            self.cut.append(f"{name} (out of memory)")
        except RuntimeError as error:  # a compiler that fails, among others
            self.cut.append(f"{name} (failed: {str(error).partition(chr(10))[0]})")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Model:
    """A recipe on the device, with the sizes and the operations of a crop."""

    recipe: str
    jepa: JEPA
    data: Any
    flops: float
    device: torch.device

    @staticmethod
    def of(recipe: str, size: str, device: torch.device) -> Model:
        """The model of a recipe with its weights of step 0."""
        options = [f"--config={CONFIGS / recipe}.yaml", "--data.root=unused"]
        options += ["--trainer.logger=false", f"--trainer.accelerator={_accelerator(device)}"]
        if size == "tiny":
            options += TINY + (TINY_WAVJEPA if recipe == "wavjepa" else [])
        cli = JEPACLI(options, run=False)
        jepa, num_samples = cli.model, cli.datamodule.clips.crop_samples
        sizes = expected_sizes(jepa, num_samples, 0, cli.trainer.max_steps)
        flops = sum(part.total for part in crop_flops(jepa, num_samples, sizes).values())
        cli.trainer.strategy.connect(jepa)
        cli.datamodule.trainer = cli.trainer  # the loader then draws the masks of the model
        return Model(recipe, jepa.to(device).train(), cli.datamodule, flops, device)

    def batch(self, size: int, step: int) -> AudioBatch:
        """A batch of noise, with masks as a loader gives them."""
        generator = torch.Generator().manual_seed(step)
        size_ = (size, self.jepa.front_end.num_channels, self.data.clips.crop_samples)
        waveform = 0.1 * torch.randn(size_, generator=generator)
        batch = AudioBatch(waveform, torch.arange(size) + step * size)
        batch = batch._replace(masks=self.jepa.draw_masks(batch, step))
        return batch.to(self.device)


@dataclass(frozen=True)
class Result:
    """The measurement of a variant."""

    crops_per_second: float
    mfu: float | None
    peak_bytes: int
    loss: float


def autocast(device: torch.device) -> torch.autocast:
    """The precision `bf16-mixed` of a Trainer."""
    return torch.autocast(device.type, torch.bfloat16)


def measure(
    model: Model, size: int, loss_of: Callable[[Tensor, Masks], Tensor], parts: nn.Module
) -> Result:
    """Time complete optimizer steps; the weights are those of step 0 before and after."""
    jepa, device = model.jepa, model.device
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(parts, True), lr=1e-5, betas=(0.9, 0.98))
    use_fused_kernel(optimizer)
    batches = [model.batch(size, step) for step in range(4)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step(number: int) -> Tensor:
        batch = batches[number % len(batches)]
        assert batch.masks is not None
        with autocast(device):
            loss = loss_of(batch.waveform, batch.masks)
        loss.backward()
        clip_gradients(parts, 5.0, None)
        optimizer.step()
        optimizer.zero_grad()
        TargetEncoderEMA.update(jepa, 0.999)
        return loss.detach()

    loss = float(step(0))
    seconds, count = _time_steps(step, device)
    rate = size * count / seconds
    peak = peak_flops(device, "bf16-mixed")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    parts.load_state_dict(before)
    return Result(rate, None if peak is None else rate * model.flops / peak, memory, loss)


def _time_steps(step: Callable[[int], Tensor], device: torch.device) -> tuple[float, int]:
    """Seconds and number of the timed steps."""
    for number in range(1, WARMUP):
        step(number)
    _wait(device)
    start, count = time.perf_counter(), 0
    while count < STEPS and time.perf_counter() - start < STEP_SECONDS:
        step(count)
        count += 1
    _wait(device)
    return time.perf_counter() - start, count


@torch.no_grad()
def first_loss(model: Model, size: int) -> float:
    """The loss of the first batch in float32, with the weights of step 0, masked and not compiled.

    It is computed in parts that fit into the memory.
    """
    jepa, batch, total = model.jepa, model.batch(size, 0), 0.0
    assert batch.masks is not None
    packs, compiled = jepa.encoder.packs, _set_compiled(jepa, {})
    prepare_modules(jepa, packed=False, compiled=False)
    for rows in torch.arange(size).split(16):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        output = jepa(batch.waveform[part], batch.masks.rows(part))
        total += float(output.distance_sum)
    prepare_modules(jepa, packed=packs, compiled=False)
    _set_compiled(jepa, compiled)
    return total / (size * jepa.masks_per_clip * batch.masks.targets_per_clip)


def is_ragged(model: Model) -> bool:
    """Whether the masks of a recipe have rows of unequal length."""
    masks = model.batch(8, 0).masks
    assert masks is not None
    return masks.context.valid is not None or masks.targets.valid is not None


class Table:
    """Prints rows as soon as they are measured; compares the losses."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)

    def add(
        self,
        model: Model,
        variant: str,
        size: int,
        result: Result,
        full: float,
        masked: float | None = None,
    ) -> None:
        """A row of the table; `full` is the loss in float32, `masked` that of masked rows."""
        from_full = abs(result.loss / full - 1)
        mfu = "unknown" if result.mfu is None else f"{result.mfu:.1%}"
        cells = [model.recipe, variant, str(size), f"{result.crops_per_second:.4g}", mfu]
        cells += [f"{result.peak_bytes / 2**30:.1f}", f"{from_full:.1e}"]
        name = f"{model.recipe}, {variant}, {size} crops"
        if not from_full <= HALF_TOLERANCE:
            self.problems.append(f"{name}: loss differs from float32 by {from_full:.1e}")
        if masked is not None:
            from_masked = abs(result.loss / masked - 1)
            cells.append(f"{from_masked:.1e}")
            if not from_masked <= PACKED_TOLERANCE:
                self.problems.append(f"{name}: loss differs from masked rows by {from_masked:.1e}")
        print(f"| {' | '.join([*cells, '-'][: len(HEAD)])} |", flush=True)


def measure_recipe(
    model: Model, size: int, args: argparse.Namespace, clock: Clock
) -> tuple[list[str], float]:
    """All variants of a recipe: the problems, and the crops per second of the fastest one."""
    table, jepa, masked = Table(), model.jepa, None
    full = first_loss(model, size)
    fast = "packed" if is_ragged(model) else "equal rows"
    plain = "masked" if fast == "packed" else fast
    variants = [(f"{plain}, eager", False, False, 30.0)]
    variants += [("packed, eager", True, False, 30.0)] if fast == "packed" else []
    variants += [(f"{fast}, compiled", True, True, 90.0)] if args.compile else []
    rates: dict[str, float] = {}
    for variant, packed, compiled, limit in variants:
        with clock.part(f"{model.recipe}, {variant}", limit):
            prepare_modules(jepa, packed, compiled)
            result = measure(model, size, jepa.loss, jepa)
            table.add(model, variant, size, result, full, masked)
            masked = masked if packed else result.loss
            rates[variant] = result.crops_per_second
    with clock.part(f"{model.recipe}, literal", 30.0):
        measure_literal(model, size, table)
    best = max(rates, key=rates.__getitem__, default="")
    if best != variants[-1][0]:
        _set_compiled(jepa, {})
    prepare_modules(jepa, packed="packed" in best, compiled=False)
    for number in range(1, args.doublings + 1) if best else ():
        larger, num_cut = size * 2**number, len(clock.cut)
        with clock.part(f"{model.recipe}, {larger} crops", 30.0):
            result = measure(model, larger, jepa.loss, jepa)
            rates[best] = max(rates[best], result.crops_per_second)
            table.add(model, best, larger, result, first_loss(model, larger))
        if len(clock.cut) > num_cut or result.peak_bytes > 0.48 * _memory(model.device):
            break
    _set_compiled(jepa, {})
    return table.problems, max(rates.values(), default=0.0)


def measure_literal(model: Model, size: int, table: Table) -> None:
    """The literal step, whose loss is a mean over the targets that the batch has."""
    compiled = _set_compiled(model.jepa, {})
    literal = literal_of(model.jepa, model.data.clips.crop_samples).to(model.device)
    loss_of, batch = _literal_loss(model, literal), model.batch(size, 0)
    result = measure(model, size, loss_of, literal)
    assert batch.masks is not None
    with torch.no_grad():
        table.add(model, "literal", size, result, float(loss_of(batch.waveform, batch.masks)))
    _set_compiled(model.jepa, compiled)


def _literal_loss(model: Model, literal: nn.Module) -> Callable[[Tensor, Masks], Tensor]:
    """The loss of the literal step, from the masks as booleans."""
    num_tokens = model.jepa.front_end.grid(model.data.clips.crop_samples).num_tokens

    def loss(waveform: Tensor, masks: Masks) -> Tensor:
        context, targets = (m.to_mask(num_tokens) for m in (masks.context, masks.targets))
        return literal(waveform, context, targets)

    return loss


def _set_compiled(jepa: JEPA, calls: dict[nn.Module, Any]) -> dict[nn.Module, Any]:
    """Set the compiled functions of modules, `{}` for none; return those that they had."""
    before = {part: part._compiled_call_impl for part in jepa.modules()}
    for part in before:
        part._compiled_call_impl = calls.get(part)
    return before


def measure_masks(model: Model) -> str:
    """Milliseconds of a step of 2,048 crops: in the loader's processes, on the training thread."""
    jepa, rows = model.jepa, 2048
    grid = jepa.front_end.grid(model.data.clips.crop_samples)
    drawn = draw_micros(jepa.masker, grid, rows, 0.5)
    thread = training_thread_micros(jepa.masker, grid)
    return (
        f"{1e-3 * drawn * rows:.1f} ms of one core for {rows} crops, "
        f"{1e-3 * thread * rows:.2f} ms of the training thread"
    )


def measure_data(model: Model, best: float) -> str:
    """Crops per second of the loader with its masks, for wav files."""
    data = model.data
    rate, seconds = data.clips.sample_rate, max(data.clips.clip_seconds or 0, 12.0)
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(32):
            samples = 0.1 * noise.standard_normal(round(seconds * rate))
            sf.write(Path(folder) / f"{number}.wav", samples, rate)
        data.sources, data.valid_share = [folder], 0.0
        data.prepare_data()
        data.setup("fit")
        found = measure_loader(data)
    verdict = "keeps up" if found >= best else "too slow"
    return (
        f"{found:.4g} crops/s with {data.workers_per_process()} processes, "
        f"training {best:.4g}: {verdict}"
    )


def measure_embedding(model: Model) -> str:
    """Hours of audio that are encoded in a minute, from tensors of 30 crops."""
    seconds = 30 * model.data.clips.crop_seconds
    encoder = Encoder.from_jepa(model.jepa, model.data.clips.crop_samples).to(model.device)
    size = (16, encoder.num_channels, round(seconds * encoder.sample_rate))
    clips = 0.1 * torch.randn(size)
    with autocast(model.device), torch.inference_mode():
        encoder.embed(clips, encoder.sample_rate)
        _wait(model.device)
        start, count = time.perf_counter(), 0
        while count < 20 and time.perf_counter() - start < STEP_SECONDS:
            encoder.embed(clips, encoder.sample_rate)
            count += 1
        _wait(model.device)
    hours = count * len(clips) * seconds / 3600
    per_minute = hours / (time.perf_counter() - start) * 60
    return f"{per_minute:.4g} hours of audio per minute"


def measure_part(part: str, model: Model, best: float) -> str:
    """A line for one of the parts that are no training steps."""
    if part == "masks":
        return measure_masks(model)
    if part == "loader":
        return measure_data(model, best)
    return measure_embedding(model)


def _accelerator(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else device.type


def _memory(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return float(torch.cuda.get_device_properties(device).total_memory)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pack_on_cpu() -> None:
    """Pack rows on the CPU, too, with a loop over rows as the kernel: for tests."""
    packing.attend_rows = packed_literal.attend_rows
    transformer.can_pack = lambda *_: True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.5, help="time limit of everything")
    parser.add_argument("--recipes", nargs="+", default=["wavjepa", "pupujepa"])
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="*", default=["masks", "loader", "embedding"])
    parser.add_argument("--doublings", type=int, default=6, help="of the batch, at most")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(arguments)
    sys.argv[1:] = []  # `JEPACLI`, which builds the models, must not read these arguments
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; `--device cpu --size tiny` is for tests")
    if args.device == "cpu":
        pack_on_cpu()
    torch.set_float32_matmul_precision("highest")
    device, clock = torch.device(args.device), Clock(60 * args.minutes)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16-mixed\n")
    problems: list[str] = []
    for recipe in args.recipes:
        model = Model.of(recipe, args.size, device)
        found, best = measure_recipe(model, FIRST_BATCH[args.size][recipe], args, clock)
        problems += found
        for part in args.parts:
            with clock.part(f"{recipe}, {part}", 25.0):
                print(f"\n{part}, {recipe}: {measure_part(part, model, best)}", flush=True)
        print()
    print(f"\nTolerances: loss in bfloat16 {HALF_TOLERANCE:g}, packed {PACKED_TOLERANCE:g}")
    print(f"{time.perf_counter() - clock.started:.0f} s; cut: {', '.join(clock.cut) or 'nothing'}")
    for problem in problems:
        print(f"WRONG: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
