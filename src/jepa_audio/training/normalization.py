"""Mean and standard deviation of a log spectrogram whose recipe does not state them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.loader import first_batches
from jepa_audio.parallel import track_progress
from jepa_audio.steps.front_ends import PatchedSpectrogram
from jepa_audio.steps.front_ends.spectrogram import measure_statistics
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.load import read_checkpoint

log = logging.getLogger(__name__)

NUM_CLIPS, NUM_CHECKED_CLIPS = 256, 32


class MeasureNormalization(Callback):
    """Sets `mean` and `std` of spectrogram front ends that do not state them.

    A new run measures them before its first step, over the first clips of the training order. The
    process of rank zero measures, so all processes have the same numbers. A run that starts from a
    checkpoint takes the numbers of the checkpoint. They become part of the model's
    hyper-parameters, and therefore of its checkpoints, and of `config`. If the front end states
    other numbers than those of the corpus, they are used with a warning. The same holds for another
    front end of the targets.

    Args:
        config: the configuration that becomes `config.yaml`; its `model.front_end` and
            `model.target_front_end` are updated.
        is_resumed: True if the run loads a checkpoint; then nothing is measured.
        weights: checkpoint with the initial weights of a new run.
    """

    def __init__(self, config: Namespace, is_resumed: bool, weights: str | None = None) -> None:
        self._config, self._is_resumed, self._weights = config, is_resumed, weights

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, JEPA)
        for name, front_end in _spectrograms(pl_module).items() if not self._is_resumed else ():
            if front_end.mean is None and (stated := _stated_in(self._weights, name)) is not None:
                self._set(pl_module, name, *stated)
            elif front_end.mean is None:
                measured: Any = self._measure(trainer, front_end, NUM_CLIPS, name)
                self._set(pl_module, name, *trainer.strategy.broadcast(measured))
            elif stage == "fit":
                self._measure(trainer, front_end, NUM_CHECKED_CLIPS, name)

    @staticmethod
    def _measure(
        trainer: Trainer, front_end: PatchedSpectrogram, num_clips: int, name: str
    ) -> tuple[float, float] | None:
        """Mean and standard deviation on rank zero; logs them if the front end needs others."""
        if not trainer.is_global_zero:
            return None
        data = trainer.datamodule  # type: ignore[attr-defined]
        mean, std = measure_normalization(front_end, data, num_clips)
        label = name.replace("_", " ")
        spectrogram = "the log spectrogram" if name == "front_end" else "the targets' spectrogram"
        found = f"{spectrogram} of {num_clips} training clips has mean {mean:.4f}, std {std:.4f}"
        if front_end.mean is None or front_end.std is None:
            log.info(
                "%s: they become `mean` and `std` of the %s and its configuration", found, label
            )
        elif abs(front_end.mean - mean) > std or not 0.5 < front_end.std / max(std, 1e-8) < 2:
            log.warning(
                "%s, but the %s states `mean` %g and `std` %g; set both to null to use the "
                "measured ones",
                found,
                label,
                front_end.mean,
                front_end.std,
            )
        return mean, std

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, JEPA)
        for name, front_end in _spectrograms(pl_module).items():
            stated = _stated(checkpoint, name)
            if stated is not None and front_end.mean is None:
                self._set(pl_module, name, *stated)

    def _set(self, model: JEPA, name: str, mean: float, std: float) -> None:
        """Set the numbers of the front end with a name of `_spectrograms`, and of its copy."""
        changed = [_spectrograms(model)[name]]
        if name == "front_end" and isinstance(model.target_front_end, PatchedSpectrogram):
            changed.append(model.target_front_end)
        for front_end in changed:
            front_end.mean, front_end.std = mean, std
        settings = dict(model.hparams[name])
        settings["init_args"] = {**settings["init_args"], "mean": mean, "std": std}
        model.save_hyperparameters({name: settings})
        init_args = self._config.model[name].init_args
        init_args.mean, init_args.std = mean, std


def measure_normalization(
    front_end: PatchedSpectrogram, data: AudioDataModule, num_clips: int
) -> tuple[float, float]:
    """Mean and standard deviation of the log spectrogram of the first `num_clips` training clips.

    Args:
        front_end: its `mean` and `std` are not used.
        data: after `setup`.
        num_clips: number of clips; clips that are too short for the transform are left out.

    Raises:
        UserError: if all clips are too short.
    """
    spectrogram = front_end.spectrogram

    def clips() -> Iterator[Tensor]:
        batches = first_batches(data.dataset("train", random_crops=True), num_clips, data.weights)
        for loaded in track_progress(batches, "Measuring the spectrogram", num_clips):
            batch = data.on_after_batch_transfer(loaded, 0)
            # Without the padding that the model does not see.
            length = None if batch.num_samples is None else int(batch.num_samples[0])
            if (waveform := batch.waveform[..., :length]).shape[-1] >= spectrogram.min_samples:
                yield waveform

    return measure_statistics(spectrogram, clips())


def _spectrograms(model: JEPA) -> dict[str, PatchedSpectrogram]:
    """The front ends that have `mean` and `std`, by the names of their settings."""
    parts = {"front_end": model.front_end, "target_front_end": model.fixed_front_end}
    return {name: part for name, part in parts.items() if isinstance(part, PatchedSpectrogram)}


def _stated_in(weights: str | None, name: str) -> tuple[float, float] | None:
    """`mean` and `std` of the checkpoint with the initial weights."""
    path = Path(weights or "")
    return _stated(read_checkpoint(path), name) if path.suffix == ".ckpt" else None


def _stated(checkpoint: dict[str, Any], name: str) -> tuple[float, float] | None:
    """`mean` and `std` in the hyper-parameters of a checkpoint."""
    front_end = checkpoint.get("hyper_parameters", {}).get(name)
    settings = front_end.get("init_args", {}) if isinstance(front_end, dict) else {}
    mean, std = settings.get("mean"), settings.get("std")
    return None if mean is None or std is None else (mean, std)
