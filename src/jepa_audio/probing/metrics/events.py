"""Scores of annotations in time, whose answers are counts by unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from jepa_audio.probing.metrics.base import MeanMetric, SumMetric


@dataclass(frozen=True)
class Share(MeanMetric):
    """Sum of one count over the sum of another, such as seconds named rightly of all seconds.

    Args:
        name: of the metric.
        hits: column of the answers.
        total: column of what it is a share of.
    """

    name: str
    hits: int
    total: int

    def parts(
        self, answers: Float[Tensor, "units k A"], truth: Shaped[Tensor, "units ..."]
    ) -> Float[Tensor, "units k 2"]:
        """See `SumMetric`."""
        return answers[..., [self.hits, self.total]].double()


@dataclass(frozen=True)
class PooledF1(SumMetric):
    """F1 of the events of all units in one pool, as MARBLE scores beats.

    Args:
        name: of the metric.
        hits: column of the answers that counts the estimated events that match.
        estimated: column that counts all estimated events.
        reference: column that counts the true ones.
    """

    name: str
    hits: int
    estimated: int
    reference: int

    def parts(
        self, answers: Float[Tensor, "units k A"], truth: Shaped[Tensor, "units ..."]
    ) -> Float[Tensor, "units k 3"]:
        """See `SumMetric`."""
        return answers[..., [self.hits, self.estimated, self.reference]].double()

    def of_sums(self, sums: Float[Tensor, "k 3"]) -> Float[Tensor, " k"]:
        """See `SumMetric`."""
        hits, estimated, reference = sums.unbind(dim=-1)
        return 2 * hits / (estimated + reference)


@dataclass(frozen=True)
class MeanF1(MeanMetric):
    """Mean over the units of the F1 of each, as mir_eval scores beats.

    Units without a true event are left out: mir_eval gives them 0 whatever is estimated.

    Args:
        name: of the metric.
        hits: column of the answers that counts the estimated events that match.
        estimated: column that counts all estimated events.
        reference: column that counts the true ones.
    """

    name: str
    hits: int
    estimated: int
    reference: int

    def parts(
        self, answers: Float[Tensor, "units k A"], truth: Shaped[Tensor, "units ..."]
    ) -> Float[Tensor, "units k 2"]:
        """See `SumMetric`."""
        hits, estimated, reference = (
            answers[..., [self.hits, self.estimated, self.reference]].double().unbind(dim=-1)
        )
        scored = reference > 0
        return torch.stack(
            [2 * hits / (estimated + reference).clamp_min(1) * scored, scored.double()], dim=-1
        )
