"""Tags of MagnaTagATune (Law et al., 2009) and MTG-Jamendo (Bogdanov et al., 2019)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.ranking import TAG_METRICS
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multilabel
from jepa_audio.probing.tasks.raw_data import DataSet, Example, TableRow, find_path, read_table

log = logging.getLogger(__name__)

NUM_TAGS = 50
"""Tags of the task on MagnaTagATune."""
TAG_SETS = {"Top50": "top50tags", "Genre": "genre", "Instrument": "instrument", "Mood": "moodtheme"}
"""Names of the tag sets of MTG-Jamendo, in its files, by name in MARBLE's stems."""

_MTT_COLUMNS = ("clip_id", "mp3_path")
_MTT_SPLITS = dict.fromkeys("0123456789ab", "train") | {"c": "val"} | dict.fromkeys("def", "test")
_MTT_REMEDY = (
    "give the folder that holds annotations_final.csv and mp3/ with its folders from 0/ to f/"
)
_MTG_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_MTG_TABLES = ("data/splits/split-0", "mtg-jamendo-dataset/data/splits/split-0")
_MTG_AUDIO = ("audio-low", "raw_30s/audio-low", "audio", "raw_30s/audio")
_MTG_COLUMNS = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
_MTG_PATH = re.compile(r"\d{2}/\d+\.mp3")
_MTG_REMEDY = (
    "give the folder of the mtg-jamendo-dataset repository with audio-low/ (the files of its "
    "download script, type audio-low) or audio/ in the same folder as its data/"
)


def read_mtt(raw: Path) -> dict[str, list[Example]]:
    """Read the tags of MagnaTagATune, whose clips have 29 s.

    The folders 0 to b are train, c is val, d to f are test. The tags are the 50 most frequent of
    all splits; among equally frequent tags the first columns win. Clips without any of these tags
    are kept: heads should predict no tag. Empty files are left out; the archive has three.
    """
    table = find_path(raw, ("annotations_final.csv",), _MTT_REMEDY)
    clips = [(row, _tags(row)) for row in read_table(table, _MTT_COLUMNS, "\t")]
    count = Counter(tag for _, tags in clips for tag in tags)
    columns = [column for column in clips[0][0].cells if column not in _MTT_COLUMNS]
    most_frequent = sorted(columns, key=lambda tag: -count[tag])[:NUM_TAGS]  # the sort is stable
    chosen = sorted(most_frequent, key=columns.index)
    folder = find_path(raw, ("mp3/[0-9a-f]", "[0-9a-f]"), _MTT_REMEDY).parent
    sizes = {path: path.stat().st_size for path in folder.glob("[0-9a-f]/*")}
    examples = []
    for row, tags in clips:
        split, path = _split(row), folder / row["mp3_path"]
        if sizes.get(path) == 0:
            log.warning("%s is left out: the file is empty (0 bytes)", path)
        else:
            examples.append(Example(split, path, [tag for tag in chosen if tag in tags]))
    return {"MTT/MTT": examples}


def _tags(row: TableRow) -> set[str]:
    cells = {column: cell for column, cell in row.cells.items() if column not in _MTT_COLUMNS}
    for column, cell in cells.items():
        if cell not in ("0", "1"):
            raise row.error(column, "must be 0 or 1")
    return {column for column, cell in cells.items() if cell == "1"}


def _split(row: TableRow) -> str:
    folder, _, name = row["mp3_path"].partition("/")
    if folder not in _MTT_SPLITS or not name:
        raise row.error("mp3_path", "must be a file in one of the folders 0 to f")
    return _MTT_SPLITS[folder]


def read_mtg(raw: Path) -> dict[str, list[Example]]:
    """Read the four sets of tags of MTG-Jamendo for whole tracks.

    The splits are split-0, by artist. Published scores are for the low bit rate, which is preferred
    if both are present.
    """
    tables, audio = (find_path(raw, names, _MTG_REMEDY) for names in (_MTG_TABLES, _MTG_AUDIO))
    return {
        f"MTG/MTG{name}": [
            Example(split, path, tags)
            for split, of_file in _MTG_SPLITS.items()
            for path, tags in _read_tracks(tables / f"autotagging_{tag_set}-{of_file}.tsv", audio)
        ]
        for name, tag_set in TAG_SETS.items()
    }


def _read_tracks(table: Path, audio: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield file and tags of each track of a table. Each tag is in a separate cell."""
    find_path(table.parent, (table.name,), _MTG_REMEDY)
    lines = table.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2 or lines[0].split("\t") != _MTG_COLUMNS:
        columns = " ".join(_MTG_COLUMNS)
        raise UserError(f"{table}, line 1: must have the columns {columns}, and tracks must follow")
    suffix = ".low.mp3" if audio.name.endswith("-low") else ".mp3"
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip().split("\t")
        path, tags = "".join(cells[3:4]), cells[5:]
        if not _MTG_PATH.fullmatch(path) or not tags or not all("---" in tag for tag in tags):
            raise UserError(
                f"{table}, line {number}: `{line}` must have a PATH such as 48/948.mp3 in its "
                "fourth cell and tags such as genre---rock from its sixth cell on, separated by "
                "tabs; download the file again"
            )
        yield (audio / path).with_suffix(suffix), tags


_V1 = Protocol(Windows(), stop_patience=10, plateau_patience=3)
# MARBLE uses a batch of 32 on each of four devices.
_V2 = replace(_V1, windows=Windows(30.0, min_ratio=0.8), learning_rates=(1e-3,), batch_size=128)
_MTG_V1 = replace(_V1, windows=Windows(30.0, min_ratio=1 / 30))
MTG = DataSet("mtg", read_mtg)

MTT_TAGS = Task(
    "mtt",
    "MTT/MTT",
    Multilabel(),
    TAG_METRICS,
    {"marble-v1": _V1, "marble-v2": replace(_V2, max_epochs=50)},
    num_units=(18_706, 1_825, 5_329),
    data_set=DataSet("mtt", read_mtt),
)
MTG_TAGS = tuple(
    Task(
        f"mtg_{name.lower()}",
        f"MTG/MTG{name}",
        Multilabel(),
        TAG_METRICS,
        {"marble-v1": _MTG_V1, "marble-v2": replace(_V2, max_epochs=20)},
        data_set=MTG,
    )
    for name in TAG_SETS
)
"""The tasks mtg_top50, mtg_genre, mtg_instrument and mtg_mood."""
