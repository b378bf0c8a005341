"""Splits and feature rows for the tests of labels in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item, Split


def split_of(*labels: Any, start_seconds: float = 0.0) -> Split:
    return Split(
        tuple(
            Item(Path(f"{n}.wav"), label, f"{n}.wav", f"songs.jsonl, line {n + 1}", start_seconds)
            for n, label in enumerate(labels)
        )
    )


def rows_of(*lengths: float, rate: float, window_seconds: float = 10.0) -> Rows:
    """Frames of items with these lengths in seconds; windows contain whole frames only."""
    item, window, seconds = [], [], []
    for number, length in enumerate(lengths):
        for start in np.arange(0, length, window_seconds):
            num_frames = max(1, int((min(window_seconds, length - start)) * rate + 1e-6))
            item += [number] * num_frames
            window += [window[-1] + 1 if window else 0] * num_frames
            seconds += (start + (np.arange(num_frames) + 0.5) / rate).tolist()
    return Rows(np.array(item), np.array(window), np.array(seconds, dtype=np.float32))
