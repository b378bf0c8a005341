"""Chords1217 as MARBLE shares it: major and minor triads over whole songs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from mir_eval import chord as mir_chord
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import SHARP_TONICS, Share
from jepa_audio.probing.tasks import labels
from jepa_audio.probing.tasks.base import Protocol, Task, Windows, protocols_of_v2
from jepa_audio.probing.tasks.records import Item, Split, is_time

CHORDS = (*(f"{root}:{quality}" for quality in ("maj", "min") for root in SHARP_TONICS), "N")
"""Major triads, minor triads, no chord; in the notation of (Harte et al., 2005)."""

_OVERLAP_SECONDS = 1e-3
"""Chords may overlap by this much: the times of annotations are rounded."""


@dataclass(frozen=True)
class Chords(labels.FrameLabels):
    """One of `CHORDS`, of records with a list of `{"start_time", "end_time", "chord_str"}`.

    The class of a chord is the major triad that it contains, or else the minor triad that it
    contains. No-chord is a class. Other chords and moments without annotation are `UNKNOWN`. A
    frame covers half a step on both sides of its centre.
    """

    kind = "class"
    names = CHORDS

    @override
    def row_targets(self, split: Split, rows: labels.Rows) -> Int64[Tensor, " rows"]:
        """Class of the chord at the centre of each frame, or `UNKNOWN`."""
        targets = np.full(len(rows), labels.UNKNOWN, dtype=np.int64)
        for frames in labels.frame_sequences(split, rows, "file"):
            timeline = _Timeline(frames.item)
            index, is_annotated = timeline.find(frames.seconds)
            targets[frames.rows[is_annotated]] = timeline.classes[index[is_annotated]]
        return torch.from_numpy(targets)

    @override
    def predictions(
        self, logits: labels.Logits, split: Split, rows: labels.Rows, by: labels.Unit
    ) -> labels.Predictions:
        """Sums of each unit and head: correct and comparable seconds, correct and scored frames.

        The seconds equal those of mir_eval's `majmin`, but are summed over parts of the intervals
        that mir_eval merges, for all heads at once.
        """
        classes, device = logits.detach().argmax(dim=-1), logits.device
        targets = self.row_targets(split, rows).to(device)
        is_scored = targets != labels.UNKNOWN
        is_correct = (classes == targets[:, None]) & is_scored[:, None]
        row, seconds, credit = (torch.from_numpy(a).to(device) for a in _overlaps(split, rows))
        correct = credit.clamp_min(0).gather(1, classes[row]) * seconds[:, None]
        comparable = seconds.where(credit[:, 0] >= 0, seconds.new_zeros(()))
        unit = torch.from_numpy(rows.unit_index(split, by)).to(device)
        terms = (
            (unit[row], correct),
            (unit[row], comparable[:, None].expand_as(correct)),
            (unit, is_correct.float()),
            (unit, is_scored[:, None].expand_as(is_correct).float()),
        )
        zeros = torch.zeros(rows.num_units(split, by), logits.shape[1], device=device)
        return torch.stack([zeros.index_add(0, index, term) for index, term in terms], dim=-1)


def _overlaps(
    split: Split, rows: labels.Rows
) -> tuple[Int64[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, "n C"]]:
    """Overlaps of a frame and a chord: row, seconds, and credit (see `_Timeline`)."""
    half, parts = 0.5 / rows.frame_rate, []
    for frames in labels.frame_sequences(split, rows, "file"):
        timeline = _Timeline(frames.item)
        low, high = frames.seconds - half, frames.seconds + half
        edges = np.unique(np.concatenate([low, high, timeline.starts, timeline.ends]))
        middle = (edges[:-1] + edges[1:]) / 2
        frame = np.searchsorted(low, middle, side="right") - 1
        index, is_annotated = timeline.find(middle)
        kept = is_annotated & (frame >= 0) & (middle < high[frame])
        seconds = np.diff(edges)[kept].astype(np.float32)
        parts.append((frames.rows[frame[kept]], seconds, timeline.credit[index[kept]]))
    row, seconds, credit = map(np.concatenate, zip(*parts, strict=True))
    return row, seconds, credit


class _Timeline:
    """The chords of an item in order of time; where two overlap, the later one counts.

    Times are in seconds, `classes` are indices in `CHORDS` or `UNKNOWN`. `credit` `[n, C]` is the
    score of each of `CHORDS` as a prediction, by mir_eval's `majmin`; -1 if the chord is not
    comparable. Raises `UserError` if the label of the item is not as documented.
    """

    def __init__(self, item: Item) -> None:
        if not isinstance(item.label, list):
            raise item.error("a list of chords with start and end")
        regions = [_region(item, region) for region in item.label]
        for (_, end, _), (start, _, chord) in itertools.pairwise(regions):
            if start < end - _OVERLAP_SECONDS:
                raise UserError(
                    f"{item.where}: chord {chord!r} starts at {start} s, but the one before ends "
                    f"at {end} s; chords must be in order of time and not overlap"
                )
        regions = [region for region in regions if region[0] < region[1]]
        self.starts = np.array([start for start, _, _ in regions], dtype=float)
        self.ends = np.array([end for _, end, _ in regions], dtype=float)
        self.classes = np.array([_class_of(chord) for _, _, chord in regions], dtype=np.int64)
        credit = np.array([_credit_of(chord) for _, _, chord in regions], dtype=np.float32)
        self.credit = credit.reshape(-1, len(CHORDS))

    def find(
        self, seconds: Float[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Index of the chord at each time, and whether there is one."""
        index = np.searchsorted(self.starts, seconds, side="right") - 1
        is_inside = index >= 0
        is_inside[is_inside] = seconds[is_inside] < self.ends[index[is_inside]]
        return index, is_inside


