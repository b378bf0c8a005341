"""Scores of a head on the test split, with intervals, and the chance score."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.probing.intervals import draw_counts, interval
from jepa_audio.probing.rows import Evidence, Score
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.probing.tasks.labels import UNKNOWN, Rows
from jepa_audio.probing.tasks.records import Split


def score_head(
    logits: Float[Tensor, "rows 1 C"], data: ProbeData, split: Split, rows: Rows
) -> tuple[dict[str, Score], Evidence]:
    """All metrics of a task on all its units, with 95 % bootstrap intervals, and the evidence.

    Metrics on other units than the first have a prefix. Predictions and labels of the evidence are
    those of the first unit.
    """
    scores: dict[str, Score] = {}
    draws: dict[str, np.ndarray] = {}
    first_unit = data.task.units[0]
    for unit in data.task.units:
        predictions = data.labels.predictions(logits, split, rows, unit).cpu()
        truth = data.labels.unit_targets(split, rows, unit)
        counts = draw_counts(len(predictions))
        for metric in data.task.metrics:
            name = metric.name if unit == first_unit else f"{unit}_{metric.name}"
            draws[name] = metric.resampled(predictions[:, 0].numpy(), truth, counts)
            value = float(metric(predictions, truth)[0])
            scores[name] = Score(value, *interval(draws[name]), metric.num_scored(truth))
        if unit == first_unit:
            kept = predictions[:, 0].float().numpy(), truth
    uids = split.uids
    if first_unit == "window":
        _, first = np.unique(rows.window, return_index=True)
        starts = zip(rows.item[first], rows.seconds[first], strict=True)
        uids = tuple(f"{split.items[item].uid} at {seconds:.1f} s" for item, seconds in starts)
    return scores, Evidence(*kept, uids=uids, draws=draws)


def chance_score(data: ProbeData, train: Rows, test: Rows) -> float:
    """First metric of a constant prediction: class or tag frequencies, or means, in training."""
    targets = data.labels.row_targets(data.splits["train"], train)
    if data.labels.kind == "class":
        targets = F.one_hot(targets[targets != UNKNOWN], data.labels.num_outputs)
    mean = targets.float().mean(dim=0)
    constant = torch.logit(mean, eps=1e-6) if data.labels.kind == "tags" else mean
    logits = constant.expand(len(test), 1, -1).contiguous()
    return float(data.scores(logits, data.splits["test"], test))
