"""The progress bar of a training run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override


class RunProgressBar(RichProgressBar):
    """One progress bar for the complete run, because one epoch of the data loader is one run."""

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        # `v_num`, the version number of the logs, is not a metric.
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}
