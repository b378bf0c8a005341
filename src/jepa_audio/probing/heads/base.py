"""What a head is, once trained: it reads some layers, and says something of every row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.probing.features import Features


@dataclass(frozen=True)
class Source:
    """What a head reads.

    Args:
        name: in the results.
        layers: places of the layers.
        kind: "layer" for one, "mix" for their learnt sum, "reduce" for all of them side by side.
    """

    name: str
    layers: tuple[int, ...]
    kind: Literal["layer", "mix", "reduce"] = "layer"


@dataclass(frozen=True)
class Head(ABC):
    """One point of the grid, trained.

    Attributes:
        source: what it reads.
        setting: its hyper-parameter: learning rate, penalty or number of neighbours.
        seed: of all that was drawn.
        valid: its validation score.
    """

    source: Source
    setting: float
    seed: int
    valid: float

    @abstractmethod
    def logits(
        self, features: Features, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "rows 1 C"]:
        """What it says of every row of a split."""


@dataclass(frozen=True)
class Choice:
    """The source and setting that were best on the validation split, mean over seeds.

    Attributes:
        heads: one for each seed.
        sources: all that were tried.
        settings: all that were tried.
        valid: validation score by source and setting, mean over seeds.
    """

    heads: tuple[Head, ...]
    sources: tuple[Source, ...]
    settings: tuple[float, ...]
    valid: Float[np.ndarray, "sources settings"]


def choose(heads: Sequence[Head]) -> Choice:
    """Of equally good ones, the first."""
    sources = tuple(dict.fromkeys(head.source for head in heads))
    settings = tuple(dict.fromkeys(head.setting for head in heads))
    points: dict[tuple[Source, float], list[Head]] = {}
    for head in heads:
        points.setdefault((head.source, head.setting), []).append(head)
    valid = np.array(
        [[np.mean([h.valid for h in points[source, s]]) for s in settings] for source in sources]
    )
    source, setting = np.unravel_index(valid.argmax(), valid.shape)
    return Choice(tuple(points[sources[source], settings[setting]]), sources, settings, valid)
