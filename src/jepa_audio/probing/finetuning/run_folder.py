"""The files of a fine-tuning run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from jepa_audio.errors import UserError
from jepa_audio.files import write_text
from jepa_audio.inference.folder import save_encoder
from jepa_audio.probing.finetuning.data import LabelledClips
from jepa_audio.probing.finetuning.evaluation import load_logits
from jepa_audio.probing.finetuning.module import FineTuning
from jepa_audio.probing.finetuning.results import Tested
from jepa_audio.training.run.folder import PREVIOUS

log = logging.getLogger(__name__)


class FineTuneFolder:
    """The folder of a run, or of one of its folds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best, self.last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"
        self.results = path / "test.npz"
        self._score = path / "valid.json"

    def part(self, name: str) -> FineTuneFolder:
        """The folder of a fold or of the baseline."""
        return FineTuneFolder(self.path / name)

    def check(self, config: str, resume: bool) -> None:
        """Check that a run with these settings can begin or continue here.

        Raises:
            UserError: if the folder holds another run, or if a run is resumed with other settings.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            if resume:
                log.info("%s has no run: a new run starts", self.path)
            return
        if not resume:
            raise UserError(
                f"{self.path} holds a run: continue it with `--resume`, or choose another "
                "`--run_dir`"
            )
        old, new = yaml.safe_load(file.read_text()), yaml.safe_load(config)
        if changed := sorted(_differences(old, new)):
            raise UserError(
                f"`--resume`: the run in {self.path} has other settings ({', '.join(changed)}): "
                "use the same ones, or choose another `--run_dir`"
            )

    def begin(self, config: str) -> None:
        """Write the settings of a new run; from now on, the folder holds this run."""
        file = self.path / "config.yaml"
        if not file.is_file():
            write_text(file, config)

    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """Save the weights of the best epoch, and all that continues a run after each epoch."""
        common: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        best: dict[str, Any] = {"monitor": "valid/score", "mode": "max", "save_weights_only": True}
        return [
            ModelCheckpoint(self.checkpoints, self.best.stem, **best, **common),
            ModelCheckpoint(self.checkpoints, self.last.stem, **common),
        ]

    @property
    def is_finished(self) -> bool:
        """Whether the test has been made."""
        return self._score.is_file() and self.results.is_file()

    def finish(self, model: FineTuning) -> None:
        """Write the encoder of the best epoch, and remove the checkpoints that would continue it.

        Args:
            model: the model; it gets the weights of the best epoch.
        """
        best = torch.load(self.best, map_location="cpu", weights_only=True)
        model.cpu().load_state_dict(best["state_dict"])
        save_encoder(model.encoder(), self.path / "encoder")
        write_text(self._score, json.dumps({"valid": float(model.valid_score)}) + "\n")
        for path in (self.last, self.last.with_name(PREVIOUS)):
            path.unlink(missing_ok=True)

    def tested(self, data: LabelledClips) -> Tested:
        """The results of the finished run."""
        rows, logits = load_logits(self.results)
        valid = float(json.loads(self._score.read_text())["valid"])
        return Tested(data.data, data.rows("train"), rows, logits, valid, data.num_padded)


def _differences(old: object, new: object, key: str = "") -> set[str]:
    """The keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        parts = (_differences(old.get(k), new.get(k), f"{key}.{k}" if key else k) for k in keys)
        return set().union(*parts)
    return set() if old == new else {key}
