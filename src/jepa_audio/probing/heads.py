"""Heads on frozen features: logistic regression and nearest neighbours, the whole grid at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

L2_STRENGTHS = (4e-4, 2e-3, 1e-2, 5e-2)
NEIGHBOURS = (1, 5, 20)

_MAX_ITERATIONS = 500
_REFRESH = 20  # iterations between two looks at the curvature
_TOLERANCE = 1e-5  # of the Newton decrement, about twice what the mean loss can still fall
_MAX_LOGITS = 2**26  # at once; eight such tensors are alive, 2 GiB


@dataclass(frozen=True)
class Features:
    """One matrix for each layer, of the three splits."""

    train: list[Float[np.ndarray, "n_train _"]]
    valid: list[Float[np.ndarray, "n_valid _"]]
    test: list[Float[np.ndarray, "n_test _"]]


@dataclass(frozen=True)
class Predictions:
    """What every head says, and nothing yet on which of them is to be believed.

    Attributes:
        settings: the hyper-parameters tried.
        valid: predicted classes by layer, setting and clip.
        test: the same on the test split.
    """

    settings: tuple[float, ...]
    valid: Int64[np.ndarray, "L K n_valid"]
    test: Int64[np.ndarray, "L K n_test"]

    def choose(self, labels: Int64[np.ndarray, " n_valid"]) -> Choice:
        """The layer and the setting that name most of the validation clips; of equals the first."""
        accuracy = (self.valid == labels).mean(axis=-1)
        layer, setting = np.unravel_index(accuracy.argmax(), accuracy.shape)
        return Choice(
            layer=int(layer),
            setting=float(self.settings[setting]),
            valid=float(accuracy[layer, setting]),
            valid_by_layer=tuple(map(float, accuracy.max(axis=1))),
            test=self.test[layer, setting],
        )


@dataclass(frozen=True)
class Choice:
    """The head that was best on the validation clips.

    Attributes:
        layer: its number.
        setting: its hyper-parameter.
        valid: its validation accuracy.
        valid_by_layer: the best validation accuracy on every layer.
        test: the classes it predicts for the test clips.
    """

    layer: int
    setting: float
    valid: float
    valid_by_layer: tuple[float, ...]
    test: Int64[np.ndarray, " n_test"]

    def correct(self, labels: Int64[np.ndarray, " n_test"]) -> Bool[np.ndarray, " n_test"]:
        """Which of the test clips it names rightly."""
        return self.test == labels


def fit_linear(
    features: Features,
    labels: Int64[np.ndarray, " n_train"],
    num_classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    device: torch.device | str = "cpu",
) -> Predictions:
    """Multinomial logistic regression on standardised features, one for each layer and L2 strength.

    The objective is the mean cross-entropy plus `strength / 2` times the squared weights, the bias free:
    scikit-learn's `LogisticRegression` with `C = 1 / (n * strength)`. It is convex, so nothing is drawn.
    """
    target = F.one_hot(torch.from_numpy(labels).to(device), num_classes).float()
    l2 = torch.tensor(strengths, device=device, dtype=torch.float32)
    at_once = max(1, _MAX_LOGITS // (len(labels) * len(strengths) * num_classes))
    valid, test = [], []
    for first in range(0, len(features.train), at_once):
        chunk = slice(first, first + at_once)
        layers = zip(features.train[chunk], features.valid[chunk], features.test[chunk], strict=True)
        rotated = [_rotated(*_standardised(*layer, device=device)) for layer in layers]
        on_train, on_valid, on_test = (_stacked(matrices) for matrices in zip(*rotated, strict=True))
        weight = _logistic_regression(on_train, target, l2)
        valid.append(_predict(on_valid, weight))
        test.append(_predict(on_test, weight))
    return Predictions(tuple(strengths), np.concatenate(valid), np.concatenate(test))


def fit_knn(
    features: Features,
    labels: Int64[np.ndarray, " n_train"],
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> Predictions:
    """Majority of the k nearest training clips by cosine of standardised features; the nearest wins a tie."""
    votes = F.one_hot(torch.from_numpy(labels).to(device), num_classes).double()
    neighbours = tuple(k for k in neighbours if k <= len(labels)) or (1,)
    valid, test = [], []
    for layer in zip(features.train, features.valid, features.test, strict=True):
        train, *queries = (F.normalize(x, dim=1) for x in _standardised(*layer, device=device))
        on_valid, on_test = (_vote(query, train, votes, neighbours) for query in queries)
        valid.append(on_valid)
        test.append(on_test)
    return Predictions(tuple(map(float, neighbours)), np.stack(valid), np.stack(test))


def _vote(query: Tensor, train: Tensor, votes: Tensor, neighbours: Sequence[int]) -> np.ndarray:
    most = max(neighbours)
    weight = 1 + 0.5 ** torch.arange(1, most + 1, dtype=torch.float64)  # all the excess is below one vote
    nearest = torch.cat([(rows @ train.T).topk(most, dim=1).indices for rows in query.split(1024)])
    ballots = votes[nearest] * weight.to(votes.device)[:, None]  # [n, k, C]
    return np.stack([ballots[:, :k].sum(dim=1).argmax(dim=1).cpu().numpy() for k in neighbours])


def _standardised(*splits: np.ndarray, device: torch.device | str) -> list[Tensor]:
    """Mean 0 and deviation 1 on the first split; what is constant there but for rounding is 0 everywhere."""
    mean, std = splits[0].mean(axis=0, dtype=np.float64), splits[0].std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.abs(mean) + 1e-12, 1 / np.maximum(std, 1e-12), 0)
    return [torch.from_numpy(((split - mean) * scale).astype(np.float32)).to(device) for split in splits]


def _rotated(train: Tensor, *others: Tensor) -> list[Tensor]:
    """The splits in the principal axes of the first one, with a column of ones for the bias.

    The penalty does not know a rotation, and weights outside of the space of the training clips are zero: the
    solution is the same, but the axes are uncorrelated and no more than there are clips.
    """
    if train.shape[0] < train.shape[1]:
        axes = torch.linalg.svd(train, full_matrices=False).Vh.T
    else:
        axes = torch.linalg.eigh(train.T @ train).eigenvectors
    return [F.pad(split @ axes, (1, 0), value=1.0) for split in (train, *others)]


def _stacked(matrices: Sequence[Tensor]) -> Float[Tensor, "L n E"]:
    """Narrow matrices are filled up with zeros, to which the penalty gives no weight."""
    width = max(matrix.shape[1] for matrix in matrices)
    return torch.stack([F.pad(matrix, (0, width - matrix.shape[1])) for matrix in matrices])


def _logistic_regression(
    x: Float[Tensor, "L n E"], target: Float[Tensor, "n C"], l2: Float[Tensor, " K"]
) -> Float[Tensor, "L E K C"]:
    """Weights of L * K independent problems, the first row of E being the bias.

    Conjugate gradients (Polak & Ribière, 1969), preconditioned by the diagonal of the Hessian, which says
    most of it because the columns of `x` are uncorrelated.
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
        momentum = 0 if restart else (_dot(gradient - before, step) / last.clamp_min(1e-30)).clamp_min(0)
        direction = momentum * direction - step
        direction = torch.where(_dot(gradient, direction) < 0, direction, -step)
        change = _up(x, direction)
        slope, ridge = _dot(gradient, direction), _dot(penalty * direction, direction)
        size = _step_size(logits, share, change, slope, ridge)
        weight, logits = weight + size * direction, logits + size * change
    log.warning("logistic regression stopped after %d iterations at %.1e", _MAX_ITERATIONS, decrement.max())
    return weight


