"""Beats and downbeats, with the task of GTZAN-Rhythm (Marchand, Fresnel and Peeters, 2015)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from mir_eval.util import match_events
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.files import read_json
from jepa_audio.probing.metrics.sums import MeanF1, PooledF1
from jepa_audio.probing.tasks import labels
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.beat_decoder import BarPointer, decode_beats
from jepa_audio.probing.tasks.gtzan import split_files
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path
from jepa_audio.probing.tasks.records import Item, Split, is_time

EVENTS = ("beat", "downbeat")
"""Outputs of a head, and keys of a label."""
BEAT_COLUMNS, DOWNBEAT_COLUMNS = (0, 1, 2), (3, 4, 5)
"""Columns of the predictions of `Beats`: matching, estimated and annotated events of a unit."""
TEMPO_BPM = {"beat": (55.0, 215.0), "downbeat": (18.0, 72.0)}
"""Slowest and fastest tempo. MARBLE's second version uses the tempo of beats for downbeats too."""
TOLERANCE_SECONDS = 0.07
"""Largest distance of a match, as in mir_eval and MARBLE's code (MARBLE's paper has 20 ms)."""
_TARGET_STEP_SECONDS = 1 / 75
"""One frame of MERT. Frames at most one step from a beat are targets, as in MERT's own probes."""

_ANNOTATIONS = tuple(
    f"{folder}*.jams"
    for folder in ("GTZAN-Rhythm_v2_ismir2015_lbd/jams/", "GTZAN-Rhythm/jams/", "jams/", "")
)
_REMEDY = (
    "give the folder that holds GTZAN's genres/ and the unpacked GTZAN-Rhythm_v2_ismir2015_lbd/, "
    "whose jams/ has a file such as blues.00000.wav.jams for each excerpt"
)


@dataclass(frozen=True)
class Beats(labels.FrameLabels):
    """Beats and downbeats, of records with labels `{"beat": [seconds], "downbeat": [seconds]}`.

    The windows of a unit are joined and decoded as one track; only `decoded` events are counted.
    The first 5 s are scored too: MARBLE keeps them, although mir_eval recommends to leave them out.
    """

    kind = "tags"
    decoder = "dbn"
    names = EVENTS
    decoded: tuple[str, ...] = EVENTS

    @override
    def for_first_metric(self) -> Beats:
        """Beats only: a third of the work, because the intervals of downbeats are longer."""
        return Beats(decoded=("beat",))

    @override
    def row_targets(self, split: Split, rows: labels.Rows) -> Float[Tensor, "rows 2"]:
        """1 for frames at most one step from an event, else 0. A step is at least one frame."""
        targets = np.zeros((len(rows), len(EVENTS)), dtype=np.float32)
        step = max(_TARGET_STEP_SECONDS, 1 / rows.frame_rate)
        for frames in labels.frame_sequences(split, rows, "file"):
            for output, name in enumerate(EVENTS):
                num_steps = _distance(frames.seconds, _event_times(frames.item, name)) / step
                # The margin gives an event half way between two frames the same targets on both.
                targets[frames.rows, output] = num_steps <= 1.501
        return torch.from_numpy(targets)

    @override
    def predictions(
        self, logits: labels.Logits, split: Split, rows: labels.Rows, by: labels.Unit
    ) -> labels.Predictions:
        """Counts of each unit and head, see `BEAT_COLUMNS`; 0 for events that are not decoded."""
        sequences, rate = list(labels.frame_sequences(split, rows, by)), rows.frame_rate
        counts = torch.zeros(rows.num_units(split, by), logits.shape[1], 2 * len(BEAT_COLUMNS))
        for output, name in enumerate(EVENTS):
            if name not in self.decoded:
                continue
            model = BarPointer(rate, *TEMPO_BPM[name])
            events = _decode(logits[:, :, output].detach().sigmoid(), sequences, model)
            of_units = defaultdict(list)
            for frames, times in zip(sequences, events, strict=True):
                of_units[frames.unit].append((frames, times))
            for unit, parts in of_units.items():
                counts[unit, :, 3 * output : 3 * output + 3] = _count(parts, name, rate)
        return counts.to(logits.device)


