"""Heads without a seed: logistic and ridge regression and nearest neighbours on standardised features."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads.base import Head

log = logging.getLogger(__name__)

L2_STRENGTHS = (4e-4, 2e-3, 1e-2, 5e-2)
RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
NEIGHBOURS = (1, 5, 20)

_MAX_ITERATIONS = 500
_REFRESH = 20  # iterations between two looks at the curvature
_TOLERANCE = 1e-5  # of the Newton decrement, about twice what the mean loss can still fall
_ROWS_AT_ONCE = 8192
_QUERIES_AT_ONCE = 1024
_MAX_LOGITS = 2**26  # at once; eight such tensors are alive, 2 GiB


@dataclass(frozen=True)
class Standardisation:
    """Mean 0 and deviation 1 on the training rows; what is constant there but for rounding is 0 everywhere.

    Attributes:
        mean: of every feature.
        factor: one over the deviation, or 0.
    """

    mean: Float[Tensor, " D"]
    factor: Float[Tensor, " D"]

    @staticmethod
    def of(rows: Float[Tensor, "n D"]) -> Standardisation:
        """That of some rows, in 64 bits."""
        parts = rows.split(_ROWS_AT_ONCE)  # all of them at once would take twice their room again
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(rows)
        squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(
            dim=0
        )
        std = (squares / len(rows)).sqrt()
        factor = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std.clamp_min(1e-12), 0)
        return Standardisation(mean, factor)

    def __call__(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Of other rows."""
        return torch.cat(
            [
                ((part.double() - self.mean) * self.factor).float()
                for part in rows.split(_ROWS_AT_ONCE)
            ]
        )


@dataclass(frozen=True)
class LinearMap:
    """Logits that are linear in standardised features.

    Attributes:
        scale: of the features.
        weight: by feature and output.
        bias: by output.
    """

    scale: Standardisation
    weight: Float[Tensor, "D C"]
    bias: Float[Tensor, " C"]

    def __call__(
        self, rows: Float[Tensor, "n D"], device: torch.device | str = "cpu"
    ) -> Float[Tensor, "n C"]:
        """Of some rows."""
        return torch.addmm(
            self.bias.to(device), self.scale(rows).to(device), self.weight.to(device)
        )


@dataclass(frozen=True)
class LinearHead(Head):
    """Logits are linear in the features.

    Attributes:
        read: features to logits.
    """

    read: LinearMap

    def logits(
        self, features: Features, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "rows 1 C"]:
        """See `Head`."""
        rows = (slice(row, row + _ROWS_AT_ONCE) for row in range(0, len(features), _ROWS_AT_ONCE))
        return torch.cat(
            [self.read(features.of(self.source.layers[0], some), device) for some in rows]
        )[:, None]


@dataclass(frozen=True)
class NeighbourHead(Head):
    """What the nearest training rows are labelled, by cosine of standardised features.

    Attributes:
        train: training rows; those of the one layer that is read are prepared when asked.
        votes: what each training row says, by output.
    """

    train: Features
    votes: Float[Tensor, "n C"]

    def logits(
        self, features: Features, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "rows 1 C"]:
        """Mean of the votes of the nearest rows; where two outputs have as many, the nearer ones win."""
        votes, k = self.votes.to(device), int(self.setting)
        of_layer = self.train.of(self.source.layers[0])
        scale = Standardisation.of(of_layer)
        train = F.normalize(scale(of_layer).to(device), dim=1)
        ahead = 1e-4 * 0.5 ** torch.arange(1, k + 1, dtype=torch.float64, device=device)
        rows = range(0, len(features), _QUERIES_AT_ONCE)
        parts = []
        for row in rows:
            query = scale(
                features.of(self.source.layers[0], slice(row, row + _QUERIES_AT_ONCE))
            ).to(device)
            nearest = (F.normalize(query, dim=1) @ train.T).topk(k, dim=1).indices
            parts.append(
                (votes[nearest].double() * (1 + ahead)[:, None]).sum(dim=1) / (1 + ahead).sum()
            )
        return torch.cat(parts).float()[:, None]


