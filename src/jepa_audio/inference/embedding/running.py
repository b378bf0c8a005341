"""The pooling of a long clip whose time columns come in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.inference.pooling import Pooling


class RunningPool:
    """Statistics of columns that are added in order; equal to `LayerFeatures.pool` of all of them.

    Sums are float64 on the CPU.

    Args:
        pooling: what is computed; not "frames".
        num_columns: number of columns of the complete clip.
    """

    def __init__(self, pooling: Pooling, num_columns: int) -> None:
        count, regions = num_columns, pooling.regions
        self._pooling, self._count, self._done = pooling, num_columns, 0
        # First column and end of every region, as in `LayerFeatures.pool`.
        self._bounds = [
            (g * count // regions, -(-(g + 1) * count // regions)) for g in range(regions)
        ]
        self._sums: list[dict[str, Tensor]] = []
        self._last: list[Tensor] = []

    def add(self, layers: Sequence[Float[Tensor, "T E"]]) -> None:
        """Add the next columns of every layer."""
        columns_of = [layer.double().cpu() for layer in layers]
        if not self._sums:
            self._sums = [
                {
                    "regions": layer.new_zeros(len(self._bounds), layer.shape[1]),
                    "mean": layer.new_zeros(layer.shape[1]),
                    "squares": layer.new_zeros(layer.shape[1]),
                    "change": layer.new_zeros(layer.shape[1]),
                }
                for layer in columns_of
            ]
            self._last = [layer[:1] for layer in columns_of]
        done, new = self._done, len(columns_of[0])
        for number, (layer, sums) in enumerate(zip(columns_of, self._sums, strict=True)):
            for region, (first, end) in enumerate(self._bounds):
                part = layer[max(first - done, 0) : max(end - done, 0)]
                sums["regions"][region] += part.sum(dim=0) / (end - first)
            # The pairwise update of Chan, Golub & LeVeque (1983).
            difference = layer.mean(dim=0) - sums["mean"]
            sums["squares"] += layer.var(dim=0, correction=0) * new
            sums["squares"] += difference**2 * (done * new / (done + new))
            sums["mean"] += difference * (new / (done + new))
            steps = torch.cat([self._last[number], layer]).diff(dim=0)
            sums["change"] += steps.abs().sum(dim=0)
            self._last[number] = layer[-1:]
        self._done += new

    def vector(self) -> Float[Tensor, " _"]:
        """The vector of all layers, in the order of `Pooling.vectors`."""
        assert self._done == self._count
        parts = []
        for sums in self._sums:
            parts.append(sums["regions"].flatten())
            if self._pooling.deviation:
                parts.append((sums["squares"] / self._count).sqrt())
            if self._pooling.change:
                parts.append(sums["change"] / max(self._count - 1, 1))
        return torch.cat(parts).float()
