"""Resumed runs: which changed settings are in force from the next step, and which are refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from jepa_audio.old_paths import with_current_paths
from jepa_audio.steps.losses import CrossEntropy
from jepa_audio.training.device import move_steps
from jepa_audio.training.run.folder import RunFolderError

log = logging.getLogger(__name__)

_TRAINED = "the weights were trained with it: only a new run can change it"
_STATE = "the state of the optimizer depends on it"
# Settings that cannot change at a resume, and why; `docs/runs.md` explains them.
_REFUSED = {
    "model.front_end*": _TRAINED,
    "model.encoder*": _TRAINED,
    "model.predictor*": _TRAINED,
    "model.target_front_end*": _TRAINED,
    "model.distance.codebook*": _TRAINED,
    "model.distance.temperature": _TRAINED,
    "model.seed": "the weights of step 0, which baselines use again, were drawn from it",
    "model.decay_all": _STATE,
    "model.optimizer": _STATE,
    "model.optimizer.amsgrad": _STATE,
    "model.optimizer.capturable": _STATE,
    "model.optimizer.differentiable": _STATE,
    "model.optimizer.fused": _STATE,
    "data.seed": "the order of the samples depends on it: some would be used twice, others never",
}
# Distances with weights.
_WITH_WEIGHTS = {f"{CrossEntropy.__module__}.{CrossEntropy.__name__}"}
# Exceptions from `_REFUSED`: they change the training, not the function of the network.
_ALWAYS_IN_FORCE = ("*.drop_path", "*.checkpoint_every")
# Copies of other settings.
LINKED = (
    "model.front_end.embed_dim",
    "model.predictor.embed_dim",
    "model.target_front_end.embed_dim",
    "data.sample_rate",
    "data.num_channels",
    "trainer.default_root_dir",
    "checkpoint.dirpath",
)
# Without a value, a resumed run takes the value of its checkpoint.
_FROM_CHECKPOINT = tuple(
    f"model.{name}.{value}"
    for name in ("front_end", "target_front_end")
    for value in ("mean", "std")
)
# Settings of one start, not of the run.
OF_A_START = ("run_dir", "ckpt_path", "weights", "weights_only", "overwrite", "estimate", "config")


class Change(NamedTuple):
    """A setting that differs from the one in the checkpoint."""

    key: str
    new: Any
    old: Any

    def __str__(self) -> str:
        return f"`{self.key}` is {_short(self.new)}, the checkpoint has {_short(self.old)}"

    @property
    def reason(self) -> str:
        """Why the setting is refused; empty if it is in force."""
        if any(fnmatchcase(self.key, pattern) for pattern in _ALWAYS_IN_FORCE):
            return ""
        if self.key == "model.distance" and _WITH_WEIGHTS & {self.old, self.new}:
            return _TRAINED
        matches = (why for pattern, why in _REFUSED.items() if fnmatchcase(self.key, pattern))
        return next(matches, "")


def saved_settings(config: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The settings of a run that Lightning does not store in its checkpoints."""
    kept = {name: value for name, value in config.items() if name not in ("model", "data")}
    return {
        **{name: value for name, value in kept.items() if name not in OF_A_START},
        "num_processes": trainer.world_size,
    }


