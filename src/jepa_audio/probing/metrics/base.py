"""What a metric is, and those that are made of sums over the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_HEADS_AT_ONCE = 2**22  # answers; some ten tensors of 32 MB are alive
_DRAWS_AT_ONCE = 2**18  # counts; larger blocks leave the cache of a core


class Metric(ABC):
    """A number that says how good the answers to a whole split are; higher is better.

    `answers` and `truth` are what the `Labels` of a task make of logits and of records; see there.
    Metrics compute in 64 bits, on the device of the answers.
    """

    name: str

    @abstractmethod
    def __call__(
        self, answers: Float[Tensor, "units K A"], truth: Shaped[np.ndarray, "units ..."]
    ) -> Float[Tensor, " K"]:
        """The score of each of K heads."""

    @abstractmethod
    def resampled(
        self,
        answers: Float[np.ndarray, "units A"],
        truth: Shaped[np.ndarray, "units ..."],
        counts: Int[np.ndarray, "draws units"],
    ) -> Float[np.ndarray, " draws"]:
        """The score of one head on resamplings of the units, each taken as often as `counts` says.

        NaN where a resampling cannot be scored.
        """

    def num_scored(self, truth: Shaped[np.ndarray, "units ..."]) -> int | None:
        """Classes or numbers that entered the mean; `None` where there is none."""
        return None


class SumMetric(Metric):
    """A function of sums over the units: a resampling weighs what is summed."""

    @abstractmethod
    def parts(
        self, answers: Float[Tensor, "units k A"], truth: Shaped[Tensor, "units ..."]
    ) -> Float[Tensor, "units k ..."]:
        """What is summed, in 64 bits."""

    @abstractmethod
    def of_sums(self, sums: Float[Tensor, "k ..."]) -> Float[Tensor, " k"]:
        """Scores from sums of the parts."""

    def __call__(
        self, answers: Float[Tensor, "units K A"], truth: Shaped[np.ndarray, "units ..."]
    ) -> Float[Tensor, " K"]:
        """See `Metric`."""
        so = torch.from_numpy(truth).to(answers.device)
        few = max(1, _HEADS_AT_ONCE // max(1, answers[:, 0].numel()))
        sums = [self.parts(heads, so).sum(dim=0) for heads in answers.split(few, dim=1)]
        return self.of_sums(torch.cat(sums))

    def resampled(
        self,
        answers: Float[np.ndarray, "units A"],
        truth: Shaped[np.ndarray, "units ..."],
        counts: Int[np.ndarray, "draws units"],
    ) -> Float[np.ndarray, " draws"]:
        """See `Metric`."""
        parts = self.parts(torch.from_numpy(answers)[:, None], torch.from_numpy(truth))[:, 0]
        sums = [
            torch.tensordot(torch.from_numpy(few).double(), parts, dims=1)
            for few in blocks_of_draws(counts)
        ]
        return self.of_sums(torch.cat(sums)).numpy()


class MeanMetric(SumMetric):
    """A ratio of two sums: the parts are the values of the units, and what they are a share of."""

    def of_sums(self, sums: Float[Tensor, "k 2"]) -> Float[Tensor, " k"]:
        """See `SumMetric`."""
        return sums[:, 0] / sums[:, 1]


def with_ones(values: Shaped[Tensor, "units k"]) -> Float[Tensor, "units k 2"]:
    """Parts of the mean over all units."""
    return torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=-1)


def blocks_of_draws(
    counts: Int[np.ndarray, "draws units"],
) -> Iterator[Int[np.ndarray, "few units"]]:
    """The resamplings, a few at a time: memory stays bounded however many there are."""
    few = max(1, _DRAWS_AT_ONCE // counts.shape[1])
    for start in range(0, len(counts), few):
        yield counts[start : start + few]
