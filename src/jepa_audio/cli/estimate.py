"""`jepa-audio fit --estimate`: what a run will cost, from its shapes and a trial of a few steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from jepa_audio.data.corpus.table import default_table_path
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import UserError
from jepa_audio.training.cost import crop_flops, expected_sizes
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.normalization import MeasureNormalization
from jepa_audio.training.run.resume import ResumedSettings
from jepa_audio.training.trial import MAX_SECONDS, TIMED_STEPS, WARMUP_STEPS, Trial, measure_loader
from jepa_audio.training.watching.collapse_monitor import CollapseMonitor
from jepa_audio.training.watching.finite_guard import FiniteGuard
from jepa_audio.training.watching.speed import peak_flops

log = logging.getLogger(__name__)

Form = Literal["table", "json"]
# The callbacks of a trial: they write nothing, and are part of each step.
_CALLBACKS = (FiniteGuard, ResumedSettings, MeasureNormalization, CollapseMonitor)
# `last.ckpt`, `previous.ckpt`, and the file that replaces one of them while it is written.
_NUM_CHECKPOINTS = 3

# Settings of the Trainer that a trial replaces.
SWITCHED_OFF: dict[str, bool | None] = {"callbacks": None, "logger": False, "profiler": None}
SWITCHED_OFF |= {"enable_progress_bar": False, "enable_model_summary": False}


def prepare_trial(config: Namespace) -> Iterator[str]:
    """Switch off, in place, what would write files or the screen in a trial of a run.

    Yields:
        One line for the callbacks of the user, which are not part of the trial.
    """
    settings = config.trainer
    callbacks = settings.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    if callbacks:
        paths = [getattr(callback, "class_path", str(callback)) for callback in callbacks]
        names = ", ".join(path.rpartition(".")[2] for path in paths)
        yield f"`--estimate` measures without the callbacks of the run: {names}"
    for name, value in SWITCHED_OFF.items():
        settings[name] = value


def print_estimate(
    trainer: Trainer,
    jepa: JEPA,
    data: AudioDataModule,
    config: Namespace,
    checkpoint: Path | None,
    form: Form,
) -> None:
    """Measure a trial of a run, and print what the run costs; only the first process prints.

    Args:
        trainer: the Trainer of the run; its callbacks and its validation are removed.
        jepa: the model; the trial changes its weights.
        data: the data of the run.
        config: the settings of the run.
        checkpoint: the checkpoint that the run would continue; `None` for a new run.
        form: a table for the screen, or one JSON object.

    Raises:
        UserError: if the run is finished, or its steps do not fit into the memory.
    """
    costs = _describe_model(jepa, data, trainer.max_steps)
    trial = _try_steps(trainer, jepa, data, checkpoint, costs["operations"]["total"])
    costs |= _describe_trial(trainer, trial, data, costs["operations"]["total"])
    costs |= _describe_files(trainer, trial, data, config)
    if not trainer.is_global_zero:
        return
    if form == "json":
        print(json.dumps(costs, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for name, text in _lines(costs):
        table.add_row(name, text)
    Console().print(table)


def _try_steps(
    trainer: Trainer,
    jepa: JEPA,
    data: AudioDataModule,
    checkpoint: Path | None,
    flops_per_crop: float,
) -> Trial:
    trial = Trial()
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [c for c in callbacks if isinstance(c, _CALLBACKS)] + [trial]  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    rank_zero_only(log.info)(
        "measuring at most %d optimizer steps after %d, for about %.0f s, then the loader",
        TIMED_STEPS,
        WARMUP_STEPS,
        MAX_SECONDS,
    )
    peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))
    crops = data.batch_size * data.clips.crops_per_clip * trainer.accumulate_grad_batches
    if peak is not None and (least := crops * flops_per_crop / peak) > MAX_SECONDS:
        rank_zero_only(log.warning)(
            "a step of %d crops needs at least %s on this device: a smaller `data.batch_size` "
            "(%d) gives an estimate sooner, for its own batch",
            crops,
            _duration(least / 3600),
            data.batch_size,
        )
    try:
        trainer.fit(jepa, data, ckpt_path=checkpoint)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a micro-batch of {data.batch_size * data.clips.crops_per_clip} crops does not fit "
            f"into the memory of {_device_name(trainer)}: lower `data.batch_size` ("
            f"{data.batch_size}) and raise `trainer.accumulate_grad_batches`"
        ) from error
    if not trial.num_timed:
        raise UserError(
            f"no optimizer step is left to measure: {checkpoint} is of step "
            f"{trainer.global_step}, and `trainer.max_steps` is {trainer.max_steps}"
        )
    return trial


def _describe_model(jepa: JEPA, data: AudioDataModule, max_steps: int) -> dict[str, Any]:
    """Parameters, tokens and operations, from the shapes."""
    num_samples = data.clips.crop_samples
    sizes = expected_sizes(jepa, num_samples, 0, max_steps)
    grid = jepa.front_end.grid(num_samples)
    parts = crop_flops(jepa, num_samples, sizes)
    parameters = list(jepa.parameters())
    copies = [p for module in jepa.target_modules.values() for p in module.parameters()]
    return {
        "parameters": {
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "momentum_copies": sum(p.numel() for p in copies),
            "total": sum(p.numel() for p in parameters),
        },
        "tokens": {
            "num_freq": grid.num_freq,
            "num_time": grid.num_time,
            "per_crop": grid.num_tokens,
            "context": sizes.context.tokens,
            "targets": sizes.targets.tokens,
            "target_groups": sizes.targets.number,
            "masks_per_clip": jepa.masks_per_clip,
        },
        "operations": {
            "total": sum(part.total for part in parts.values()),
            "parts": {
                name: {"forward": part.forward, "backward": part.backward}
                for name, part in parts.items()
            },
        },
    }


def _describe_trial(
    trainer: Trainer, trial: Trial, data: AudioDataModule, flops: float
) -> dict[str, Any]:
    """Memory, speed and time, from the trial; all rates are those of all processes together."""
    device, num_processes = trainer.strategy.root_device, trainer.world_size
    crops_per_step = trial.num_crops * num_processes / trial.num_timed
    seconds = trial.seconds / trial.num_timed
    computing = seconds - trial.seconds_waiting / trial.num_timed
    loader_rate = measure_loader(data) * num_processes
    # The first steps use batches that were loaded before they were needed.
    expected = max(seconds, crops_per_step / loader_rate)
    peak = peak_flops(device, str(trainer.precision))
    num_steps = trainer.max_steps - trial.first_step
    return {
        "memory": {
            "device": _device_name(trainer),
            "peak_bytes": trial.peak_bytes,
            "device_bytes": torch.cuda.get_device_properties(device).total_memory
            if device.type == "cuda"
            else None,
            "weights_bytes": trial.states.weights,
            "gradients_bytes": trial.states.gradients,
            "optimizer_bytes": trial.states.optimizer,
            "states_bytes": trial.states.total,
        },
        "speed": {
            "timed_steps": trial.num_timed,
            "seconds_per_step": expected,
            "crops_per_step": crops_per_step,
            "crops_per_second": crops_per_step / expected,
            "peak_flops_per_second": peak,
            "mfu": None
            if peak is None
            else flops * crops_per_step / expected / peak / num_processes,
        },
        "loader": {
            "crops_per_second": loader_rate,
            "needed_crops_per_second": crops_per_step / computing,
            "keeps_up": loader_rate >= crops_per_step / computing,
        },
        "run": {
            "processes": num_processes,
            "precision": str(trainer.precision),
            "max_steps": trainer.max_steps,
            "steps_left": num_steps,
            "hours": num_steps * expected / 3600,
        },
    }


def _describe_files(
    trainer: Trainer, trial: Trial, data: AudioDataModule, config: Namespace
) -> dict[str, Any]:
    """Disk and corpus."""
    num_checkpoints = _NUM_CHECKPOINTS
    if config.checkpoint.keep_all:
        num_checkpoints += trainer.max_steps // config.checkpoint.every_n_train_steps + 1
    tables = {
        default_table_path(source)
        for source in (*data.sources, data.valid_root, data.test_root)
        if source
    }
    files = data.dataset("train", random_crops=True).files
    clips = trainer.max_steps * trainer.accumulate_grad_batches * data.batch_size
    num_clips = clips * trainer.world_size
    return {
        "disk": {
            "checkpoint_bytes": trial.checkpoint_bytes,
            "num_checkpoints": num_checkpoints,
            "index_bytes": sum(path.stat().st_size for path in tables if path.exists()),
        },
        "corpus": {
            "files": len(files),
            "hours": float(files.seconds.sum()) / 3600,
            "epochs": num_clips / len(files),
            "crop_hours": num_clips * data.clips.crops_per_clip * data.clips.crop_seconds / 3600,
        },
    }


def _lines(costs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each line of the table."""
    run, speed, loader, memory, tokens, corpus, disk = (
        costs[name] for name in ("run", "speed", "loader", "memory", "tokens", "corpus", "disk")
    )
    parameters = costs["parameters"]
    devices = f"{run['processes']} x {memory['device']}"
    yield "run", f"{run['max_steps']} optimizer steps on {devices}, {run['precision']}"
    yield (
        "parameters",
        f"{_count(parameters['trained'])} trained, {_count(parameters['momentum_copies'])} in "
        f"momentum copies, {_count(parameters['total'])} together",
    )
    shares = {name: tokens[name] / tokens["per_crop"] for name in ("context", "targets")}
    yield (
        "tokens of a crop",
        f"{tokens['per_crop']} ({tokens['num_freq']} rows x {tokens['num_time']} columns); a mask "
        f"has {tokens['context']:.1f} context ({shares['context']:.0%}) and "
        f"{tokens['targets']:.1f} target tokens ({shares['targets']:.0%}) in "
        f"{_plural(tokens['target_groups'], 'group')}; "
        f"{_plural(tokens['masks_per_clip'], 'mask')} per clip",
    )
    yield "operations", f"{costs['operations']['total'] / 1e9:.3g} GFLOP for a crop"
    for name, part in costs["operations"]["parts"].items():
        passes = f"forward {part['forward'] / 1e9:.3g}, backward {part['backward'] / 1e9:.3g} GFLOP"
        yield f"  {name}", passes
    of = f" of {_bytes(memory['device_bytes'])}" if memory["device_bytes"] else ""
    yield "memory", f"{_bytes(memory['peak_bytes'])}{of} on each device at this batch"
    yield (
        "  states",
        f"{_bytes(memory['states_bytes'])}: weights {_bytes(memory['weights_bytes'])}, gradients "
        f"{_bytes(memory['gradients_bytes'])}, optimizer {_bytes(memory['optimizer_bytes'])}",
    )
    yield "speed", _speed(speed)
    yield (
        "loader",
        f"{'keeps up' if loader['keeps_up'] else 'is too slow'}: alone it gives "
        f"{loader['crops_per_second']:.4g} crops/s, the step needs "
        f"{loader['needed_crops_per_second']:.4g}",
    )
    steps = _plural(run["steps_left"], "step")
    yield "time", f"{_duration(run['hours'])} for {steps}, without validation"
    total = disk["num_checkpoints"] * disk["checkpoint_bytes"]
    yield (
        "disk",
        f"{_bytes(total)}: {disk['num_checkpoints']} checkpoints of "
        f"{_bytes(disk['checkpoint_bytes'])}; index {_bytes(disk['index_bytes'])}",
    )
    yield (
        "corpus",
        f"{corpus['files']} training files, {corpus['hours']:.4g} hours; the run uses each file "
        f"{corpus['epochs']:.3g} times, {corpus['crop_hours']:.4g} hours of crops",
    )


def _speed(speed: dict[str, Any]) -> str:
    mfu = "unknown for this device"
    if speed["mfu"] is not None:
        peak = speed["peak_flops_per_second"] / 1e9
        mfu = f"{speed['mfu']:.1%} of {peak:.4g} GFLOP/s on each device"
    return (
        f"{speed['crops_per_second']:.4g} crops/s, {speed['seconds_per_step']:.3g} s for a step of "
        f"{speed['crops_per_step']:g} crops ({_plural(speed['timed_steps'], 'timed step')}); "
        f"MFU {mfu}"
    )


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def _plural(number: float | int, noun: str) -> str:
    return f"{number:.10g} {noun}{'s' * (number != 1)}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
