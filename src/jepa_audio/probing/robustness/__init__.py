"""Robustness: scores on degraded test clips, level by level."""

from jepa_audio.probing.robustness.conditions import Condition
from jepa_audio.probing.robustness.sweeps import SWEEPS, area, noise_sweep

__all__ = ["SWEEPS", "Condition", "area", "noise_sweep"]
