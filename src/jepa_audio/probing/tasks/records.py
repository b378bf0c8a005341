"""What is asked of whom: MARBLE's JSON lines, read unchanged, as labelled stretches of audio."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jepa_audio.errors import MissingFileError, UserError

SPLITS = ("train", "val", "test")
"""Of every task, by the names that MARBLE's files bear."""

Record = dict[str, Any]
"""One line: `audio_path`, `label`, and as the task needs `uid`, `ori_uid`, `start`, `end` (seconds)."""

_NEEDED = ("audio_path", "label")


@dataclass(frozen=True)
class Item:
    """One labelled stretch of an audio file.

    Attributes:
        path: the file.
        label: as it stands in the record: a string, a list of tags, of numbers, or an annotation in
            time.
        uid: of the unit that is scored; what is said of items of one uid is averaged.
        where: file and line that say so.
        start_seconds: where in the file it begins.
        end_seconds: where it ends; `None` for the end of the file.
    """

    path: Path
    label: Any
    uid: str
    where: str
    start_seconds: float = 0.0
    end_seconds: float | None = None


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
        first: dict[str, Item] = {}
        for item in self.items:
            leader = first.setdefault(item.uid, item)
            if item.label != leader.label:
                raise UserError(
                    f"{item.where}: `{item.uid}` is labelled {item.label!r}, but {leader.label!r} in {leader.where}; "
                    "give records that are scored apart a `uid` of their own"
                )

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def uids(self) -> tuple[str, ...]:
        """Of the units that are scored, in the order of their first items."""
        return tuple(dict.fromkeys(item.uid for item in self.items))

    @cached_property
    def unit_index(self) -> Int64[np.ndarray, " items"]:
        """Place in `uids` of every item's unit."""
        place = {uid: i for i, uid in enumerate(self.uids)}
        return np.array([place[item.uid] for item in self.items], dtype=np.int64)

    @cached_property
    def unit_items(self) -> tuple[Item, ...]:
        """The first item of every unit, which has the label of all."""
        _, first = np.unique(self.unit_index, return_index=True)
        return tuple(self.items[i] for i in first)

    def subset(self, size: int | None, seed: int) -> Split:
        """The items of `size` random units in their own order (all, if `None` or too few).

        The choice depends on the number of units and the seed alone: tasks on the same audio choose
        the same.
        """
        if size is None or size >= len(self.uids):
            return self
        if size < 1:
            raise UserError(f"a subset needs at least one unit, got {size}")
        kept = np.isin(
            self.unit_index, np.random.default_rng(seed).choice(len(self.uids), size, replace=False)
        )
        return Split(tuple(self.items[place] for place in np.flatnonzero(kept)))

    def shuffled(self, seed: int) -> Split:
        """The same units, every one with the label of a random other: what chance says."""
        order = np.random.default_rng(seed).permutation(len(self.uids))
        labels = [self.unit_items[place].label for place in order]
        return Split(
            tuple(
                Item(
                    item.path,
                    labels[unit],
                    item.uid,
                    item.where,
                    item.start_seconds,
                    item.end_seconds,
                )
                for item, unit in zip(self.items, self.unit_index, strict=True)
            )
        )


def read_records(path: Path) -> dict[str, Record]:
    """The objects of a JSON-lines file, by the place where each of them stands.

    Raises:
        UserError: if there is no such file.
        UserError: naming file and line, if a line is not an object with `audio_path` and `label`.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no {path}")
    records = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        missing = [key for key in _NEEDED if not isinstance(record, dict) or key not in record]
        if missing:
            raise UserError(f"{where}: no {' and no '.join(f'`{key}`' for key in missing)}")
        records[where] = record
    if not records:
        raise UserError(f"{path} holds no record")
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One object a line; the file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    unfinished.replace(path)


def read_split(path: Path, group_by: str = "audio_path") -> Split:
    """The items of a JSON-lines file.

    A relative `audio_path` is looked for from the working directory, as MARBLE does, then from the
    folder of the records and from the folders above it; the first record decides for all.

    Args:
        path: the file.
        group_by: key whose value is the unit that is scored; a record's own `uid` goes before it.

    Raises:
        UserError: naming the record, if an audio file is missing.
        UserError: as `read_records` and `split_of`.
    """
    records = read_records(path)
    first = str(next(iter(records.values()))["audio_path"])
    return split_of(records, _root_of(first, path), group_by)


def split_of(records: Mapping[str, Record], root: Path, group_by: str = "audio_path") -> Split:
    """The items of some records, by the place where each of them stands.

    Raises:
        UserError: naming the record, if an audio file is missing.
        UserError: naming the record, if `start` and `end` are no times; as `Split`.
    """
    items = []
    for where, record in records.items():
        start, end = record.get("start", 0.0), record.get("end")
        if not _is_time(start) or not (end is None or (_is_time(end) and end > start)):
            raise UserError(
                f"{where}: `start` ({start!r}) and `end` ({end!r}) must be seconds, in this order"
            )
        uid = record.get("uid", record.get(group_by, record["audio_path"]))
        items.append(
            Item(
                root / str(record["audio_path"]),
                record["label"],
                str(uid),
                where,
                float(start),
                end,
            )
        )
    _check_files(items)
    return Split(tuple(items))


def split_checksum(splits: Sequence[Split]) -> str:
    """sha256 of what is in which split: files by their names and folders' names, stretches and labels, in any order.

    So the same split has one checksum wherever it lies, as it is downloaded and as records.
    """
    digest = hashlib.sha256()
    for split in splits:
        lines = [
            f"{item.path.parent.name}/{item.path.name} {item.start_seconds} {item.end_seconds} {json.dumps(item.label)}"
            for item in split.items
        ]
        digest.update("\n".join([*sorted(lines), ""]).encode())
    return digest.hexdigest()


def _is_time(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    )


def _root_of(audio_path: str, records: Path) -> Path:
    """The folder that relative paths start from."""
    candidates = (Path(), *records.resolve().parents)
    return next((folder for folder in candidates if (folder / audio_path).is_file()), Path())


def _check_files(items: Sequence[Item]) -> None:
    present: dict[Path, set[str]] = {}
    missing = []
    for item in items:
        folder = item.path.parent
        if (
            folder not in present
        ):  # one listing a folder: a look at every file takes minutes on a network drive
            present[folder] = (
                {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
            )
        if item.path.name not in present[folder]:
            missing.append(item)
    if missing:
        more = (
            f", as are {len(missing) - 1} more of the {len(items)} files"
            if len(missing) > 1
            else ""
        )
        raise MissingFileError(
            f"{missing[0].where}: {missing[0].path} is missing{more}; relative paths start from the working directory "
            "or from a folder above the records"
        )