def _decode(
    activations: Float[Tensor, "rows K"],
    sequences: Sequence[labels.FrameSequence],
    model: BarPointer,
) -> list[list[Float[np.ndarray, " _"]]]:
    """Times of the events in seconds, by sequence and head."""
    num_heads, longest = activations.shape[1], max(len(frames.rows) for frames in sequences)
    index = np.stack([np.pad(s.rows, (0, longest - len(s.rows))) for s in sequences])
    tracks = activations[torch.from_numpy(index).to(activations.device)].mT.flatten(0, 1)
    lengths = torch.tensor([len(s.rows) for s in sequences]).repeat_interleave(num_heads)
    beats = iter(decode_beats(tracks, model, lengths))
    return [[frames.seconds[next(beats)] for _ in range(num_heads)] for frames in sequences]


def _count(
    parts: Sequence[tuple[labels.FrameSequence, list[Float[np.ndarray, " _"]]]],
    name: str,
    rate: float,
) -> Float[Tensor, "K 3"]:
    """Number of matching, estimated and annotated events of one unit, by head."""
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
    """Times of the events in seconds; raises `UserError` if they are not an increasing list."""
    values = item.label.get(name) if isinstance(item.label, dict) else None
    if not isinstance(values, list):
        raise item.error(f"an object whose `{name}` is a list of seconds")
    for time in values:
        if not is_time(time):
            raise UserError(f"{item.where}: `{name}` contains {time!r}, must contain seconds")
    times = np.array(values, dtype=np.float64)
    if (late := times[1:][np.diff(times) < 0]).size:
        raise UserError(
            f"{item.where}: `{name}` must increase, but {late[0]} s is after a later time"
        )
    return times


def _distance(
    times: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    """Distance of each time to the nearest of `others`, which increase."""
    padded = np.concatenate([[-np.inf], others, [np.inf]])
    after = np.searchsorted(padded, times).clip(1)
    return np.minimum(times - padded[after - 1], padded[after] - times)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read beats and downbeats; the split is that of GTZAN's genres."""
    folder = find_path(raw, _ANNOTATIONS, _REMEDY).parent
    examples = [
        Example(split, path, _read_jams(folder / f"{stem}.wav.jams"))
        for split, files in split_files(raw).items()
        for stem, path in files.items()
    ]
    return {"GTZAN/GTZANBeatTracking": examples}


def _read_jams(path: Path) -> dict[str, list[float]]:
    """Times of beats and downbeats in seconds, increasing; some excerpts have no downbeats."""
    annotations = read_json(find_path(path.parent, (path.name,), _REMEDY))
    try:
        # Both annotations have the namespace "beat". Only the sandbox distinguishes them.
        times = {
            annotation.get("sandbox", {}).get("annotation_type"): sorted(
                float(event["time"]) for event in annotation["data"]
            )
            for annotation in annotations["annotations"]
            if annotation["namespace"] == "beat"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a JAMS file of GTZAN-Rhythm ({error!r}): unpack the archive again"
        ) from error
    for event in EVENTS:
        if event not in times:
            raise UserError(f"{path} has no annotation of type {event!r}: unpack the archive again")
    return {event: times[event] for event in EVENTS}


GTZAN_RHYTHM = DataSet("gtzan_rhythm", read)
GTZAN_BEAT = Task(
    "gtzan_beat",
    "GTZAN/GTZANBeatTracking",
    Beats(),
    (
        MeanF1("beat_f1", BEAT_COLUMNS),
        PooledF1("beat_f1_pooled", BEAT_COLUMNS),
        MeanF1("downbeat_f1", DOWNBEAT_COLUMNS),
        PooledF1("downbeat_f1_pooled", DOWNBEAT_COLUMNS),
    ),
    {
        # Excerpts have different lengths: the rest after 30 s is mostly too short for a window.
        "marble-v1": Protocol(Windows(10.0, min_ratio=0.05), plateau_patience=6),
        "marble-v2": Protocol(
            Windows(10.0, min_ratio=0.8), max_epochs=50, stop_patience=10, learning_rates=(1e-3,)
        ),
    },
    grid_hz=100.0,
    num_seeds=3,
    num_units=(443, 197, 290),
    data_set=GTZAN_RHYTHM,
)
