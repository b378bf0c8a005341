"""What a head has to say of every moment: beats, chords; scored by events and by seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from mir_eval import chord as mir_chord
from mir_eval.util import match_events
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.beats import decode_beats_dbn, decode_beats_peaks
from jepa_audio.probing.tasks.labels import Labels, Rows, Unit
from jepa_audio.probing.tasks.records import Item, Split

IGNORED = -1
"""Class of a frame that is neither learnt nor scored."""

BEAT_COLUMNS = (
    *("beat_hits", "beat_estimated", "beat_reference"),
    *("downbeat_hits", "downbeat_estimated", "downbeat_reference"),
)
"""What `Beats` counts in every unit."""

CHORD_COLUMNS = ("majmin_seconds", "comparable_seconds", "frame_hits", "frames")
"""What `Chords` counts in every unit."""

_ROOTS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
CHORDS = (*(f"{root}:maj" for root in _ROOTS), *(f"{root}:min" for root in _ROOTS), "N")
"""Major triads, minor triads, no chord; in the notation of (Harte et al., 2005)."""

Decoder = Literal["dbn", "peaks"]
"""How beats are found in activations: `decode_beats_dbn`, `decode_beats_peaks`."""

TOLERANCE_SECONDS = 0.07
"""How far a beat may be from where it is annotated: as mir_eval, and as MARBLE's code (its paper says 20 ms)."""

_NO_CHORD = len(CHORDS) - 1
_ROUNDING_SECONDS = 1e-3  # annotations round their times: chords may overlap by so much


@dataclass(frozen=True)
class _Stretch:
    """Rows that follow each other without a gap.

    Attributes:
        item: that they come from.
        unit: number of the unit that they belong to.
        rows: their numbers.
        seconds: their centres from the start of the file, as annotations count.
    """

    item: Item
    unit: int
    rows: Int64[np.ndarray, " rows"]
    seconds: Float[np.ndarray, " rows"]


class FrameLabels(Labels):
    """An annotation in time: every row is a frame with a target of its own, and what is scored is counted by unit.

    Annotations count seconds from the start of their file, whatever part of it a record names. What
    no frame covers, such as an end that is too short for a window, is not scored.
    """

    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Shaped[np.ndarray, " units"]:
        """Zeros: `answers` holds the counts, taken against the annotation itself."""
        return np.zeros(_num_units(split, rows, by))


