"""Tables of labels: the user's own as a task, and how rows of any are read."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import AUROC, F1, R2, Accuracy, AveragePrecision, Metric
from jepa_audio.probing.tasks.base import ProbeData, Protocol, Task
from jepa_audio.probing.tasks.labels import Labels, Multiclass, Multilabel, Regression
from jepa_audio.probing.tasks.records import SPLITS, Record, split_checksum, split_of
from jepa_audio.probing.tasks.windows import Windows

log = logging.getLogger(__name__)

LabelKind = Literal["multiclass", "multilabel", "regression"]
"""What a label is: one class, any number of tags, or numbers."""

Row = dict[str, str]
"""The cells of a line by the name of their column, without spaces around them."""

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Of the groups, where a table does not say which split a file is in."""

_PATHS = ("path", "file", "audio_path", "filename", "file_name")
_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LABELS = {"multiclass": ("label",), "multilabel": ("tags", "label"), "regression": ("label",)}


def read_rows(
    path: Path,
    needed: Sequence[str],
    delimiter: str = ",",
    errors: str = "strict",
    ragged: bool = False,
) -> Iterator[tuple[str, Row]]:
    """The rows of a table with a header, each with the place where it stands.

    Args:
        path: of the table.
        needed: columns that it must have.
        delimiter: between cells.
        errors: what becomes of bytes that are not UTF-8, as in `open`.
        ragged: lines may have fewer cells than the header, which count as empty, or more, which are
            passed over.

    Raises:
        UserError: if there is no such file.
        UserError: naming the file and the column or the line that is missing, too long or too
            short.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    empty = True
    with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            header = [name.strip() for name in reader.fieldnames or ()]
            _check_header(path, header, needed)
            reader.fieldnames = header
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not ragged and (None in row or None in row.values()):
                    raise UserError(f"{where}: must have {len(header)} cells, as the header has")
                yield where, {name: (row[name] or "").strip() for name in header}
                empty = False
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: no line of a table ({error})"
            ) from error
    if empty:
        raise UserError(f"{path} holds no row")


def number_in(row: Row, column: str, where: str) -> float:
    """The finite number in a cell.

    Raises:
        UserError: naming place, column and value of what is none.
    """
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}, column `{column}`: {row[column]!r} must be a finite number")
    return value


def table_task(
    path: Path,
    kind: LabelKind,
    columns: Sequence[str] = (),
    window_seconds: float | None = 30.0,
) -> ProbeData:
    """A task on the user's own files, from a table: `.csv` with commas, `.tsv` or `.txt` with tabs.

    Its columns: `path` (or file, audio_path, filename, file_name), from the folder of the table;
    the label; if they are there, `split` (train, val or valid, test) and `group`, such as the
    artist. A table without `split` is divided 70:15:15 by a hash of the group's name (of the path,
    without `group`): no group is in two splits, and a file stays where it is when others are added.

    Args:
        path: of the table.
        kind: "multiclass": `label` names a class. "multilabel": `tags` (or `label`) names tags,
            with `|` or `;` between them, perhaps none. "regression": `label` is a number.
        columns: of the label, if it is not called so; several only for a regression.
        window_seconds: what the encoder hears at a time; `None` for whole files.

    Raises:
        UserError: naming the line, if an audio file is missing.
        UserError: naming file, line, column and value of what is wrong.
    """
    rows = dict(read_rows(path, (), "," if path.suffix.lower() == ".csv" else "\t"))
    layout = _Layout.of(path, next(iter(rows.values())), kind, tuple(columns))
    splits: dict[str, dict[str, Record]] = {split: {} for split in SPLITS}
    for where, row in rows.items():
        splits[layout.split(row, where)][where] = layout.record(row, where)
    _check_splits(path, splits, layout, rows)
    labels, metrics = _labels_and_metrics(kind, layout.labels)
    task = Task(path.stem, path.stem, labels, metrics, _protocols(window_seconds), num_seeds=3)
    items = {split: split_of(records, path.parent) for split, records in splits.items()}
    return ProbeData(
        task, labels.fitted(items["train"]), items, split_checksum(list(items.values()))
    )


@dataclass(frozen=True)
class _Layout:
    """Which columns of a table hold what."""

    path: str
    labels: tuple[str, ...]
    parse: Callable[[Row, tuple[str, ...], str], object]
    has_split: bool
    group: str

    @classmethod
    def of(cls, table: Path, row: Row, kind: LabelKind, columns: tuple[str, ...]) -> _Layout:
        if len(columns) > 1 and kind != "regression":
            raise UserError(
                f"`columns` names {len(columns)} columns ({', '.join(columns)}); only a regression has several"
            )
        _check_header(table, list(row), columns)
        path = _first_of(table, row, _PATHS)
        labels = columns or (_first_of(table, row, _LABELS[kind]),)
        parse = {"multiclass": _class, "multilabel": _tags, "regression": _numbers}[kind]
        return cls(path, labels, parse, "split" in row, "group" if "group" in row else path)

    def record(self, row: Row, where: str) -> Record:
        if not row[self.path]:
            raise UserError(f"{where}, column `{self.path}`: must name a file, is empty")
        return {"audio_path": row[self.path], "label": self.parse(row, self.labels, where)}

    def split(self, row: Row, where: str) -> str:
        if self.has_split:
            name = _SPLIT_NAMES.get(row["split"].lower())
            if name is None:
                raise UserError(
                    f"{where}, column `split`: {row['split']!r} must be one of {', '.join(_SPLIT_NAMES)}"
                )
            return name
        if not row[self.group]:
            raise UserError(
                f"{where}, column `{self.group}`: is empty; without `split` it decides on the split"
            )
        return _split_by_hash(row[self.group])


def _split_by_hash(group: str) -> str:
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return SPLITS[-1]  # the shares' sum is 1 but for rounding


def _class(row: Row, columns: tuple[str, ...], where: str) -> str:
    if not row[columns[0]]:
        raise UserError(f"{where}, column `{columns[0]}`: must name a class, is empty")
    return row[columns[0]]


def _tags(row: Row, columns: tuple[str, ...], _: str) -> list[str]:
    return list(
        dict.fromkeys(tag.strip() for tag in re.split(r"[|;]", row[columns[0]]) if tag.strip())
    )


def _numbers(row: Row, columns: tuple[str, ...], where: str) -> list[float]:
    return [number_in(row, column, where) for column in columns]


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{path}, line 1: there are two columns called `{twice[0]}`")
    if missing := [name for name in needed if name not in header]:
        raise UserError(
            f"{path}, line 1: there is no column `{missing[0]}`, only {_quoted(header)}"
        )


def _first_of(table: Path, row: Row, names: Sequence[str]) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise UserError(
            f"{table}, line 1: there is no column {_quoted(names, ' or ')}, only {_quoted(row)}"
        )
    return found


def _quoted(names: Sequence[str] | Mapping[str, str], between: str = ", ") -> str:
    return between.join(f"`{name}`" for name in names)


def _check_splits(
    path: Path, splits: Mapping[str, Mapping[str, Record]], layout: _Layout, rows: Mapping[str, Row]
) -> None:
    """Nothing empty, no file in two splits; a group in two is the user's own choice, but said."""
    for split, records in splits.items():
        if not records:
            remedy = (
                "some rows need"
                if layout.has_split
                else "the groups are too few: add a column `split` with"
            )
            raise UserError(f"{path}: no row is in the split {split!r}; {remedy} `split` {split}")
    chosen = {where: split for split, records in splits.items() for where in records}
    for file, where, elsewhere in _parted(layout.path, rows, chosen):
        raise UserError(
            f"{where}: {file} is in {chosen[where]}, but in {chosen[elsewhere]} in {elsewhere}"
        )
    if groups := sorted({group for group, _, _ in _parted(layout.group, rows, chosen) if group}):
        log.warning(
            "%s: %d groups are in more than one split, such as %r", path, len(groups), groups[0]
        )


