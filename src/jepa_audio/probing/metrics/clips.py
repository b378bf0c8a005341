"""Scores of classes, keys, tags and numbers, one for each unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from mir_eval.key import weighted_score
from torch import Tensor
from torchmetrics.functional.regression import r2_score

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.base import MeanMetric, SumMetric, with_ones

TONICS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
"""Names of the twelve pitch classes from C upwards, with flats."""

KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
"""Classes that `KeyScore` knows, in their order, spelt as in the labels of MARBLE's GS."""


class Accuracy(MeanMetric):
    """Share of the units whose largest logit is that of their class; an unknown class is always wrong."""

    name = "accuracy"

    def parts(
        self, answers: Float[Tensor, "units k C"], truth: Int[Tensor, " units"]
    ) -> Float[Tensor, "units k 2"]:
        """See `SumMetric`."""
        return with_ones(answers.argmax(dim=-1) == truth[:, None])


class KeyScore(MeanMetric):
    """Mean credit for a key: 1 for the right one, some for a related one (mir_eval's `key.weighted_score`).

    Args:
        symmetric: mir_eval gives credit for a key a fifth above the true one and none for a key a
            fifth below. If set, the one counts as the other.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self.name = "key_weighted_symmetric" if symmetric else "key_weighted"

    def parts(
        self, answers: Float[Tensor, "units k C"], truth: Int[Tensor, " units"]
    ) -> Float[Tensor, "units k 2"]:
        """See `SumMetric`; `ValueError` if the classes cannot be the `KEYS`."""
        if answers.shape[-1] != len(KEYS):
            raise UserError(
                f"`{self.name}` is of {len(KEYS)} classes, the `KEYS`, and not of {answers.shape[-1]}"
            )
        credit = torch.from_numpy(key_credits(self.symmetric)).to(answers.device)
        known = truth[:, None] >= 0
        return with_ones(credit[truth.clamp_min(0)[:, None], answers.argmax(dim=-1)] * known)


@cache
def key_credits(symmetric: bool) -> Float[np.ndarray, "24 24"]:
    """Credit for each estimated key (column) where another is true (row), in the order of `KEYS`."""
    credit = np.array([[weighted_score(true, estimate) for estimate in KEYS] for true in KEYS])
    return np.maximum(credit, credit.T) if symmetric else credit


class F1(SumMetric):
    """F1 of tags, claimed where their logit is above 0 (their probability above 0.5).

    Args:
        average: "macro" for the mean over the tags that some unit has, "micro" for all tags in one
            pool.

    Raises:
        UserError: when called, if no unit has any tag.
    """

    def __init__(self, average: Literal["macro", "micro"]) -> None:
        self.average = average
        self.name = f"f1_{average}"

    def num_scored(self, truth: Shaped[np.ndarray, "units C"]) -> int | None:
        """Tags that some unit has."""
        return int((truth > 0).any(axis=0).sum()) if self.average == "macro" else None

    def parts(
        self, answers: Float[Tensor, "units k C"], truth: Shaped[Tensor, "units C"]
    ) -> Float[Tensor, "units k C 3"]:
        """See `SumMetric`."""
        claimed, so = answers > 0, (truth > 0)[:, None].expand_as(answers)
        if not so.any():
            raise UserError(
                f"`{self.name}`: none of {len(so)} units has any of the {so.shape[-1]} tags; take more units"
            )
        return torch.stack([claimed & so, claimed, so], dim=-1).double()

    def of_sums(self, sums: Float[Tensor, "k C 3"]) -> Float[Tensor, " k"]:
        """See `SumMetric`; a tag that no unit has in a draw is left out of the mean of that draw."""
        hits, claimed, so = (
            sums if self.average == "macro" else sums.sum(dim=1, keepdim=True)
        ).unbind(dim=-1)
        return torch.where(so > 0, 2 * hits / (claimed + so), torch.nan).nanmean(dim=-1)


@dataclass(frozen=True)
class R2(SumMetric):
    """Share of the variance of the truth that is explained, over the whole split: 1 - squared errors / variance.

    The mean over batches is another number, and mostly a smaller one.

    Args:
        output: number of the output that is scored; `None` for the mean over all.
        name: of the metric.

    Raises:
        UserError: when called, if the truth does not vary.
    """

    output: int | None = None
    name: str = "r2"

    def num_scored(self, truth: Shaped[np.ndarray, "units A"]) -> int | None:
        """Outputs that enter the mean."""
        return truth.shape[1] if self.output is None else None

    def __call__(
        self, answers: Float[Tensor, "units K A"], truth: Float[np.ndarray, "units A"]
    ) -> Float[Tensor, " K"]:
        """See `Metric`; scored by torchmetrics."""
        outputs = self._outputs(truth)
        said = answers[..., outputs].double().nan_to_num(-torch.inf).flatten(1)
        so = torch.from_numpy(truth[:, outputs]).to(said).repeat(1, answers.shape[1])
        return r2_score(said, so, multioutput="raw_values").view(-1, len(outputs)).mean(dim=1)

    def parts(
        self, answers: Float[Tensor, "units k A"], truth: Float[Tensor, "units A"]
    ) -> Float[Tensor, "units k _ 4"]:
        """See `SumMetric`."""
        outputs = self._outputs(truth.numpy())
        answers, so = answers[..., outputs].double(), truth[:, None, outputs].double()
        errors = (
            answers.nan_to_num(-torch.inf) - so
        ).square()  # a head that has diverged is the worst, not NaN
        centred = (so - so.mean(dim=0)).expand_as(
            errors
        )  # or `of_sums` would lose digits where the mean is large
        return torch.stack([errors, centred, centred.square(), torch.ones_like(errors)], dim=-1)

    def of_sums(self, sums: Float[Tensor, "k A 4"]) -> Float[Tensor, " k"]:
        """See `SumMetric`; the variance is about the mean of the draw."""
        errors, total, squares, units = sums.unbind(dim=-1)
        variance = squares - total.square() / units
        varies = variance > 1e-12 * squares  # not in a draw that takes one unit alone
        return (1 - errors / torch.where(varies, variance, torch.nan)).mean(dim=-1)

    def _outputs(self, truth: Float[np.ndarray, "units A"]) -> list[int]:
        """Numbers of those that are scored."""
        outputs = list(range(truth.shape[1])) if self.output is None else [self.output]
        constant = [number for number in outputs if (truth[:, number] == truth[0, number]).all()]
        if constant:
            raise UserError(
                f"`{self.name}`: output {constant[0]} is the same in all {len(truth)} units; take more units"
            )
        return outputs
