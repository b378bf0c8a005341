"""MagnaTagATune (Law et al., 2009): the 50 most frequent tags of excerpts of 29 s."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import AUROC, F1, AveragePrecision
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multilabel
from jepa_audio.probing.tasks.records import Record
from jepa_audio.probing.tasks.table import read_rows
from jepa_audio.probing.tasks.windows import Windows

log = logging.getLogger(__name__)

NUM_TAGS = 50

_OTHER_COLUMNS = ("clip_id", "mp3_path")
_SPLITS = {"0123456789ab": "train", "c": "val", "def": "test"}
_DOWNLOAD = (
    "give the folder that holds annotations_final.csv and mp3/ with its folders from 0/ to f/"
)


def convert(raw: Path) -> Conversion:
    """Records of the tags, see `DataSet`.

    Clips in the folders 0 to b train, those in c validate, those in d to f test. The tags are the
    50 that most clips of all splits have; of tags with equally many, that whose column stands
    first. Clips without any of them stay: nothing is said of them, but heads should say so. Empty
    files are left out: the archive has three.
    """
    table = raw / "annotations_final.csv"
    if not table.is_file():
        raise MissingFileError(f"{table} is missing: {_DOWNLOAD}")
    clips = dict(_clips(table))
    tags = _most_frequent(clips.values())
    sizes = _sizes(raw)
    prefix = "mp3/" if (raw / "mp3").is_dir() else ""
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for where, clip in clips.items():
        if sizes.get(clip.path) == 0:
            log.warning("%s is left out: the file is empty (0 bytes)", raw / prefix / clip.path)
            continue
        label = [tag for tag in tags if tag in clip.tags]
        splits[_split(clip.path, where)].append({"audio_path": prefix + clip.path, "label": label})
    return {"MTT/MTT": splits}


class _Clip(NamedTuple):
    path: str
    tags: frozenset[str]
    columns: tuple[str, ...]


def _clips(table: Path) -> Iterator[tuple[str, _Clip]]:
    """Where each clip stands, and what stands there."""
    columns: tuple[str, ...] = ()
    for where, row in read_rows(table, _OTHER_COLUMNS, "\t"):
        columns = columns or tuple(name for name in row if name not in _OTHER_COLUMNS)
        for tag in columns:
            if row[tag] not in ("0", "1"):
                raise UserError(f"{where}, column `{tag}`: {row[tag]!r} must be 0 or 1")
        yield (
            where,
            _Clip(row["mp3_path"], frozenset(tag for tag in columns if row[tag] == "1"), columns),
        )


def _most_frequent(clips: Collection[_Clip]) -> list[str]:
    """Names of the tags, in the order of their columns."""
    columns = next(iter(clips)).columns
    count = Counter(tag for clip in clips for tag in clip.tags)
    chosen = sorted(columns, key=lambda tag: -count[tag])[
        :NUM_TAGS
    ]  # a stable sort: the first of equals comes first
    return sorted(chosen, key=columns.index)


def _sizes(raw: Path) -> dict[str, int]:
    """Bytes of every file, by its folder and name."""
    folder = raw / "mp3" if (raw / "mp3").is_dir() else raw
    names = [name for group in _SPLITS for name in group]
    present = [folder / name for name in names if (folder / name).is_dir()]
    if not present:
        raise MissingFileError(f"{folder / names[0]} is missing: {_DOWNLOAD}")
    return {
        f"{path.parent.name}/{path.name}": path.stat().st_size
        for each in present
        for path in each.iterdir()
    }


def _split(path: str, where: str) -> str:
    folder, _, name = path.partition("/")
    split = next(
        (split for folders, split in _SPLITS.items() if len(folder) == 1 and folder in folders),
        None,
    )
    if split is None or not name:
        raise UserError(
            f"{where}, column `mp3_path`: {path!r} must be a file in one of the folders 0 to f"
        )
    return split


MTT = DataSet("mtt", convert)

MTT_TAGS = Task(
    "mtt",
    "MTT/MTT",
    Multilabel(),
    (AUROC(), AveragePrecision(), F1("macro"), F1("micro")),
    {
        "marble-v1": Protocol(Windows(), max_epochs=100, stop_patience=10, plateau_patience=3),
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
    data_set=MTT,
)
