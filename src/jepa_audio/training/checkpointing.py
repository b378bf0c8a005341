"""Checkpoints that are always whole, and a stop that loses nothing."""

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
from jepa_audio.parallel import STOP_SIGNALS

log = logging.getLogger(__name__)

ECHO_SECONDS = (
    1.0  # `torchrun` sends its processes once more what the terminal has sent to them already
)


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the message says which, why, and how to go on."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: whenever the process dies, the file of that name is a whole one.

    Lightning's own writer goes through the system's temporary folder; where that is another file
    system, the last step is a copy, which a kill or a full disk cuts short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """See `TorchCheckpointIO`; remote paths are left to it.

        Raises:
            CheckpointWriteError: if the file system does not take it; a former file of that name is
                whole then.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(path)
        part = whole.with_name(f".{whole.name}.part")
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(whole)
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise CheckpointWriteError(_not_written(whole, cause)) from error
        finally:
            part.unlink(missing_ok=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """The file system's error behind one of torch's, whose writer wants to finish its file even then."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _not_written(path: Path, cause: OSError) -> str:
    former = (
        "the one of before is whole" if path.exists() else "there is none of that name from before"
    )
    return (
        f"the checkpoint {path} could not be written: {cause.strerror or cause}; {former}. "
        "Make room there, then go on with the same command and `--ckpt_path last`"
    )


class RunCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` up to date: every so many optimizer steps, at the end of the run, and when it is told to stop.

    The first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 at any process lets the running optimizer step
    end, saves and leaves; a second one, a second later or more, stops at once, and what was saved
    before still is whole.

    Under SLURM the signal of Lightning's `SLURMEnvironment` (SIGUSR1, unless its `auto_requeue` is
    off) also puts the job back into the queue, after the save. Lightning's own handler is not used:
    it saves in the middle of a step, into a file that later wins over a newer checkpoint.

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
            save_on_exception=False,  # an interrupted batch is neither trained on nor to be read again
            enable_version_counter=False,
        )
        self.stopped_by: signal.Signals | None = None  # what made the run end before its last step
        self._told_by: signal.Signals | None = None
        self._told_at = 0.0
        self._requeue_signal: signal.Signals | None = None
        self._stepped_at = 0
        self._limit_val_batches: int | float = 1.0
        self._former: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the requeueing over from Lightning, before it listens for signals itself."""
        super().setup(trainer, pl_module, stage)
        environment = trainer._accelerator_connector.cluster_environment
        if (
            stage == "fit"
            and isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
        ):
            self._requeue_signal, environment.auto_requeue = environment.requeue_signal, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        super().on_train_start(trainer, pl_module)
        self.stopped_by = self._told_by = None
        self._stepped_at = trainer.global_step
        self._limit_val_batches = trainer.limit_val_batches
        self._last_global_step_saved = (
            trainer.global_step
        )  # else a resumed run saves in the middle of its first step
        if threading.current_thread() is threading.main_thread():
            self._former = {
                number: signal.signal(number, self._tell_to_stop) for number in self._signals
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; stop at the end of an optimizer step if told to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step != self._stepped_at:
            self._stepped_at = trainer.global_step
            if trainer.strategy.reduce_boolean_decision(self._told_by is not None, all=False):
                trainer.should_stop = True
                trainer.limit_val_batches = (
                    0  # Lightning validates before it stops, for which there may be no time
                )
                if trainer.global_step != trainer.max_steps:
                    self.stopped_by = self._told_to_all(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has not been saved, and hand the signals back."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_listening()
        trainer.limit_val_batches = self._limit_val_batches
        if self.stopped_by is not None:
            log.warning("stopped at step %d; go on with `--ckpt_path last`", trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Hand the signals back."""
        self._stop_listening()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the job back into SLURM's queue if its signal stopped the run: from then on it may be killed."""
        super().teardown(trainer, pl_module, stage)
        if (
            stage == "fit"
            and self.stopped_by is not None
            and self.stopped_by == self._requeue_signal
        ):
            for logger in trainer.loggers:
                logger.finalize("finished")
            if trainer.is_global_zero:
                requeue()

    @property
    def _signals(self) -> list[signal.Signals]:
        own = () if self._requeue_signal is None else (self._requeue_signal,)
        return list(dict.fromkeys((*own, *STOP_SIGNALS)))

    def _told_to_all(self, trainer: Trainer) -> signal.Signals:
        """The first signal, in an order that is the same everywhere, that any process was sent."""
        told = (
            n
            for n in self._signals
            if trainer.strategy.reduce_boolean_decision(n == self._told_by, all=False)
        )
        return next(told)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; an error of the one process that writes ends all of them, instead of leaving the others waiting."""
        failed: CheckpointWriteError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except CheckpointWriteError as error:
            failed = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others are
        if trainer.strategy.reduce_boolean_decision(failed is not None, all=False):
            raise failed or CheckpointWriteError(
                f"the checkpoint {filepath} could not be written by another process"
            )

    def _tell_to_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_by is not None:
            if now - self._told_at < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self._told_by, self._told_at = signal.Signals(number), now
        log.warning("%s: stopping after this step; once more to stop at once", self._told_by.name)

    def _stop_listening(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


def requeue() -> None:
    """Put this process's SLURM job, or its task of an array of jobs, back into the queue."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = (
        os.environ["SLURM_JOB_ID"]
        if array is None
        else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    )
    if not re.fullmatch(r"[0-9_]+", job):
        raise UserError(f"`SLURM_JOB_ID` is {job!r}, no number of a job: it was not requeued")
    command = ["scontrol", "requeue", job]
    try:
        code = subprocess.call(command)
    except FileNotFoundError:
        code = 127
    if code == 0:
        log.warning("requeued the SLURM job %s", job)
    else:
        log.error(
            "`%s` failed with code %d: submit the job again to go on", " ".join(command), code
        )
