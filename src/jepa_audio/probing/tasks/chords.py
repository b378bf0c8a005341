"""Chords1217 as MARBLE shares it: major and minor triads over whole songs."""

from __future__ import annotations

from jepa_audio.probing.metrics import Share
from jepa_audio.probing.tasks.base import Protocol, Task
from jepa_audio.probing.tasks.frames import CHORD_COLUMNS, Chords
from jepa_audio.probing.tasks.windows import Windows

_WINDOWS = Windows(15.0, min_ratio=0.1)

CHORDS1217 = Task(
    "chords1217",
    "Chords1217/Chords1217",
    Chords(),
    (
        Share(
            "majmin",
            CHORD_COLUMNS.index("majmin_seconds"),
            CHORD_COLUMNS.index("comparable_seconds"),
        ),
        Share("frame_accuracy", CHORD_COLUMNS.index("frame_hits"), CHORD_COLUMNS.index("frames")),
    ),
    {
        # MARBLE's first version has no chords: this is its second's with the first's learning
        # rates.
        "marble-v1": Protocol(_WINDOWS, max_epochs=50, stop_patience=10, plateau_patience=5),
        "marble-v2": Protocol(
            _WINDOWS, max_epochs=50, stop_patience=10, plateau_patience=5, learning_rates=(1e-3,)
        ),
    },
    # A change of chord is missed by 12.5 ms on average, under 1 % of chords that last 2 s; 100 Hz
    # would need five times the memory for that.
    grid_hz=20.0,
)
