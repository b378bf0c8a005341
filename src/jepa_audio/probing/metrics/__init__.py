"""Metrics of the predictions for a whole split, and for bootstrap resamples of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from typing_extensions import override

_HEADS_AT_ONCE = 2**22
"""Predictions in one chunk of heads; about ten tensors of 32 MB are alive."""

_DRAWS_AT_ONCE = 2**18
"""Counts in one chunk of draws; larger chunks exceed the cache of a core."""

Predictions = Float[Tensor, "units K A"]
"""Predictions of K heads, from the `Labels` of a task: A numbers for each unit."""

Targets = Shaped[np.ndarray, "units ..."]
"""Labels of the units, encoded by the `Labels` of a task."""

HeadPredictions = Float[np.ndarray, "units A"]
Scores = Float[Tensor, " K"]
Terms = Float[Tensor, "units K ..."]
Counts = Int[np.ndarray, "draws units"]
DrawScores = Float[np.ndarray, " draws"]
DrawScorer = Callable[[Counts], DrawScores]


class Metric(ABC):
    """A score of the predictions for a whole split; higher is better.

    Metrics compute in 64 bits, on the device of the predictions.
    """

    name: str

    @abstractmethod
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        """Score each of K heads."""

    @abstractmethod
    def draw_scorer(self, predictions: HeadPredictions, targets: Targets) -> DrawScorer:
        """A function that scores one head on bootstrap draws; see `resampled`."""

    def resampled(
        self, predictions: HeadPredictions, targets: Targets, counts: Counts
    ) -> DrawScores:
        """Score one head on bootstrap draws; NaN for a draw that cannot be scored.

        `counts` is how often each draw contains each unit.
        """
        score, size = self.draw_scorer(predictions, targets), _DRAWS_AT_ONCE // counts.shape[1]
        chunks = torch.from_numpy(counts).split(max(1, size))
        return np.concatenate([score(chunk.numpy()) for chunk in chunks])

    def num_scored(self, targets: Targets) -> int | None:
        """Number of classes or outputs in the mean; `None` if the score is not a mean of these."""
        return None


class SumMetric(Metric):
    """A function of sums over the units. Resamples weight the terms of the sums."""

    @abstractmethod
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        """Terms of the sums, in 64 bits."""

    def score(self, sums: Float[Tensor, "K ..."]) -> Scores:
        """Scores from sums of the terms; the default is a ratio: numerator and denominator."""
        return sums[:, 0] / sums[:, 1]

    @override
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        on_device = torch.from_numpy(targets).to(predictions.device)
        chunk = max(1, _HEADS_AT_ONCE // max(1, predictions[:, 0].numel()))
        sums = [
            self.terms(heads, on_device).sum(dim=0) for heads in predictions.split(chunk, dim=1)
        ]
        return self.score(torch.cat(sums))

    @override
    def draw_scorer(self, predictions: HeadPredictions, targets: Targets) -> DrawScorer:
        terms = self.terms(torch.from_numpy(predictions)[:, None], torch.from_numpy(targets))[:, 0]
        return lambda counts: self.score(
            torch.tensordot(torch.from_numpy(counts).double(), terms, dims=1)
        ).numpy()
