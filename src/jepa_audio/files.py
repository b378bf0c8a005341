"""Files that are written whole or not at all, and readers whose errors name the file and line."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jepa_audio.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` at the end of the block.

    If the block raises or the process dies, `path` keeps its former content. The folder is made
    if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file by a text in UTF-8, whole or not at all."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a JSON Lines file that is not empty.

    Raises:
        UserError: if the file is missing or unreadable, or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json_object(path, number, line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object")
    return value


def read_csv(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str | None]]]]:
    """Column names of a CSV file (tabs if it is `.tsv`), and (line number, row) of every row.

    Raises:
        UserError: if the file is missing, unreadable or not UTF-8 CSV, also while rows are read.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def rows() -> Iterator[tuple[int, dict[str, str | None]]]:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter=delimiter)
                yield 1, dict.fromkeys(reader.fieldnames or ())
                for row in reader:
                    yield reader.line_num, row
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is not CSV in UTF-8: {error}") from None

    lines = rows()
    return list(next(lines)[1]), lines