@dataclass(frozen=True)
class Beats(FrameLabels):
    """Beats and downbeats, of records that are labelled `{"beat": [seconds], "downbeat": [seconds]}`.

    A unit is decoded as a whole, its windows joined, and compared with the annotated seconds as
    they stand. Its first 5 s count as any others: MARBLE does not cut them off, though mir_eval
    advises it.

    Args:
        neighbours: targets of the frames 1, 2, … steps away from a beat; MARBLE's second version
            has (0.5, 0.25).
        neighbour_seconds: a step, or a frame if that is longer; MERT's frame, whose published
            numbers are those to compare with.
        decoder: how beats are found in activations.
        threshold: lowest activation of a beat, for "peaks".
        beat_bpm: slowest and fastest tempo of beats.
        downbeat_bpm: the same of downbeats; MARBLE's second version takes that of beats for them
            too.
        decoded: the outputs that are decoded and counted.
    """

    kind: ClassVar[Literal["class", "tags", "numbers"]] = "tags"

    neighbours: tuple[float, ...] = (1.0,)
    neighbour_seconds: float = 1 / 75
    decoder: Decoder = "dbn"
    threshold: float = 0.5
    beat_bpm: tuple[float, float] = (55.0, 215.0)
    downbeat_bpm: tuple[float, float] = (18.0, 72.0)
    decoded: tuple[str, ...] = ("beat", "downbeat")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs."""
        return ("beat", "downbeat")

    def for_first_metric(self) -> Beats:
        """See `Labels`: beats alone, a third of the work: intervals of downbeats are longer."""
        return replace(self, decoded=("beat",))

    def row_targets(self, split: Split, rows: Rows) -> Float[Tensor, "rows 2"]:
        """How much of a beat, and of a downbeat, each frame is."""
        targets = np.zeros((len(rows), 2), dtype=np.float32)
        values = np.array([1.0, *self.neighbours, 0.0])
        step = max(self.neighbour_seconds, 1 / _frame_rate(rows))
        for stretch in _stretches(split, rows, "file"):
            for output, name in enumerate(self.names):
                away = _distance(stretch.seconds, _events(stretch.item, name)) / step
                steps = np.ceil(
                    away - 0.501
                )  # nearest step; a beat half way between two frames belongs to both
                targets[stretch.rows, output] = values[
                    np.minimum(steps, len(values) - 1).astype(np.int64)
                ]
        return torch.from_numpy(targets)

    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Float[Tensor, "n C"]
    ) -> Float[Tensor, " K"]:
        """Binary cross-entropy, mean over frames and outputs."""
        expanded = targets[:, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, expanded, reduction="none").mean(
            dim=(0, 2)
        )

    def predictions(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows, by: Unit
    ) -> Float[Tensor, "units K A"]:
        """How many events each head hit, estimated and should have found, see `BEAT_COLUMNS`; 0 of what is left out."""
        stretches, frame_rate = list(_stretches(split, rows, by)), _frame_rate(rows)
        counts = torch.zeros(_num_units(split, rows, by), logits.shape[1], len(BEAT_COLUMNS))
        for output, name in enumerate(self.names):
            if name not in self.decoded:
                continue
            frames = self._frames(
                logits[:, :, output].detach().sigmoid(), stretches, name, frame_rate
            )
            for unit, parts in itertools.groupby(
                sorted(zip(stretches, frames, strict=True), key=_unit_of), key=_unit_of
            ):
                counts[unit, :, 3 * output : 3 * output + 3] = self._counted(
                    list(parts), name, frame_rate
                )
        return counts.to(logits.device)

    def _counted(
        self,
        parts: list[tuple[_Stretch, list[Int64[np.ndarray, " _"]]]],
        name: str,
        frame_rate: float,
    ) -> Float[Tensor, "K 3"]:
        """Hits, estimated and annotated events of one unit, by head, from the frames that each head names."""
        annotated = [_events(stretch.item, name) for stretch, _ in parts]
        heard = [
            events[_distance(events, stretch.seconds) <= 1 / frame_rate]
            for events, (stretch, _) in zip(annotated, parts, strict=True)
        ]
        reference = np.unique(np.concatenate(heard))
        counts = []
        for k in range(len(parts[0][1])):
            estimated = np.sort(
                np.concatenate([stretch.seconds[frames[k]] for stretch, frames in parts])
            )
            counts.append((_num_hits(reference, estimated), len(estimated), len(reference)))
        return torch.tensor(counts, dtype=torch.float32)

    def _frames(
        self,
        activations: Float[Tensor, "rows K"],
        stretches: list[_Stretch],
        name: str,
        frame_rate: float,
    ) -> list[list[Int64[np.ndarray, " _"]]]:
        """Frames of the events, by stretch and head."""
        min_bpm, max_bpm = self.beat_bpm if name == "beat" else self.downbeat_bpm
        num_heads = activations.shape[1]
        lengths = np.array([len(stretch.rows) for stretch in stretches])
        place = np.stack(
            [np.pad(stretch.rows, (0, lengths.max() - len(stretch.rows))) for stretch in stretches]
        )
        tracks = activations[torch.from_numpy(place).to(activations.device)].mT.flatten(0, 1)
        of_heads = lengths.repeat(num_heads)
        if self.decoder == "dbn":
            beats = decode_beats_dbn(tracks, frame_rate, min_bpm, max_bpm, lengths=of_heads)
        else:
            beats = decode_beats_peaks(
                tracks, frame_rate, self.threshold, max_bpm, lengths=of_heads
            )
        return [beats[start : start + num_heads] for start in range(0, len(beats), num_heads)]


@dataclass(frozen=True)
class Chords(FrameLabels):
    """One of `CHORDS`, of records labelled with a list of `{"start_time", "end_time", "chord_str"}`.

    A chord that contains a major triad is that triad, else one that contains a minor triad is that
    one; other chords are ignored, and so are moments without annotation. No-chord stays no-chord,
    wherever it stands. A frame answers for half a step on either side of its centre.
    """

    kind: ClassVar[Literal["class", "tags", "numbers"]] = "class"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return CHORDS

    def row_targets(self, split: Split, rows: Rows) -> Int64[Tensor, " rows"]:
        """Class of the chord at the centre of each frame, or `IGNORED`."""
        targets = np.full(len(rows), IGNORED, dtype=np.int64)
        for stretch in _stretches(split, rows, "file"):
            chords = _Timeline.of(stretch.item)
            place, inside = chords.at(stretch.seconds)
            targets[stretch.rows[inside]] = chords.classes[place[inside]]
        return torch.from_numpy(targets)

    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Int64[Tensor, " n"]
    ) -> Float[Tensor, " K"]:
        """Cross-entropy, mean over the frames that are not ignored."""
        expanded = targets[:, None].expand(-1, logits.shape[1])
        of_rows = F.cross_entropy(logits.mT, expanded, reduction="none", ignore_index=IGNORED)
        return of_rows.sum(dim=0) / (targets != IGNORED).sum().clamp_min(1)

    def predictions(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows, by: Unit
    ) -> Float[Tensor, "units K A"]:
        """Seconds that mir_eval's `majmin` gives each head of those that can be compared, and frames: `CHORD_COLUMNS`.

        Every chord of the annotation is compared with the 25 answers once; what mir_eval would then
        sum over merged intervals is summed over their parts, of all heads together.
        """
        said, device = logits.detach().argmax(dim=-1), logits.device
        targets = self.row_targets(split, rows).to(device)
        counted = targets != IGNORED
        hit = (said == targets[:, None]) & counted[:, None]
        row, seconds, credit = (
            torch.from_numpy(array).to(device) for array in self._parts(split, rows)
        )
        unit = torch.from_numpy(rows.unit_index(split, by)).to(device)
        right = credit.clamp_min(0).gather(1, said[row]) * seconds[:, None]
        comparable = seconds.where(credit[:, 0] >= 0, seconds.new_zeros(()))
        columns = (
            (unit[row], right),
            (unit[row], comparable[:, None].expand_as(right)),
            (unit, hit.float()),
            (unit, counted[:, None].expand_as(hit).float()),
        )
        empty = logits.new_zeros(_num_units(split, rows, by), logits.shape[1], dtype=torch.float32)
        return torch.stack([empty.index_add(0, index, column) for index, column in columns], dim=-1)

    def _parts(
        self, split: Split, rows: Rows
    ) -> tuple[
        Int64[np.ndarray, " parts"], Float[np.ndarray, " parts"], Float[np.ndarray, "parts C"]
    ]:
        """Where one frame meets one chord: row, seconds, and what every answer would earn (-1: not comparable)."""
        row, seconds = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        credit, half = [np.empty((0, len(CHORDS)), np.float32)], 0.5 / _frame_rate(rows)
        for stretch in _stretches(split, rows, "file"):
            chords = _Timeline.of(stretch.item)
            low, high = stretch.seconds - half, stretch.seconds + half
            edges = np.unique(np.concatenate([low, high, chords.starts, chords.ends]))
            middle = (edges[:-1] + edges[1:]) / 2
            frame = np.searchsorted(low, middle, side="right") - 1
            place, annotated = chords.at(middle)
            meets = annotated & (frame >= 0) & (middle < high[frame])
            row.append(stretch.rows[frame[meets]])
            seconds.append(np.diff(edges)[meets].astype(np.float32))
            credit.append(chords.credit[place[meets]])
        return np.concatenate(row), np.concatenate(seconds), np.concatenate(credit)


@dataclass(frozen=True)
class _Timeline:
    """The chords of an item, in order; where two overlap by a rounding, the later one holds.

    Attributes:
        starts: in seconds.
        ends: in seconds.
        classes: places in `CHORDS`, or `IGNORED`.
        credit: what mir_eval's `majmin` says of each of `CHORDS` as an answer.
    """

    starts: Float[np.ndarray, " n"]
    ends: Float[np.ndarray, " n"]
    classes: Int64[np.ndarray, " n"]
    credit: Float[np.ndarray, "n C"]

    @classmethod
    def of(cls, item: Item) -> _Timeline:
        """`ValueError` naming the record, if its label is no such list or names no chord."""
        regions = [_region(item, region) for region in _checked_list(item)]
        for (_, end, _), (start, _, chord) in itertools.pairwise(regions):
            if start < end - _ROUNDING_SECONDS:
                raise UserError(
                    f"{item.where}: chord {chord!r} starts at {start} s, but the one before ends at {end} s; chords "
                    "must stand in order of time and not overlap"
                )
        heard = [region for region in regions if region[0] < region[1]]
        starts = np.array([start for start, _, _ in heard], dtype=np.float64)
        ends = np.array([end for _, end, _ in heard], dtype=np.float64)
        classes = np.array([_class_of(chord) for _, _, chord in heard], dtype=np.int64)
        credit = [_credit_of(chord) for _, _, chord in heard]
        return cls(
            starts, ends, classes, np.array(credit, dtype=np.float32).reshape(-1, len(CHORDS))
        )

    def at(
        self, seconds: Float[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Place of the chord at some times, and whether there is one."""
        place = np.searchsorted(self.starts, seconds, side="right") - 1
        inside = place >= 0
        inside[inside] = seconds[inside] < self.ends[place[inside]]
        return place, inside


