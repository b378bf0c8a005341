"""Presets: published protocols that define which heads are fitted, and with which settings."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Literal

import numpy as np
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.features import Features, Preparation
from jepa_audio.probing.heads import FitContext, Head, HeadInput
from jepa_audio.probing.heads.attentive import fit_attentive
from jepa_audio.probing.heads.linear import NEIGHBOURS, NeighbourHead, fit_logistic, fit_ridge
from jepa_audio.probing.heads.stacked import MLPSettings, Select
from jepa_audio.probing.heads.sweep import fit_grid
from jepa_audio.probing.tasks.base import Protocol, Task
from jepa_audio.probing.tasks.labels import UNKNOWN, Rows

log = logging.getLogger(__name__)

HeadKind = Literal["mlp", "logistic", "ridge", "knn", "attentive"]
FittedHeads = Mapping[HeadKind, Sequence[Head]]


@dataclass(frozen=True)
class Preset(ABC):
    """The protocol of a probe; `select` chooses the epoch whose weights of a head are scored.

    `is_pooled`: whether a clip is one feature vector, so that the option `--pooling` has effect.
    """

    name: ClassVar[str]
    is_pooled: ClassVar[bool] = True
    select: Select = "best"

    def protocol(self, task: Task) -> Protocol:
        """Settings of this preset for a task.

        Raises:
            UserError: if the task has no settings for this preset.
        """
        if self.name not in task.protocols:
            known = ", ".join(task.protocols)
            raise UserError(f"{task.name} has no protocol {self.name}, it has {known}")
        return task.protocols[self.name]

    def preparation(self, task: Task) -> Preparation:
        """How the audio of a task becomes feature rows."""
        return Preparation(self.protocol(task).windows, task.grid_hz is not None, task.grid_hz)

    @abstractmethod
    def fit(self, fit: FitContext) -> FittedHeads:
        """Fit all heads of the search grid; they have validation scores, but none is chosen."""


class MarbleV1(Preset):
    """Constrained track of MARBLE v1 (Yuan et al., 2023, arXiv:2306.10548, appendix A).

    The heads have one hidden layer of 512 units. There is a head for each layer of the encoder and
    for the softmax-weighted sum of all blocks, each with six learning rates. The weights of the
    best validation epoch are scored. As in MARBLE, annotations in time use the weighted sum alone,
    unless the encoder has one block.
    """

    name = "marble-v1"

    @override
    def fit(self, fit: FitContext) -> FittedHeads:
        task, inputs = fit.data.task, fit.layer_inputs()
        blocks = tuple(i for i, name in enumerate(fit.layer_names) if name != "input")
        widths = set(fit.features["train"].widths(blocks))
        if len(widths) > 1:
            log.warning(
                "%s: no head on the weighted sum, because the layers have different widths: %s",
                fit.description,
                sorted(widths),
            )
        elif len(blocks) > 1:
            mix = HeadInput("weighted sum", blocks, "mix")
            inputs = [*inputs, mix] if task.grid_hz is None else [mix]
        return {"mlp": fit_grid(fit, inputs, MLPSettings(self.protocol(task), select=self.select))}


class MarbleV2(Preset):
    """MARBLE v2, for cross-checks: a linear map of all layers, and one learning rate.

    The checkpoint that MARBLE v2 calls the best one is that of the last epoch; `select` chooses the
    best or the last epoch. MARBLE v2 includes padding in its averages; this package does not.
    """

    name = "marble-v2"

    @override
    def preparation(self, task: Task) -> Preparation:
        # The frames of annotations in time are the time columns of the encoder: no `grid_hz`.
        return Preparation(self.protocol(task).windows, task.grid_hz is not None)

    @override
    def fit(self, fit: FitContext) -> FittedHeads:
        inputs = fit.layer_inputs()
        if len(inputs) > 1:
            inputs = [HeadInput("all layers", tuple(range(len(inputs))), "reduce")]
        settings = MLPSettings(self.protocol(fit.data.task), select=self.select)
        return {"mlp": fit_grid(fit, inputs, settings)}


class LinearPreset(Preset):
    """Deterministic heads on standardised features.

    A task takes seconds, so this preset can follow the progress of a model. The heads are logistic
    regression for classes, ridge regression for tags and numbers, and nearest neighbours.
    Annotations in time use ridge regression alone.
    """

    name = "linear"

    @override
    def protocol(self, task: Task) -> Protocol:
        """The windows are those of MARBLE v1."""
        return task.protocols.get("marble-v1") or super().protocol(task)

    @override
    def fit(self, fit: FitContext) -> FittedHeads:
        labels, per_frame = fit.data.labels, fit.data.task.grid_hz is not None
        inputs, device, num_outputs = fit.layer_inputs(), fit.device, labels.num_outputs
        train = fit.features["train"]
        numbers = targets = labels.row_targets(fit.data.splits["train"], train.rows)
        if labels.kind == "class":
            known = np.flatnonzero(targets.numpy() != UNKNOWN)
            rows = Rows(train.rows.item[known], train.rows.window[known], train.rows.seconds[known])
            train, targets = Features(train.layers, train.place[known], rows), targets[known]
            numbers = F.one_hot(targets, num_outputs).float()
        if labels.kind != "numbers":
            # ±2, so that the predictions are logits: near 0, sigmoid(x) is about 1/2 + x/4.
            numbers = 4 * (numbers - 0.5)
        fitted: dict[HeadKind, Sequence[Head]] = {}
        if labels.kind == "class" and not per_frame:
            fitted["logistic"] = fit_logistic(train, targets, num_outputs, inputs, device=device)
        else:
            fitted["ridge"] = fit_ridge(train, numbers, inputs, device=device)
        if not per_frame:
            sizes = tuple(k for k in NEIGHBOURS if k <= len(train)) or (1,)
            points = product(inputs, sizes)
            fitted["knn"] = [NeighbourHead(x, float(k), train, numbers) for x, k in points]
        for kind, heads in fitted.items():
            logits = (head.logits(fit.features["val"], device) for head in heads)
            scores = [float(fit.validation_scores(of_head)[0]) for of_head in logits]
            pairs = zip(heads, scores, strict=True)
            fitted[kind] = [replace(head, seed=fit.seeds[0], valid=score) for head, score in pairs]
        return fitted


class AttentivePreset(Preset):
    """Heads that pool the time columns of a clip by learned attention, then a linear map.

    All columns are stored, in 16 bits. The windows are those of MARBLE v1.
    """

    name = "attentive"
    is_pooled = False

    @override
    def protocol(self, task: Task) -> Protocol:
        if task.grid_hz is not None:
            raise UserError(f"{task.name} has labels in time, but attentive heads label clips")
        return task.protocols.get("marble-v1") or super().protocol(task)

    @override
    def preparation(self, task: Task) -> Preparation:
        return Preparation(self.protocol(task).windows, per_frame=True, by_window=True)

    @override
    def fit(self, fit: FitContext) -> FittedHeads:
        return {"attentive": fit_attentive(fit, fit.layer_inputs())}


def preset_of(name: str, select: Select = "best") -> Preset:
    """The preset that has this name.

    Raises:
        UserError: if no preset has this name, or if `select` is "last" and the preset is not
            marble-v2.
    """
    presets = {
        preset.name: preset for preset in (MarbleV1, LinearPreset, AttentivePreset, MarbleV2)
    }
    if name not in presets:
        raise UserError(f"`preset` is {name!r}, must be one of {', '.join(presets)}")
    if select != "best" and name != "marble-v2":
        raise UserError(f"`select` is {select!r}, but only the preset marble-v2 has this option")
    return presets[name](select)
