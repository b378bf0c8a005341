"""GiantSteps (Knees et al., 2015; Faraldo et al., 2016): the key of electronic dance music."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mir_eval

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import KEYS, Accuracy, KeyScore
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import Record
from jepa_audio.probing.tasks.table import Row, read_rows
from jepa_audio.probing.tasks.windows import Windows

TEST_FOLDER = "giantsteps-key-dataset"
TRAIN_FOLDER = "giantsteps-mtg-key-dataset"

_AUDIO_FOLDERS = ("audio", "wav")
_SUFFIXES = (".mp3", ".wav", ".flac")
_FLATS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
_CONFIDENT = "2"  # of 0, 1 and 2
_PARTS, _PARTS_FOR_TRAINING = (
    116,
    100,
)  # of the artists: about 80 % of the songs, for collaborators come along
_DOWNLOAD = (
    f"give the folder that holds {TEST_FOLDER} and {TRAIN_FOLDER}, as on GitHub, each with the mp3 files "
    "in its audio/"
)


def convert(raw: Path) -> Conversion:
    """Records of the keys, see `DataSet`; sharps become flats.

    The test split is the GiantSteps key data set. Train and val are those songs of the GiantSteps
    MTG key data set that have a single key of the greatest confidence, parted by artist as in
    MARBLE's first version: see `split_by_artist`.
    """
    mtg = _folder(raw, TRAIN_FOLDER)
    metadata = mtg / "annotations" / "beatport_metadata.txt"
    songs = read_rows(metadata, ("ID", "ARTIST"), "\t", errors="replace", ragged=True)
    split_of_song = split_by_artist({_number(row, where): row["ARTIST"] for where, row in songs})
    audio = _audio(mtg)
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": _test_records(raw)}
    annotated = read_rows(
        mtg / "annotations" / "annotations.txt", ("ID", "MANUAL KEY", "C"), "\t", ragged=True
    )
    for where, row in annotated:
        if row["C"] != _CONFIDENT or "/" in row["MANUAL KEY"]:
            continue
        number = _number(row, where)
        if number not in split_of_song:
            raise UserError(f"{where}: song {number} has no line in {metadata}")
        splits[split_of_song[number]].append(
            _record(raw, mtg, audio, number, _key(row["MANUAL KEY"], where))
        )
    return {"GS/GS": splits}


def split_by_artist(artists: Mapping[int, str]) -> dict[int, str]:
    """Train or val for every song.

    An artist belongs to train if the sha1 checksum of the name in lower case, modulo 116, is below
    100, else to val. Then, song by song in their order and twice over, whoever made a song with an
    artist of val comes to val too.

    Args:
        artists: of every song, with commas between several.
    """
    names = {song: [name.strip() for name in line.split(",")] for song, line in artists.items()}
    in_val = {
        name for of_song in names.values() for name in of_song if _part(name) >= _PARTS_FOR_TRAINING
    }
    for _ in range(2):
        for of_song in names.values():
            if in_val.intersection(of_song):
                in_val.update(of_song)
    return {
        song: "val" if in_val.intersection(of_song) else "train" for song, of_song in names.items()
    }


def _part(artist: str) -> int:
    digest = hashlib.sha1(artist.lower().encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % _PARTS


def _folder(raw: Path, name: str) -> Path:
    """Also as GitHub names an archive of a branch or of a commit."""
    found = sorted(folder for folder in raw.glob(f"{name}*") if folder.is_dir())
    if not found:
        raise MissingFileError(f"{raw / name} is missing: {_DOWNLOAD}")
    if len(found) > 1:
        raise UserError(
            f"{raw} holds {len(found)} folders called {name}: {', '.join(f.name for f in found)}; keep one"
        )
    return found[0]


def _test_records(raw: Path) -> list[Record]:
    folder = _folder(raw, TEST_FOLDER)
    keys = sorted((folder / "annotations" / "key").glob("*.key"), key=_number_of)
    if not keys:
        raise MissingFileError(f"{folder / 'annotations' / 'key'} holds no .key file: {_DOWNLOAD}")
    audio = _audio(folder)
    return [
        _record(
            raw,
            folder,
            audio,
            _number_of(path),
            _key(path.read_text(encoding="utf-8"), f"{path}, line 1"),
        )
        for path in keys
    ]


def _audio(folder: Path) -> dict[int, str]:
    """The audio files of a folder by the numbers of their songs."""
    folders = [folder / name for name in _AUDIO_FOLDERS if (folder / name).is_dir()]
    if not folders:
        raise MissingFileError(f"{folder / _AUDIO_FOLDERS[0]} is missing: {_DOWNLOAD}")
    files = [
        path
        for each in folders
        for path in sorted(each.iterdir())
        if path.suffix.lower() in _SUFFIXES
    ]
    return {_number_of(path): path.relative_to(folder).as_posix() for path in reversed(files)}


def _record(raw: Path, folder: Path, audio: Mapping[int, str], number: int, key: str) -> Record:
    file = audio.get(number, f"{_AUDIO_FOLDERS[0]}/{number}.LOFI.mp3")
    return {
        "audio_path": f"{folder.relative_to(raw).as_posix()}/{file}",
        "label": key,
        "ori_uid": f"{number:07}",
    }


def _number_of(path: Path) -> int:
    digits = path.name.partition(".")[0]
    if not digits.isdecimal():
        raise UserError(
            f"{path}: the name must begin with the number of a song, such as 1234749.LOFI{path.suffix}"
        )
    return int(digits)


def _number(row: Row, where: str) -> int:
    if not row["ID"].isdecimal():
        raise UserError(f"{where}, column `ID`: {row['ID']!r} must be the number of a song")
    return int(row["ID"])


def _key(text: str, where: str) -> str:
    """One of `KEYS`."""
    tonic, _, mode = text.strip().partition(" ")
    semitone = mir_eval.key.KEY_TO_SEMITONE.get(tonic.lower())
    key = "" if semitone is None else f"{_FLATS[semitone]} {mode.strip().lower()}"
    if key not in KEYS:
        raise UserError(
            f"{where}: {text.strip()!r} is no key; a key is like `Bb major` or `F# minor`"
        )
    return key


GIANTSTEPS = DataSet("giantsteps", convert)

GIANTSTEPS_KEY = Task(
    "giantsteps_key",
    "GS/GS",
    Multiclass(KEYS),
    (KeyScore(), KeyScore(symmetric=True), Accuracy()),
    {
        "marble-v1": Protocol(Windows(30.0), max_epochs=100, stop_patience=20, plateau_patience=5),
        "marble-v2": Protocol(
            Windows(30.0, min_ratio=0.8),
            max_epochs=50,
            stop_patience=20,
            plateau_patience=5,
            plateau_factor=0.1,
            learning_rates=(1e-3,),
        ),
    },
    group_by="ori_uid",
    num_seeds=3,
    num_units=(None, None, 604),
    data_set=GIANTSTEPS,
)
