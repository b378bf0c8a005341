"""Heads without random draws: ridge and logistic regression, and nearest neighbours.

Logistic regression fits many layers and penalties at once. 52 problems (13 layers of 768, 2,000
rows, 11 classes, four penalties) take 9 to 12 s of CPU time; one by one in scikit-learn they take
31 s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import Device, Head, HeadInput

log = logging.getLogger(__name__)

RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
LOGISTIC_STRENGTHS = (4e-4, 2e-3, 1e-2, 5e-2)
NEIGHBOURS = (1, 5, 20)

_ROWS_PER_CHUNK = 8192
_QUERIES_PER_CHUNK = 1024

# Of logistic regression.
_MAX_ITERATIONS = 500
_ITERATIONS_PER_HESSIAN = 20
# Newton decrement: about twice the amount by which the mean loss can still fall.
_TOLERANCE = 1e-5
# Logits that are computed at once; eight such tensors are alive: 2 GiB.
_MAX_LOGITS = 2**26
# Features of layers that are solved at once; four such tensors are alive: 4 GiB.
_MAX_VALUES = 2**28


class Standardisation:
    """Scaling to mean 0 and deviation 1 on the training rows, computed in double precision.

    `factor` is the reciprocal of the deviation. It is 0 for features that are constant on the
    training rows, except for rounding: they become 0 everywhere.
    """

    def __init__(self, rows: Float[Tensor, "n D"]) -> None:
        # In chunks: a double copy of all rows would take twice their memory.
        chunks = rows.split(_ROWS_PER_CHUNK)
        sums = [chunk.double().sum(dim=0) for chunk in chunks]
        self.mean = torch.stack(sums).sum(dim=0) / len(rows)
        squares = [(chunk.double() - self.mean).square().sum(dim=0) for chunk in chunks]
        std = (torch.stack(squares).sum(dim=0) / len(rows)).sqrt()
        is_varying = std > 1e-6 * self.mean.abs() + 1e-12
        self.factor = torch.where(is_varying, 1 / std.clamp_min(1e-12), 0)

    def __call__(self, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Standardise rows."""
        chunks = rows.split(_ROWS_PER_CHUNK)
        return torch.cat([((c.double() - self.mean) * self.factor).float() for c in chunks])


