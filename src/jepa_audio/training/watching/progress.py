"""The progress of a training run: a bar in a terminal, otherwise lines in the log."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.watching.speed import SpeedMeter, speed_texts

log = logging.getLogger(__name__)


class RunProgressBar(RichProgressBar):
    """One progress bar for the complete run, in optimizer steps."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.progress is not None:
            # A resumed run starts at the step of its checkpoint.
            self.train_progress_bar_id = self.progress.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the bar: Lightning would start it again at 0."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the number of optimizer steps instead of micro-batches."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        # `v_num`, the version number of the logs, is not a metric.
        metrics = super().get_metrics(trainer, pl_module)
        speed = speed_texts(trainer.callback_metrics)
        return {name: value for name, value in (metrics | speed).items() if name != "v_num"}


class ProgressLines(Callback):
    """Log a line every `every_n_steps` optimizer steps, if the output is not a terminal.

    A line has the step, the last logged training and validation loss, the last RankMe of the
    context, the clips of all processes per second, the share of time spent waiting for data and the
    MFU since the last line (`SpeedMeter`), and the time left at the mean speed of this start of the
    run. The first step of a start, which waits for the worker processes, does not count. Only the
    process of rank zero logs lines.

    Args:
        every_n_steps: optimizer steps between two lines; `None` for `trainer.log_every_n_steps`, 0
            for no lines.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 0:
            raise UserError(f"`every_n_steps` ({every_n_steps}) must be at least 0")
        self.every_n_steps = every_n_steps
        # `JEPACLI` sets it if a progress bar is shown.
        self.is_enabled = True
        self._is_due, self._is_start = False, True
        self._speed = SpeedMeter()
        self._started = time.perf_counter()
        self._first_step = self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute the operations of a crop, before parameters are sharded."""
        if stage == "fit" and self.is_enabled and isinstance(pl_module, JEPA):
            self._speed.prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._first_step = self._step = trainer.global_step
        self._started, self._is_due, self._is_start = time.perf_counter(), False, True
        self._speed.restart()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Count the clips; a line is due after some optimizer steps and after the last one."""
        assert isinstance(pl_module, JEPA)
        self._speed.count(batch, pl_module.front_end.sample_rate, trainer.world_size)
        self._speed.end_batch()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        every = self.every_n_steps
        if every is None:
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_last = self._step == trainer.max_steps
        self._is_due = self.is_enabled and every > 0 and (self._step % every == 0 or is_last)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the line of the last step, when all other callbacks have logged its metrics."""
        self._log_if_due(trainer)
        if self._is_start and self._step > self._first_step:
            self._is_start = False
            self._first_step, self._started = self._step, time.perf_counter()
            self._speed.restart()
        self._speed.start_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line of the last step before a validation."""
        self._log_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the measurement of the speed, so that the time of validation is not counted."""
        self._speed.restart()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last line."""
        self._log_if_due(trainer)

    def _log_if_due(self, trainer: Trainer) -> None:
        if not self._is_due:
            return
        crops_per_clip = getattr(trainer.datamodule, "hparams", {}).get("crops_per_clip", 1)  # type: ignore[attr-defined]
        speed = self._speed.read()
        num_clips = speed.pop("speed/crops_per_second") / crops_per_clip
        elapsed = time.perf_counter() - self._started
        steps_per_second = (self._step - self._first_step) / elapsed
        left = timedelta(seconds=round((trainer.max_steps - self._step) / steps_per_second))
        logged = {
            label: trainer.callback_metrics[key].item()
            for label, key in (
                ("loss", "train/loss"),
                ("valid loss", "valid/loss"),
                ("rank", "collapse/context_rank"),
            )
            if key in trainer.callback_metrics
        }
        parts = [
            f"step {self._step}/{trainer.max_steps}",
            *(f"{label} {value:.4g}" for label, value in logged.items()),
            f"{num_clips:.3g} clips/s",
            *(f"{label} {text}" for label, text in speed_texts(speed).items()),
            f"{left} left",
        ]
        if trainer.is_global_zero:
            log.info(", ".join(parts))
        self._is_due = False
        self._speed.restart()
