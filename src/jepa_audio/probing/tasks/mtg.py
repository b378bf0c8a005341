"""MTG-Jamendo (Bogdanov et al., 2019, ICML workshop on music discovery): tags of whole tracks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import TAG_METRICS
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multilabel
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path

TAG_SETS = {
    "MTG/MTGTop50": "top50tags",
    "MTG/MTGGenre": "genre",
    "MTG/MTGInstrument": "instrument",
    "MTG/MTGMood": "moodtheme",
}
"""Name of the tags of each stem in the files of the data set."""

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_TABLES = ("data/splits/split-0", "mtg-jamendo-dataset/data/splits/split-0")
_AUDIO = ("audio-low", "raw_30s/audio-low", "audio", "raw_30s/audio")
_COLUMNS = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
_PATH = re.compile(r"\d{2}/\d+\.mp3")
_REMEDY = (
    "give the folder of the mtg-jamendo-dataset repository with audio-low/ (the files of its "
    "download script, type audio-low) or audio/ in the same folder as its data/"
)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read the four sets of tags; the splits are split-0, by artist.

    Published scores are for the low bit rate, which is preferred if both are present.
    """
    tables, audio = find_path(raw, _TABLES, _REMEDY), find_path(raw, _AUDIO, _REMEDY)
    return {
        stem: [
            Example(split, path, tags)
            for split, name in _SPLITS.items()
            for path, tags in _read_tracks(tables / f"autotagging_{tag_set}-{name}.tsv", audio)
        ]
        for stem, tag_set in TAG_SETS.items()
    }


def _read_tracks(table: Path, audio: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield file and tags of each track of a table. Each tag is in a separate cell."""
    lines = find_path(table.parent, (table.name,), _REMEDY).read_text(encoding="utf-8").splitlines()
    if len(lines) < 2 or lines[0].split("\t") != _COLUMNS:
        raise UserError(
            f"{table}, line 1: must have the columns {' '.join(_COLUMNS)}, and tracks must follow"
        )
    suffix = ".low.mp3" if audio.name.endswith("-low") else ".mp3"
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip().split("\t")
        path, tags = "".join(cells[3:4]), cells[5:]
        if not _PATH.fullmatch(path) or not tags or not all("---" in tag for tag in tags):
            raise UserError(
                f"{table}, line {number}: `{line}` must have a PATH such as 48/948.mp3 in its "
                "fourth cell and tags such as genre---rock from its sixth cell on, separated by "
                "tabs; download the file again"
            )
        yield (audio / path).with_suffix(suffix), tags


MTG = DataSet("mtg", read)

_PROTOCOLS = {
    "marble-v1": Protocol(Windows(30.0, min_ratio=1 / 30), stop_patience=10, plateau_patience=3),
    "marble-v2": Protocol(
        Windows(30.0, min_ratio=0.8),
        max_epochs=20,
        stop_patience=10,
        plateau_patience=3,
        learning_rates=(1e-3,),
        batch_size=128,  # 32 on each of four devices
    ),
}


def _task(name: str, stem: str) -> Task:
    return Task(name, stem, Multilabel(), TAG_METRICS, _PROTOCOLS, data_set=MTG)


MTG_TOP50 = _task("mtg_top50", "MTG/MTGTop50")
MTG_GENRE = _task("mtg_genre", "MTG/MTGGenre")
MTG_INSTRUMENT = _task("mtg_instrument", "MTG/MTGInstrument")
MTG_MOOD = _task("mtg_mood", "MTG/MTGMood")
