"""Heads: small models that are trained on frozen features, and the choice of the best."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.probing.features import Features
from jepa_audio.probing.tasks.base import ProbeData

Device = torch.device | str


@dataclass(frozen=True)
class HeadInput:
    """The layers that a head reads, and how it combines them.

    Args:
        kind: "layer": one layer; "mix": the learned weighted sum of the layers; "reduce": the
            concatenation of the layers, reduced to the width of one by a linear map.
    """

    name: str
    layers: tuple[int, ...]
    kind: Literal["layer", "mix", "reduce"] = "layer"


@dataclass(frozen=True)
class FitContext:
    """What a preset needs to fit heads.

    Attributes:
        features: by split, at least "train" and "val".
        seeds: seeds of weights, batches and dropout; one head for each.
        description: text of the progress bar.
    """

    features: Mapping[str, Features]
    data: ProbeData
    layer_names: tuple[str, ...]
    seeds: Sequence[int]
    device: Device
    description: str

    def layer_inputs(self) -> list[HeadInput]:
        """One input for each layer."""
        return [HeadInput(name, (layer,)) for layer, name in enumerate(self.layer_names)]

    def validation_scores(self, logits: Float[Tensor, "rows K C"]) -> Float[np.ndarray, " K"]:
        """First metric of the task for K heads on the validation split; NaN becomes -inf."""
        scores = self.data.scores(logits, self.data.splits["val"], self.features["val"].rows)
        return np.nan_to_num(scores.double().cpu().numpy(), nan=-math.inf)


@dataclass(frozen=True)
class Head(ABC):
    """A trained head.

    Attributes:
        input: the layers that it reads.
        setting: its hyper-parameter: learning rate, penalty or number of neighbours.
        seed: seed of its training; heads without random draws only record it.
        valid: validation score; NaN until it is computed.
    """

    setting_name: ClassVar[str]

    input: HeadInput
    setting: float
    seed: int = field(default=0, kw_only=True)
    valid: float = field(default=math.nan, kw_only=True)

    @abstractmethod
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        """Logits of every row of a split."""


@dataclass(frozen=True)
class Choice:
    """The heads with the best input and setting, one for each seed.

    Attributes:
        inputs: all inputs that were compared.
        settings: all settings that were compared.
        valid: validation score for each input and setting, averaged over seeds.
    """

    heads: tuple[Head, ...]
    inputs: tuple[HeadInput, ...]
    settings: tuple[float, ...]
    valid: Float[np.ndarray, "inputs settings"]


def choose(heads: Sequence[Head]) -> Choice:
    """Choose the input and setting with the best mean validation score, the first of equal ones."""
    inputs = tuple(dict.fromkeys(head.input for head in heads))
    settings = tuple(dict.fromkeys(head.setting for head in heads))
    by_point: dict[tuple[HeadInput, float], list[Head]] = {}
    for head in heads:
        by_point.setdefault((head.input, head.setting), []).append(head)
    valid = np.array(
        [[np.mean([h.valid for h in by_point[one, s]]) for s in settings] for one in inputs]
    )
    row, column = np.unravel_index(valid.argmax(), valid.shape)
    return Choice(tuple(by_point[inputs[row], settings[column]]), inputs, settings, valid)
