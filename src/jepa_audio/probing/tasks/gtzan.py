"""GTZAN (Tzanetakis and Cook, 2002): the genre of excerpts of 30 s."""

from __future__ import annotations

import logging
from pathlib import Path

from jepa_audio.data.audio.read import AudioReadError, inspect
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import SPLITS
from jepa_audio.probing.tasks.splits import load_splits
from jepa_audio.probing.tasks.windows import Windows

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
_AUDIO_FOLDERS = ("genres", "genres_original", "Data/genres_original", ".")
_SUFFIXES = (".wav", ".au", ".flac")
_OFTEN_CORRUPT = "jazz.00054"  # in the most common copy of the data set
_DOWNLOAD = "give the folder that holds genres/ (or genres_original/) with its ten folders, from blues/ to rock/"


def convert(raw: Path) -> Conversion:
    """Records of the genres, see `DataSet`.

    The split is the fault-filtered one (Kereliuk, Sturm and Larsen, 2015, arXiv:1507.04761): its
    three lists beside the audio if they lie there, else those of this package. The copy that most
    people have holds a broken jazz.00054, which is left out if it cannot be decoded; MARBLE's first
    version leaves it out always.
    """
    return {
        "GTZAN/GTZANGenre": {
            split: [
                {"audio_path": path, "label": stem.partition(".")[0]}
                for stem, path in files.items()
            ]
            for split, files in split_files(raw).items()
        }
    }


def split_files(raw: Path) -> dict[str, dict[str, str]]:
    """The paths of the files of every split, from `raw`, by their names without suffix such as "blues.00029".

    Raises:
        UserError: if there is no folder of genres, or only some of the lists of files.
        UserError: naming list and line that is no file of GTZAN.
    """
    folder = _audio_folder(raw)
    present = {
        Path(entry.name).stem: f"{genre}/{entry.name}"
        for genre in GENRES
        for entry in sorted((folder / genre).iterdir())
        if entry.suffix.lower() in _SUFFIXES
    }
    lists = _lists(raw)
    if _OFTEN_CORRUPT in (stem for stems in lists.values() for stem in stems):
        reason = _unusable(folder, present.get(_OFTEN_CORRUPT))
        if reason:
            log.warning("%s is left out: %s", _OFTEN_CORRUPT, reason)
            lists = {
                split: [stem for stem in stems if stem != _OFTEN_CORRUPT]
                for split, stems in lists.items()
            }
    prefix = "" if folder == raw else f"{folder.relative_to(raw).as_posix()}/"
    return {
        split: {
            stem: prefix + present.get(stem, f"{stem.partition('.')[0]}/{stem}.wav")
            for stem in stems
        }
        for split, stems in lists.items()
    }


def _audio_folder(raw: Path) -> Path:
    candidates = [raw / name for name in _AUDIO_FOLDERS]
    folder = next((folder for folder in candidates if (folder / GENRES[0]).is_dir()), None)
    if folder is None:
        raise MissingFileError(f"{raw / _AUDIO_FOLDERS[0] / GENRES[0]} is missing: {_DOWNLOAD}")
    for genre in GENRES:
        if not (folder / genre).is_dir():
            raise MissingFileError(f"{folder / genre} is missing: {_DOWNLOAD}")
    return folder


def _unusable(folder: Path, path: str | None) -> str:
    if path is None:
        return f"it is not in {folder}"
    try:
        inspect(folder / path)
    except AudioReadError as error:
        return str(error)
    return ""


def _lists(raw: Path) -> dict[str, list[str]]:
    """Names without suffix, by split."""
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
            f"{missing[0]} is missing beside the other lists: all three are needed, or none"
        )
    return {split: _read_list(path) for split, path in paths.items()}


def _read_list(path: Path) -> list[str]:
    """Of lines such as `blues/blues.00029.wav`, or of numbers from 1 on that count the files in order."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [_stem(line.strip(), f"{path}, line {number}") for number, line in lines if line.strip()]


def _stem(line: str, where: str) -> str:
    if line.isdecimal() and 1 <= int(line) <= FILES_PER_GENRE * len(GENRES):
        place, number = divmod(int(line) - 1, FILES_PER_GENRE)
        return f"{GENRES[place]}.{number:05}"
    genre, _, digits = Path(line).name.removesuffix(Path(line).suffix).partition(".")
    if (
        genre not in GENRES
        or len(digits) != 5
        or not digits.isdecimal()
        or int(digits) >= FILES_PER_GENRE
    ):
        raise UserError(
            f"{where}: {line!r} is no file of GTZAN; a line is like blues/blues.00029.wav, or a number from 1 to "
            f"{FILES_PER_GENRE * len(GENRES)}; the genres are {', '.join(GENRES)}"
        )
    return f"{genre}.{digits}"


GTZAN = DataSet("gtzan", convert)

GTZAN_GENRE = Task(
    "gtzan_genre",
    "GTZAN/GTZANGenre",
    Multiclass(GENRES),
    (Accuracy(),),
    {
        "marble-v1": Protocol(Windows(), max_epochs=100, stop_patience=20, plateau_patience=6),
        "marble-v2": Protocol(
            Windows(30.2, min_ratio=0.8),
            max_epochs=100,
            stop_patience=20,
            plateau_patience=6,
            learning_rates=(5e-3,),
        ),
    },
    num_seeds=3,
    num_units=(443, 197, 290),
    data_set=GTZAN,
)
