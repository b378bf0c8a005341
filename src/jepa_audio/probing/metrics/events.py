"""Metrics of annotations in time, whose predictions are counts for each unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from typing_extensions import override

from jepa_audio.probing.metrics.base import MeanMetric, Predictions, Scores, Terms


@dataclass(frozen=True)
class CountMetric(MeanMetric):
    """A metric of some columns of the predictions.

    Args:
        name: name of the metric.
        columns: the columns; see the subclass.
    """

    name: str
    columns: tuple[int, ...]

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        return predictions[..., list(self.columns)].double()


class Share(CountMetric):
    """Sum of one count over the sum of another, such as correct seconds over all seconds."""


class PooledF1(CountMetric):
    """F1 of the events of all units pooled, as MARBLE scores beats.

    The columns are the numbers of matching, estimated and annotated events.
    """

    @override
    def score(self, sums: Float[Tensor, "K 3"]) -> Scores:
        matching, estimated, annotated = sums.unbind(dim=-1)
        return 2 * matching / (estimated + annotated)


class MeanF1(CountMetric):
    """Mean over the units of the F1 of each, as mir_eval scores beats; columns as in `PooledF1`.

    Units without an annotated event are left out: mir_eval scores them 0 for any prediction.
    """

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        matching, estimated, annotated = super().terms(predictions, targets).unbind(dim=-1)
        is_scored = annotated > 0
        f1 = 2 * matching / (estimated + annotated).clamp_min(1)
        return torch.stack([f1 * is_scored, is_scored.double()], dim=-1)
