"""GiantSteps (Knees et al., 2015; Faraldo et al., 2016): the key of electronic dance music."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mir_eval

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import KEYS, TONICS, Accuracy, KeyScore
from jepa_audio.probing.tasks import raw_data
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass

TEST_FOLDER, TRAIN_FOLDER = "giantsteps-key-dataset", "giantsteps-mtg-key-dataset"

_MAX_CONFIDENCE = "2"  # the values are 0, 1 and 2
_REMEDY = (
    f"give the folder that holds {TEST_FOLDER} and {TRAIN_FOLDER}, as on GitHub, each with its mp3 "
    "files in audio/"
)


def read(raw: Path) -> dict[str, Iterator[raw_data.Example]]:
    """Read the keys; sharps become flats.

    The test split is the GiantSteps key data set. Train and val are the songs of the GiantSteps MTG
    key data set with a single key of the highest confidence: see `split_by_artist`.
    """
    return {"GS/GS": itertools.chain(_train_examples(raw), _test_examples(raw))}


def split_by_artist(artists: Mapping[int, str]) -> dict[int, str]:
    """Assign every song to train or val, as in MARBLE's first version.

    An artist is in train if the sha1 checksum of the name in lower case, modulo 116, is below 100,
    else in val. Then two passes over the songs, in their order, move all artists of a song with an
    artist in val to val. About 80 % of the songs remain in train. Artists are separated by commas.
    """
    names = {song: [name.strip() for name in line.split(",")] for song, line in artists.items()}
    every = set(itertools.chain.from_iterable(names.values()))
    in_val = {name for name in every if raw_data.hash_modulo(name.lower(), 116, "sha1") >= 100}
    for _ in range(2):
        for of_song in names.values():
            if in_val.intersection(of_song):
                in_val.update(of_song)
    return {song: "val" if in_val.intersection(names[song]) else "train" for song in names}


def _train_examples(raw: Path) -> Iterator[raw_data.Example]:
    folder, path_of = _find_songs(raw, TRAIN_FOLDER)
    metadata = folder / "annotations/beatport_metadata.txt"
    songs = raw_data.read_table(metadata, ("ID", "ARTIST"), "\t", errors="replace", ragged=True)
    splits = split_by_artist({row.whole_number("ID"): row["ARTIST"] for row in songs})
    annotations = folder / "annotations/annotations.txt"
    for row in raw_data.read_table(annotations, ("ID", "MANUAL KEY", "C"), "\t", ragged=True):
        if row["C"] != _MAX_CONFIDENCE or "/" in row["MANUAL KEY"]:
            continue
        song = row.whole_number("ID")
        if song not in splits:
            raise UserError(f"{row.where}: song {song} has no line in {metadata}")
        key = _key(row["MANUAL KEY"], row.where)
        yield raw_data.Example(splits[song], path_of(song), key, ori_uid=f"{song:07}")


def _test_examples(raw: Path) -> Iterator[raw_data.Example]:
    folder, path_of = _find_songs(raw, TEST_FOLDER)
    first = raw_data.find_path(folder, ("annotations/key/*.key",), _REMEDY)
    for path in sorted(first.parent.glob("*.key"), key=_song_of):
        song, key = _song_of(path), _key(path.read_text(encoding="utf-8"), f"{path}, line 1")
        yield raw_data.Example("test", path_of(song), key, ori_uid=f"{song:07}")


def _find_songs(raw: Path, name: str) -> tuple[Path, Callable[[int], Path]]:
    """Find the folder, also with a suffix that GitHub appends: the branch or commit.

    Also returns a function from the number of a song to its file, which may be missing.
    """
    folders = sorted(raw.glob(f"{name}*/"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{raw} has {len(folders)} folders for {name}: {names}; keep one")
    folder = raw_data.find_path(raw, (f"{name}*/",), _REMEDY)
    raw_data.find_path(folder, ("audio", "wav"), _REMEDY)
    audio = {
        _song_of(path): path
        for part in ("wav", "audio")  # a file in audio/ replaces one of the same song in wav/
        if (folder / part).is_dir()
        for path in raw_data.audio_files(folder / part, (".flac", ".mp3", ".wav")).values()
    }
    return folder, lambda song: audio.get(song, folder / "audio" / f"{song}.LOFI.mp3")


def _song_of(path: Path) -> int:
    digits = path.name.partition(".")[0]
    if not digits.isdecimal():
        example = f"1234749.LOFI{path.suffix}"
        raise UserError(f"{path}: the name must begin with the number of a song, such as {example}")
    return int(digits)


def _key(text: str, where: str) -> str:
    """One of `KEYS`."""
    text = text.strip()
    tonic, _, mode = text.partition(" ")
    semitone = mir_eval.key.KEY_TO_SEMITONE.get(tonic.lower())
    key = "" if semitone is None else f"{TONICS[semitone]} {mode.strip().lower()}"
    if key not in KEYS:
        raise UserError(f"{where}: {text!r} is not a key; a key is like `Bb major` or `F# minor`")
    return key


GIANTSTEPS_KEY = Task(
    "giantsteps_key",
    "GS/GS",
    Multiclass(KEYS),
    (KeyScore(), KeyScore(symmetric=True), Accuracy()),
    {
        "marble-v1": Protocol(Windows(30.0)),
        "marble-v2": Protocol(
            Windows(30.0, min_ratio=0.8), max_epochs=50, plateau_factor=0.1, learning_rates=(1e-3,)
        ),
    },
    group_by="ori_uid",
    num_seeds=3,
    num_units=(None, None, 604),
    data_set=raw_data.DataSet("giantsteps", read),
)
