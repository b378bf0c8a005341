"""Metrics of annotations in time, whose predictions are counts for each unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from typing_extensions import override

from jepa_audio.probing.metrics.base import MeanMetric, Predictions, Scores, SumMetric, Terms


@dataclass(frozen=True)
class Share(MeanMetric):
    """Sum of one count over the sum of another, such as correct seconds over all seconds.

    Args:
        name: name of the metric.
        columns: columns of the predictions with numerator and denominator.
    """

    name: str
    columns: tuple[int, int]

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        return predictions[..., list(self.columns)].double()


@dataclass(frozen=True)
class PooledF1(SumMetric):
    """F1 of the events of all units pooled, as MARBLE scores beats.

    Args:
        name: name of the metric.
        columns: columns of the predictions with the numbers of matching, estimated and annotated
            events.
    """

    name: str
    columns: tuple[int, int, int]

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        return predictions[..., list(self.columns)].double()

    @override
    def score(self, sums: Float[Tensor, "K 3"]) -> Scores:
        matching, estimated, annotated = sums.unbind(dim=-1)
        return 2 * matching / (estimated + annotated)


@dataclass(frozen=True)
class MeanF1(MeanMetric):
    """Mean over the units of the F1 of each, as mir_eval scores beats.

    Units without an annotated event are left out: mir_eval scores them 0 for any prediction.

    Args:
        name: name of the metric.
        columns: see `PooledF1`.
    """

    name: str
    columns: tuple[int, int, int]

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        counts = predictions[..., list(self.columns)].double()
        matching, estimated, annotated = counts.unbind(dim=-1)
        is_scored = annotated > 0
        f1 = 2 * matching / (estimated + annotated).clamp_min(1)
        return torch.stack([f1 * is_scored, is_scored.double()], dim=-1)
