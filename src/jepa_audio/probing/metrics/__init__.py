"""Metrics of the predictions for a whole split, and for bootstrap resamples of it."""

from jepa_audio.probing.metrics.base import Metric
from jepa_audio.probing.metrics.ranking import AUROC, AveragePrecision
from jepa_audio.probing.metrics.sums import (
    F1,
    KEYS,
    R2,
    SHARP_TONICS,
    TONICS,
    Accuracy,
    KeyScore,
    MeanF1,
    PooledF1,
    Share,
    key_credits,
)

TAG_METRICS: tuple[Metric, ...] = (AUROC(), AveragePrecision(), F1("macro"), F1("micro"))
"""Metrics of every task on tags."""

__all__ = [
    "AUROC",
    "F1",
    "KEYS",
    "R2",
    "SHARP_TONICS",
    "TAG_METRICS",
    "TONICS",
    "Accuracy",
    "AveragePrecision",
    "KeyScore",
    "MeanF1",
    "Metric",
    "PooledF1",
    "Share",
    "key_credits",
]