def _region(item: Item, region: Any) -> tuple[float, float, str]:
    keys = ("start_time", "end_time", "chord_str")
    if not isinstance(region, dict) or any(key not in region for key in keys):
        raise UserError(
            f"{item.where}: chord {region!r} must have `start_time`, `end_time` and `chord_str`"
        )
    start, end, chord = (region[key] for key in keys)
    if not is_time(start) or not is_time(end) or end < start:
        times = "`start_time` and `end_time`"
        raise UserError(f"{item.where}: {times} of {region!r} must be seconds, in this order")
    try:
        _class_of(chord)
    except (mir_chord.InvalidChordException, TypeError) as error:
        raise UserError(
            f"{item.where}: `chord_str` is {chord!r}, must be a chord such as 'A:min7/b3' or 'N' "
            f"({error})"
        ) from error
    return float(start), float(end), chord


@lru_cache(maxsize=10_000)
def _class_of(chord: str) -> int:
    root, semitones, _ = mir_chord.encode(chord)
    if chord == mir_chord.NO_CHORD:
        return CHORDS.index("N")
    for first, quality in ((0, "maj"), (12, "min")):
        triad = np.flatnonzero(mir_chord.quality_to_bitmap(quality))
        if (semitones[triad] == 1).all():
            return int(first + root % 12)
    return labels.UNKNOWN


@lru_cache(maxsize=10_000)
def _credit_of(chord: str) -> tuple[float, ...]:
    return tuple(mir_chord.majmin([chord] * len(CHORDS), list(CHORDS)).tolist())


_V2 = Protocol(
    Windows(15.0, min_ratio=0.1), max_epochs=50, stop_patience=10, learning_rates=(1e-3,)
)
CHORDS1217 = Task(
    "chords1217",
    "Chords1217/Chords1217",
    Chords(),
    (Share("majmin", (0, 1)), Share("frame_accuracy", (2, 3))),
    protocols_of_v2(_V2),
    # The average error at a chord change is 12.5 ms, under 1 % of a chord of 2 s. 100 Hz would need
    # five times the memory.
    grid_hz=20.0,
)
