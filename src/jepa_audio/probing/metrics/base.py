"""The interface of metrics, and metrics that are functions of sums over the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from typing_extensions import override

_HEADS_AT_ONCE = 2**22
"""Predictions in one chunk of heads; about ten tensors of 32 MB are alive."""

_DRAWS_AT_ONCE = 2**18
"""Counts in one chunk of draws; larger chunks do not fit into the cache of a core."""

Predictions = Float[Tensor, "units K A"]
"""Predictions of K heads for each unit, from the `Labels` of a task; A numbers each."""

Targets = Shaped[np.ndarray, "units ..."]
"""Label of each unit, from the `Labels` of a task."""

HeadPredictions = Float[np.ndarray, "units A"]
Scores = Float[Tensor, " K"]
Terms = Float[Tensor, "units K ..."]
Counts = Int[np.ndarray, "draws units"]
DrawScores = Float[np.ndarray, " draws"]


class Metric(ABC):
    """A score of the predictions for a whole split; higher is better.

    Metrics compute in 64 bits, on the device of the predictions.
    """

    name: str

    @abstractmethod
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        """Score each of K heads."""

    @abstractmethod
    def resampled(
        self, predictions: HeadPredictions, targets: Targets, counts: Counts
    ) -> DrawScores:
        """Score one head on resamplings; `counts` is how often each unit occurs in each of them.

        A resampling that cannot be scored gets NaN.
        """

    def num_scored(self, targets: Targets) -> int | None:
        """Number of classes or outputs in the mean; `None` if the score is not a mean of these."""
        return None


class SumMetric(Metric):
    """A function of sums over the units: a resampling weights the terms of the sums."""

    @abstractmethod
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        """Terms of the sums, in 64 bits."""

    @abstractmethod
    def score(self, sums: Float[Tensor, "K ..."]) -> Scores:
        """Scores from sums of the terms."""

    @override
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        on_device = torch.from_numpy(targets).to(predictions.device)
        chunk = max(1, _HEADS_AT_ONCE // max(1, predictions[:, 0].numel()))
        sums = [
            self.terms(heads, on_device).sum(dim=0) for heads in predictions.split(chunk, dim=1)
        ]
        return self.score(torch.cat(sums))

    @override
    def resampled(
        self, predictions: HeadPredictions, targets: Targets, counts: Counts
    ) -> DrawScores:
        terms = self.terms(torch.from_numpy(predictions)[:, None], torch.from_numpy(targets))[:, 0]
        sums = [
            torch.tensordot(torch.from_numpy(chunk).double(), terms, dims=1)
            for chunk in chunk_draws(counts)
        ]
        return self.score(torch.cat(sums)).numpy()


class MeanMetric(SumMetric):
    """A ratio of two sums: the terms are the numerator and the denominator of each unit."""

    @override
    def score(self, sums: Float[Tensor, "K 2"]) -> Scores:
        return sums[:, 0] / sums[:, 1]


def mean_terms(values: Shaped[Tensor, "units k"]) -> Float[Tensor, "units k 2"]:
    """Terms of the mean over all units."""
    return torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=-1)


def chunk_draws(
    counts: Int[np.ndarray, "draws units"],
) -> Iterator[Int[np.ndarray, "chunk units"]]:
    """Yield the resamplings in chunks: memory is bounded for any number of them."""
    chunk = max(1, _DRAWS_AT_ONCE // counts.shape[1])
    for start in range(0, len(counts), chunk):
        yield counts[start : start + chunk]
