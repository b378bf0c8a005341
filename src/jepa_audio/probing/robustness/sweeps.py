"""The sweeps of conditions, and the area under the curve of scores of a sweep."""

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
"""Levels of every noise, from mild to severe."""

_LEVELS: dict[type[Condition], tuple[float, ...]] = {
    WhiteNoise: SNRS_DB,
    PinkNoise: SNRS_DB,
    Reverberation: (0.2, 0.4, 0.8, 1.6),
    LowPass: (8000.0, 4000.0, 2000.0, 1000.0, 500.0),
    HighPass: (125.0, 250.0, 500.0, 1000.0, 2000.0),
    Gain: (10.0, -10.0, -20.0, -30.0),
    Clipping: (1.0, 5.0, 10.0, 25.0, 50.0),
    Mp3: (128.0, 64.0, 32.0, 16.0, 8.0),
    Vorbis: (8.0, 5.0, 3.0, 1.0),
    Opus: (64.0, 32.0, 16.0, 8.0),
}

SWEEPS = {kind.name: tuple(map(kind, levels)) for kind, levels in _LEVELS.items()}
"""Conditions by name, each from mild to severe (gain by its distance from 0)."""


def noise_sweep(folder: Path) -> tuple[Condition, ...]:
    """The user's own recordings as noise, at the default levels; see `RecordedNoise`."""
    return tuple(RecordedNoise(level, folder) for level in SNRS_DB)


def area(scores: Sequence[float], clean: float) -> float:
    """Mean height of the curve of scores along a sweep, starting at the clean score.

    The trapezoidal rule with equal steps: (c / 2 + s1 + ... + s(n-1) + sn / 2) / n. All levels
    count equally, whatever their units. The area has the unit of the score: a curve that never
    falls has the area `clean`. Scores below 0 count as they are (R² of predictions that are worse
    than the mean).

    Raises:
        UserError: if there is no level.
    """
    if not scores:
        raise UserError("the area of a curve needs the score of at least one level")
    return float(np.trapezoid([clean, *scores])) / len(scores)
