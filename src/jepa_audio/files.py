"""Atomic writes, appending, and readers of JSON and CSV whose errors name the file and the line.

All readers raise `MissingFileError` if the file does not exist, and `UserError` if it cannot be
read or has another format.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jepa_audio.errors import MissingFileError, UserError, did_you_mean

_MAX_JSON_DEPTH = 100


@contextmanager
def atomic_path(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` at the end of the block.

    If the block raises or the process dies, `path` keeps its old content. Missing folders are
    created.

    Args:
        path: the file to replace.
        one_writer: True if no other process writes `path` at the same time. The temporary name is
            then fixed, and the next write replaces the temporary file of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = "" if one_writer else f".{uuid.uuid4().hex}"
    unfinished = path.with_name(f".{path.name}{unique}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        # An error of `write` does not name the file; a file name hides the text of other errors.
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def append_bytes(path: Path, data: bytes | memoryview, end: int | None = None) -> None:
    """Append bytes to a file and write them to disk; after an error, the file is as before.

    Args:
        path: the file; it is created if it does not exist.
        data: what to append.
        end: what follows after this number of bytes is removed first; `None` removes nothing.
    """
    # A buffer would write again when the file is closed after an error.
    with path.open("ab", buffering=0) as file:
        if end is not None:
            file.truncate(end)
        size, remaining = os.fstat(file.fileno()).st_size, memoryview(data)
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, size)
            error.filename = str(path)
            raise


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk; Windows cannot open a folder."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file with UTF-8 text, atomically."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def similar_name(path: Path) -> str:
    """The end of a message about a path that does not exist: the nearest name, or some names."""
    existing = next((parent for parent in path.parents if parent.exists()), Path())
    wrong = path.relative_to(existing).parts[0] if path.is_relative_to(existing) else path.name
    names = [child.name for child in existing.iterdir()] if existing.is_dir() else []
    shown = sorted(name for name in names if not name.startswith("."))
    listed = f"; {existing} has {', '.join(shown[:5])}" if shown else ""
    return did_you_mean(wrong, shown) or listed


def csv_cell(text: str) -> str:
    """A cell for a CSV file that no spreadsheet computes.

    Spreadsheets take a text that begins with one of these signs as a formula, which can run a
    command; an apostrophe in front makes it a text.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return _parse_json(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """Parse JSON; `ValueError` also for nesting that `repr`, `==` and `json.dumps` fail at."""
    too_deep = f"nested deeper than {_MAX_JSON_DEPTH} levels"
    try:
        value = json.loads(text, object_pairs_hook=_unique_dict if unique_keys else None)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        parts = [part for part in level if isinstance(part, dict | list)]
        level = [
            child for part in parts for child in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return value
    raise ValueError(too_deep)


def _unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return value


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: if the text is not a JSON object, or has a key twice; the message does not name
            the file.
    """
    try:
        value = _parse_json(text, unique_keys=True)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"not a JSON object, but {type(value).__name__}")
    return value


def scan_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """Yield (line number from 1, object or error) for every non-empty line of a JSON Lines file."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, parse_json_object(line)
                    except UserError as error:
                        yield number, error
    except OSError as error:
        raise _unreadable(path, error) from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every non-empty line of a JSON Lines file."""
    for number, record in scan_jsonl(path):
        if isinstance(record, UserError):
            raise UserError(f"{path}, line {number}: {record}")
        yield number, record


def read_csv(
    path: Path, errors: str = "strict", delimiter: str | None = None
) -> tuple[list[str], Iterator[tuple[int, dict[str, str | None]]]]:
    """Return the column names of a CSV file and an iterator of (line number, row).

    Args:
        path: file in UTF-8, with or without a byte order mark. The errors of a reader (see the
            docstring of this module) can also come from the iterator.
        errors: how to decode bytes that are not UTF-8; see `open`.
        delimiter: separator of columns; `None` for a tab in `.tsv` files and a comma in others.
    """
    separator = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")

    def lines() -> Iterator[tuple[int, dict[str, str | None]]]:
        taken: list[str] = []  # the lines of the current row
        try:
            with path.open("rb") as file:
                if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise UserError(f"{path} is UTF-16, not UTF-8: save it as UTF-8")
            with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
                reader = csv.DictReader(_remember(file, taken), delimiter=separator)
                try:
                    names = reader.fieldnames or ()
                    _check_quotes(path, reader.line_num, taken, separator)
                    taken.clear()
                    # The keys are indices, because a header may have the same name twice.
                    yield 1, {str(i): name for i, name in enumerate(names)}
                    for row in reader:
                        _check_quotes(path, reader.line_num, taken, separator)
                        yield reader.line_num, row
                        taken.clear()
                except csv.Error as error:
                    number = reader.line_num
                    raise UserError(f"{path}, after line {number}: not CSV: {error}") from None
        except OSError as error:
            raise _unreadable(path, error) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None

    rows = lines()
    _, header = next(rows)
    return [name or "" for name in header.values()], rows


def _remember(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _check_quotes(path: Path, last_line: int, lines: list[str], delimiter: str) -> None:
    """Refuse an unclosed quote, which makes one value of all lines up to the next quote.

    `csv` reports it only in its strict mode. This mode also refuses a value that begins with a
    quoted word, which real tables have; therefore only rows of several lines or with an odd number
    of quotes are parsed strictly.
    """
    quoted = [
        number for number, line in enumerate(lines, last_line - len(lines) + 1) if '"' in line
    ]
    if not quoted or (len(lines) == 1 and lines[0].count('"') % 2 == 0):
        return
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        raise UserError(
            f"{path}, line {quoted[0]}: a quote is opened and never closed, or closed too early; "
            "write two quotes for a quote inside a quoted value"
        ) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    kind = MissingFileError if isinstance(error, FileNotFoundError) else UserError
    return kind(f"{path} cannot be read: {error.strerror or error}")
