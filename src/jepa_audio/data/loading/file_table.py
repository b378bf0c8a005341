"""The table of the files that a run reads, in memory shared by all worker processes."""

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
import pyarrow.compute as pc
from jaxtyping import Float64, Int64

from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.data.corpus.table import Corpus, CorpusError


class FileTable:
    """The files of one or several corpora, one corpus after the other.

    The table is an unnamed temporary file that all processes map into memory: a table of millions
    of files needs no additional memory in a worker process.

    Args:
        corpora: corpora that contain usable files only.

    Attributes:
        sizes: number of files of each corpus.

    Raises:
        CorpusError: if there is no file.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.sizes = [len(corpus) for corpus in corpora]
        if not sum(self.sizes):
            raise CorpusError(
                f"no usable audio file under {', '.join(str(corpus.root) for corpus in corpora)}"
            )
        columns = ["source", "member", "offset", *IndexedFile._fields[1:]]
        table = pa.concat_tables([corpus.table.select(columns) for corpus in corpora])
        numbers = np.repeat(np.arange(len(corpora), dtype=np.int16), self.sizes)
        table = table.append_column("corpus", pa.array(numbers))
        self._roots = [corpus.root for corpus in corpora]
        # The system deletes an unnamed file when the last process ends, also after a crash.
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
        """Hash of the names and the order of the files; it does not depend on the chunks."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("source", "member"):
            lengths = pc.binary_length(self._table[name]).to_numpy()
            digest.update(np.append(0, lengths.cumsum()).astype(np.int32).data)
            for chunk in self._table[name].chunks:
                _, offsets, text = chunk.buffers()
                if text is not None:
                    ends = np.frombuffer(offsets, np.int32)[chunk.offset :]
                    digest.update(text[ends[0] : ends[len(chunk)]])
        for name in ("offset", "corpus"):
            digest.update(self._table[name].to_numpy())
        return digest.hexdigest()

    def corpus_of(self, index: int) -> range:
        """Indices of all files in the corpus of a file."""
        corpus = self._columns["corpus"][index].as_py()
        first = sum(self.sizes[:corpus])
        return range(first, first + self.sizes[corpus])

    @property
    def num_channels(self) -> Int64[np.ndarray, " N"]:
        """Number of channels of each file."""
        return self._table["num_channels"].to_numpy().astype(np.int64)

    @property
    def seconds(self) -> Float64[np.ndarray, " N"]:
        """Length of each file in seconds."""
        return self._table["num_frames"].to_numpy() / self._table["sample_rate"].to_numpy()

    # Another process receives the file descriptor and maps the same file.
    def __getstate__(self) -> tuple[list[Path], list[int], Any]:
        return self._roots, self.sizes, DupFd(self._descriptor)

    def __setstate__(self, state: tuple[list[Path], list[int], Any]) -> None:
        self._roots, self.sizes, descriptor = state
        self._map(descriptor.detach())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        self._columns = {name: self._table[name] for name in self._table.column_names}
