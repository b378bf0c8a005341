"""From what a head says of a test split to scores with intervals, and to what they rest on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.probing.intervals import draw_counts, interval
from jepa_audio.probing.rows import Evidence, Score
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.probing.tasks.labels import UNKNOWN, Rows, Unit
from jepa_audio.probing.tasks.records import Split

NUM_DRAWS = 2000
_DRAWS_SEED = 0  # the same for every row ever written: only so can any two be compared on the same resamplings


@dataclass(frozen=True)
class TestResult:
    """Scores of one head.

    Attributes:
        scores: of every metric and unit.
        evidence: what they rest on.
    """

    scores: dict[str, Score]
    evidence: Evidence


def judge(
    logits: Float[Tensor, "rows 1 C"], data: ProbeData, split: Split, rows: Rows
) -> TestResult:
    """Every metric of a task, on every unit that it scores, with 95 % intervals of the bootstrap over units."""
    scores: dict[str, Score] = {}
    draws: dict[str, np.ndarray] = {}
    for by in data.task.units:
        answers, truth = (
            data.labels.predictions(logits, split, rows, by).cpu(),
            data.labels.unit_targets(split, rows, by),
        )
        counts = draw_counts(len(answers), NUM_DRAWS, _DRAWS_SEED)
        for metric in data.task.metrics:
            name = metric.name if by == data.task.units[0] else f"{by}_{metric.name}"
            draws[name] = metric.resampled(answers[:, 0].numpy(), truth, counts)
            value = float(metric(answers, truth)[0])
            scores[name] = Score(value, *interval(draws[name]), metric.num_scored(truth))
        if by == data.task.units[0]:
            kept = answers[:, 0].float().numpy(), truth
    return TestResult(
        scores, Evidence(*kept, uids=_names(split, rows, data.task.units[0]), draws=draws)
    )


def chance(data: ProbeData, train: Rows, test: Rows) -> float:
    """The first metric of answers that are the same for all: what is most usual, or the mean, in the training split."""
    targets = data.labels.row_targets(data.splits["train"], train)
    if data.labels.kind == "class":
        targets = F.one_hot(targets[targets != UNKNOWN], data.labels.num_outputs).float()
    usual = targets.float().mean(dim=0)
    logits = torch.logit(usual, eps=1e-6) if data.labels.kind == "tags" else usual
    return float(
        data.scores(logits.expand(len(test), 1, -1).contiguous(), data.splits["test"], test)
    )


def _names(split: Split, rows: Rows, by: Unit) -> tuple[str, ...]:
    if by == "file":
        return split.uids
    _, first = np.unique(rows.window, return_index=True)
    return tuple(f"{split.items[rows.item[row]].uid} at {rows.seconds[row]:.1f} s" for row in first)
