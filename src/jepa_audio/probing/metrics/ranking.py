"""Scores of tags that depend on the order of the units alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.base import Metric, blocks_of_draws


@dataclass(frozen=True)
class Ranked:
    """The units of a few resamplings in the order of one class's logits, as weights.

    Attributes:
        weight: of each hit (unit that is of the class), from the highest logit to the lowest.
        hits: for each hit, the weight of the hits whose logit is not lower, itself among them.
        misses_before: for each hit, the weight of the misses (other units) whose logit is higher.
        misses: the same with those of the same logit.
        num_misses: weight of all misses.
    """

    weight: Float[np.ndarray, "few n"]
    hits: Float[np.ndarray, "few n"]
    misses_before: Float[np.ndarray, "few n"]
    misses: Float[np.ndarray, "few n"]
    num_misses: Float[np.ndarray, " few"]


class RankMetric(Metric):
    """Mean over classes of a score of the order into which a head brings the units.

    The units as they are, are scored by torchmetrics (in 32 bits). It gets ranks: they order the
    units as probabilities do, without the ties where those saturate. It knows no weights, so
    resamplings are scored here, all at once.
    """

    @abstractmethod
    def num_scored(self, truth: Shaped[np.ndarray, "units C"]) -> int:
        """Classes that enter the mean."""

    @abstractmethod
    def of_classes(
        self, ranks: Float[Tensor, "units N"], truth: Int[Tensor, "units N"]
    ) -> Float[Tensor, " N"]:
        """Scores by torchmetrics of each of N classes; the ranks are in [0, 1], a tie is the same rank."""

    @abstractmethod
    def of_resampled(self, ranked: Ranked) -> Float[np.ndarray, " few"]:
        """Scores of one class in a few resamplings, NaN where there is none."""

    def __call__(
        self, answers: Float[Tensor, "units K C"], truth: Shaped[np.ndarray, "units C"]
    ) -> Float[Tensor, " K"]:
        """See `Metric`; `ValueError` if no class can be scored."""
        scored = self._scored(truth)
        ranks = _ranks(answers[:, :, scored].flatten(1))
        so = (
            torch.from_numpy(truth[:, scored] > 0)
            .long()
            .to(answers.device)
            .repeat(1, answers.shape[1])
        )
        # torchmetrics wants two columns at least.
        columns = [torch.cat([both, both[:, :1]], dim=1) for both in (ranks, so)]
        scores = self.of_classes(*columns)[:-1].double()
        return scores.unflatten(0, (-1, len(scored))).mean(dim=1)

    def resampled(
        self,
        answers: Float[np.ndarray, "units C"],
        truth: Shaped[np.ndarray, "units C"],
        counts: Int[np.ndarray, "draws units"],
    ) -> Float[np.ndarray, " draws"]:
        """See `Metric`; a class that cannot be scored in a draw is left out of the mean of that draw."""
        falling = _falling(torch.from_numpy(answers)).numpy()
        classes = [
            _Order.of(falling[:, number], truth[:, number] > 0) for number in self._scored(truth)
        ]
        scores = []
        for few in blocks_of_draws(counts):
            with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is wanted
                of_classes = np.stack([self._resampled(order, few) for order in classes])
            scores.append(torch.from_numpy(of_classes).nanmean(dim=0).numpy())
        return np.concatenate(scores)

    def _resampled(
        self, order: _Order, counts: Int[np.ndarray, "few units"]
    ) -> Float[np.ndarray, " few"]:
        """Scores of one class in a few draws."""
        weight = counts[:, order.hits]
        hits, misses = _running_sums(weight), _running_sums(counts[:, order.misses])
        ranks = (
            hits[:, order.hits_through],
            misses[:, order.misses_before],
            misses[:, order.misses_through],
        )
        return self.of_resampled(
            Ranked(*(sums.astype(np.float64) for sums in (weight, *ranks, misses[:, -1])))
        )

    def _scored(self, truth: Shaped[np.ndarray, "units C"]) -> list[int]:
        """Numbers of the classes that enter the mean."""
        scored = [number for number in range(truth.shape[1]) if self.num_scored(truth[:, [number]])]
        if not scored:
            raise UserError(
                f"`{self.name}` can score none of {truth.shape[1]} classes on {len(truth)} units: "
                "each of them is true of no unit, or else of all; take more units"
            )
        return scored


class AUROC(RankMetric):
    """Area under the receiver operating characteristic, mean over classes that some units have and some have not."""

    name = "auroc"

    def num_scored(self, truth: Shaped[np.ndarray, "units C"]) -> int:
        """See `Metric`."""
        return int(((truth > 0).any(axis=0) & (truth <= 0).any(axis=0)).sum())

    def of_classes(
        self, ranks: Float[Tensor, "units N"], truth: Int[Tensor, "units N"]
    ) -> Float[Tensor, " N"]:
        """See `RankMetric`."""
        return multilabel_auroc(ranks, truth, ranks.shape[1], average=None, thresholds=None)

    def of_resampled(self, ranked: Ranked) -> Float[np.ndarray, " few"]:
        """Pairs of a hit and a miss in the right order, of all such pairs; a tie is half a pair."""
        # Twice each pair in the wrong order, once a tie.
        wrong = (ranked.weight * (ranked.misses_before + ranked.misses)).sum(-1)
        return 1 - wrong / (2 * ranked.weight.sum(-1) * ranked.num_misses)


class AveragePrecision(RankMetric):
    """Mean over the hits of the precision at each, mean over classes that some units have; nothing is interpolated."""

    name = "ap"

    def num_scored(self, truth: Shaped[np.ndarray, "units C"]) -> int:
        """See `Metric`."""
        return int((truth > 0).any(axis=0).sum())

    def of_classes(
        self, ranks: Float[Tensor, "units N"], truth: Int[Tensor, "units N"]
    ) -> Float[Tensor, " N"]:
        """See `RankMetric`."""
        return multilabel_average_precision(
            ranks, truth, ranks.shape[1], average=None, thresholds=None
        )

    def of_resampled(self, ranked: Ranked) -> Float[np.ndarray, " few"]:
        """Share of hits among the units whose logit is not lower, at each hit; then their mean."""
        units = ranked.hits + ranked.misses
        precision = ranked.hits / (
            units + (units == 0)
        )  # where there is no unit, this hit has no weight
        return (ranked.weight * precision).sum(-1) / ranked.weight.sum(-1)


@dataclass(frozen=True)
class _Order:
    """The units in the order of falling logits, hits and misses apart.

    Attributes:
        hits: numbers of the units that are of the class.
        misses: numbers of the others.
        hits_through: for each hit, how many hits have no lower logit.
        misses_before: for each hit, how many misses have a higher logit.
        misses_through: for each hit, how many misses have no lower logit.
    """

    hits: Int[np.ndarray, " hits"]
    misses: Int[np.ndarray, " misses"]
    hits_through: Int[np.ndarray, " hits"]
    misses_before: Int[np.ndarray, " hits"]
    misses_through: Int[np.ndarray, " hits"]

    @classmethod
    def of(
        cls, falling: Float[np.ndarray, " units"], is_hit: Shaped[np.ndarray, " units"]
    ) -> _Order:
        """From what rises where logits fall."""
        order = falling.argsort()
        hits, misses = order[is_hit[order]], order[~is_hit[order]]
        return cls(
            hits,
            misses,
            np.searchsorted(falling[hits], falling[hits], side="right"),
            np.searchsorted(falling[misses], falling[hits], side="left"),
            np.searchsorted(falling[misses], falling[hits], side="right"),
        )


def _falling(logits: Tensor) -> Tensor:
    """What rises where logits fall."""
    # NaN goes last and is a tie: units that a diverged head does not order must not stay in the
    # order of the records.
    return -torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _ranks(logits: Float[Tensor, "units N"]) -> Float[Tensor, "units N"]:
    """Places of the units in each column, equal logits at one place, from 0 to 1."""
    falling, order = _falling(logits).sort(dim=0)
    steps = F.pad((falling[1:] != falling[:-1]).double().cumsum(dim=0), (0, 0, 1, 0))
    return 1 - torch.empty_like(steps).scatter_(0, order, steps) / max(1, len(logits))


def _running_sums(counts: Int[np.ndarray, "few n"]) -> Int[np.ndarray, "few m"]:
    """Sums of the first 0, 1, ... n counts."""
    sums = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=sums[:, 1:])
    return sums
