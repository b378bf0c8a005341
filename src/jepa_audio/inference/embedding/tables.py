"""Rows of embeddings on disk: parts that a killed command leaves, and the final file."""

from __future__ import annotations

import csv
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float32

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path, csv_cell

KEY = "jepa_audio"
_BATCH_ROWS = 4096
_REPORT = b"jepa_audio.report"


def schema(width: int) -> pa.Schema:
    """Columns: path, start and end in seconds, whether the clip was padded, and the vector."""
    return pa.schema(
        {
            "path": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "padded": pa.bool_(),
            "vector": pa.list_(pa.float32(), width),
        }
    )


class PartWriter:
    """Writes the rows of one chunk.

    Attributes:
        bad: names of files that could not be used → reasons.
        notes: how many files were converted in which way.
        names: files with rows.
    """

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self.bad: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        self.names: set[str] = set()

    def add(
        self,
        path: str,
        start: Float[np.ndarray, " N"],
        end: Float[np.ndarray, " N"],
        is_padded: bool,
        vectors: Float32[np.ndarray, "N E"],
    ) -> None:
        """Append rows of one file."""
        count = len(vectors)
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
        columns = [
            pa.array([path] * count, pa.string()),
            pa.array(start, pa.float64()),
            pa.array(end, pa.float64()),
            pa.array([is_padded] * count, pa.bool_()),
            pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._writer.schema))


@contextmanager
def write_part(path: Path, width: int) -> Iterator[PartWriter]:
    """Write a part; it exists only if the block ends without an error."""
    with atomic_path(path) as unfinished, _parquet(unfinished, schema(width)) as writer:
        part = PartWriter(writer)
        yield part
        report = json.dumps({"bad": part.bad, "notes": part.notes})
        writer.add_key_value_metadata({_REPORT: report.encode()})


def _parquet(path: Path, columns: pa.Schema) -> pq.ParquetWriter:
    # Vectors hardly repeat.
    return pq.ParquetWriter(path, columns, use_dictionary=["path"], write_statistics=False)


def read_reports(parts: Sequence[Path]) -> tuple[dict[str, str], Counter[str]]:
    """The bad files and the conversions of all parts."""
    bad: dict[str, str] = {}
    notes: Counter[str] = Counter()
    for path in parts:
        report = json.loads(pq.read_metadata(path).metadata[_REPORT])
        bad |= report["bad"]
        notes.update(report["notes"])
    return bad, notes


def count_rows(parts: Sequence[Path]) -> int:
    """Number of rows of all parts."""
    return sum(pq.read_metadata(part).num_rows for part in parts)


def check_output(output: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        UserError: if its suffix is unknown, if a library is missing, if it is a folder, or if its
            folder is a file or cannot be written.
    """
    if output.suffix not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise UserError(f"`output` ({output}) must end in one of {known}")
    if output.suffix == ".h5" and find_spec("h5py") is None:
        raise UserError(f"{output} needs h5py: install it with `pip install 'jepa-audio[h5]'`")
    if output.is_dir():
        raise UserError(f"`output` ({output}) is a folder: give the name of a file")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"`output` ({output}): {folder} is a file, not a folder")
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"`output` ({output}): {folder} cannot be written: {error.strerror}; choose another "
            "folder"
        ) from error


def read_metadata(output: Path) -> dict[str, Any]:
    """The settings in a file of embeddings; empty if the file is another one."""
    try:
        if output.suffix == ".parquet":
            text = (pq.read_schema(output).metadata or {})[KEY.encode()]
        elif output.suffix == ".npz":
            with np.load(output) as stored:
                text = str(stored[KEY])
        else:
            import h5py  # noqa: PLC0415

            with h5py.File(output) as file:
                text = file.attrs[KEY]
        metadata = json.loads(text)
    except (pa.ArrowException, OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def write_output(parts: Sequence[Path], output: Path, width: int, metadata: dict[str, Any]) -> None:
    """Write all rows of the parts in order to the final file."""
    num_rows = count_rows(parts)
    with atomic_path(output) as unfinished:
        _WRITERS[output.suffix](parts, unfinished, width, num_rows, json.dumps(metadata))


def write_bad_files(path: Path, bad: dict[str, str]) -> None:
    """Write names and reasons as CSV."""
    with atomic_path(path) as unfinished, unfinished.open("w", newline="") as file:
        rows = [tuple(map(csv_cell, row)) for row in bad.items()]
        csv.writer(file).writerows([("path", "reason"), *rows])


def _batches(parts: Sequence[Path], columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    for part in parts:
        with pq.ParquetFile(part) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=columns)


def _array(batch: pa.RecordBatch, name: str, width: int) -> np.ndarray:
    column = batch.column(name)
    if name == "vector":
        return column.flatten().to_numpy().reshape(-1, width)
    return column.to_numpy(zero_copy_only=False)


def _write_parquet(
    parts: Sequence[Path], path: Path, width: int, num_rows: int, metadata: str
) -> None:
    columns = schema(width).with_metadata({KEY: metadata})
    with _parquet(path, columns) as writer:
        for batch in _batches(parts):
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=columns))


def _write_npz(parts: Sequence[Path], path: Path, width: int, num_rows: int, metadata: str) -> None:
    longest = max(
        (len(name) for batch in _batches(parts, ["path"]) for name in batch["path"].to_pylist()),
        default=1,
    )
    types = {"path": f"<U{longest}", "start": "<f8", "end": "<f8", "padded": "|b1", "vector": "<f4"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, kind in types.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if name == "path" else zipfile.ZIP_STORED
            shape = (num_rows, width) if name == "vector" else (num_rows,)
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for batch in _batches(parts, [name]):
                    file.write(_array(batch, name, width).astype(kind).tobytes())
        with archive.open(f"{KEY}.npy", "w") as file:
            np.lib.format.write_array(file, np.array(metadata))


def _write_h5(parts: Sequence[Path], path: Path, width: int, num_rows: int, metadata: str) -> None:
    import h5py  # noqa: PLC0415

    types = {"path": h5py.string_dtype(), "start": "f8", "end": "f8", "padded": "?", "vector": "f4"}
    with h5py.File(path, "w") as file:
        file.attrs[KEY] = metadata
        for name, kind in types.items():
            shape = (num_rows, width) if name == "vector" else (num_rows,)
            file.create_dataset(name, shape, kind)
        done = 0
        for batch in _batches(parts):
            for name in types:
                file[name][done : done + len(batch)] = _array(batch, name, width)
            done += len(batch)


_WRITERS: dict[str, Callable[[Sequence[Path], Path, int, int, str], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".h5": _write_h5,
}
