"""MTG-Jamendo (Bogdanov et al., 2019, ICML workshop on music discovery): four sets of tags of whole tracks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import AUROC, F1, AveragePrecision
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multilabel
from jepa_audio.probing.tasks.records import Record
from jepa_audio.probing.tasks.windows import Windows

TAG_SETS = {
    "MTG/MTGTop50": "top50tags",
    "MTG/MTGGenre": "genre",
    "MTG/MTGInstrument": "instrument",
    "MTG/MTGMood": "moodtheme",
}
"""Name that the data set's own files give to the tags of each stem."""

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_TABLES = ("data/splits/split-0", "mtg-jamendo-dataset/data/splits/split-0")
_AUDIO = ("audio-low", "raw_30s/audio-low", "audio", "raw_30s/audio")
_COLUMNS = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
_PATH = re.compile(r"\d{2}/\d+\.mp3")
_DOWNLOAD = (
    "give the folder of the mtg-jamendo-dataset repository with audio-low/ (the files of its download script, type "
    "audio-low) or audio/ beside its data/"
)


def convert(raw: Path) -> Conversion:
    """Records of the four tasks, see `DataSet`; the splits are the data set's own split-0, which parts artists.

    Published numbers are of the low bit rate, which is taken where both are there.
    """
    tables, audio = _first_folder(raw, _TABLES), _first_folder(raw, _AUDIO)
    return {
        stem: {
            split: [
                _record(audio, path, tags)
                for path, tags in _read_tracks(raw / tables / f"autotagging_{tag_set}-{name}.tsv")
            ]
            for split, name in _SPLITS.items()
        }
        for stem, tag_set in TAG_SETS.items()
    }


def _first_folder(raw: Path, candidates: Sequence[str]) -> str:
    found = next((name for name in candidates if (raw / name).is_dir()), None)
    if found is None:
        raise MissingFileError(f"{raw} holds none of {', '.join(candidates)}: {_DOWNLOAD}")
    return found


def _record(audio: str, path: str, tags: list[str]) -> Record:
    name = path.replace(".mp3", ".low.mp3") if audio.endswith("-low") else path
    return {"audio_path": f"{audio}/{name}", "label": tags}


def _read_tracks(table: Path) -> Iterator[tuple[str, list[str]]]:
    """Path and tags of every track of one split, in the order of the table."""
    if not table.is_file():
        raise MissingFileError(f"{table} is missing: {_DOWNLOAD}")
    lines = table.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2 or lines[0].split("\t") != _COLUMNS:
        raise UserError(
            f"{table}, line 1: must name the columns {' '.join(_COLUMNS)}, and tracks must follow"
        )
    for number, line in enumerate(lines[1:], start=2):
        fields = line.rstrip().split("\t")
        path, tags = "".join(fields[3:4]), fields[5:]
        if not _PATH.fullmatch(path) or not tags or not all("---" in tag for tag in tags):
            raise UserError(
                f"{table}, line {number}: `{line}` must have a PATH such as 48/948.mp3 in its fourth field and tags "
                "such as genre---rock from its sixth on, parted by tabs; fetch the file anew"
            )
        yield path, tags


MTG = DataSet("mtg", convert)

_PROTOCOLS = {
    "marble-v1": Protocol(
        Windows(30.0, min_ratio=1 / 30), max_epochs=100, stop_patience=10, plateau_patience=3
    ),
    # 32 rows on each of four devices
    "marble-v2": Protocol(
        Windows(30.0, min_ratio=0.8),
        max_epochs=20,
        stop_patience=10,
        plateau_patience=3,
        learning_rates=(1e-3,),
        batch_size=128,
    ),
}


def _task(name: str, stem: str) -> Task:
    metrics = (AUROC(), AveragePrecision(), F1("macro"), F1("micro"))
    return Task(name, stem, Multilabel(), metrics, _PROTOCOLS, data_set=MTG)


MTG_TOP50 = _task("mtg_top50", "MTG/MTGTop50")
MTG_GENRE = _task("mtg_genre", "MTG/MTGGenre")
MTG_INSTRUMENT = _task("mtg_instrument", "MTG/MTGInstrument")
MTG_MOOD = _task("mtg_mood", "MTG/MTGMood")
