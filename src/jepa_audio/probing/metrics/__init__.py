"""Scores of what heads say of a whole split, and the same of its resamplings."""

from jepa_audio.probing.metrics.base import Metric
from jepa_audio.probing.metrics.clips import F1, KEYS, R2, TONICS, Accuracy, KeyScore, key_credits
from jepa_audio.probing.metrics.events import MeanF1, PooledF1, Share
from jepa_audio.probing.metrics.ranking import AUROC, AveragePrecision

__all__ = [
    "AUROC",
    "F1",
    "KEYS",
    "R2",
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
