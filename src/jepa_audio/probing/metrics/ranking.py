"""Metrics of tags that depend only on the order of the units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import (
    Counts,
    DrawScorer,
    DrawScores,
    HeadPredictions,
    Metric,
    Predictions,
    Scores,
    Targets,
)
from jepa_audio.probing.metrics.sums import F1

Columns = Float[Tensor, "units N"]


class ClassOrder:
    """The units of one class in the order of their logits, from the highest to the lowest.

    A positive is a unit of the class, a negative any other unit.

    Attributes:
        positives: indices of the positives; those of the negatives are `negatives`.
        positives_above: for each positive, the number of positives with at least its logit.
        negatives_higher: for each positive, the number of negatives with a higher logit.
        negatives_above: for each positive, the number of negatives with at least its logit.
    """

    def __init__(
        self, keys: Float[np.ndarray, " units"], is_positive: Bool[np.ndarray, " units"]
    ) -> None:
        order = keys.argsort()
        self.positives, self.negatives = order[is_positive[order]], order[~is_positive[order]]
        positives, negatives = keys[self.positives], keys[self.negatives]
        self.positives_above = np.searchsorted(positives, positives, side="right")
        self.negatives_higher = np.searchsorted(negatives, positives, side="left")
        self.negatives_above = np.searchsorted(negatives, positives, side="right")


class RankMetric(Metric):
    """Mean over classes of a score of the order in which a head ranks the units.

    torchmetrics computes the score of the whole split, in 32 bits, from ranks. Ranks have the order
    of probabilities, but no ties where probabilities saturate. torchmetrics has no weights, so the
    scores of resamples are computed here, many at once.

    Attributes:
        score_ranks: function of torchmetrics for the score of each class.
        needs_negatives: whether a class that all units have is left out of the mean, as is a class
            that no unit has.
    """

    score_ranks: Callable[..., Tensor]
    needs_negatives: bool

    @abstractmethod
    def score_class(self, order: ClassOrder, counts: Counts) -> DrawScores:
        """Scores of one class on draws; NaN where there is none."""

    @override
    def num_scored(self, targets: Targets) -> int:
        return len(self._scored_classes(targets))

    @override
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        """See `Metric`; raises `UserError` if no class can be scored."""
        classes = self._scored_classes(targets)
        ranks = _ranks(predictions[:, :, classes].flatten(1))
        positives = torch.from_numpy(targets[:, classes] > 0).to(ranks.device).long()
        positives = positives.repeat(1, predictions.shape[1])
        # torchmetrics needs two columns or more: the first is repeated at the end.
        tables = [torch.cat([table, table[:, :1]], dim=1) for table in (ranks, positives)]
        scores = self.score_ranks(*tables, tables[0].shape[1], average=None, thresholds=None)
        return scores[:-1].double().unflatten(0, (-1, len(classes))).mean(dim=1)

    @override
    def draw_scorer(self, predictions: HeadPredictions, targets: Targets) -> DrawScorer:
        """See `Metric`; a class that cannot be scored in a draw is left out of its mean."""
        keys = _sort_keys(torch.from_numpy(predictions)).numpy()
        orders = [ClassOrder(keys[:, c], targets[:, c] > 0) for c in self._scored_classes(targets)]

        @np.errstate(invalid="ignore")  # 0 / 0 is NaN: the class is left out
        def score(counts: Counts) -> DrawScores:
            scores = np.stack([self.score_class(order, counts) for order in orders])
            return torch.from_numpy(scores).nanmean(dim=0).numpy()

        return score

    def _scored_classes(self, targets: Targets) -> list[int]:
        positives = targets > 0
        is_scored = positives.any(axis=0) & ~(self.needs_negatives & positives.all(axis=0))
        if not is_scored.any():
            raise UserError(
                f"`{self.name}` can score none of {targets.shape[1]} classes on {len(targets)} "
                "units: each class is on no unit or on all; use more units"
            )
        return np.flatnonzero(is_scored).tolist()


class AUROC(RankMetric):
    """Area under the ROC curve, mean over the classes that some units have and some have not."""

    name = "auroc"
    score_ranks = staticmethod(multilabel_auroc)
    needs_negatives = True

    @override
    def score_class(self, order: ClassOrder, counts: Counts) -> DrawScores:
        """Share of pairs of a positive and a negative in the right order; a tie is half a pair."""
        positives, negatives = counts[:, order.positives], _sums(counts[:, order.negatives])
        # A pair in the wrong order counts twice, a tie once.
        wrong = negatives[:, order.negatives_higher] + negatives[:, order.negatives_above]
        num_pairs = positives.sum(-1) * negatives[:, -1]
        return 1 - (positives * wrong).sum(-1) / (2 * num_pairs)


class AveragePrecision(RankMetric):
    """Mean precision at each positive, without interpolation; mean over classes with positives."""

    name = "ap"
    score_ranks = staticmethod(multilabel_average_precision)
    needs_negatives = False

    @override
    def score_class(self, order: ClassOrder, counts: Counts) -> DrawScores:
        """Share of positives among the units from the highest logit to that of each positive."""
        positives = counts[:, order.positives]
        positives_above = _sums(positives)[:, order.positives_above]
        units = positives_above + _sums(counts[:, order.negatives])[:, order.negatives_above]
        precision = positives_above / (units + (units == 0))  # without units, the count is 0
        return (positives * precision).sum(-1) / positives.sum(-1)


def _sort_keys(logits: Tensor) -> Tensor:
    """Keys whose ascending order is the descending order of the logits.

    NaN is last and tied: units that a diverged head does not order must not stay in the order of
    the records.
    """
    return -torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _ranks(logits: Columns) -> Columns:
    """Ranks of the units in each column from 0 to 1, the same for equal logits."""
    keys, order = _sort_keys(logits).sort(dim=0)
    steps = F.pad((keys[1:] != keys[:-1]).double().cumsum(dim=0), (0, 0, 1, 0))
    return 1 - torch.empty_like(steps).scatter_(0, order, steps) / max(1, len(logits))


def _sums(counts: Int[np.ndarray, "draws n"]) -> Int[np.ndarray, "draws m"]:
    """Sums of the first 0, 1, ... n counts."""
    sums = np.zeros((len(counts), counts.shape[1] + 1), dtype=np.int64)
    np.cumsum(counts, axis=1, out=sums[:, 1:])
    return sums


TAG_METRICS: tuple[Metric, ...] = (AUROC(), AveragePrecision(), F1("macro"), F1("micro"))
"""Metrics of every task on tags."""
