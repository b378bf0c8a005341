"""Metrics of the predictions for a whole split, and of its bootstrap resamplings."""

from jepa_audio.probing.metrics.base import Metric
from jepa_audio.probing.metrics.clips import F1, R2, Accuracy, KeyScore, key_credits
from jepa_audio.probing.metrics.events import MeanF1, PooledF1, Share
from jepa_audio.probing.metrics.pitch import KEYS, SHARP_TONICS, TONICS
from jepa_audio.probing.metrics.ranking import AUROC, AveragePrecision

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
