"""Protocols by name: how heads are trained and chosen, so that a number can be held against others."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.probing.features import Features, Preparation
from jepa_audio.probing.heads import Head, Source
from jepa_audio.probing.heads.linear import (
    L2_STRENGTHS,
    NEIGHBOURS,
    RIDGE_STRENGTHS,
    LinearHead,
    LinearMap,
    NeighbourHead,
    fit_logistic,
    fit_ridge,
)
from jepa_audio.probing.heads.sweep import Batches, Select, Training, fit_grid
from jepa_audio.probing.tasks.base import ProbeData, Protocol, Task
from jepa_audio.probing.tasks.labels import UNKNOWN, Rows

log = logging.getLogger(__name__)

Kind = Literal["mlp", "logistic", "ridge", "knn"]
SETTING_NAMES: dict[Kind, str] = {
    "mlp": "learning rate",
    "logistic": "penalty",
    "ridge": "penalty",
    "knn": "neighbours",
}


@dataclass(frozen=True)
class Fit:
    """What a preset is given.

    Attributes:
        features: of the splits "train" and "val".
        data: the task.
        layer_names: of the encoder.
        seeds: of everything that is drawn.
        device: where heads are trained.
        description: of progress bars.
    """

    features: Mapping[str, Features]
    data: ProbeData
    layer_names: tuple[str, ...]
    seeds: Sequence[int]
    device: torch.device | str
    description: str

    def each_layer(self) -> list[Source]:
        """One source for every layer."""
        return [Source(name, (layer,)) for layer, name in enumerate(self.layer_names)]

    def all_blocks(self) -> tuple[int, ...]:
        """The layers behind the first: what enters the encoder is no block."""
        return tuple(layer for layer, name in enumerate(self.layer_names) if name != "input")


class Preset(ABC):
    """A protocol.

    Attributes:
        name: in the results.
        select: which state of a head is scored.
    """

    name: str
    select: Select = "best"

    def protocol(self, task: Task) -> Protocol:
        """What the preset takes from the task; `ValueError` if the task knows nothing of it."""
        if self.name not in task.protocols:
            raise UserError(
                f"{task.name} has no protocol {self.name}, it has {', '.join(task.protocols)}"
            )
        return task.protocols[self.name]

    def preparation(self, task: Task) -> Preparation:
        """How audio becomes rows."""
        return Preparation(self.protocol(task).windows, task.grid_hz is not None, task.grid_hz)

    @abstractmethod
    def fit(self, fit: Fit) -> dict[Kind, Sequence[Head]]:
        """The whole grid of each kind of head, with validation scores; nothing is chosen yet."""


class MarbleV1(Preset):
    """The constrained track of MARBLE's first version (Yuan et al., 2023, arXiv:2306.10548, appendix A).

    One hidden layer of 512 units on each layer and on the softmax-weighted sum of all blocks, six
    learning rates; the best validation epoch is kept. For annotations in time the weighted sum
    alone, as there, unless the encoder has one layer.
    """

    name = "marble-v1"

    def fit(self, fit: Fit) -> dict[Kind, Sequence[Head]]:
        """See `Preset`."""
        task, blocks = fit.data.task, fit.all_blocks()
        each = fit.each_layer()
        widths = {fit.features["train"].layers[layer].shape[1] for layer in blocks}
        mix = (
            [Source("weighted sum", blocks, "mix")] if len(blocks) > 1 and len(widths) == 1 else []
        )
        if len(widths) > 1:
            log.warning(
                "%s: layers of widths %s have no weighted sum", fit.description, sorted(widths)
            )
        sources = mix if mix and task.grid_hz is not None else each + mix
        return {"mlp": _grid(fit, sources, _training(self.protocol(task), self.select))}


class MarbleV2(Preset):
    """MARBLE's second version, for cross-checks: all layers side by side through a linear map, one learning rate.

    Its own checkpoint called best is that of the last epoch; `select` says which is wanted.
    Padding, which enters its averages, does not enter ours.
    """

    name = "marble-v2"

    def __init__(self, select: Select = "best") -> None:
        self.select = select

    def preparation(self, task: Task) -> Preparation:
        """How audio becomes rows; annotations in time are put on the encoder's own columns."""
        return Preparation(self.protocol(task).windows, task.grid_hz is not None)

    def fit(self, fit: Fit) -> dict[Kind, Sequence[Head]]:
        """See `Preset`."""
        layers = tuple(range(len(fit.layer_names)))
        one = len(layers) == 1
        source = (
            Source(fit.layer_names[0], layers) if one else Source("all layers", layers, "reduce")
        )
        return {"mlp": _grid(fit, [source], _training(self.protocol(fit.data.task), self.select))}


