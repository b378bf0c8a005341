"""Labels of beats and downbeats: targets of frames, and counts of matching events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from mir_eval.util import match_events
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.beat_decoder import BarPointer, decode_beats
from jepa_audio.probing.tasks.labels import (
    FrameLabels,
    FrameSequence,
    Logits,
    Predictions,
    Rows,
    Unit,
    frame_sequences,
)
from jepa_audio.probing.tasks.records import Item, Split, is_time

EVENTS = ("beat", "downbeat")
"""Outputs of a head, and keys of a label."""

BEAT_COLUMNS, DOWNBEAT_COLUMNS = (0, 1, 2), (3, 4, 5)
"""Columns of the predictions of `Beats`: matching, estimated and annotated events of a unit."""

TEMPO_BPM = {"beat": (55.0, 215.0), "downbeat": (18.0, 72.0)}
"""Slowest and fastest tempo; MARBLE's second version uses that of beats for downbeats too."""

TOLERANCE_SECONDS = 0.07
"""Largest distance of a match: as in mir_eval and in MARBLE's code (its paper has 20 ms)."""

_TARGET_STEP_SECONDS = 1 / 75
"""A frame of MERT. Frames up to one step from a beat are targets, as in MERT's published probes."""


@dataclass(frozen=True)
class Beats(FrameLabels):
    """Beats and downbeats, of records with labels `{"beat": [seconds], "downbeat": [seconds]}`.

    The windows of a unit are joined and decoded as one track, and compared with all annotated
    seconds. The first 5 s are scored too: MARBLE keeps them, though mir_eval advises against it.

    Args:
        decoded: events that are decoded and counted.
    """

    kind = "tags"
    decoder = "dbn"
    names = EVENTS

    decoded: tuple[str, ...] = EVENTS

    @override
    def for_first_metric(self) -> Beats:
        """Beats alone, a third of the work: intervals of downbeats are longer."""
        return Beats(decoded=("beat",))

    @override
    def row_targets(self, split: Split, rows: Rows) -> Float[Tensor, "rows 2"]:
        """1 for frames at most one step from an event, else 0; a step is at least one frame."""
        targets = np.zeros((len(rows), len(EVENTS)), dtype=np.float32)
        step = max(_TARGET_STEP_SECONDS, 1 / rows.frame_rate)
        for frames in frame_sequences(split, rows, "file"):
            for output, name in enumerate(EVENTS):
                num_steps = _distance(frames.seconds, _event_times(frames.item, name)) / step
                # An event half way between two frames has the same targets on both sides.
                targets[frames.rows, output] = num_steps <= 1.501
        return torch.from_numpy(targets)

    @override
    def predictions(self, logits: Logits, split: Split, rows: Rows, by: Unit) -> Predictions:
        """Counts of each unit and head, see `BEAT_COLUMNS`; 0 for events that are not decoded."""
        sequences, rate = list(frame_sequences(split, rows, by)), rows.frame_rate
        counts = torch.zeros(rows.num_units(split, by), logits.shape[1], 2 * len(BEAT_COLUMNS))
        for output, name in enumerate(EVENTS):
            if name not in self.decoded:
                continue
            model = BarPointer.build(rate, *TEMPO_BPM[name])
            events = _decode(logits[:, :, output].detach().sigmoid(), sequences, model)
            of_units = defaultdict(list)
            for frames, times in zip(sequences, events, strict=True):
                of_units[frames.unit].append((frames, times))
            for unit, parts in of_units.items():
                counts[unit, :, 3 * output : 3 * output + 3] = _count(parts, name, rate)
        return counts.to(logits.device)


def _decode(
    activations: Float[Tensor, "rows K"], sequences: Sequence[FrameSequence], model: BarPointer
) -> list[list[Float[np.ndarray, " _"]]]:
    """Seconds of the events, by sequence and head."""
    num_heads, longest = activations.shape[1], max(len(frames.rows) for frames in sequences)
    index = np.stack([np.pad(s.rows, (0, longest - len(s.rows))) for s in sequences])
    tracks = activations[torch.from_numpy(index).to(activations.device)].mT.flatten(0, 1)
    lengths = torch.tensor([len(s.rows) for s in sequences]).repeat_interleave(num_heads)
    beats = iter(decode_beats(tracks, model, lengths))
    return [[frames.seconds[next(beats)] for _ in range(num_heads)] for frames in sequences]


def _count(
    parts: Sequence[tuple[FrameSequence, list[Float[np.ndarray, " _"]]]], name: str, rate: float
) -> Float[Tensor, "K 3"]:
    """Matching, estimated and annotated events of one unit, by head."""
    covered = []
    for frames, _ in parts:
        times = _event_times(frames.item, name)
        covered.append(times[_distance(times, frames.seconds) <= 1 / rate])
    annotated = np.unique(np.concatenate(covered))
    counts = []
    for of_head in zip(*(times for _, times in parts), strict=True):
        estimated = np.sort(np.concatenate(of_head))
        matches = match_events(annotated, estimated, TOLERANCE_SECONDS)
        counts.append((len(matches), len(estimated), len(annotated)))
    return torch.tensor(counts, dtype=torch.float32)


def _event_times(item: Item, name: str) -> Float[np.ndarray, " events"]:
    """Seconds of the beats or downbeats; raises `UserError` if the label is not as documented."""
    label = item.label
    if not isinstance(label, dict) or not isinstance(label.get(name), list):
        raise item.error(f"an object whose `{name}` is a list of seconds")
    for time in label[name]:
        if not is_time(time):
            raise UserError(f"{item.where}: `{name}` contains {time!r}, must contain seconds")
    times = np.array(label[name], dtype=np.float64)
    if (falls := np.diff(times) < 0).any():
        late = times[1:][falls][0]
        raise UserError(f"{item.where}: `{name}` must increase, but {late} s is after a later time")
    return times


def _distance(
    times: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """Distance of each time to the nearest of the others, which increase."""
    padded = np.concatenate([[-np.inf], others, [np.inf]])
    after = np.searchsorted(padded, times).clip(1)
    return np.minimum(times - padded[after - 1], padded[after] - times)