def fit_logistic(
    train: Features,
    labels: Int64[Tensor, " n"],
    num_classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    device: torch.device | str = "cpu",
) -> Iterator[list[LinearMap]]:
    """Multinomial logistic regression on standardised features: for each layer one map for every strength.

    The objective is the mean cross-entropy plus `strength / 2` times the squared weights, the bias
    free: scikit-learn's `LogisticRegression` with `C = 1 / (n * strength)`. It is convex, so
        nothing is drawn.
    """
    target = F.one_hot(labels.to(device), num_classes).float()
    l2 = torch.tensor(strengths, device=device, dtype=torch.float32)
    at_once = max(1, _MAX_LOGITS // (len(labels) * len(strengths) * num_classes))
    for first in range(0, len(train.layers), at_once):
        rows = [train.of(layer) for layer in range(first, min(first + at_once, len(train.layers)))]
        scales = [Standardisation.of(layer) for layer in rows]
        rotated = [
            _rotated(scale(layer).to(device)) for scale, layer in zip(scales, rows, strict=True)
        ]
        weight = _logistic_regression(_stacked([x for x, _ in rotated]), target, l2)
        for of_layer, scale, (_, axes) in zip(weight, scales, rotated, strict=True):
            bias, in_axes = of_layer[0], of_layer[1 : axes.shape[1] + 1]  # [K, C], [axes, K, C]
            yield [LinearMap(scale, axes @ in_axes[:, k], bias[k]) for k in range(len(strengths))]


def fit_ridge(
    train: Features,
    targets: Float[Tensor, "n C"],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
    device: torch.device | str = "cpu",
) -> Iterator[list[LinearMap]]:
    """Ridge regression on standardised features: for each layer one map for every strength.

    The objective is the mean squared error plus `strength` times the squared weights, the bias
    free.
    """
    centred = (targets - targets.mean(dim=0)).double().to(device)
    for layer in range(len(train.layers)):
        rows = train.of(layer)
        scale = Standardisation.of(rows)
        x = scale(rows).to(device)
        spectrum, axes = torch.linalg.eigh(_accumulated(x, x) / len(x))
        along = axes.T @ (_accumulated(x, centred) / len(x))
        weights = [
            axes @ (along / (spectrum.clamp_min(0) + strength)[:, None]) for strength in strengths
        ]
        bias = targets.mean(dim=0).to(device)
        yield [LinearMap(scale, weight.float(), bias) for weight in weights]


def _accumulated(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"]) -> Float[Tensor, "D C"]:
    """xᵀy in double precision, some rows at a time."""
    chunks = zip(x.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True)
    return torch.stack([a.double().T @ b.double() for a, b in chunks]).sum(dim=0)


def _rotated(train: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n E"], Float[Tensor, "D A"]]:
    """The rows in their principal axes, with a column of ones for the bias; and the axes.

    The penalty does not know a rotation, and weights outside of the space of the training rows are
    zero: the solution is the same, but the axes are uncorrelated and no more than there are rows.
    """
    if train.shape[0] < train.shape[1]:
        axes = torch.linalg.svd(train, full_matrices=False).Vh.T
    else:
        axes = torch.linalg.eigh(train.T @ train).eigenvectors
    return F.pad(train @ axes, (1, 0), value=1.0), axes


def _stacked(matrices: Sequence[Tensor]) -> Float[Tensor, "L n E"]:
    """Narrow matrices are filled up with zeros, to which the penalty gives no weight."""
    width = max(matrix.shape[1] for matrix in matrices)
    return torch.stack([F.pad(matrix, (0, width - matrix.shape[1])) for matrix in matrices])


def _logistic_regression(
    x: Float[Tensor, "L n E"], target: Float[Tensor, "n C"], l2: Float[Tensor, " K"]
) -> Float[Tensor, "L E K C"]:
    """Weights of L * K independent problems, the first row of E being the bias.

    Conjugate gradients (Polak & Ribière, 1969), preconditioned by the diagonal of the Hessian,
    which says most of it because the columns of `x` are uncorrelated.
    """
    shape, per_clip = (len(l2), target.shape[1]), 1 / len(target)
    penalty = l2[:, None].repeat(x.shape[2], 1, 1)  # [E, K, 1]
    penalty[0] = 0
    towards = (x.mT @ target * per_clip)[:, :, None]  # [L, E, 1, C]
    weight = direction = x.new_zeros(len(x), x.shape[2], *shape)
    logits = x.new_zeros(len(x), x.shape[1], *shape)
    gradient, decrement = weight, x.new_ones(())
    for iteration in range(_MAX_ITERATIONS):
        share = logits.softmax(dim=-1)
        before, gradient = gradient, _down(x, share) * per_clip - towards + penalty * weight
        if restart := iteration % _REFRESH == 0:
            curvature = _down(x.square(), share * (1 - share)) * per_clip + penalty
            curvature = curvature.clamp_min(torch.finfo(x.dtype).eps)
        step = gradient / curvature
        last, decrement = decrement, _dot(gradient, step)
        if decrement.max() < _TOLERANCE:
            return weight
        momentum = (
            0 if restart else (_dot(gradient - before, step) / last.clamp_min(1e-30)).clamp_min(0)
        )
        direction = momentum * direction - step
        direction = torch.where(_dot(gradient, direction) < 0, direction, -step)
        change = _up(x, direction)
        slope, ridge = _dot(gradient, direction), _dot(penalty * direction, direction)
        size = _step_size(logits, share, change, slope, ridge)
        weight, logits = weight + size * direction, logits + size * change
    log.warning(
        "logistic regression stopped after %d iterations at %.1e", _MAX_ITERATIONS, decrement.max()
    )
    return weight


def _step_size(
    logits: Tensor, share: Tensor, change: Tensor, slope: Tensor, ridge: Tensor
) -> Tensor:
    """How far to go along `change`: a Newton step, halved until the loss falls, `[L, 1, K, 1]`."""
    per_clip = 1 / logits.shape[1]
    mean = (share * change).sum(dim=-1, keepdim=True)  # [L, n, K, 1]
    second_moment = _dot(share * change, change)
    bend = (second_moment - mean.square().sum(dim=1, keepdim=True)) * per_clip + ridge
    size = -slope / bend.clamp_min(1e-30)
    linear = slope - mean.sum(dim=1, keepdim=True) * per_clip
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    for _ in range(30):
        moved = (logits + size * change).logsumexp(dim=-1, keepdim=True)
        loss = (
            (moved - normaliser).mean(dim=1, keepdim=True)
            + size * linear
            + 0.5 * size.square() * ridge
        )
        falls = loss <= 1e-4 * size * slope + 1e-6  # float32 knows the loss no better
        if falls.all():
            break
        size = torch.where(falls, size, size / 2)
    return size


def _up(x: Float[Tensor, "L n E"], weight: Float[Tensor, "L E K C"]) -> Float[Tensor, "L n K C"]:
    return (x @ weight.flatten(2)).unflatten(2, weight.shape[2:])


def _down(
    x: Float[Tensor, "L n E"], of_clips: Float[Tensor, "L n K C"]
) -> Float[Tensor, "L E K C"]:
    return _up(x.mT, of_clips)


def _dot(a: Float[Tensor, "L R K C"], b: Float[Tensor, "L R K C"]) -> Float[Tensor, "L 1 K 1"]:
    """Of each problem on its own."""
    return (a * b).sum(dim=(1, 3), keepdim=True)