def _parted(
    column: str, rows: Mapping[str, Row], chosen: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Cells that stand in two splits, with two places of each."""
    first: dict[str, str] = {}
    pairs = (
        (row[column], where, first.setdefault(row[column], where)) for where, row in rows.items()
    )
    return [
        (cell, where, elsewhere)
        for cell, where, elsewhere in pairs
        if chosen[where] != chosen[elsewhere]
    ]


def _labels_and_metrics(
    kind: LabelKind, columns: tuple[str, ...]
) -> tuple[Labels, tuple[Metric, ...]]:
    if kind == "multiclass":
        return Multiclass(), (Accuracy(),)
    if kind == "multilabel":
        return Multilabel(), (AUROC(), AveragePrecision(), F1("macro"), F1("micro"))
    one_by_one = (
        tuple(R2(i, f"r2_{column}") for i, column in enumerate(columns)) if len(columns) > 1 else ()
    )
    return Regression(columns), (R2(), *one_by_one)


def _protocols(window_seconds: float | None) -> dict[str, Protocol]:
    """What MARBLE does for the most of its clip tasks."""
    # Its first version drops the last window of a file only if it is shorter than 1 s.
    shortest = 1.0 if window_seconds is None else min(1.0, 1 / window_seconds)
    return {
        "marble-v1": Protocol(
            Windows(window_seconds, min_ratio=shortest),
            max_epochs=100,
            stop_patience=20,
            plateau_patience=5,
        ),
        "marble-v2": Protocol(
            Windows(window_seconds, min_ratio=0.8),
            max_epochs=50,
            stop_patience=20,
            plateau_patience=5,
            learning_rates=(1e-3,),
        ),
    }
