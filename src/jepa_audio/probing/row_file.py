"""Rows on disk: one file to which blocks of rows are appended, and an index with checksums."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_audio.errors import UserError
from jepa_audio.files import append_bytes, scan_jsonl, write_text

log = logging.getLogger(__name__)

_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Block:
    """Consecutive rows that were written at once: one line of the index.

    Attributes:
        first: index of the first row in the file.
        counts: number of rows of each key, in their order.
        widths: numbers of features of the layers.
        checksum: CRC-32 of the other attributes and of the bytes of the rows.
    """

    first: int
    counts: dict[str, int]
    widths: tuple[int, ...]
    checksum: int = 0

    @property
    def end(self) -> int:
        """Index of the first row after the block."""
        return self.first + sum(self.counts.values())

    @property
    def header_checksum(self) -> int:
        """CRC-32 of the attributes without the checksum."""
        return zlib.crc32(json.dumps([self.first, self.counts, self.widths]).encode())


class RowFile:
    """Rows of features by key; rows that a killed process, a disk or a user damaged are left out.

    One process at a time may use a folder; the caller locks it.

    Args:
        folder: an existing folder for the file of the rows and its index.
        dtype: type of the features.
        kind: what the rows belong to, for messages, for example "clips".
    """

    def __init__(self, folder: Path, dtype: np.dtype, kind: str) -> None:
        self.folder = folder
        self.rows_path, self.index_path = folder / "rows", folder / "index.jsonl"
        self.dtype, self.kind = dtype, kind
        self.blocks: list[Block] = []
        self.spans: dict[str, tuple[int, int]] = {}

    def load(self, keys: Collection[str]) -> None:
        """Read the index, and check the rows of these keys; damaged blocks are left out.

        One line is logged if there are any. Afterwards `spans` has the first row and the number of
        rows of every intact key.
        """
        self.blocks, is_damaged = self._read_index()
        needed = set(keys)
        num_bytes = self.rows_path.stat().st_size if self.rows_path.is_file() else 0
        intact = [
            block
            for block in self.blocks
            if block.end * row_type(self.dtype, block.widths).itemsize <= num_bytes
            and (needed.isdisjoint(block.counts) or self._is_intact(block))
        ]
        if is_damaged or len(intact) < len(self.blocks):
            log.warning(
                "%s: cached features are damaged, for example by a killed process or a full disk: "
                "their %s are encoded again",
                self.index_path.parent,
                self.kind,
            )
            self.blocks = intact
            write_text(self.index_path, "".join(map(_to_line, intact)))
        self.spans = {}
        for block in self.blocks:
            self._add_spans(block)

    def append(self, rows: np.ndarray, counts: Mapping[str, int]) -> None:
        """Append rows, of type `row_type`, and their keys; both are on disk at the return.

        Raises:
            UserError: if the disk is full or cannot be written. Earlier rows remain valid.
        """
        widths = tuple(rows.dtype[i].shape[0] for i in range(3, len(rows.dtype.fields or ())))
        data = np.ascontiguousarray(rows).view(np.uint8).data
        block = Block(max((block.end for block in self.blocks), default=0), dict(counts), widths)
        checksum = zlib.crc32(data, block.header_checksum)
        block = Block(block.first, block.counts, widths, checksum)
        try:
            # A killed process may have left rows that are not in the index.
            append_bytes(self.rows_path, data, end=block.first * rows.dtype.itemsize)
            append_bytes(self.index_path, _to_line(block).encode())
        except OSError as error:
            raise UserError(
                f"{self.rows_path} cannot be written: {error.strerror or error}; the "
                f"{len(self.spans)} {self.kind} in it remain valid: free disk space, then repeat "
                "the command"
            ) from error
        self.blocks.append(block)
        self._add_spans(block)

    def rows(self) -> np.ndarray:
        """All rows, on disk."""
        dtype = row_type(self.dtype, self.blocks[0].widths)
        num_rows = max(block.end for block in self.blocks)
        return np.memmap(self.rows_path, dtype=dtype, mode="r", shape=(num_rows,))

    def _add_spans(self, block: Block) -> None:
        first = block.first
        for key, count in block.counts.items():
            self.spans[key] = first, count
            first += count

    def _read_index(self) -> tuple[list[Block], bool]:
        """The blocks, and whether a line is damaged."""
        blocks: list[Block] = []
        if not self.index_path.is_file():
            return blocks, False
        num_lines = 0
        for _, values in scan_jsonl(self.index_path):
            num_lines += 1
            try:
                block = _parse(values)
            except (TypeError, ValueError, KeyError, AttributeError):
                continue
            if not blocks or block.widths == blocks[0].widths:
                blocks.append(block)
        is_cut = num_lines > 0 and not self.index_path.read_bytes().endswith(b"\n")
        return blocks, is_cut or len(blocks) < num_lines

    def _is_intact(self, block: Block) -> bool:
        size = row_type(self.dtype, block.widths).itemsize
        checksum, num_bytes = block.header_checksum, (block.end - block.first) * size
        with self.rows_path.open("rb") as file:
            file.seek(block.first * size)
            while num_bytes:
                data = file.read(min(num_bytes, _CHUNK_BYTES))
                checksum, num_bytes = zlib.crc32(data, checksum), num_bytes - len(data)
        return checksum == block.checksum


def row_type(dtype: np.dtype, widths: Sequence[int]) -> np.dtype:
    """Type of a row: window of its item, centre in s, samples of the window, and layers."""
    fixed = [("window", "<i4"), ("seconds", "<f4"), ("samples", "<i4")]
    layers = [(layer_field(i), dtype, (width,)) for i, width in enumerate(widths)]
    return np.dtype([*fixed, *layers])


def layer_field(layer: int) -> str:
    """Name of the features of a layer in a row."""
    return f"layer-{layer:02}"


def _parse(values: dict[str, Any] | UserError) -> Block:
    if isinstance(values, UserError):
        raise values
    block = Block(**values | {"widths": tuple(values["widths"])})
    numbers = [block.first, block.checksum, *block.counts.values(), *block.widths]
    if not all(type(number) is int and number >= 0 for number in numbers) or not block.widths:
        raise ValueError("not the numbers of a block")
    return block


def _to_line(block: Block) -> str:
    return json.dumps(asdict(block)) + "\n"