def find_changes(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> list[Change]:
    """The settings of `config` that differ from those of a checkpoint.

    A setting that exists in only one of them is left out: another version may have other settings.

    Args:
        checkpoint: the content of a checkpoint.
        config: complete settings: `model`, `data` and those of `saved_settings`.
    """
    old = {
        **checkpoint.get("settings", {}),
        "model": checkpoint["hyper_parameters"],
        "data": checkpoint.get("datamodule_hyper_parameters", {}),
    }
    return list(_differences(with_current_paths(old), config))


def _differences(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    old, new = _plain(old), _plain(new)
    if key in LINKED or key in OF_A_START:
        return
    is_class = isinstance(old, Mapping) and isinstance(new, Mapping)
    if is_class and old.get("class_path") != new.get("class_path"):
        yield Change(key, new.get("class_path"), old.get("class_path"))
    elif is_class and key != "data.root":
        for name in old:
            if name in new:
                child = key if name == "init_args" else f"{key}.{name}".strip(".")
                yield from _differences(old[name], new[name], child)
    elif key in ("data.root", "data.valid_root", "data.test_root"):
        if _absolute(old) != _absolute(new):
            yield Change(key, new, old)
    elif old != new and not (new is None and key in _FROM_CHECKPOINT):
        yield Change(key, new, old)


def _plain(value: Any) -> Any:
    """The same value for all spellings: lists for tuples, mappings for classes without settings."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and "class_path" in value:
        return {"init_args": {}, **value}
    return value


def _absolute(root: Any) -> Any:
    if isinstance(root, Mapping):
        return {_absolute(source): weight for source, weight in root.items()}
    if isinstance(root, list):
        return [_absolute(source) for source in root]
    return root if root is None or "://" in str(root) else os.path.abspath(str(root))  # noqa: PTH100


def _short(value: Any) -> str:
    text = value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_changes(changes: list[Change], only: str = "*") -> None:
    """Refuse changed settings that cannot be in force.

    Args:
        changes: all changed settings.
        only: pattern of the settings to check.

    Raises:
        RunFolderError: with each of these settings, its two values and the reason.
    """
    refused = [c for c in changes if c.reason and fnmatchcase(c.key, only)]
    if refused:
        text = "; ".join(f"{change} ({change.reason})" for change in refused)
        raise RunFolderError(f"the run cannot continue with other settings: {text}")


def describe_changes(
    changes: list[Change], checkpoint: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[str]:
    """One line for each setting that is in force from the next step on, and for the batch."""
    step = checkpoint["global_step"] + 1
    for change in changes:
        yield f"{change}: in force from step {step} on"
    old = {
        **checkpoint.get("settings", {}),
        "data": checkpoint.get("datamodule_hyper_parameters", {}),
    }
    if "num_processes" in old:
        before, now = _clips_per_step(old), _clips_per_step(config)
        if before != now:
            yield f"an optimizer step has {now} clips from step {step} on, before {before}"


def _clips_per_step(settings: Mapping[str, Any]) -> int:
    micro_batches = settings["trainer"]["accumulate_grad_batches"] * settings["num_processes"]
    return settings["data"]["batch_size"] * micro_batches


class ResumedSettings(Callback):
    """Puts the settings of the optimizer, its schedule and the accumulation in force at a resume.

    The checkpoint's state of the optimizer and of the scheduler contains the settings of the
    earlier start, and Lightning restores them.
    """

    def __init__(self) -> None:
        self._groups: list[list[dict[str, Any]]] = []
        self._is_resumed = False

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the micro-batches of the finished steps as if all steps had as many as the next."""
        self._is_resumed = True
        step, new = checkpoint["global_step"], trainer.accumulate_grad_batches
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        settings = checkpoint.get("settings", {}).get("trainer", {})
        if not progress or not step:
            return
        old = settings.get("accumulate_grad_batches") or progress["total"]["ready"] // step
        if old == new:
            return
        for counts in (progress["total"], progress["current"]):
            unfinished = counts["ready"] - counts["completed"]
            ready = counts["ready"] // old * new
            counts.update(dict.fromkeys(counts, ready), completed=ready - unfinished)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the settings of the optimizers before Lightning restores their state."""
        self._groups = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the restored settings by those of this start."""
        if not self._is_resumed:
            return
        self._is_resumed = False
        before = _learning_rates(trainer)
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
                if group.get("fused"):
                    move_steps(optimizer, group["params"])
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            assert isinstance(scheduler, LambdaLR)
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]
        now = _learning_rates(trainer)
        if trainer.is_global_zero and not np.allclose(before, now, rtol=1e-6, atol=0):
            log.warning(
                "the learning rate of step %d is %.6g, with the settings of the checkpoint %.6g",
                trainer.global_step + 1,
                now[0],
                before[0],
            )


def _learning_rates(trainer: Trainer) -> list[float]:
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return [float(group["lr"]) for group in groups]
