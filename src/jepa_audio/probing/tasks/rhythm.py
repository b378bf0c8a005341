"""GTZAN-Rhythm (Marchand, Fresnel and Peeters, 2015): beats and downbeats of GTZAN's excerpts of 30 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import MeanF1, PooledF1
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.frames import BEAT_COLUMNS, Beats
from jepa_audio.probing.tasks.gtzan import split_files
from jepa_audio.probing.tasks.windows import Windows

_FOLDERS = ("GTZAN-Rhythm_v2_ismir2015_lbd/jams", "GTZAN-Rhythm/jams", "jams", ".")
_KINDS = ("beat", "downbeat")
_DOWNLOAD = (
    "give the folder that holds GTZAN's genres/ and, beside it, GTZAN-Rhythm_v2_ismir2015_lbd/ as its archive unpacks, "
    "whose jams/ has a file such as blues.00000.wav.jams for each excerpt"
)


def convert(raw: Path) -> Conversion:
    """Records with the beats and downbeats of every excerpt, see `DataSet`; the split is that of GTZAN's genres."""
    folder = next((raw / name for name in _FOLDERS if any((raw / name).glob("*.jams"))), None)
    if folder is None:
        raise MissingFileError(f"{raw / _FOLDERS[0]} is missing: {_DOWNLOAD}")
    return {
        "GTZAN/GTZANBeatTracking": {
            split: [
                {"audio_path": path, "label": _read_jams(folder / f"{stem}.wav.jams")}
                for stem, path in files.items()
            ]
            for split, files in split_files(raw).items()
        }
    }


def _read_jams(path: Path) -> dict[str, list[float]]:
    """Seconds of the beats and of the downbeats, rising; some excerpts have no downbeats."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing: {_DOWNLOAD}")
    try:
        annotations = json.loads(path.read_bytes())["annotations"]
        told = [(_kind(annotation), annotation["data"]) for annotation in annotations]
        times = {
            kind: sorted(float(event["time"]) for event in data)
            for kind, data in told
            if kind in _KINDS
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no JAMS file of GTZAN-Rhythm ({error!r}): unpack the archive anew"
        ) from error
    missing = [kind for kind in _KINDS if kind not in times]
    if missing:
        raise UserError(
            f"{path} has no annotation of the kind {missing[0]!r}: unpack the archive anew"
        )
    return times


def _kind(annotation: dict[str, Any]) -> str | None:
    """Beats and downbeats are both of the namespace "beat"; only the sandbox tells which."""
    return (
        annotation.get("sandbox", {}).get("annotation_type")
        if annotation["namespace"] == "beat"
        else None
    )


GTZAN_RHYTHM = DataSet("gtzan_rhythm", convert)

_BEATS = tuple(BEAT_COLUMNS.index(f"beat_{what}") for what in ("hits", "estimated", "reference"))
_DOWNBEATS = tuple(
    BEAT_COLUMNS.index(f"downbeat_{what}") for what in ("hits", "estimated", "reference")
)

GTZAN_BEAT = Task(
    "gtzan_beat",
    "GTZAN/GTZANBeatTracking",
    Beats(),
    (
        MeanF1("beat_f1", *_BEATS),
        PooledF1("beat_f1_pooled", *_BEATS),
        MeanF1("downbeat_f1", *_DOWNBEATS),
        PooledF1("downbeat_f1_pooled", *_DOWNBEATS),
    ),
    {
        # The excerpts are not cut to the same length: what remains behind 30 s is mostly too short
        # to be heard.
        "marble-v1": Protocol(
            Windows(10.0, min_ratio=0.05), max_epochs=100, stop_patience=20, plateau_patience=6
        ),
        "marble-v2": Protocol(
            Windows(10.0, min_ratio=0.8),
            max_epochs=50,
            stop_patience=10,
            plateau_patience=5,
            learning_rates=(1e-3,),
        ),
    },
    grid_hz=100.0,
    num_seeds=3,
    num_units=(443, 197, 290),
    data_set=GTZAN_RHYTHM,
)
