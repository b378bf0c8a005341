"""emoMusic (Soleymani et al., 2013): arousal and valence of excerpts of 45 s."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import R2
from jepa_audio.probing.tasks import raw_data
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Regression

_SET = "Mediaeval 2013 set"
_QUANTITIES = ("mean_arousal", "mean_valence")
_REMEDY = "give the folder that holds clips_45seconds/, songs_info.csv and static_annotations.csv"


def read(raw: Path) -> dict[str, list[raw_data.Example]]:
    """Read arousal and valence.

    Splits and labels are those of MARBLE's first version. The test split is the evaluation set of
    MediaEval 2013. The other songs are split 8:2 by the sha1 checksum of the artist modulo 10.
    Labels are standardised with the mean and deviation of all songs outside the test split.
    """
    names = ("songs_info.csv", "static_annotations.csv")
    info, annotations = (raw_data.find_path(raw, (n, f"annotations/{n}"), _REMEDY) for n in names)
    songs = raw_data.read_table(info, ("song_id", "Artist", _SET), errors="replace")
    rows = {row.whole_number("song_id"): row for row in songs}
    splits = {song: _split(row) for song, row in rows.items()}
    values = {}
    for row in raw_data.read_table(annotations, ("song_id", *_QUANTITIES)):
        song = row.whole_number("song_id")
        if song not in splits:
            raise UserError(f"{row.where}: song {song} has no line in {info}")
        values[song] = [row.number(quantity) for quantity in _QUANTITIES]
    for song, row in rows.items():
        if song not in values:
            raise UserError(f"{row.where}: song {song} has no line in {annotations}")
    known = np.array([value for song, value in values.items() if splits[song] != "test"])
    if len(known) == 0 or (known.std(axis=0) == 0).any():
        raise UserError(
            "emoMusic: arousal or valence is the same in all songs that are not in the test split"
        )
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    folder = raw_data.find_path(raw, ("clips_45seconds", "clips_45sec"), _REMEDY)
    clips = raw_data.audio_files(folder, (".flac", ".mp3", ".wav"))
    examples = []
    for song, split in sorted(splits.items()):
        label = ((np.array(values[song]) - mean) / deviation).tolist()
        examples.append(
            raw_data.Example(split, clips.get(str(song), folder / f"{song}.mp3"), label)
        )
    return {"EMO/EMO": examples}


def _split(row: raw_data.TableRow) -> str:
    if row[_SET] not in ("development", "evaluation"):
        raise row.error(_SET, "must be development or evaluation")
    if row[_SET] == "evaluation":
        return "test"
    # Only a to z and spaces are used: copies of the table differ in the spelling of artists.
    letters = (c for c in row["Artist"].lower() if c.isascii() and (c.isalpha() or c.isspace()))
    artist = " ".join("".join(letters).split())
    return "train" if raw_data.hash_modulo(artist, 10, "sha1") < 8 else "val"


# Windows of 5 s; a shorter last window is kept if it has at least 1 s.
_V1 = Protocol(Windows(5.0, min_ratio=0.2, first_seconds=30.0))

EMOMUSIC_EMOTION = Task(
    "emomusic",
    "EMO/EMO",
    Regression(("arousal", "valence")),
    (R2(), R2(0, "r2_arousal"), R2(1, "r2_valence")),
    {
        "marble-v1": _V1,
        "marble-v2": replace(_V1, windows=Windows(15.0, min_ratio=0.8), learning_rates=(1e-3,)),
    },
    num_seeds=3,
    data_set=raw_data.DataSet("emomusic", read),
)