class Linear(Preset):
    """Heads without a seed on standardised features, for tracking: seconds a task.

    Logistic regression for classes, ridge regression for tags and numbers; and nearest neighbours.
    Annotations in time get ridge regression alone.
    """

    name = "linear"

    def protocol(self, task: Task) -> Protocol:
        """Windows as in MARBLE v1."""
        return task.protocols.get("marble-v1") or super().protocol(task)

    def fit(self, fit: Fit) -> dict[Kind, Sequence[Head]]:
        """See `Preset`."""
        kind, in_time = fit.data.labels.kind, fit.data.task.grid_hz is not None
        fitted: dict[Kind, Sequence[Head]] = {}
        if kind == "class" and not in_time:
            fitted["logistic"] = _logistic(fit)
        else:
            fitted["ridge"] = _ridge(fit)
        return fitted if in_time else fitted | {"knn": _neighbours(fit)}


def preset_of(name: str, select: Select = "best") -> Preset:
    """By name; `ValueError` if there is none, or if it has no last state to select."""
    presets: dict[str, Preset] = {
        "marble-v1": MarbleV1(),
        "linear": Linear(),
        "marble-v2": MarbleV2(select),
    }
    if name not in presets:
        raise UserError(f"`preset` is {name!r}, must be one of {', '.join(presets)}")
    if select != "best" and name != "marble-v2":
        raise UserError(
            f"`select` is {select!r}: {name} scores the best state; only marble-v2 lets choose"
        )
    return presets[name]


def _training(protocol: Protocol, select: Select) -> Training:
    return Training(
        protocol.learning_rates,
        protocol.batch_size,
        protocol.max_epochs,
        protocol.stop_patience,
        protocol.plateau_patience,
        protocol.plateau_factor,
        select=select,
    )


def _grid(fit: Fit, sources: Sequence[Source], training: Training) -> Sequence[Head]:
    return fit_grid(
        fit.features, fit.data, sources, training, fit.seeds, fit.device, fit.description
    )


def _known(fit: Fit) -> tuple[Features, Tensor]:
    """The training rows that have a label, and the labels."""
    train = fit.features["train"]
    targets = fit.data.labels.row_targets(fit.data.splits["train"], train.rows)
    if fit.data.labels.kind != "class":
        return train, targets
    known = np.flatnonzero(targets.numpy() != UNKNOWN)
    rows = Rows(train.rows.item[known], train.rows.window[known], train.rows.seconds[known])
    return Features(train.layers, train.place[known], rows), targets[known]


def _as_numbers(fit: Fit, targets: Tensor) -> Float[Tensor, "n C"]:
    """Targets as regression takes them: classes and tags so that their logits' signs say what is likely."""
    kind = fit.data.labels.kind
    if kind == "numbers":
        return targets
    shares = F.one_hot(targets, fit.data.labels.num_outputs).float() if kind == "class" else targets
    return 4 * (shares - 0.5)  # the sigmoid's slope at 0 is a quarter


def _logistic(fit: Fit) -> list[Head]:
    train, labels = _known(fit)
    return _linear_heads(
        fit,
        L2_STRENGTHS,
        fit_logistic(train, labels, fit.data.labels.num_outputs, device=fit.device),
    )


def _ridge(fit: Fit) -> list[Head]:
    train, targets = _known(fit)
    return _linear_heads(
        fit, RIDGE_STRENGTHS, fit_ridge(train, _as_numbers(fit, targets), device=fit.device)
    )


def _linear_heads(
    fit: Fit, strengths: Sequence[float], fitted: Iterable[Sequence[LinearMap]]
) -> list[Head]:
    return [
        _scored(fit, LinearHead(source, strength, fit.seeds[0], 0.0, read))
        for source, maps in zip(fit.each_layer(), fitted, strict=True)
        for strength, read in zip(strengths, maps, strict=True)
    ]


def _neighbours(fit: Fit) -> list[Head]:
    train, targets = _known(fit)
    votes = _as_numbers(fit, targets)
    numbers = tuple(k for k in NEIGHBOURS if k <= len(train)) or (1,)
    return [
        _scored(fit, NeighbourHead(source, float(k), fit.seeds[0], 0.0, train, votes))
        for source in fit.each_layer()
        for k in numbers
    ]


def _scored(fit: Fit, head: Head) -> Head:
    valid = Batches(fit.features["val"], fit.data, "val", fit.device)
    return replace(head, valid=float(valid.scores(head.logits(fit.features["val"], fit.device))[0]))