@dataclass(frozen=True)
class LinearHead(Head):
    """Logits that are linear in the features of one layer, which `scale` standardises."""

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

    `votes` has the target of each row of `train`, for each output.
    """

    setting_name = "neighbours"

    train: Features
    votes: Float[Tensor, "n C"]

    @override
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        votes, num_neighbours = self.votes.to(device), int(self.setting)
        layer = self.input.layers[0]
        train_rows = self.train.read(layer)
        scale = Standardisation(train_rows)
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
    device: Device = "cpu",
) -> list[LinearHead]:
    """Ridge regression on each single-layer input, with each of `RIDGE_STRENGTHS`.

    The objective is the mean squared error plus `strength` times the squared weights; the bias is
    not penalised. One eigendecomposition in double precision serves all strengths of a layer.
    """
    mean = targets.mean(dim=0)
    centred = (targets - mean).double().to(device)
    heads = []
    for head_input in inputs:
        rows = train.read(head_input.layers[0])
        scale = Standardisation(rows)
        x = scale(rows).to(device)
        basis = None
        if len(x) < x.shape[1]:
            # The optimal weights lie in the space of the training rows: see `_rotate`.
            x, basis = _principal_axes(x)
        spectrum, axes = torch.linalg.eigh(_cross_product(x, x) / len(x))
        projected = axes.T @ (_cross_product(x, centred) / len(x))
        for strength in RIDGE_STRENGTHS:
            weight = (axes @ (projected / (spectrum.clamp_min(0) + strength)[:, None])).float()
            weight = weight if basis is None else basis @ weight
            heads.append(LinearHead(head_input, strength, scale, weight, mean.to(device)))
    return heads


def _cross_product(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"]) -> Float[Tensor, "D C"]:
    """xᵀy in double precision, in chunks of rows."""
    chunks = zip(x.split(_ROWS_PER_CHUNK), y.split(_ROWS_PER_CHUNK), strict=True)
    return torch.stack([a.double().T @ b.double() for a, b in chunks]).sum(dim=0)


def _chunks(features: Features, layer: int, size: int) -> Iterator[Float[Tensor, "n D"]]:
    for start in range(0, len(features), size):
        yield features.read(layer, slice(start, start + size))


def fit_logistic(
    train: Features,
    labels: Int64[Tensor, " n"],
    num_classes: int,
    inputs: Sequence[HeadInput],
    strengths: Sequence[float] = LOGISTIC_STRENGTHS,
    device: Device = "cpu",
) -> list[LinearHead]:
    """Multinomial logistic regression on each single-layer input, with each strength.

    The objective is the mean cross-entropy plus `strength / 2` times the squared weights; the bias
    is not penalised. This is scikit-learn's `LogisticRegression` with `C = 1 / (n * strength)`. It
    is convex, so no initial weights are drawn.
    """
    target = F.one_hot(labels.to(device), num_classes).float()
    l2 = torch.tensor(strengths, device=device, dtype=torch.float32)
    width = max(train.widths([head_input.layers[0] for head_input in inputs]))
    by_logits = _MAX_LOGITS // (len(labels) * len(strengths) * num_classes)
    by_width = _MAX_VALUES // (len(labels) * width)
    layers_at_once = max(1, min(by_logits, by_width))
    heads = []
    for first in range(0, len(inputs), layers_at_once):
        group = inputs[first : first + layers_at_once]
        rows = [train.read(head_input.layers[0]) for head_input in group]
        scales = [Standardisation(layer) for layer in rows]
        rotated = [_rotate(scale(x).to(device)) for scale, x in zip(scales, rows, strict=True)]
        width = max(x.shape[1] for x, _ in rotated)
        # The penalty sets the weights of the zero columns of the padding to 0.
        padded = [F.pad(x, (0, width - x.shape[1])) for x, _ in rotated]
        weights = _solve(torch.stack(padded), target, l2)
        for i, (_, axes) in enumerate(rotated):
            bias, in_axes = weights[i, 0], weights[i, 1 : axes.shape[1] + 1]  # [K, C], [A, K, C]
            for k, strength in enumerate(strengths):
                weight = axes @ in_axes[:, k]
                heads.append(LinearHead(group[i], strength, scales[i], weight, bias[k]))
    return heads


def _rotate(train: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n E"], Float[Tensor, "D A"]]:
    """The rows in their principal axes behind a column of ones for the bias, and the axes.

    The penalty is invariant to rotations, and the optimal weights lie in the space of the training
    rows. So the solution is the same, but the columns are uncorrelated and at most n.
    """
    if train.shape[0] < train.shape[1]:
        projected, axes = _principal_axes(train)
    else:
        axes = torch.linalg.eigh(train.T @ train).eigenvectors
        projected = train @ axes
    return F.pad(projected, (1, 0), value=1.0), axes


def _principal_axes(
    train: Float[Tensor, "n D"],
) -> tuple[Float[Tensor, "n A"], Float[Tensor, "D A"]]:
    """The rows in their principal axes, and the axes, for fewer rows than features.

    They come from the eigenvectors of the products of the rows, in double precision: for 2,000 rows
    of 3,072 features, `_rotate` takes 60 % of the time that it takes with a singular value
    decomposition. Axes whose deviation is below 1e-6 of the largest one are left out: their
    contribution to the logits is negligible under the penalties.
    """
    x = train.double()
    variances, rows = torch.linalg.eigh(x @ x.T)
    deviations = variances.clamp_min(0).sqrt()
    is_used = deviations >= 1e-6 * deviations[-1]
    rows, deviations = rows[:, is_used], deviations[is_used]
    axes = x.T @ (rows / deviations.clamp_min(1e-30))
    return (rows * deviations).float(), axes.float()


def _solve(
    x: Float[Tensor, "L n E"], target: Float[Tensor, "n C"], l2: Float[Tensor, " K"]
) -> Float[Tensor, "L E K C"]:
    """Weights of L * K independent problems; the first row of E is the bias.

    Conjugate gradients (Polak & Ribière, 1969), preconditioned by the diagonal of the Hessian,
    which is a good approximation because the columns of `x` are uncorrelated.
    """
    shape, per_row = (len(l2), target.shape[1]), 1 / len(target)
    penalty = l2[:, None].repeat(x.shape[2], 1, 1)  # [E, K, 1]
    penalty[0] = 0
    target_mean = (x.mT @ target * per_row)[:, :, None]  # [L, E, 1, C]
    weight = direction = x.new_zeros(len(x), x.shape[2], *shape)
    logits = x.new_zeros(len(x), x.shape[1], *shape)
    gradient, decrement = weight, x.new_ones(())
    for iteration in range(_MAX_ITERATIONS):
        prob = logits.softmax(dim=-1)
        last_gradient = gradient
        gradient = _project(x.mT, prob) * per_row - target_mean + penalty * weight
        # An old Hessian makes the decrement too small: the last check needs a new one.
        is_restart = iteration % _ITERATIONS_PER_HESSIAN == 0 or bool(decrement.max() < _TOLERANCE)
        if is_restart:
            hessian = _project(x.square().mT, prob * (1 - prob)) * per_row + penalty
            hessian = hessian.clamp_min(torch.finfo(x.dtype).eps)
        step = gradient / hessian
        last_decrement, decrement = decrement, _dot(gradient, step)
        if is_restart and decrement.max() < _TOLERANCE:
            return weight
        ratio = _dot(gradient - last_gradient, step) / last_decrement.clamp_min(1e-30)
        direction = (0 if is_restart else ratio.clamp_min(0)) * direction - step
        direction = torch.where(_dot(gradient, direction) < 0, direction, -step)
        change = _project(x, direction)
        slope, curvature = _dot(gradient, direction), _dot(penalty * direction, direction)
        size = _step_size(logits, prob, change, slope, curvature)
        weight, logits = weight + size * direction, logits + size * change
    log.warning(
        "logistic regression stopped after %d iterations with a decrement of %.1e, the tolerance "
        "is %.0e",
        _MAX_ITERATIONS,
        decrement.max(),
        _TOLERANCE,
    )
    return weight


def _step_size(
    logits: Tensor, prob: Tensor, change: Tensor, slope: Tensor, penalty_curvature: Tensor
) -> Float[Tensor, "L 1 K 1"]:
    """Step along `change`: the Newton step, halved until the loss falls."""
    per_row = 1 / logits.shape[1]
    mean = (prob * change).sum(dim=-1, keepdim=True)  # [L, n, K, 1]
    variance = _dot(prob * change, change) - mean.square().sum(dim=1, keepdim=True)
    curvature = variance * per_row + penalty_curvature
    size = -slope / curvature.clamp_min(1e-30)
    linear = slope - mean.sum(dim=1, keepdim=True) * per_row
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    for _ in range(30):
        moved = (logits + size * change).logsumexp(dim=-1, keepdim=True)
        loss_change = (moved - normaliser).mean(dim=1, keepdim=True) + size * linear
        loss_change = loss_change + 0.5 * size.square() * penalty_curvature
        # The last term is the resolution of the loss in float32.
        falls = loss_change <= 1e-4 * size * slope + 1e-6
        if falls.all():
            break
        size = torch.where(falls, size, size / 2)
    return size


def _project(x: Float[Tensor, "L A B"], y: Float[Tensor, "L B K C"]) -> Float[Tensor, "L A K C"]:
    return (x @ y.flatten(2)).unflatten(2, y.shape[2:])


def _dot(a: Float[Tensor, "L R K C"], b: Float[Tensor, "L R K C"]) -> Float[Tensor, "L 1 K 1"]:
    """Inner products, one for each problem."""
    return (a * b).sum(dim=(1, 3), keepdim=True)