def _step_size(logits: Tensor, share: Tensor, change: Tensor, slope: Tensor, ridge: Tensor) -> Tensor:
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
        loss = (moved - normaliser).mean(dim=1, keepdim=True) + size * linear + 0.5 * size.square() * ridge
        falls = loss <= 1e-4 * size * slope + 1e-6  # float32 knows the loss no better
        if falls.all():
            break
        size = torch.where(falls, size, size / 2)
    return size


def _up(x: Float[Tensor, "L n E"], weight: Float[Tensor, "L E K C"]) -> Float[Tensor, "L n K C"]:
    return (x @ weight.flatten(2)).unflatten(2, weight.shape[2:])


def _down(x: Float[Tensor, "L n E"], of_clips: Float[Tensor, "L n K C"]) -> Float[Tensor, "L E K C"]:
    return _up(x.mT, of_clips)


def _dot(a: Float[Tensor, "L R K C"], b: Float[Tensor, "L R K C"]) -> Float[Tensor, "L 1 K 1"]:
    """Of each problem on its own."""
    return (a * b).sum(dim=(1, 3), keepdim=True)


def _predict(x: Float[Tensor, "L n E"], weight: Float[Tensor, "L E K C"]) -> np.ndarray:
    """Classes by layer, setting and clip."""
    chunks = [(x @ weight[:, :, k]).argmax(dim=-1) for k in range(weight.shape[2])]
    return torch.stack(chunks, dim=1).cpu().numpy()
