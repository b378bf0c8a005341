"""Labels with annotations in time: every feature row is a frame with its own target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from typing_extensions import override

from jepa_audio.probing.tasks.labels import Labels, Rows, Unit, UnitTargets
from jepa_audio.probing.tasks.records import Item, Split


class FrameLabels(Labels):
    """An annotation in time: frames have targets, and predictions are counts for each unit.

    Annotations count seconds from the start of their file, whatever segment of it a record names.
    Parts without frames, such as an end that is too short for a window, are not scored.
    """

    @override
    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> UnitTargets:
        """Zeros: `predictions` are counts, already compared with the annotation."""
        return np.zeros(rows.num_units(split, by))


@dataclass(frozen=True)
class FrameSequence:
    """Consecutive frames of one item.

    Attributes:
        item: their item.
        unit: index of their unit.
        rows: their indices.
        seconds: their centres from the start of the file, as annotations count.
    """

    item: Item
    unit: int
    rows: Int64[np.ndarray, " rows"]
    seconds: Float[np.ndarray, " rows"]


def frame_sequences(split: Split, rows: Rows, by: Unit) -> Iterator[FrameSequence]:
    """Yield the frames of each item, or of each window if that is the unit."""
    key = rows.window if by == "window" else rows.item
    order = np.argsort(key, kind="stable")
    unit = rows.unit_index(split, by)
    for part in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        item = split.items[rows.item[part[0]]]
        seconds = item.start_seconds + rows.seconds[part].astype(np.float64)
        yield FrameSequence(item, int(unit[part[0]]), part, seconds)