def _checked_list(item: Item) -> list[Any]:
    if not isinstance(item.label, list):
        raise UserError(
            f"{item.where}: `label` is {item.label!r}, must be a list of chords with start and end"
        )
    return item.label


def _region(item: Item, region: Any) -> tuple[float, float, str]:
    """Start, end and chord."""
    keys = ("start_time", "end_time", "chord_str")
    if not isinstance(region, dict) or any(key not in region for key in keys):
        raise UserError(
            f"{item.where}: chord {region!r} must have `start_time`, `end_time` and `chord_str`"
        )
    start, end, chord = (region[key] for key in keys)
    if not _is_time(start) or not _is_time(end) or end < start:
        raise UserError(
            f"{item.where}: `start_time` and `end_time` of {region!r} must be seconds, in this order"
        )
    if not isinstance(chord, str):
        raise UserError(
            f"{item.where}: `chord_str` is {chord!r}, must be a chord such as 'A:min7/b3' or 'N'"
        )
    try:
        _class_of(chord)
    except mir_chord.InvalidChordException as error:
        raise UserError(
            f"{item.where}: {chord!r} is no chord such as 'A:min7/b3' or 'N' ({error})"
        ) from error
    return float(start), float(end), chord


@lru_cache(maxsize=10_000)
def _class_of(chord: str) -> int:
    root, semitones, _ = mir_chord.encode(chord)
    if chord == mir_chord.NO_CHORD:
        return _NO_CHORD
    for first, quality in ((0, "maj"), (12, "min")):
        triad = np.flatnonzero(mir_chord.quality_to_bitmap(quality))
        if (semitones[triad] == 1).all():
            return int(first + root % 12)
    return IGNORED


