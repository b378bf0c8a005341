"""Robustness: test clips degraded level by level, and what is left of a score."""

from jepa_audio.probing.robustness.conditions import Condition
from jepa_audio.probing.robustness.sweeps import SWEEPS, area, kept_share, noise_sweep

__all__ = ["SWEEPS", "Condition", "area", "kept_share", "noise_sweep"]
