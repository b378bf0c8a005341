"""GTZAN (Tzanetakis and Cook, 2002): the genre of excerpts of 30 s."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from jepa_audio.data.audio.read import AudioReadError, inspect
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.raw_data import DataSet, Example, audio_files, find_path
from jepa_audio.probing.tasks.records import SPLITS
from jepa_audio.probing.tasks.splits import load_splits

log = logging.getLogger(__name__)

GENRES = (
    "blues",
    "classical",
    "country",
    "disco",
    "hiphop",
    "jazz",
    "metal",
    "pop",
    "reggae",
    "rock",
)
FILES_PER_GENRE = 100

_LISTS = {"train": "train_filtered.txt", "val": "valid_filtered.txt", "test": "test_filtered.txt"}
_FIRST_GENRE = tuple(
    f"{folder}{GENRES[0]}"
    for folder in ("genres/", "genres_original/", "Data/genres_original/", "")
)
_OFTEN_CORRUPT = "jazz.00054"  # in the most common copy of the data set
_REMEDY = (
    "give the folder that holds genres/ (or genres_original/) with its ten folders from blues/ to "
    "rock/"
)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read the genres.

    The split is the fault-filtered one (Kereliuk, Sturm and Larsen, 2015, arXiv:1507.04761): its
    three lists if they are in the folder, else those of this package. The most common copy of the
    data set has a corrupt jazz.00054. It is left out if it cannot be decoded; MARBLE's first
    version always leaves it out.
    """
    files = split_files(raw)
    examples = [
        Example(split, path, stem.partition(".")[0])
        for split in files
        for stem, path in files[split].items()
    ]
    return {"GTZAN/GTZANGenre": examples}


def split_files(raw: Path) -> dict[str, dict[str, Path]]:
    """Return the files of each split by stem ("blues.00029").

    Raises:
        MissingFileError: if there is no folder of genres, or only some of the lists of files.
        UserError: if a line of a list is not a file of GTZAN; names list and line.
    """
    folder = find_path(raw, _FIRST_GENRE, _REMEDY).parent
    audio: dict[str, Path] = {}
    for genre in GENRES:
        audio |= audio_files(find_path(folder, (genre,), _REMEDY), (".wav", ".flac", ".au"))
    files = {
        split: {
            stem: audio.get(stem, folder / stem.partition(".")[0] / f"{stem}.wav") for stem in stems
        }
        for split, stems in _read_lists(raw).items()
    }
    for of_split in files.values():
        if _OFTEN_CORRUPT in of_split:
            try:
                inspect(of_split[_OFTEN_CORRUPT])
            except AudioReadError as error:
                log.warning("%s is left out: %s", _OFTEN_CORRUPT, error)
                del of_split[_OFTEN_CORRUPT]
    return files


def _read_lists(raw: Path) -> dict[str, list[str]]:
    """Stems by split."""
    paths = {split: raw / name for split, name in _LISTS.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths):
        shipped = load_splits("gtzan")
        return {
            split: [f"{genre}.{n:05}" for genre in GENRES for n in shipped[split][genre]]
            for split in SPLITS
        }
    if missing:
        raise MissingFileError(
            f"{missing[0]} is missing: all three lists of files are needed, or none"
        )
    return {split: _read_list(path) for split, path in paths.items()}


def _read_list(path: Path) -> list[str]:
    """Lines are files such as `blues/blues.00029.wav`, or numbers from 1 that count the files."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [_stem(line.strip(), f"{path}, line {number}") for number, line in lines if line.strip()]


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


GTZAN = DataSet("gtzan", read)

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
    data_set=GTZAN,
)