@lru_cache(maxsize=10_000)
def _credit_of(chord: str) -> tuple[float, ...]:
    return tuple(mir_chord.majmin([chord] * len(CHORDS), list(CHORDS)).tolist())


def _events(item: Item, name: str) -> Float[np.ndarray, " events"]:
    """The seconds of the beats or of the downbeats; `ValueError` naming the record, if there are none such."""
    label = item.label
    if not isinstance(label, dict) or not isinstance(label.get(name), list):
        raise UserError(
            f"{item.where}: `label` must be an object whose `{name}` is a list of seconds, is {label!r}"
        )
    wrong = [time for time in label[name] if not _is_time(time)]
    if wrong:
        raise UserError(f"{item.where}: `{name}` holds {wrong[0]!r}, must hold seconds")
    events = np.array(label[name], dtype=np.float64)
    if (np.diff(events) < 0).any():
        late = events[1:][np.diff(events) < 0][0]
        raise UserError(f"{item.where}: `{name}` must rise, but {late} s comes after a later one")
    return events


def _is_time(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    )


def _num_hits(reference: Float[np.ndarray, " n"], estimated: Float[np.ndarray, " m"]) -> int:
    """Most pairs that are no farther apart than the tolerance."""
    if not len(reference) or not len(estimated):
        return 0
    return len(match_events(reference, estimated, TOLERANCE_SECONDS))


def _distance(
    times: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """From each time to the nearest of the others, which rise."""
    around = np.concatenate([[-np.inf], others, [np.inf]])
    after = np.searchsorted(around, times).clip(1)
    return np.minimum(times - around[after - 1], around[after] - times)


def _stretches(split: Split, rows: Rows, by: Unit) -> Iterator[_Stretch]:
    """The frames of each item, or of each window if that is the unit."""
    key = rows.window if by == "window" else rows.item
    order = np.argsort(key, kind="stable")
    unit = rows.unit_index(split, by)
    for part in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        item = split.items[rows.item[part[0]]]
        yield _Stretch(
            item,
            int(unit[part[0]]),
            part,
            item.start_seconds + rows.seconds[part].astype(np.float64),
        )


def _frame_rate(rows: Rows) -> float:
    """Frames a second within the windows; 1 where every window has a single frame, which has no rate."""
    within = np.diff(rows.window) == 0
    steps = np.diff(rows.seconds.astype(np.float64))[within]
    return 1 / float(steps.mean()) if len(steps) else 1.0


def _unit_of(part: tuple[_Stretch, Any]) -> int:
    return part[0].unit


def _num_units(split: Split, rows: Rows, by: Unit) -> int:
    return int(rows.unit_index(split, by).max()) + 1
