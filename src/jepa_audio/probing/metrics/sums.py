"""Metrics that are functions of sums over the units: classes, keys, tags, numbers and events."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from mir_eval.key import weighted_score
from torch import Tensor
from torchmetrics.functional.regression import r2_score
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import Predictions, Scores, SumMetric, Targets, Terms

SHARP_TONICS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
"""The twelve pitch classes from C upwards, with sharps."""

TONICS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
"""The twelve pitch classes from C upwards, with flats."""

KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
"""Major and minor keys, spelt as in the labels of MARBLE's GS."""


def _mean_terms(values: Shaped[Tensor, "units k"]) -> Float[Tensor, "units k 2"]:
    """Terms of the mean over all units."""
    return torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=-1)


class Accuracy(SumMetric):
    """Share of units whose largest logit is that of their class; an unknown class is wrong."""

    name = "accuracy"

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        return _mean_terms(predictions.argmax(dim=-1) == targets[:, None])


class KeyScore(SumMetric):
    """Mean credit for a key: 1 if correct, less if related (mir_eval's `key.weighted_score`).

    mir_eval gives credit for a key a fifth above the true key, but none for a key a fifth below.

    Args:
        symmetric: whether both keys get the same credit.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self.name = "key_weighted_symmetric" if symmetric else "key_weighted"

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        assert predictions.shape[-1] == len(KEYS), "the classes are not `KEYS`"
        credit = torch.from_numpy(key_credits(self.symmetric)).to(predictions.device)
        credit = credit[targets.clamp_min(0)[:, None], predictions.argmax(dim=-1)]
        return _mean_terms(credit * (targets[:, None] >= 0))


@cache
def key_credits(symmetric: bool) -> Float[np.ndarray, "24 24"]:
    """Credit for each predicted key (column) and true key (row), in the order of `KEYS`."""
    credit = np.array([[weighted_score(true, predicted) for predicted in KEYS] for true in KEYS])
    return np.maximum(credit, credit.T) if symmetric else credit


class F1(SumMetric):
    """F1 of tags; a tag is predicted if its logit is above 0 (its probability above 0.5).

    Args:
        average: "macro" for the mean over the tags that some unit has, "micro" for all tags pooled.

    Raises:
        UserError: when called, if no unit has a tag.
    """

    def __init__(self, average: Literal["macro", "micro"]) -> None:
        self.average = average
        self.name = f"f1_{average}"

    @override
    def num_scored(self, targets: Targets) -> int | None:
        return int((targets > 0).any(axis=0).sum()) if self.average == "macro" else None

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        predicted, true = predictions > 0, (targets > 0)[:, None].expand_as(predictions)
        if not true.any():
            raise UserError(
                f"`{self.name}`: none of {len(true)} units has any of the {true.shape[-1]} tags; "
                "use more units"
            )
        return torch.stack([predicted & true, predicted, true], dim=-1).double()

    @override
    def score(self, sums: Float[Tensor, "K C 3"]) -> Scores:
        """A tag that no unit of a draw has is left out of the mean of that draw."""
        sums = sums if self.average == "macro" else sums.sum(dim=1, keepdim=True)
        hits, predicted, true = sums.unbind(dim=-1)
        return torch.where(true > 0, 2 * hits / (predicted + true), torch.nan).nanmean(dim=-1)


@dataclass(frozen=True)
class R2(SumMetric):
    """Coefficient of determination over the whole split: 1 - squared errors / variance.

    It differs from the mean over batches, which is mostly smaller.

    Args:
        output: index of the output that is scored; `None` for the mean over all.

    Raises:
        UserError: when called, if the targets are constant.
    """

    output: int | None = None
    name: str = "r2"

    @override
    def num_scored(self, targets: Targets) -> int | None:
        return targets.shape[1] if self.output is None else None

    @override
    def __call__(self, predictions: Predictions, targets: Targets) -> Scores:
        outputs = self._outputs(targets)
        predicted = _finite(predictions[..., outputs]).flatten(1)
        true = torch.from_numpy(targets[:, outputs]).to(predicted).repeat(1, predictions.shape[1])
        scores = r2_score(predicted, true, multioutput="raw_values")
        return scores.view(-1, len(outputs)).mean(dim=1)

    @override
    def terms(self, predictions: Predictions, targets: Shaped[Tensor, "units ..."]) -> Terms:
        outputs = self._outputs(targets.numpy())
        true = targets[:, None, outputs].double()
        errors = (_finite(predictions[..., outputs]) - true).square()
        # Centred, or `score` would lose digits where the mean is large.
        centred = (true - true.mean(dim=0)).expand_as(errors)
        return torch.stack([errors, centred, centred.square(), torch.ones_like(errors)], dim=-1)

    @override
    def score(self, sums: Float[Tensor, "K A 4"]) -> Scores:
        """The variance is around the mean of the draw."""
        errors, total, squares, units = sums.unbind(dim=-1)
        variance = squares - total.square() / units
        is_constant = variance <= 1e-12 * squares  # in a draw of a single unit
        return (1 - errors / variance.where(~is_constant, torch.nan)).mean(dim=-1)

    def _outputs(self, targets: Float[np.ndarray, "units A"]) -> list[int]:
        """Indices of the outputs that are scored."""
        outputs = list(range(targets.shape[1])) if self.output is None else [self.output]
        for output in outputs:
            if (targets[:, output] == targets[0, output]).all():
                raise UserError(
                    f"`{self.name}`: output {output} is the same in all {len(targets)} units; use "
                    "more units"
                )
        return outputs


def _finite(predictions: Tensor) -> Tensor:
    """Replace NaN by -inf, in 64 bits: a diverged head gets the lowest score instead of NaN."""
    return predictions.double().nan_to_num(-torch.inf)


@dataclass(frozen=True)
class CountMetric(SumMetric):
    """A metric of some columns of the predictions, which are counts for each unit."""

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
