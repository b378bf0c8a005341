"""GTZAN (Tzanetakis and Cook, 2002): the genre of excerpts of 30 s."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from importlib import resources
from pathlib import Path

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import inspect
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics.sums import Accuracy
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.raw_data import DataSet, Example, audio_files, find_path
from jepa_audio.probing.tasks.records import SPLITS

log = logging.getLogger(__name__)

GENRES = (
    "blues", "classical", "country", "disco", "hiphop",
    "jazz", "metal", "pop", "reggae", "rock",
)  # fmt: skip
FILES_PER_GENRE = 100
SPLIT_SHA256 = "417da1ac79518cf41329e3c325677aec4445884967f14143a21e71b75816b7d6"
"""Checksum of `gtzan_split.json`, the published split as file numbers of each genre."""

_LISTS = {"train": "train_filtered.txt", "val": "valid_filtered.txt", "test": "test_filtered.txt"}
_FIRST_GENRE = ("genres/blues", "genres_original/blues", "Data/genres_original/blues", "blues")
_OFTEN_CORRUPT = "jazz.00054"  # in the most common copy of the data set
_REMEDY = (
    "give the folder that holds genres/ (or genres_original/) with its ten folders from blues/ to "
    "rock/"
)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read the genres.

    The split is the fault-filtered one (Kereliuk, Sturm and Larsen, 2015, arXiv:1507.04761), from
    its three lists if the folder has them, else from this package. jazz.00054, which is corrupt in
    the most common copy of the data set, is left out if it cannot be decoded; MARBLE's first
    version always leaves it out.
    """
    examples = [
        Example(split, path, stem.partition(".")[0])
        for split, files in split_files(raw).items()
        for stem, path in files.items()
    ]
    return {"GTZAN/GTZANGenre": examples}


def split_files(raw: Path) -> dict[str, dict[str, Path]]:
    """Return the files of each split by stem ("blues.00029")."""
    folder = find_path(raw, _FIRST_GENRE, _REMEDY).parent
    audio: dict[str, Path] = {}
    for genre in GENRES:
        audio |= audio_files(find_path(folder, (genre,), _REMEDY), (".wav", ".flac", ".au"))
    splits = {}
    for split, stems in _read_lists(raw).items():
        wav = {stem: folder / stem.partition(".")[0] / f"{stem}.wav" for stem in stems}
        splits[split] = files = {stem: audio.get(stem, wav[stem]) for stem in stems}
        if _OFTEN_CORRUPT in files:
            try:
                inspect(files[_OFTEN_CORRUPT])
            except AudioReadError as error:
                log.warning("%s is left out: %s", _OFTEN_CORRUPT, error)
                del files[_OFTEN_CORRUPT]
    return splits


def _read_lists(raw: Path) -> dict[str, list[str]]:
    """Stems by split. Lines are files, `blues/blues.00029.wav`, or count the files from 1."""
    paths = {split: raw / name for split, name in _LISTS.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths):
        return published_split()
    if missing:
        rule = "all three lists of files are needed, or none"
        raise MissingFileError(f"{missing[0]} is missing: {rule}")
    stems: dict[str, list[str]] = {split: [] for split in paths}
    for split, path in paths.items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if text := line.strip():
                stems[split].append(_stem(text, f"{path}, line {number}"))
    return stems


def published_split() -> dict[str, list[str]]:
    """Read the stems of each split from this package; check the checksum of the file."""
    file = resources.files(__package__).joinpath("gtzan_split.json")
    text = file.read_text(encoding="utf-8")  # not bytes: line ends differ between checkouts
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if checksum != SPLIT_SHA256:
        raise UserError(
            f"{file} has the sha256 checksum {checksum}, must have {SPLIT_SHA256}: the file was "
            "changed, and scores on it would not be comparable; install the package again"
        )
    numbers = json.loads(text)
    return {
        split: [f"{genre}.{n:05}" for genre in GENRES for n in numbers[split][genre]]
        for split in SPLITS
    }


def _stem(line: str, where: str) -> str:
    num_files = FILES_PER_GENRE * len(GENRES)
    if line.isdecimal() and 1 <= int(line) <= num_files:
        genre_index, number = divmod(int(line) - 1, FILES_PER_GENRE)
        return f"{GENRES[genre_index]}.{number:05}"
    genre, _, digits = Path(line).stem.partition(".")
    is_number = len(digits) == 5 and digits.isdecimal() and int(digits) < FILES_PER_GENRE
    if genre not in GENRES or not is_number:
        raise UserError(
            f"{where}: {line!r} is not a file of GTZAN; a line is like blues/blues.00029.wav, or a "
            f"number from 1 to {num_files}; the genres are {', '.join(GENRES)}"
        )
    return f"{genre}.{digits}"


_V1 = Protocol(Windows(), plateau_patience=6)

GTZAN_GENRE = Task(
    "gtzan_genre",
    "GTZAN/GTZANGenre",
    Multiclass(GENRES),
    (Accuracy(),),
    {
        "marble-v1": _V1,
        "marble-v2": replace(_V1, windows=Windows(30.2, min_ratio=0.8), learning_rates=(5e-3,)),
    },
    num_seeds=3,
    num_units=(443, 197, 290),
    data_set=DataSet("gtzan", read),
)
