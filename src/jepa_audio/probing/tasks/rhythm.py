"""GTZAN-Rhythm (Marchand, Fresnel and Peeters, 2015): beats and downbeats of GTZAN's excerpts."""

from __future__ import annotations

from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.files import read_json
from jepa_audio.probing.metrics import MeanF1, PooledF1
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.beats import BEAT_COLUMNS, DOWNBEAT_COLUMNS, EVENTS, Beats
from jepa_audio.probing.tasks.gtzan import split_files
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path

_ANNOTATIONS = tuple(
    f"{folder}*.jams"
    for folder in ("GTZAN-Rhythm_v2_ismir2015_lbd/jams/", "GTZAN-Rhythm/jams/", "jams/", "")
)
_REMEDY = (
    "give the folder that holds GTZAN's genres/ and the unpacked GTZAN-Rhythm_v2_ismir2015_lbd/, "
    "whose jams/ has a file such as blues.00000.wav.jams for each excerpt"
)


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
    """Seconds of beats and downbeats, increasing; some excerpts have no downbeats."""
    annotations = read_json(find_path(path.parent, (path.name,), _REMEDY))
    try:
        # Both have the namespace "beat"; only the sandbox distinguishes them.
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
        # Excerpts have different lengths: what is left after 30 s is mostly too short for a window.
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
