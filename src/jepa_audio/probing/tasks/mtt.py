"""MagnaTagATune (Law et al., 2009): the 50 most frequent tags of excerpts of 29 s."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from jepa_audio.probing.metrics import TAG_METRICS
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multilabel
from jepa_audio.probing.tasks.raw_data import DataSet, Example, Row, find_path, read_rows

log = logging.getLogger(__name__)

NUM_TAGS = 50

_OTHER_COLUMNS = ("clip_id", "mp3_path")
_SPLITS = dict.fromkeys("0123456789ab", "train") | {"c": "val"} | dict.fromkeys("def", "test")
_REMEDY = "give the folder that holds annotations_final.csv and mp3/ with its folders from 0/ to f/"


def read(raw: Path) -> dict[str, list[Example]]:
    """Read the tags.

    The folders 0 to b are train, c is val, d to f are test. The tags are the 50 most frequent of
    all splits; among equally frequent tags the first columns win. Clips without any of these tags
    are kept: heads should predict no tag. Empty files are left out; the archive has three.
    """
    table = find_path(raw, ("annotations_final.csv",), _REMEDY)
    clips = [(row, _tags(row)) for row in read_rows(table, _OTHER_COLUMNS, "\t")]
    chosen = _most_frequent([tags for _, tags in clips], columns=list(clips[0][0].cells))
    folder = find_path(raw, ("mp3/[0-9a-f]", "[0-9a-f]"), _REMEDY).parent
    sizes = {path: path.stat().st_size for path in folder.glob("[0-9a-f]/*")}
    examples = []
    for row, tags in clips:
        split, path = _split(row), folder / row["mp3_path"]
        if sizes.get(path) == 0:
            log.warning("%s is left out: the file is empty (0 bytes)", path)
        else:
            examples.append(Example(split, path, [tag for tag in chosen if tag in tags]))
    return {"MTT/MTT": examples}


def _tags(row: Row) -> set[str]:
    columns = [column for column in row.cells if column not in _OTHER_COLUMNS]
    for column in columns:
        if row[column] not in ("0", "1"):
            raise row.error(column, "must be 0 or 1")
    return {column for column in columns if row[column] == "1"}


def _most_frequent(clips: Collection[set[str]], columns: list[str]) -> list[str]:
    """The most frequent tags, in the order of their columns."""
    count = Counter(tag for tags in clips for tag in tags)
    tags = [column for column in columns if column not in _OTHER_COLUMNS]
    chosen = sorted(tags, key=lambda tag: -count[tag])[:NUM_TAGS]  # the sort is stable
    return sorted(chosen, key=columns.index)


def _split(row: Row) -> str:
    folder, _, name = row["mp3_path"].partition("/")
    if folder not in _SPLITS or not name:
        raise row.error("mp3_path", "must be a file in one of the folders 0 to f")
    return _SPLITS[folder]


MTT_TAGS = Task(
    "mtt",
    "MTT/MTT",
    Multilabel(),
    TAG_METRICS,
    {
        "marble-v1": Protocol(Windows(), stop_patience=10, plateau_patience=3),
        "marble-v2": Protocol(
            Windows(30.0, min_ratio=0.8),
            max_epochs=50,
            stop_patience=10,
            plateau_patience=3,
            learning_rates=(1e-3,),
            batch_size=128,  # 32 on each of four devices
        ),
    },
    num_units=(18_706, 1_825, 5_329),
    data_set=DataSet("mtt", read),
)
