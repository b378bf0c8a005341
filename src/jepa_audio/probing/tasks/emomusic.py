"""emoMusic (Soleymani et al., 2013): arousal and valence of excerpts of 45 s."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import R2
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Regression
from jepa_audio.probing.tasks.records import Record
from jepa_audio.probing.tasks.table import Row, number_in, read_rows
from jepa_audio.probing.tasks.windows import Windows

_SET = "Mediaeval 2013 set"
_QUANTITIES = ("mean_arousal", "mean_valence")
_SPLITS_OF_ARTISTS = ("train",) * 8 + ("val",) * 2
_CLIPS = ("clips_45seconds", "clips_45sec")
_SUFFIXES = (".mp3", ".wav", ".flac")
_DOWNLOAD = "give the folder that holds clips_45seconds/, songs_info.csv and static_annotations.csv"


def convert(raw: Path) -> Conversion:
    """Records of arousal and valence, see `DataSet`.

    The test split is the evaluation set of MediaEval 2013; the others are parted 8:2 by the sha1
    checksum of the artist, modulo 10, as in MARBLE's first version. The labels are its too: less
    the mean, over the standard deviation of all songs that are not for testing.
    """
    info = _annotations(raw, "songs_info.csv")
    songs = dict(read_rows(info, ("song_id", "Artist", _SET), errors="replace"))
    splits = {_song(row, where): _split(row, where) for where, row in songs.items()}
    values = {}
    for where, row in read_rows(
        _annotations(raw, "static_annotations.csv"), ("song_id", *_QUANTITIES)
    ):
        song = _song(row, where)
        if song not in splits:
            raise UserError(f"{where}: song {song} has no line in {info}")
        values[song] = [number_in(row, name, where) for name in _QUANTITIES]
    for where, row in songs.items():
        if _song(row, where) not in values:
            raise UserError(
                f"{where}: song {_song(row, where)} has no line in static_annotations.csv"
            )
    return {"EMO/EMO": _records(raw, splits, _normalised(values, splits))}


def _records(
    raw: Path, splits: dict[int, str], labels: dict[int, list[float]]
) -> dict[str, list[Record]]:
    folder = next((raw / name for name in _CLIPS if (raw / name).is_dir()), None)
    if folder is None:
        raise MissingFileError(f"{raw / _CLIPS[0]} is missing: {_DOWNLOAD}")
    clips = {
        path.stem: path.name
        for path in sorted(folder.iterdir(), reverse=True)
        if path.suffix in _SUFFIXES
    }
    records: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for song, split in sorted(splits.items()):
        name = clips.get(str(song), f"{song}.mp3")
        records[split].append({"audio_path": f"{folder.name}/{name}", "label": labels[song]})
    return records


def _normalised(values: dict[int, list[float]], splits: dict[int, str]) -> dict[int, list[float]]:
    known = np.array([value for song, value in values.items() if splits[song] != "test"])
    if len(known) == 0 or (known.std(axis=0) == 0).any():
        raise UserError(
            "emoMusic: arousal or valence is the same in all songs that are not for testing"
        )
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    return {song: ((np.array(value) - mean) / deviation).tolist() for song, value in values.items()}


def _annotations(raw: Path, name: str) -> Path:
    found = next(
        (path for path in (raw / name, raw / "annotations" / name) if path.is_file()), None
    )
    if found is None:
        raise MissingFileError(f"{raw / name} is missing: {_DOWNLOAD}")
    return found


def _song(row: Row, where: str) -> int:
    if not row["song_id"].isdecimal():
        raise UserError(
            f"{where}, column `song_id`: {row['song_id']!r} must be the number of a song"
        )
    return int(row["song_id"])


def _split(row: Row, where: str) -> str:
    if row[_SET] not in ("development", "evaluation"):
        raise UserError(
            f"{where}, column `{_SET}`: {row[_SET]!r} must be development or evaluation"
        )
    if row[_SET] == "evaluation":
        return "test"
    # Of the artist's name only a to z and spaces count: its spelling differs between copies of the
    # table.
    letters = "".join(
        c for c in row["Artist"].lower() if c.isascii() and (c.isalpha() or c.isspace())
    )
    digest = hashlib.sha1(" ".join(letters.split()).encode(), usedforsecurity=False).hexdigest()
    return _SPLITS_OF_ARTISTS[int(digest, 16) % len(_SPLITS_OF_ARTISTS)]


EMOMUSIC = DataSet("emomusic", convert)

EMOMUSIC_EMOTION = Task(
    "emomusic",
    "EMO/EMO",
    Regression(("arousal", "valence")),
    (R2(), R2(0, "r2_arousal"), R2(1, "r2_valence")),
    {
        # Features of 5 s each; a shorter rest counts from 1 s on.
        "marble-v1": Protocol(
            Windows(5.0, min_ratio=0.2, first_seconds=30.0),
            max_epochs=100,
            stop_patience=20,
            plateau_patience=5,
        ),
        "marble-v2": Protocol(
            Windows(15.0, min_ratio=0.8),
            max_epochs=100,
            stop_patience=20,
            plateau_patience=5,
            learning_rates=(1e-3,),
        ),
    },
    num_seeds=3,
    data_set=EMOMUSIC,
)
