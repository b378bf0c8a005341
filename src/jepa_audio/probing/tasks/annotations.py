"""Annotation tables: rows whose errors name file, line, column and value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.files import read_csv


@dataclass(frozen=True)
class Row:
    """One row of an annotation table.

    Attributes:
        where: file and line, for error messages.
        cells: text of each cell by column, without spaces around it.
    """

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
        """Return the number in a cell; raise `UserError` if it is not of digits alone."""
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


def read_rows(
    path: Path,
    columns: Sequence[str],
    delimiter: str = ",",
    errors: str = "strict",
    ragged: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a table with a header.

    Args:
        path: file in UTF-8.
        columns: columns that the table must have.
        delimiter: separator of cells.
        errors: what to do with bytes that are not UTF-8; see `open`.
        ragged: accept rows with fewer cells than the header (the others are empty) or more (these
            are ignored).

    Raises:
        MissingFileError: if the file does not exist.
        UserError: if a column is missing or occurs twice, a row is too long or too short, there
            are no rows, or the file is not CSV in UTF-8.
    """
    header, lines = read_csv(path, errors, delimiter)
    names = [name.strip() for name in header]
    _check_header(path, names, columns)
    is_empty = True
    for number, cells in lines:
        where = f"{path}, line {number}"
        if not ragged and (None in cells or None in cells.values()):
            raise UserError(f"{where}: must have {len(names)} cells, as the header has")
        texts = ((cells[name] or "").strip() for name in header)
        yield Row(where, dict(zip(names, texts, strict=True)))
        is_empty = False
    if is_empty:
        raise UserError(f"{path} has no rows")


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    if repeated := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{path}, line 1: there are two columns `{repeated[0]}`")
    for name in columns:
        find_column(path, header, [name])


def find_column(path: Path, header: Iterable[str], names: Sequence[str]) -> str:
    """Return the first of `names` that a header has.

    Raises:
        UserError: if it has none of them.
    """
    found = next((name for name in names if name in header), None)
    if found is None:
        expected = " or ".join(f"`{name}`" for name in names)
        present = ", ".join(f"`{name}`" for name in header)
        raise UserError(f"{path}, line 1: there is no column {expected}, only {present}")
    return found
