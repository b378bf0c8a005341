"""How the tokens of a clip become one feature vector, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.errors import UserError, did_you_mean
from jepa_audio.inference.features import Frequency, LayerFeatures

MAX_REGIONS = 100
_NAMES = ("mean", "thirds", "regions_N")
_PATTERN = re.compile(r"(?:(mean)|(thirds)|regions_(\d{1,9}))(_std)?(_change)?")


@dataclass(frozen=True)
class Pooling:
    """Statistics of the time columns of a clip; see `LayerFeatures.pool`.

    Args:
        regions: time regions whose means are kept; 0 keeps every time column and no statistics.
        deviation: also the standard deviation over the complete clip.
        change: also the mean absolute difference of neighbouring columns.
        frequency: how the frequency rows of a time column become one vector.
    """

    regions: int = 1
    deviation: bool = False
    change: bool = False
    frequency: Frequency = "mean"

    @property
    def time(self) -> str:
        """Name of what is kept of the time columns, as in the option `--pooling`."""
        name = {0: "frames", 1: "mean", 3: "thirds"}.get(self.regions, f"regions_{self.regions}")
        return name + "_std" * self.deviation + "_change" * self.change

    @property
    def name(self) -> str:
        """Name in the results, for example "thirds_std/concat"."""
        return f"{self.time}/{self.frequency}"

    def __call__(self, features: LayerFeatures) -> list[Float[Tensor, "B rows _"]]:
        """One row for each clip, or for each time column, of every layer."""
        if self.regions == 0:
            return features.over_time(self.frequency)
        statistics = {"deviation": self.deviation, "change": self.change}
        return [rows[:, None] for rows in features.pool(self.frequency, self.regions, **statistics)]

    def vectors(self, features: LayerFeatures) -> Float[Tensor, "B rows _"]:
        """The rows of all layers, concatenated."""
        return torch.cat(self(features), dim=-1)

    @property
    def frames(self) -> Pooling:
        """The pooling of labels in time: every time column."""
        return Pooling(0, frequency=self.frequency)


def parse_poolings(times: Sequence[str], frequencies: Sequence[str]) -> tuple[Pooling, ...]:
    """All combinations of the options `--pooling` and `--frequency`.

    Raises:
        UserError: for a name that does not exist, or that is given twice.
    """
    if unknown := [name for name in frequencies if name not in get_args(Frequency)]:
        known = ", ".join(get_args(Frequency))
        raise UserError(f"`frequency` is {unknown[0]!r}, must be one of {known}")
    pairs = product(map(_parse, times), cast(Sequence[Frequency], frequencies))
    poolings = [replace(pooling, frequency=frequency) for pooling, frequency in pairs]
    names = [pooling.name for pooling in poolings]
    if not names or len(set(names)) < len(names):
        raise UserError(f"`pooling` and `frequency` must name different poolings, got {names}")
    return tuple(poolings)


def parse_pooling(name: Any, argument: Literal["pooling", "pool"] = "pooling") -> Pooling:
    """The pooling of a name such as "mean_std" or "frames", with "/concat" for the frequency rows.

    Args:
        name: the name.
        argument: where it comes from, for messages: `pooling` of `embed`, which also takes
            "frames", or `pool` in Python.

    Raises:
        UserError: for a name that does not exist.
    """
    time, slash, frequency = name.partition("/") if isinstance(name, str) else (name, "", "")
    if slash and frequency not in get_args(Frequency):
        raise UserError(f"`{argument}` is {name!r}: after the slash, write mean or concat")
    chosen = cast(Frequency, frequency or "mean")
    if time == "frames":
        return Pooling(0, frequency=chosen)
    others = ", or frames" if argument == "pooling" else ""
    return replace(_parse(time, argument, others), frequency=chosen)


def _parse(name: Any, argument: str = "pooling", others: str = "") -> Pooling:
    found = _PATTERN.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        hint = did_you_mean(str(name), ("mean_std", "thirds", "thirds_std"))
        raise UserError(
            f"`{argument}` is {name!r}, must be one of {', '.join(_NAMES)}, which may end in "
            f"_std, _change or _std_change{others}{hint}"
        )
    mean, thirds, number, deviation, change = found.groups()
    regions = 1 if mean else 3 if thirds else int(number)
    if not 1 <= regions <= MAX_REGIONS:
        raise UserError(
            f"`{argument}` is {name!r}: the number of regions must be in 1-{MAX_REGIONS}"
        )
    return Pooling(regions, bool(deviation), bool(change))
