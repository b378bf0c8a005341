"""Checkpoints that are always whole, and a stop that loses nothing."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: whenever the process dies, the file of that name is a whole one.

    Lightning's own writer goes through the system's temporary folder; where that is another file system, the last step
    is a copy, which a kill or a full disk cuts short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """See `TorchCheckpointIO`; remote paths are left to it."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        part = whole.with_name(f".{whole.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt` up to date: every so many optimizer steps, at the end of the run, and when it is told to stop.

    The first Ctrl-C (or SIGTERM) lets the running optimizer step end, saves and leaves; a second one stops at once,
    and what was saved before still is whole.

    Args:
        dirpath: folder of the checkpoints; `None` for `checkpoints/` in the folder of the run.
        every_n_train_steps: optimizer steps between two saves.
        keep_all: also keep a checkpoint of every save, as `step=00001000.ckpt`.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 1000, keep_all: bool = False) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step:08d}",
            every_n_train_steps=every_n_train_steps,
            save_top_k=-1 if keep_all else 0,
            save_last=True,
            save_on_exception=False,  # an interrupted batch is neither trained on nor to be read again
            enable_version_counter=False,
        )
        self._told_to_stop = False
        self._stepped_at = 0
        self._limit_val_batches: int | float = 1.0
        self._former: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        super().on_train_start(trainer, pl_module)
        self._told_to_stop, self._stepped_at = False, trainer.global_step
        self._limit_val_batches = trainer.limit_val_batches
        self._last_global_step_saved = trainer.global_step  # else a resumed run saves in the middle of its first step
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._tell_to_stop) for number in STOP_SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; stop at the end of an optimizer step if told to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step != self._stepped_at:
            self._stepped_at = trainer.global_step
            if trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False):
                trainer.should_stop = True
                trainer.limit_val_batches = 0  # Lightning validates before it stops, for which there may be no time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has not been saved, and hand the signals back."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._stop_listening()
        trainer.limit_val_batches = self._limit_val_batches
        if self._told_to_stop:
            log.warning("stopped at step %d; go on with `--ckpt_path last`", trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand the signals back."""
        self._stop_listening()

    def _tell_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._told_to_stop:
            raise KeyboardInterrupt
        self._told_to_stop = True
        log.warning("%s: stopping after this step; once more to stop at once", signal.Signals(number).name)

    def _stop_listening(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
