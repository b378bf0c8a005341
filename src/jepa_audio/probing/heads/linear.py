"""Heads without random draws, on standardised features: ridge regression and nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads.base import Device, Head, HeadInput

RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
NEIGHBOURS = (1, 5, 20)

_ROWS_PER_CHUNK = 8192
_QUERIES_PER_CHUNK = 1024


@dataclass(frozen=True)
class Standardisation:
    """Scaling to mean 0 and deviation 1 on the training rows, computed in double precision.

    Features that are constant on the training rows, except for rounding, become 0 everywhere.

    Attributes:
        mean: mean of every feature.
        factor: reciprocal of the deviation, or 0.
    """

    mean: Float[Tensor, " D"]
    factor: Float[Tensor, " D"]

    @staticmethod
    def of(rows: Float[Tensor, "n D"]) -> Standardisation:
        """Mean and deviation of training rows."""
        # In chunks: a double copy of all rows would take twice their memory.
        chunks = rows.split(_ROWS_PER_CHUNK)
        sums = [chunk.double().sum(dim=0) for chunk in chunks]
        mean = torch.stack(sums).sum(dim=0) / len(rows)
        squares = [(chunk.double() - mean).square().sum(dim=0) for chunk in chunks]
        std = (torch.stack(squares).sum(dim=0) / len(rows)).sqrt()
        factor = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std.clamp_min(1e-12), 0)
        return Standardisation(mean, factor)

    def __call__(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Standardise rows."""
        chunks = rows.split(_ROWS_PER_CHUNK)
        return torch.cat([((c.double() - self.mean) * self.factor).float() for c in chunks])


@dataclass(frozen=True)
class LinearHead(Head):
    """Logits that are linear in the standardised features of one layer.

    Attributes:
        scale: standardisation of the features.
        weight: weight for each feature and output.
        bias: bias of each output.
    """

    setting_name = "penalty"

    scale: Standardisation
    weight: Float[Tensor, "D C"]
    bias: Float[Tensor, " C"]

    @override
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        weight, bias = self.weight.to(device), self.bias.to(device)
        chunks = _chunks(features, self.input.layers[0], _ROWS_PER_CHUNK)
        logits = [torch.addmm(bias, self.scale(rows).to(device), weight) for rows in chunks]
        return torch.cat(logits)[:, None]


@dataclass(frozen=True)
class NeighbourHead(Head):
    """Mean target of the nearest training rows, by cosine of the standardised features.

    Attributes:
        train: features of the training rows.
        votes: target of each training row, for each output.
    """

    setting_name = "neighbours"

    train: Features
    votes: Float[Tensor, "n C"]

    @override
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        votes, num_neighbours = self.votes.to(device), int(self.setting)
        layer = self.input.layers[0]
        train_rows = self.train.read(layer)
        scale = Standardisation.of(train_rows)
        train = F.normalize(scale(train_rows).to(device), dim=1)
        # A nearer row counts a little more, so it wins a tie between two outputs.
        rank = torch.arange(1, num_neighbours + 1, dtype=torch.float64, device=device)
        weight = 1 + 1e-4 * 0.5**rank
        logits = []
        for rows in _chunks(features, layer, _QUERIES_PER_CHUNK):
            cosine = F.normalize(scale(rows).to(device), dim=1) @ train.T
            nearest = cosine.topk(num_neighbours, dim=1).indices
            logits.append((votes[nearest].double() * weight[:, None]).sum(dim=1) / weight.sum())
        return torch.cat(logits).float()[:, None]


def fit_ridge(
    train: Features,
    targets: Float[Tensor, "n C"],
    inputs: Sequence[HeadInput],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
    *,
    seed: int = 0,
    device: Device = "cpu",
) -> list[LinearHead]:
    """Ridge regression on each single-layer input, with each strength.

    The objective is the mean squared error plus `strength` times the squared weights; the bias is
    not penalised. One eigendecomposition in double precision serves all strengths of a layer. The
    validation score of the heads is NaN; `seed` is only recorded.
    """
    mean = targets.mean(dim=0)
    centred = (targets - mean).double().to(device)
    heads = []
    for head_input in inputs:
        rows = train.read(head_input.layers[0])
        scale = Standardisation.of(rows)
        x = scale(rows).to(device)
        spectrum, axes = torch.linalg.eigh(_cross_product(x, x) / len(x))
        projected = axes.T @ (_cross_product(x, centred) / len(x))
        for strength in strengths:
            weight = axes @ (projected / (spectrum.clamp_min(0) + strength)[:, None])
            fitted = scale, weight.float(), mean.to(device)
            heads.append(LinearHead(head_input, strength, seed, float("nan"), *fitted))
    return heads


def _cross_product(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"]) -> Float[Tensor, "D C"]:
    """xᵀy in double precision, in chunks of rows."""
    chunks = zip(x.split(_ROWS_PER_CHUNK), y.split(_ROWS_PER_CHUNK), strict=True)
    return torch.stack([a.double().T @ b.double() for a, b in chunks]).sum(dim=0)


def _chunks(features: Features, layer: int, size: int) -> Iterator[Float[Tensor, "n D"]]:
    for start in range(0, len(features), size):
        yield features.read(layer, slice(start, start + size))
