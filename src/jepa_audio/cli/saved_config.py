"""The configuration that a run saves when it begins, in its folder and in its checkpoints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from jepa_audio.training.run.folder import RunFolder
from jepa_audio.training.run.resume import saved_settings


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` when training begins, and the same settings into checkpoints."""

    # Set by `fit`, if the run may replace another one.
    folder: RunFolder | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: here, the checkpoint of a resumed run is not loaded yet."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        # Otherwise a run with this file would remove the run that wrote it.
        config.overwrite = False
        folder = self.folder or RunFolder(Path(trainer.default_root_dir))
        folder.begin(self.parser.dump(config, skip_none=False, skip_validation=True))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["settings"] = saved_settings(self._settings, trainer)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """All settings; they are constant after the start of the training."""
        dump = self.parser.dump(
            self.config, skip_link_targets=False, skip_none=False, skip_validation=True
        )
        return yaml.safe_load(dump)
