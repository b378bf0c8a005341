"""Robustness: test clips degraded level by level, and what is left of a score."""

from jepa_audio.probing.robustness.conditions import Condition
from jepa_audio.probing.robustness.sweeps import SWEEPS, area, noise_sweep

__all__ = ["SWEEPS", "Condition", "area", "noise_sweep"]
