"""The files that a run reads, in memory that all its reading processes share."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from jepa_audio.data.corpus.table import Corpus, CorpusError, IndexedFile

_COLUMNS = (
    "source",
    "member",
    "offset",
    "num_bytes",
    "num_frames",
    "sample_rate",
    "num_channels",
    "rms",
)


class FileTable:
    """The files of one or several corpora, one after the other.

    Millions of them cost a reading process nothing: the table lies in a nameless temporary file
    that all of them map.

    Args:
        corpora: of usable files only.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.sizes = [len(corpus) for corpus in corpora]
        if not sum(self.sizes):
            raise CorpusError(
                f"no usable audio file under {', '.join(str(corpus.root) for corpus in corpora)}"
            )
        tables = [
            corpus.table.select(_COLUMNS).append_column(
                "corpus", pa.array(np.full(len(corpus), number, np.int16))
            )
            for number, corpus in enumerate(corpora)
        ]
        table = pa.concat_tables(tables).combine_chunks()
        self._roots = [corpus.root for corpus in corpora]
        # On disk and without a name: it is gone with the last process, however that ends.
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            self._map(os.dup(file.fileno()))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> IndexedFile:
        """The file of a row."""
        row = {name: column[index].as_py() for name, column in self._columns.items()}
        return IndexedFile.from_row(self._roots[row["corpus"]], row)

    @property
    def fingerprint(self) -> str:
        """Of which files there are, and in which order."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("source", "member", "offset", "corpus"):
            for value in self._table[name].chunks:
                for buffer in value.buffers()[1:]:
                    digest.update(buffer if buffer is not None else b"")
        return digest.hexdigest()

    def corpus_of(self, index: int) -> range:
        """The files of the corpus that a file belongs to."""
        first = 0
        for size in self.sizes:
            if index < first + size:
                return range(first, first + size)
            first += size
        raise IndexError(index)

    @property
    def num_channels(self) -> Int64[np.ndarray, " N"]:
        """Channels of every file."""
        return self._table["num_channels"].to_numpy().astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (self._roots, self.sizes, DupFd(self._descriptor))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        self._columns = {name: self._table[name] for name in self._table.column_names}


def _attached(roots: list[Path], sizes: list[int], descriptor: Any) -> FileTable:
    files = FileTable.__new__(FileTable)
    files._roots, files.sizes = roots, sizes
    files._map(descriptor.detach())
    return files
