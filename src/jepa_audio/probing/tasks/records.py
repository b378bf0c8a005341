"""Records (MARBLE's JSON lines) and the labelled segments of audio files that they describe."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import read_jsonl, write_text

SPLITS = ("train", "val", "test")
"""The splits of every task, as in the names of MARBLE's files."""

Record = dict[str, Any]
"""One line: `audio_path`, `label`, and optionally `uid`, `ori_uid`, `start` and `end` (s), `group`
and `fold`."""


@dataclass(frozen=True)
class Item:
    """One labelled segment of an audio file.

    Attributes:
        label: a string, a list of tags or numbers, or an annotation in time.
        uid: the scored unit; predictions for items of one uid are averaged.
        where: file and line of the record, for error messages.
        end_seconds: end of the segment; `None` for the end of the file.
        group: such as the artist: its items stay together in cross-validation. Empty if unknown.
        fold: its fold in a cross-validation that the data set defines. Empty if unknown.
    """

    path: Path
    label: Any
    uid: str
    where: str
    start_seconds: float = 0.0
    end_seconds: float | None = None
    group: str = ""
    fold: str = ""

    def error(self, expected: str) -> UserError:
        """Return the error for a label other than expected."""
        return UserError(f"{self.where}: `label` is {self.label!r}, must be {expected}")


@dataclass(frozen=True)
class Split:
    """The items of one split, in the order of their records.

    Raises:
        UserError: if there are none, or if two items of one uid have different labels.
    """

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError("a split needs at least one item")
        first_items: dict[str, Item] = {}
        for item in self.items:
            first = first_items.setdefault(item.uid, item)
            if item.label != first.label:
                raise UserError(
                    f"{item.where}: `{item.uid}` has the label {item.label!r}, but {first.label!r} "
                    f"in {first.where}; give records that are scored separately different `uid`s"
                )

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def uids(self) -> tuple[str, ...]:
        """Uids of the units, in the order of their first items."""
        return tuple(dict.fromkeys(item.uid for item in self.items))

    @cached_property
    def unit_index(self) -> Int64[np.ndarray, " items"]:
        """Index in `uids` of the unit of each item."""
        index = {uid: i for i, uid in enumerate(self.uids)}
        return np.array([index[item.uid] for item in self.items], dtype=np.int64)

    @cached_property
    def unit_items(self) -> tuple[Item, ...]:
        """The first item of each unit; all items of a unit have the same label."""
        _, first = np.unique(self.unit_index, return_index=True)
        return tuple(self.items[i] for i in first)

    def subset(self, size: int | None, seed: int) -> Split:
        """Select `size` random units and keep the order; all if `None` or larger than the split.

        The selection depends only on the number of units and the seed: tasks on the same audio
        select the same units.
        """
        if size is None or size >= len(self.uids):
            return self
        if size < 1:
            raise UserError(f"a subset needs at least one unit, got {size}")
        units = np.random.default_rng(seed).choice(len(self.uids), size, replace=False)
        kept = np.flatnonzero(np.isin(self.unit_index, units))
        return Split(tuple(self.items[i] for i in kept))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object per line, atomically."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def read_split(path: Path, group_by: str = "audio_path") -> Split:
    """Read the items of a JSON Lines file.

    A relative `audio_path` starts from the working directory, as in MARBLE, or else from the folder
    of the records or a folder above it, whichever contains the file of the first record.

    Raises:
        MissingFileError: if the file does not exist; see also `split_of`.
        UserError: if a line is not an object, the file is empty, or for the reasons of `split_of`.
    """
    records = {f"{path}, line {number}": record for number, record in read_jsonl(path)}
    if not records:
        raise UserError(f"{path} has no records")
    first = str(next(iter(records.values())).get("audio_path"))
    folders = (Path(), *path.resolve().parents)
    root = next((folder for folder in folders if (folder / first).is_file()), Path())
    return split_of(records, root, group_by)


def split_of(records: Mapping[str, Record], root: Path, group_by: str = "audio_path") -> Split:
    """Make a split of records.

    Args:
        records: records by file and line.
        root: start of relative paths.
        group_by: key whose value is the scored unit, for records without `uid`.

    Raises:
        MissingFileError: if an audio file is missing; names the record.
        UserError: if a record has no `audio_path` or no `label`, if `start` and `end` are not
            times, or for the reasons of `Split`.
    """
    items = []
    for where, record in records.items():
        for key in ("audio_path", "label"):
            if key not in record:
                raise UserError(f"{where}: no `{key}`")
        path = root / str(record["audio_path"])
        start, end = record.get("start", 0.0), record.get("end")
        if not is_time(start) or not (end is None or (is_time(end) and end > start)):
            raise UserError(
                f"{where}: `start` ({start!r}) and `end` ({end!r}) must be seconds, in this order"
            )
        uid = unit_of(record, group_by)
        parts = str(record.get("group", "")), str(record.get("fold", ""))
        items.append(Item(path, record["label"], uid, where, float(start), end, *parts))
    # Each folder is listed once: to look up every file takes minutes on a network drive.
    folders = {item.path.parent for item in items}
    files = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    if missing := [item for item in items if item.path not in files]:
        more = f", and {len(missing) - 1} more of {len(items)} files" if len(missing) > 1 else ""
        raise MissingFileError(
            f"{missing[0].where}: {missing[0].path} is missing{more}; relative paths start from "
            "the working directory or from a folder above the records"
        )
    return Split(tuple(items))


def unit_of(record: Record, group_by: str) -> str:
    """Return the uid of the unit of a record; see `split_of`."""
    return str(record.get("uid", record.get(group_by, record["audio_path"])))


def is_time(value: object) -> bool:
    """Whether a value is a time in seconds: finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < math.inf


def split_checksum(splits: Sequence[Split]) -> str:
    """Compute a sha256 checksum of the segments and labels of each split.

    It depends neither on the order nor on the location: of a path it contains only the names of
    file and folder. A raw data set and its records have the same checksum.
    """
    digest = hashlib.sha256()
    for split in splits:
        lines = [
            f"{item.path.parent.name}/{item.path.name} {item.start_seconds} {item.end_seconds} "
            f"{json.dumps(item.label)}"
            for item in split.items
        ]
        digest.update("\n".join([*sorted(lines), ""]).encode())
    return digest.hexdigest()
