"""Tasks from the user's own table of labels."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.ranking import TAG_METRICS
from jepa_audio.probing.metrics.sums import R2, Accuracy
from jepa_audio.probing.tasks.base import ProbeData, Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass, Multilabel, Regression
from jepa_audio.probing.tasks.raw_data import TableRow, find_column, read_table
from jepa_audio.probing.tasks.records import SPLITS, Record, split_of

log = logging.getLogger(__name__)

LabelKind = Literal["multiclass", "multilabel", "regression"]
"""Type of the labels: one class, any number of tags, or numbers."""

_PROTOCOLS = {
    # MARBLE's first version drops the last window of a file only if it is shorter than 1 s.
    "marble-v1": Protocol(Windows(30.0, min_ratio=1 / 30)),
    "marble-v2": Protocol(Windows(30.0, min_ratio=0.8), max_epochs=50, learning_rates=(1e-3,)),
}
PATH_COLUMNS = ("path", "file", "audio_path", "filename", "file_name")
_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_Parser = Callable[[TableRow, Sequence[str]], object]
# Columns of the label, and how they are read.
_LABELS: dict[str, tuple[Sequence[str], _Parser]] = {
    "multiclass": (["label"], lambda row, columns: row.text(columns[0])),
    "multilabel": (["tags", "label"], lambda row, columns: _tags(row[columns[0]])),
    "regression": (["label"], lambda row, columns: [row.number(column) for column in columns]),
}


def table_task(
    path: Path, kind: LabelKind, columns: Sequence[str] = (), for_folds: bool = False
) -> ProbeData:
    """Make a task of the user's own files from a table: `.csv` with commas, other files with tabs.

    Its columns are `path` (or file, audio_path, filename, file_name), relative to the folder of the
    table; the label; optionally `split` (train, val or valid, test), `group`, such as the artist,
    and `fold`, for a cross-validation. A table without `split` is split 70:15:15 by a hash of the
    group (or of the path): each group is in one split, and a file keeps its split when other files
    are added.

    Args:
        path: the table.
        kind: "multiclass": `label` is the name of a class. "multilabel": `tags` (or `label`) has
            tags separated by `|` or `;`, or is empty. "regression": `label` is a number.
        columns: columns of the label, if their names differ; several only for a regression.
        for_folds: True if all rows will be divided into folds: then the splits have no meaning.

    Raises:
        MissingFileError: if the table or an audio file is missing; names the line.
        UserError: for a wrong row; names file, line, column and value.
    """
    rows = list(read_table(path, columns, "," if path.suffix.lower() == ".csv" else "\t"))
    if len(columns) > 1 and kind != "regression":
        raise UserError(
            f"`columns` has {len(columns)} columns ({', '.join(columns)}); only a regression may "
            "have several"
        )
    header = list(rows[0].cells)
    file = find_column(path, header, PATH_COLUMNS)
    names, parse = _LABELS[kind]
    label = tuple(columns) or (find_column(path, header, names),)
    group = "group" if "group" in header else file
    if for_folds:
        row_splits = [SPLITS[i % len(SPLITS)] for i in range(len(rows))]
        if "split" in header:
            log.info("%s: the column `split` is not used, because of the folds", path)
    else:
        row_splits = [_split(row, group) for row in rows]
    kept = [column for column in ("group", "fold") if column in header]
    records: dict[str, dict[str, Record]] = {split: {} for split in SPLITS}
    for row, split in zip(rows, row_splits, strict=True):
        record = {"audio_path": row.text(file), "label": parse(row, label)}
        records[split][row.where] = record | {column: row[column] for column in kept}
    for split in SPLITS:
        if not records[split]:
            raise UserError(
                f"{path}: no row is in the split {split!r}; add rows with {split} in the column "
                "`split`" + ("" if "split" in header else ": there are too few groups for a hash")
            )
    if not for_folds:
        _check_splits(path, rows, row_splits, file, group)
    of_columns = [R2(i, f"r2_{column}") for i, column in enumerate(label)] if len(label) > 1 else []
    labels, metrics = {
        "multiclass": (Multiclass(), (Accuracy(),)),
        "multilabel": (Multilabel(), TAG_METRICS),
        "regression": (Regression(label), (R2(), *of_columns)),
    }[kind]
    task = Task(path.stem, path.stem, labels, metrics, _PROTOCOLS, num_seeds=3)
    return ProbeData.of(task, [split_of(records[split], path.parent) for split in SPLITS])


def _split(row: TableRow, group: str) -> str:
    if "split" in row.cells:
        name = row["split"].lower()
        if name not in _SPLIT_NAMES:
            raise row.error("split", f"must be one of {', '.join(_SPLIT_NAMES)}")
        return _SPLIT_NAMES[name]
    position = int.from_bytes(hashlib.sha256(row.text(group).encode()).digest()[:8]) / 2**64
    return "train" if position < 0.7 else "val" if position < 0.85 else "test"


def _tags(cell: str) -> list[str]:
    tags = (tag.strip() for tag in re.split(r"[|;]", cell))
    return list(dict.fromkeys(tag for tag in tags if tag))


def _check_splits(
    path: Path, rows: Sequence[TableRow], splits: Sequence[str], file: str, group: str
) -> None:
    """Refuse a file in two splits. Warn of a group in two splits, which a user may want."""
    for column in (file, group):
        first: dict[str, tuple[TableRow, str]] = {}
        repeated = {}
        for row, split in zip(rows, splits, strict=True):
            other, other_split = first.setdefault(row[column], (row, split))
            if split != other_split:
                repeated[row[column]] = (
                    f"{row.where}: {row[column]} is in {split}, but in {other_split} in "
                    f"{other.where}"
                )
        if repeated and column == file:
            raise UserError(next(iter(repeated.values())))
        if groups := sorted(name for name in repeated if name):
            log.warning(
                "%s: %d groups are in more than one split, such as %r", path, len(groups), groups[0]
            )
