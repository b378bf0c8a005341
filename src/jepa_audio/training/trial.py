"""A trial of a run: a few optimizer steps on the device, their time and memory, and the loader."""

from __future__ import annotations

import itertools
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.steps.grid import AudioBatch

WARMUP_STEPS, TIMED_STEPS = 2, 10
# A trial ends with the step in which this time is over, even if it is the first one.
MAX_SECONDS = 60.0
# The loader alone is measured for at most so long, after a start of at most the same time.
_LOADER_SECONDS = 5.0
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the states of a model on one device; sharded states count with their part.

    Attributes:
        weights: parameters and buffers of all modules, also of the momentum copies.
        gradients: of the trained parameters.
        optimizer: state of the optimizer.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All states together."""
        return self.weights + self.gradients + self.optimizer

    @staticmethod
    def of(trainer: Trainer, module: LightningModule) -> StateBytes:
        """The states after an optimizer step."""
        trained = [p for p in module.parameters() if p.requires_grad]
        weights = itertools.chain(module.parameters(), module.buffers())
        return StateBytes(
            *(
                sum(map(_local_bytes, part))
                for part in (weights, trained, optimizer_tensors(trainer))
            )
        )


def optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    """The tensors in the states of all optimizers."""
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def checkpoint_bytes(trainer: Trainer, module: LightningModule) -> int:
    """Size of a checkpoint, which contains complete tensors, also those of a sharded run."""
    tensors = itertools.chain(module.state_dict().values(), optimizer_tensors(trainer))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


class Trial(Callback):
    """Times optimizer steps after a warm-up, measures memory, and then ends the training.

    A trial has at most 10 timed steps and ends after the step in which a minute is over; a step of
    a minute is timed without a warm-up. A shorter run is measured until its end; a run of few steps
    has no warm-up. On CUDA, the memory
    is the largest that tensors took at once. On a CPU, it is the growth of the resident memory of
    the process during the steps, and the weights, which were there before; it is not exact.

    Attributes:
        first_step: optimizer steps before the trial, above 0 for a resumed run.
        num_timed: number of timed optimizer steps.
        seconds: of the timed steps together.
        seconds_waiting: the time of it in which the training waited for data.
        num_crops: crops of the timed steps in this process.
        peak_bytes: memory of this process, see above.
        states: bytes of weights, gradients and optimizer.
        checkpoint_bytes: size of a checkpoint.
    """

    def __init__(self) -> None:
        self.first_step = self.num_timed = self.num_crops = 0
        self.seconds = self.seconds_waiting = 0.0
        self.peak_bytes, self.states, self.checkpoint_bytes = 0, StateBytes(0, 0, 0), 0
        self._start_bytes = self._step = self._num_warmup = 0
        self._started = self._last_end = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the last callback, so that the time of all others belongs to the step."""
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the measurement of the memory."""
        self.first_step = self._step = trainer.global_step
        num_steps = trainer.max_steps - self.first_step
        self._num_warmup = WARMUP_STEPS if num_steps > WARMUP_STEPS else 0
        self._start_bytes = _reset_peak(trainer.strategy.root_device)
        self._started = self._last_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Count the time since the last batch as time spent waiting."""
        self.seconds_waiting += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Add the time of a micro-batch; end the training after the last timed step."""
        _wait_for(trainer.strategy.root_device)
        now = time.perf_counter()
        self.seconds += now - self._last_end
        self.num_crops += len(batch.waveform)
        self._last_end = now
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        is_late = trainer.strategy.reduce_boolean_decision(
            now - self._started >= MAX_SECONDS, all=False
        )
        if self._step - self.first_step <= self._num_warmup and not is_late:
            self.seconds, self.seconds_waiting, self.num_crops = 0.0, 0.0, 0
            return
        self.num_timed += 1
        if is_late or self.num_timed == TIMED_STEPS:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the memory."""
        self.states = StateBytes.of(trainer, pl_module)
        self.checkpoint_bytes = checkpoint_bytes(trainer, pl_module)
        device = trainer.strategy.root_device
        growth = max(_peak(device) - self._start_bytes, 0)
        self.peak_bytes = growth if device.type == "cuda" else growth + self.states.weights


def measure_loader(data: AudioDataModule) -> float:
    """Crops per second of the training loader of this process, without a training."""
    loader = data.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    # The first batches wait for the start of the workers, the next ones were prefetched meanwhile.
    num_workers = data.workers_per_process()
    list(_for_seconds(itertools.islice(batches, 1 + 2 * num_workers), _LOADER_SECONDS))
    start, num_crops = time.perf_counter(), 0
    for batch in _for_seconds(batches, _LOADER_SECONDS):
        num_crops += len(batch.row)
    rate = num_crops / (time.perf_counter() - start)
    loader.close()
    return rate


def _for_seconds(batches: Iterable[Any], seconds: float) -> Iterator[Any]:
    """The batches of some time, at least one."""
    end = time.perf_counter() + seconds
    for batch in batches:
        yield batch
        if time.perf_counter() >= end:
            return


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    """Forget the largest memory so far; return the memory that does not count as growth."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:  # Only Linux has this file. The peak so far counts instead.
        return _peak(device)
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    """The largest memory in bytes since `_reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (_PROC / "status").exists():
        return _resident("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _resident(name: str) -> int:
    """A number of bytes in the status of this process."""
    match = re.search(rf"{name}:\s*(\d+) kB", (_PROC / "status").read_text())
    return 1024 * int(match[1]) if match else 0
