"""What is left of a score when clips are degraded, level by level: the sweeps, and the area under their curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jepa_audio.errors import UserError
from jepa_audio.probing.robustness.codecs import Mp3, Opus, Vorbis
from jepa_audio.probing.robustness.conditions import (
    Clipping,
    Condition,
    Gain,
    HighPass,
    LowPass,
    PinkNoise,
    RecordedNoise,
    Reverberation,
    WhiteNoise,
)

SNRS_DB = (30.0, 20.0, 10.0, 5.0, 0.0, -5.0)
"""Default levels of every noise, from mild to hard."""


def noise_sweep(folder: Path) -> tuple[Condition, ...]:
    """Recordings of a user's own as noise, at the default levels; see `RecordedNoise`."""
    return tuple(RecordedNoise(level, folder) for level in SNRS_DB)


SWEEPS: dict[str, tuple[Condition, ...]] = {
    sweep[0].name: sweep
    for sweep in (
        tuple(WhiteNoise(level) for level in SNRS_DB),
        tuple(PinkNoise(level) for level in SNRS_DB),
        tuple(Reverberation(level) for level in (0.2, 0.4, 0.8, 1.6)),
        tuple(LowPass(level) for level in (8000.0, 4000.0, 2000.0, 1000.0, 500.0)),
        tuple(HighPass(level) for level in (125.0, 250.0, 500.0, 1000.0, 2000.0)),
        tuple(Gain(level) for level in (10.0, -10.0, -20.0, -30.0)),
        tuple(Clipping(level) for level in (1.0, 5.0, 10.0, 25.0, 50.0)),
        tuple(Mp3(level) for level in (128.0, 64.0, 32.0, 16.0, 8.0)),
        tuple(Vorbis(level) for level in (8.0, 5.0, 3.0, 1.0)),
        tuple(Opus(level) for level in (64.0, 32.0, 16.0, 8.0)),
    )
}
"""Conditions by name, each from mild to hard (gain by its distance from 0)."""


def area(levels_scores: Sequence[float], clean: float) -> float:
    """Mean height of the curve of scores along a sweep, by trapezoids over equally spaced steps.

    The curve begins at the clean score: of c, s1 ... sn it is (c / 2 + s1 + ... + s(n-1) + sn / 2)
    / n. Levels count alike, whatever their units. It is in the score's own unit: a curve that never
    falls has `clean`, scores below 0 (R² of answers worse than the mean) count as they are.

    Raises:
        UserError: if there is no level.
    """
    if not levels_scores:
        raise UserError("the area of a curve needs the score of at least one level")
    return float(np.trapezoid([clean, *levels_scores])) / len(levels_scores)
