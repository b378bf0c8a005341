"""Atomic checkpoint files, and a checkpoint of the last step when a signal stops the run."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path
from jepa_audio.parallel import STOP_SIGNALS
from jepa_audio.training.run.folder import LAST, PREVIOUS
from jepa_audio.training.run.load import read_torch_file

log = logging.getLogger(__name__)

# A second signal within this time is a copy of the first. The terminal sends a signal to all
# processes, and `torchrun` then forwards the same signal to the processes that it started.
DUPLICATE_SIGNAL_SECONDS = 1.0


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the message names the file, the cause and the remedy."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint to a temporary file in the same folder, then rename this file.

    A kill therefore never damages a checkpoint. Lightning writes the temporary file into the
    system's temporary folder. If this folder is on another file system, Lightning then copies the
    file, and a kill or a full disk can truncate the copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; Lightning writes it if `path` is remote.

        Raises:
            CheckpointWriteError: if the file system reports an error. An existing file at `path`
                does not change.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with atomic_path(path, one_writer=True) as unfinished:
                with unfinished.open("wb") as file:
                    torch.save(checkpoint, file)
                if path.name == LAST:
                    _keep_previous(path)
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise CheckpointWriteError(_write_error_message(path, cause)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; Lightning reads it if `path` is remote.

        Raises:
            DamagedCheckpointError: if the file is not a complete checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_torch_file(Path(path))


def _keep_previous(last: Path) -> None:
    """Keep the last checkpoint under a second name, unless it is damaged or does not exist."""
    if not zipfile.is_zipfile(last):
        return
    with atomic_path(last.with_name(PREVIOUS), one_writer=True) as unfinished:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(last, unfinished)
        except OSError:  # Some file systems have no links.
            shutil.copyfile(last, unfinished)


def _system_error(error: BaseException | None) -> OSError | None:
    """The `OSError` in a chain of exceptions; torch can raise another exception after it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _write_error_message(path: Path, cause: OSError) -> str:
    previous = (
        "the previous checkpoint is valid" if path.exists() else "there is no previous checkpoint"
    )
    return (
        f"the checkpoint {path} could not be written: {cause.strerror or cause}; {previous}. "
        "Free disk space, then resume with the same command and `--ckpt_path last`"
    )


class RunCheckpoint(ModelCheckpoint):
    """Save `last.ckpt` every `every_n_train_steps`, at the end of a run and after a stop signal.

    The checkpoint before it is kept as `previous.ckpt`.

    After the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 at any process, the run finishes the current
    optimizer step, saves a checkpoint and ends. A second signal, at least 1 second later, ends the
    run immediately; the last saved checkpoint is then valid, but may be of an earlier step.

    Under SLURM, `SLURMEnvironment.requeue_signal` (by default SIGUSR1) also requeues the job after
    the save, unless `SLURMEnvironment.auto_requeue` is false. This class replaces the signal
    handler of Lightning. That handler saves in the middle of an optimizer step, and Lightning
    later resumes from the saved file even if a newer checkpoint exists.

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
            # After such a save, a resumed run would skip the rest of the interrupted batch.
            save_on_exception=False,
            enable_version_counter=False,
        )
        # The signal that ended the run before `max_steps`.
        self.stopped_by: signal.Signals | None = None
        # Seconds of training after which the run ends; see `set_max_time`.
        self.max_seconds = math.inf
        self._started_at = 0.0
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._requeue_signal: signal.Signals | None = None
        self._last_step = 0
        self._limit_val_batches: int | float = 1.0
        self._previous_handlers: dict[
            signal.Signals, Callable[[int, FrameType | None], Any] | int | None
        ] = {}

    def set_max_time(self, max_time: str | timedelta | dict[str, int] | None) -> None:
        """Set `trainer.max_time`: it counts from this start of the run, not from the first one.

        Raises:
            UserError: if the text is not a time.
        """
        try:
            seconds = Timer(max_time).time_remaining()
        except (MisconfigurationException, TypeError) as error:
            raise UserError(
                f"`trainer.max_time` ({max_time!r}) must have the form DD:HH:MM:SS, for example "
                "00:12:00:00 for 12 hours"
            ) from error
        self.max_seconds = math.inf if seconds is None else seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disable Lightning's requeueing before Lightning installs handlers; see `teardown`."""
        super().setup(trainer, pl_module, stage)
        cluster = trainer._accelerator_connector.cluster_environment
        if stage == "fit" and isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
            self._requeue_signal, cluster.auto_requeue = cluster.requeue_signal, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        super().on_train_start(trainer, pl_module)
        self.stopped_by = self._received = None
        self._started_at = time.monotonic()
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
        """Save if a save is due; at a signal or after the time, end the run after the step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.max_seconds < math.inf:
            self._stop_in_time(trainer)
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            trainer.should_stop = True
            # Otherwise Lightning would validate before it stops, and SLURM may not wait so long.
            trainer.limit_val_batches = 0
            if trainer.global_step != trainer.max_steps:
                self.stopped_by = self._signal_of_any_process(trainer)

    def _stop_in_time(self, trainer: Trainer) -> None:
        """End the run on all processes if its time is over on any of them."""
        is_over = time.monotonic() - self._started_at >= self.max_seconds
        if trainer.strategy.reduce_boolean_decision(is_over, all=False):
            trainer.should_stop = True
            if trainer.is_global_zero and trainer.global_step != trainer.max_steps:
                log.warning(
                    "stopped at step %d after `trainer.max_time`; resume with `--ckpt_path last`",
                    trainer.global_step,
                )

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
        """Requeue the SLURM job if its signal ended the run; SLURM may then kill this process."""
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
        """The first of `_signals` that any process received; the same signal on all processes."""
        any_process = trainer.strategy.reduce_boolean_decision
        return next(n for n in self._signals if any_process(n == self._received, all=False))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save a checkpoint; raise a write error of rank zero on all processes.

        Otherwise the other processes would wait for rank zero forever.
        """
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
            if now - self._received_at < DUPLICATE_SIGNAL_SECONDS:
                return
            raise KeyboardInterrupt
        self._received, self._received_at = signal.Signals(number), now
        log.warning(
            "%s: stopping after this step; send the signal again to stop immediately",
            self._received.name,
        )

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def requeue() -> None:
    """Requeue the SLURM job of this process; in a job array, only the task of this process.

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
