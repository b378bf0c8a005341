"""Checkpoints that are written completely or not at all, and a stop that loses no step."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path
from jepa_audio.parallel import STOP_SIGNALS

log = logging.getLogger(__name__)

# Within this time a second signal is a copy of the first: the terminal signals all processes, and
# `torchrun` forwards the same signal to its own processes once more.
ECHO_SECONDS = 1.0


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the message names the file, the cause and the remedy."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder and renames it: a kill never damages a checkpoint.

    Lightning writes into the system's temporary folder instead. If that is another file system,
    its last step is a copy, which a kill or a full disk can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; remote paths are left to Lightning.

        Raises:
            CheckpointWriteError: if the file system reports an error. An existing file of that
                name stays complete.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with atomic_path(path, one_writer=True) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise CheckpointWriteError(_write_error_message(path, cause)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The file system's error in a chain of exceptions: torch raises its own error on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _write_error_message(path: Path, cause: OSError) -> str:
    previous = "the previous one is complete" if path.exists() else "there is no previous one"
    return (
        f"the checkpoint {path} could not be written: {cause.strerror or cause}; {previous}. "
        "Free some space, then resume with the same command and `--ckpt_path last`"
    )


class RunCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` every `every_n_train_steps`, at the end of a run and after a stop signal.

    After the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 at any process, the run finishes the current
    optimizer step, saves and ends. A second signal, at least 1 second later, ends the run at once;
    the last saved checkpoint stays complete.

    Under SLURM, the signal of Lightning's `SLURMEnvironment` (SIGUSR1, unless its `auto_requeue` is
    off) also requeues the job after the save. Lightning's own handler is not used: it saves in the
    middle of a step, into a file that later takes precedence over a newer checkpoint.

    Args:
        dirpath: folder of the checkpoints; `None` for `checkpoints/` in the folder of the run.
        every_n_train_steps: optimizer steps between two saves.
        keep_all: also keep a checkpoint of every save, as `step=00001000.ckpt`.
    """

    def __init__(
        self, dirpath: str | None = None, every_n_train_steps: int = 1000, keep_all: bool = False
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step:08d}",
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1 if keep_all else 0,
            save_last=True,
            # A resume would skip the rest of an interrupted batch without training on it.
            save_on_exception=False,
            enable_version_counter=False,
        )
        # The signal that ended the run before its last step.
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._requeue_signal: signal.Signals | None = None
        self._last_step = 0
        self._limit_val_batches: int | float = 1.0
        self._previous_handlers: dict[
            signal.Signals, Callable[[int, FrameType | None], Any] | int | None
        ] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take requeueing over from Lightning, before Lightning installs its signal handlers."""
        super().setup(trainer, pl_module, stage)
        cluster = trainer._accelerator_connector.cluster_environment
        if stage == "fit" and isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            self._requeue_signal, cluster.auto_requeue = cluster.requeue_signal, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        super().on_train_start(trainer, pl_module)
        self.stopped_by = self._received = None
        self._last_step = trainer.global_step
        self._limit_val_batches = trainer.limit_val_batches
        # Otherwise a resumed run would save in the middle of its first step.
        self._last_global_step_saved = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in self._signals
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a save is due; end the run after an optimizer step if a signal was received."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            trainer.should_stop = True
            # Lightning validates before it stops; there may be no time for that.
            trainer.limit_val_batches = 0
            if trainer.global_step != trainer.max_steps:
                self.stopped_by = self._signal_of_any_process(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if it is not saved yet, and restore the signal handlers."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._restore_handlers()
        trainer.limit_val_batches = self._limit_val_batches
        if self.stopped_by is not None:
            log.warning("stopped at step %d; resume with `--ckpt_path last`", trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Requeue the SLURM job if its signal ended the run; SLURM may kill it from then on."""
        super().teardown(trainer, pl_module, stage)
        stopped_by_slurm = self.stopped_by is not None and self.stopped_by == self._requeue_signal
        if stage == "fit" and stopped_by_slurm:
            for logger in trainer.loggers:
                logger.finalize("finished")
            if trainer.is_global_zero:
                requeue()

    @property
    def _signals(self) -> list[signal.Signals]:
        """The handled signals, without duplicates, in the same order on all processes."""
        signals = [*filter(None, [self._requeue_signal]), *STOP_SIGNALS]
        return list(dict.fromkeys(signals))

    def _signal_of_any_process(self, trainer: Trainer) -> signal.Signals:
        """The first of `_signals` that any process received; all processes get the same answer."""
        any_process = trainer.strategy.reduce_boolean_decision
        return next(n for n in self._signals if any_process(n == self._received, all=False))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; a write error of rank zero ends all processes, which would otherwise wait."""
        error: CheckpointWriteError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except CheckpointWriteError as write_error:
            error = write_error
            # The other processes wait at this barrier.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            raise error or CheckpointWriteError(
                f"the checkpoint {filepath} could not be written by another process"
            )

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if now - self._received_at < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self._received, self._received_at = signal.Signals(number), now
        log.warning(
            "%s: stopping after this step; send it again to stop at once", self._received.name
        )

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def requeue() -> None:
    """Requeue the SLURM job of this process, or its task of a job array.

    Raises:
        UserError: if `SLURM_JOB_ID` is not a job number.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    if not re.fullmatch(r"[0-9_]+", job):
        raise UserError(f"the SLURM job is not requeued: `SLURM_JOB_ID` ({job!r}) is not a number")
    command = ["scontrol", "requeue", job]
    try:
        code = subprocess.call(command)
    except FileNotFoundError:
        code = 127
    if code == 0:
        log.warning("requeued the SLURM job %s", job)
    else:
        text = " ".join(command)
        log.error("`%s` failed with code %d: submit the job again to continue", text, code)
