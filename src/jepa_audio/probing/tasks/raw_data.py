"""Raw data sets as downloaded: their examples, files and annotation tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import read_csv
from jepa_audio.probing.tasks.records import SPLITS, Record


class Example(NamedTuple):
    """A labelled audio file of a raw data set; `ori_uid` is a key of its record."""

    split: str
    path: Path
    label: Any
    ori_uid: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set as downloaded: its name in `jepa-audio data convert`, and its reader.

    `read` returns the examples in a folder by stem of the records. It raises `MissingFileError` for
    a missing file or folder, `UserError` for a wrong line.
    """

    name: str
    read: Callable[[Path], Mapping[str, Iterable[Example]]]

    def convert(self, raw: Path) -> dict[str, dict[str, list[Record]]]:
        """Make the records of all tasks by stem and split, with paths relative to `raw`."""
        conversion: dict[str, dict[str, list[Record]]] = {}
        for stem, examples in self.read(raw).items():
            conversion[stem] = {split: [] for split in SPLITS}
            for split, path, label, ori_uid in examples:
                record = {"audio_path": path.relative_to(raw).as_posix(), "label": label}
                if ori_uid is not None:
                    record["ori_uid"] = ori_uid
                conversion[stem][split].append(record)
        return conversion


def find_path(root: Path, patterns: Sequence[str], remedy: str) -> Path:
    """Return the first match of the first glob with one; raises `MissingFileError` without any."""
    for pattern in patterns:
        if paths := sorted(root.glob(pattern)):
            return paths[0]
    others = f"; also tried: {', '.join(patterns[1:])}" if len(patterns) > 1 else ""
    raise MissingFileError(f"{root / patterns[0]} is missing: {remedy}{others}")


def audio_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the audio files of a folder by stem; earlier suffixes win."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    paths.sort(key=lambda path: suffixes.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in paths}


def hash_modulo(text: str, modulus: int, algorithm: str = "sha256") -> int:
    """Map a text to a number below `modulus` by its checksum."""
    digest = hashlib.new(algorithm, text.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % modulus


@dataclass(frozen=True)
class TableRow:
    """One row of an annotation table: file and line for messages, and its stripped cells."""

    where: str
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def error(self, column: str, rule: str) -> UserError:
        """Return the error for a cell that breaks a rule, such as "must be 0 or 1"."""
        return UserError(f"{self.where}, column `{column}`: {self[column]!r} {rule}")

    def text(self, column: str) -> str:
        """Return the text of a cell; raise `UserError` if it is empty."""
        if not self[column]:
            raise self.error(column, "must not be empty")
        return self[column]

    def whole_number(self, column: str) -> int:
        """Return the number in a cell; raise `UserError` for other characters than digits."""
        if not self[column].isdecimal():
            raise self.error(column, "must be a whole number")
        return int(self[column])

    def number(self, column: str) -> float:
        """Return the number in a cell; raise `UserError` if it is not finite."""
        try:
            value = float(self[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error(column, "must be a finite number")
        return value


def read_table(
    path: Path,
    columns: Sequence[str],
    delimiter: str = ",",
    errors: str = "strict",
    ragged: bool = False,
) -> Iterator[TableRow]:
    """Yield the rows of a table in UTF-8 with a header that contains `columns`.

    `errors` is that of `open`. Rows of a `ragged` table may have missing cells (they are empty) and
    surplus cells (ignored). Raises `MissingFileError` without the file, and `UserError` if a column
    is missing or occurs twice, a row has a wrong length, there are no rows, or it is not CSV.
    """
    header, lines = read_csv(path, errors, delimiter)
    names = [name.strip() for name in header]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"{path}, line 1: there are two columns `{repeated[0]}`")
    for column in columns:
        find_column(path, names, [column])
    is_empty = True
    for number, cells in lines:
        where = f"{path}, line {number}"
        if not ragged and (None in cells or None in cells.values()):
            raise UserError(f"{where}: must have {len(names)} cells, as the header has")
        texts = ((cells[name] or "").strip() for name in header)
        yield TableRow(where, dict(zip(names, texts, strict=True)))
        is_empty = False
    if is_empty:
        raise UserError(f"{path} has no rows")


def find_column(path: Path, header: Iterable[str], names: Sequence[str]) -> str:
    """Return the first of `names` that a header has; raises `UserError` if it has none."""
    found = next((name for name in names if name in header), None)
    if found is None:
        expected = " or ".join(f"`{name}`" for name in names)
        present = ", ".join(f"`{name}`" for name in header)
        raise UserError(f"{path}, line 1: there is no column {expected}, only {present}")
    return found
