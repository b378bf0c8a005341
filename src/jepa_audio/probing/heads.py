"""Heads on frozen features: logistic regression and nearest neighbours, for all layers and hyper-parameters at once."""

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

L2_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
NEIGHBOURS = (1, 5, 20)

_MAX_ITERATIONS = 2000
_CHECK_EVERY = 20
_TOLERANCE = 1e-4  # largest entry of the gradient of the mean loss, as in scikit-learn
_MAX_LOGITS = 2**27  # at once; half a gibibyte


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

    def choose(self, labels: Int64[np.ndarray, "n_valid"]) -> Choice:  # noqa: F821
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
    test: Int64[np.ndarray, "n_test"]  # noqa: F821

    def correct(self, labels: Int64[np.ndarray, "n_test"]) -> Bool[np.ndarray, "n_test"]:  # noqa: F821
        """Which of the test clips it names rightly."""
        return self.test == labels


def fit_linear(
    features: Features,
    labels: Int64[np.ndarray, "n_train"],  # noqa: F821
    num_classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    device: torch.device | str = "cpu",
) -> Predictions:
    """Multinomial logistic regression on standardised features, one for each layer and L2 strength.

    The objective is the mean cross-entropy plus `strength / 2` times the squared weights, the bias free:
    scikit-learn's `LogisticRegression` with `C = 1 / (n * strength)`. It is strictly convex, so nothing is drawn.
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
    labels: Int64[np.ndarray, "n_train"],  # noqa: F821
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> Predictions:
    """Majority of the k nearest training clips by cosine of standardised features; of equals the nearer ones win."""
    votes = F.one_hot(torch.from_numpy(labels).to(device), num_classes).float()
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
    weight = 1 - torch.arange(most, device=query.device) / (
        2 * most**2
    )  # all together lack less than one vote
    nearest = torch.cat([(rows @ train.T).topk(most, dim=1).indices for rows in query.split(1024)])
    ballots = votes[nearest] * weight[:, None]  # [n, k, C]
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
    x: Float[Tensor, "L n E"],
    target: Float[Tensor, "n C"],
    l2: Float[Tensor, "K"],  # noqa: F821
) -> Float[Tensor, "L E K C"]:
    """Weights of L * K independent problems, the first row of E being the bias.

    Each step divides the gradient by an upper bound of the curvature, 1/2 the mean square of the column plus the
    penalty (Böhning, 1992), which is diagonal because the columns are uncorrelated. Steps are accelerated (Nesterov,
    1983), and each problem loses its speed when it runs uphill (O'Donoghue & Candès, 2015).
    """
    penalty = l2[:, None].repeat(x.shape[2], 1, 1)  # [E, K, 1]
    penalty[0] = 0
    curvature = 0.5 * x.square().mean(dim=1)[..., None, None] + penalty  # [L, E, K, 1]
    towards = (x.mT @ target / len(target))[:, :, None]  # [L, E, 1, C]
    weight = x.new_zeros(len(x), x.shape[2], len(l2), target.shape[1])
    ahead, age = weight, x.new_zeros(len(x), 1, len(l2), 1)
    for iteration in range(_MAX_ITERATIONS):
        share = (x @ ahead.flatten(2)).unflatten(2, weight.shape[2:]).softmax(dim=-1)  # [L, n, K, C]
        gradient = (
            (x.mT @ share.flatten(2)).unflatten(2, weight.shape[2:]) / len(target) - towards + penalty * ahead
        )
        if iteration % _CHECK_EVERY == 0 and gradient.abs().max() < _TOLERANCE:
            return ahead
        moved = ahead - gradient / curvature
        step = moved - weight
        age = torch.where((gradient * step).sum(dim=(1, 3), keepdim=True) > 0, 0, age + 1)
        weight, ahead = moved, moved + age / (age + 3) * step
    log.warning(
        "logistic regression: gradient %.1e after %d iterations", gradient.abs().max(), _MAX_ITERATIONS
    )
    return weight


def _predict(x: Float[Tensor, "L n E"], weight: Float[Tensor, "L E K C"]) -> np.ndarray:
    """Classes by layer, setting and clip."""
    chunks = [(x @ weight[:, :, k]).argmax(dim=-1) for k in range(weight.shape[2])]
    return torch.stack(chunks, dim=1).cpu().numpy()
