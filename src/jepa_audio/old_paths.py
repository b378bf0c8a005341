"""Replace class paths of earlier versions in checkpoints and saved configurations."""

from __future__ import annotations

from typing import Any

# Old module → current module. Files written by version 0.1.0 before it had the packages `steps`,
# `training`, `training.run` and so on name the old modules.
_MODULES = {
    "checkpointing": "training.run.checkpointing",
    "ema": "training.ema",
    "finite": "training.watching.finite_guard",
    "front_ends": "steps.front_ends",
    "front_ends.base": "steps.front_ends.base",
    "front_ends.spectrogram": "steps.front_ends.spectrogram",
    "front_ends.transforms": "steps.front_ends.transforms",
    "front_ends.waveform": "steps.front_ends.waveform",
    "jepa": "training.jepa",
    "losses": "steps.losses",
    "masking": "steps.masking",
    "masking.base": "steps.masking.base",
    "masking.blocks": "steps.masking.blocks",
    "masking.mixture": "steps.masking.mixture",
    "masking.random": "steps.masking.random",
    "masking.spans": "steps.masking.spans",
    "monitor": "training.watching.collapse_monitor",
    "positions": "steps.encoder.positions",
    "predictor": "steps.predictor",
    "schedules": "training.schedules",
    "sharding": "training.sharding",
    "targets": "steps.targets",
    "training.checkpointing": "training.run.checkpointing",
    "training.collapse_monitor": "training.watching.collapse_monitor",
    "training.finite_guard": "training.watching.finite_guard",
    "training.loss_log": "training.watching.loss_log",
    "training.progress": "training.watching.progress",
    "transformer": "steps.encoder.transformer",
}
_CLASSES = {
    "cli.RunProgressBar": "training.watching.progress.RunProgressBar",
    "data.scenes.Scenes": "data.scenes.scenes.SceneSettings",
    "transformer.Encoder": "steps.encoder.transformer.Transformer",
}


def current_path(path: str) -> str:
    """The current path of a class of this package; any other text is returned unchanged."""
    package, _, rest = path.partition(".")
    module, _, name = rest.rpartition(".")
    if package != "jepa_audio":
        return path
    if rest in _CLASSES:
        return f"{package}.{_CLASSES[rest]}"
    return f"{package}.{_MODULES[module]}.{name}" if module in _MODULES else path


def with_current_paths(settings: Any) -> Any:
    """A copy of nested settings in which every old class path is replaced by the current path.

    All texts are checked, not only the values of `class_path`, because settings may name a class
    without arguments by its path alone.
    """
    if isinstance(settings, dict):
        return {key: with_current_paths(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return type(settings)(with_current_paths(value) for value in settings)
    return current_path(settings) if isinstance(settings, str) else settings
