"""Frozen features of the splits of a task, and their cache on disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.parallel import map_threads, track_progress
from jepa_audio.probing.encoders import ProbeEncoder
from jepa_audio.probing.extraction import Preparation, encode_waveforms, load_degraded
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item, Split

# Decoding and resampling release the interpreter's lock.
_NUM_READERS = 4
# Items that are encoded between two writes to disk.
_ITEMS_PER_WRITE = 32
# Larger features stay on disk, and batches are read from there.
_MAX_BYTES_IN_MEMORY = 4 * 2**30
_SPARE_BYTES = 2**30
_ROW_TABLES = {"window": np.dtype(np.int32), "seconds": np.dtype(np.float32)}


@dataclass(frozen=True)
class Features:
    """Feature rows of one split.

    Attributes:
        layers: one table of rows for each layer, in memory or on disk.
        place: index in the tables of each row of the split.
        rows: item, window and time of each row.
    """

    layers: Sequence[np.ndarray]
    place: Int64[np.ndarray, " rows"]
    rows: Rows

    def __len__(self) -> int:
        return len(self.place)

    def read(
        self, layer: int, rows: Int64[np.ndarray, " n"] | slice = slice(None)
    ) -> Float32[Tensor, "n D"]:
        """Rows of one layer; by default all."""
        return torch.from_numpy(self.layers[layer][self.place[rows]]).float()

    def widths(self, layers: Sequence[int]) -> list[int]:
        """Numbers of features of some layers."""
        return [self.layers[layer].shape[1] for layer in layers]

    def in_memory(self) -> Features:
        """The same features read into memory, if they take less than 4 GiB."""
        bytes_per_row = sum(layer.shape[1] * layer.dtype.itemsize for layer in self.layers)
        if bytes_per_row * len(self) > _MAX_BYTES_IN_MEMORY:
            return self
        layers = [layer[self.place] for layer in self.layers]
        return Features(layers, np.arange(len(self)), self.rows)


class FeatureStore:
    """Features of one encoder with one preparation, in tables on disk to which rows are appended.

    The tables have one row for each window (or time frame) of each item that was encoded before.
    An index file maps items to rows. An interrupted extraction continues where it stopped, and
    tasks on the same audio share rows. One process at a time writes. `folder` is the parent of all
    stores.
    """

    def __init__(self, folder: Path, encoder: ProbeEncoder, preparation: Preparation) -> None:
        key = f"{encoder.function_hash} {preparation.key}"
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.encoder, self.preparation = encoder, preparation
        self._dtype = np.dtype(np.float16 if preparation.per_frame else np.float32)
        self._index: dict[str, tuple[int, int]] = {}

    def features(self, split: Split, batch_seconds: float, description: str) -> Features:
        """Features of all items of a split; items that are not in the store are encoded first.

        `batch_seconds` of audio are encoded at once.

        Raises:
            AudioReadError: if a file cannot be read.
            UserError: if the disk has not enough free space.
        """
        keys = [_item_key(item) for item in split.items]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._read_index()
            pairs = zip(keys, split.items, strict=True)
            missing = {key: item for key, item in pairs if key not in self._index}
            if missing:
                self._extract(missing, batch_seconds, description)
        return self._gather(keys)

    @property
    def _num_rows(self) -> int:
        return sum(count for _, count in self._index.values())

    def _gather(self, keys: Sequence[str]) -> Features:
        spans = [self._index[key] for key in keys]
        place = np.concatenate([np.arange(first, first + count) for first, count in spans])
        item = np.repeat(np.arange(len(spans)), [count for _, count in spans])
        window_of_item, seconds = (
            self._table(name, dtype, 1)[place, 0] for name, dtype in _ROW_TABLES.items()
        )
        is_first = (np.diff(item, prepend=-1) != 0) | (np.diff(window_of_item, prepend=-1) != 0)
        rows = Rows(item, is_first.cumsum() - 1, seconds)
        widths = json.loads((self.folder / "widths.json").read_text())
        layers = [
            self._table(_layer_table(i), self._dtype, width) for i, width in enumerate(widths)
        ]
        return Features(layers, place, rows).in_memory()

    def _table(self, name: str, dtype: np.dtype, width: int) -> np.ndarray:
        # Another process may append more rows meanwhile.
        shape = (self._num_rows, width)
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape)

    def _read_index(self) -> None:
        """Read the index, and cut off a line that a killed process did not finish."""
        path = self.folder / "index.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        self._index = {key: (first, count) for key, first, count in map(json.loads, complete)}
        if len(complete) < len(lines):
            path.write_text("".join(complete))

    def _extract(self, missing: dict[str, Item], batch_seconds: float, description: str) -> None:
        """Encode items and append their rows, some items at a time."""

        def load(item: Item) -> Float32[Tensor, "C S"]:
            return load_degraded(item, self.encoder, self.preparation.condition)

        ahead = 2 * _ITEMS_PER_WRITE
        waveforms = map_threads(load, missing.values(), _NUM_READERS, num_submitted=ahead)
        loaded = zip(missing, waveforms, strict=True)
        progress = track_progress(loaded, description, total=len(missing))
        is_first = True
        while chunk := list(islice(progress, _ITEMS_PER_WRITE)):
            items, audio = [missing[key] for key, _ in chunk], [waveform for _, waveform in chunk]
            layers, window, seconds, rows_per_item = encode_waveforms(
                self.encoder, self.preparation, items, audio, batch_seconds, self._dtype
            )
            if is_first:
                num_bytes = sum(layer.nbytes for layer in layers) / len(chunk) * len(missing)
                self._check_free_space(num_bytes)
                widths = [layer.shape[1] for layer in layers]
                (self.folder / "widths.json").write_text(json.dumps(widths))
                is_first = False
            tables = {_layer_table(i): layer for i, layer in enumerate(layers)}
            tables |= {"window": window, "seconds": seconds}
            self._append(tables, dict(zip((key for key, _ in chunk), rows_per_item, strict=True)))

    def _append(self, tables: Mapping[str, np.ndarray], rows_of_key: Mapping[str, int]) -> None:
        num_rows = self._num_rows
        for name, table in tables.items():
            with (self.folder / name).open("ab") as file:
                # A killed process may have left rows that are not in the index.
                file.truncate(num_rows * table[0].nbytes)
                table.tofile(file)
        with (self.folder / "index.jsonl").open("a") as index:
            for key, count in rows_of_key.items():
                self._index[key] = num_rows, count
                index.write(json.dumps([key, num_rows, count]) + "\n")
                num_rows += count

    def _check_free_space(self, num_bytes: float) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_bytes + _SPARE_BYTES > free:
            raise UserError(
                f"features of {len(self.encoder.layer_names)} layers take {num_bytes / 1e9:.1f} GB "
                f"in {self.folder}, but {free / 1e9:.1f} GB are free: keep fewer with `--layers`, "
                "or choose another `--output`"
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Allow one process at a time."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _layer_table(layer: int) -> str:
    return f"layer-{layer:02}"


def _item_key(item: Item) -> str:
    """Hash of path, size, modification time and span of an item."""
    status = item.path.stat()
    file = f"{item.path.resolve()} {status.st_size} {status.st_mtime_ns}"
    key = f"{file} {item.start_seconds} {item.end_seconds}"
    return hashlib.sha256(key.encode()).hexdigest()[:24]
