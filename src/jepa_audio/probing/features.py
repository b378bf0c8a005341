"""Audio → frozen features on disk: every stretch is heard once, whatever is asked of it later."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError
from jepa_audio.parallel import map_threads, track_progress
from jepa_audio.probing.encoders import ProbeEncoder
from jepa_audio.probing.robustness.conditions import Condition
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item, Split
from jepa_audio.probing.tasks.windows import Windows

REVISION = 1
"""Part of every key; goes up whenever the same audio gives other features than before, so that they are made anew."""

_READERS = 4  # threads; decoding and resampling let go of the interpreter
_AT_ONCE = 32  # stretches between two looks at the disk
_IN_MEMORY_BYTES = 4 * 2**30  # larger features stay on disk, and batches are read from there
_SPARE_BYTES = 2**30
_ABOUT = {"window": np.dtype(np.int32), "seconds": np.dtype(np.float32)}


@dataclass(frozen=True)
class Preparation:
    """What is done to audio before and after the encoder.

    Args:
        windows: what it hears at a time.
        in_time: False for one row a window; True for one row a column of time.
        grid_hz: columns are interpolated to so many rows a second; `None` leaves them at the
            encoder's own times.
        condition: what is done to the waveform; `None` for nothing.
    """

    windows: Windows
    in_time: bool = False
    grid_hz: float | None = None
    condition: Condition | None = None

    @property
    def key(self) -> str:
        """Says all of it."""
        condition = self.condition.key if self.condition else "clean"
        return f"revision {REVISION} {self.windows} {self.in_time} {self.grid_hz} {condition}"


@dataclass(frozen=True)
class Features:
    """Rows of features of one split.

    Attributes:
        layers: one table for each layer, in memory or on disk, in which they stand.
        place: row of the tables, of each row of the split.
        rows: where they come from.
    """

    layers: Sequence[np.ndarray]
    place: Int64[np.ndarray, " rows"]
    rows: Rows

    def __len__(self) -> int:
        return len(self.place)

    def of(
        self, layer: int, rows: Int64[np.ndarray, " n"] | slice = slice(None)
    ) -> Float32[Tensor, "n D"]:
        """Some rows of a layer."""
        return torch.from_numpy(self.layers[layer][self.place[rows]]).float()

    def widths(self, layers: Sequence[int]) -> list[int]:
        """Numbers in a row of each of these layers."""
        return [self.layers[layer].shape[1] for layer in layers]

    def in_memory(self) -> Features:
        """The same read into memory, if they are not too many."""
        width = sum(layer.shape[1] * layer.dtype.itemsize for layer in self.layers)
        if width * len(self) > _IN_MEMORY_BYTES:
            return self
        return Features(
            [layer[self.place] for layer in self.layers], np.arange(len(self)), self.rows
        )


class FeatureStore:
    """The features of one encoder under one preparation: tables that only grow.

    A row stands there for every window (or column of time) of every stretch of audio that was ever
    asked for, and an index says which rows are whose. A stopped extraction goes on where it was;
    tasks on the same audio share it.

    Args:
        folder: of all stores.
        encoder: what hears.
        preparation: see there.
    """

    def __init__(self, folder: Path, encoder: ProbeEncoder, preparation: Preparation) -> None:
        said = f"{encoder.function_hash} {preparation.key}"
        name = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.folder = folder / name
        self.encoder, self.preparation = encoder, preparation
        self._dtype = np.dtype(np.float16 if preparation.in_time else np.float32)
        self._index: dict[str, tuple[int, int]] = {}

    def features(self, split: Split, batch_seconds: float, description: str) -> Features:
        """Of every item of a split, those not yet known being extracted.

        Raises:
            AudioReadError: if a file cannot be read.
            UserError: if there is no room on the disk.
        """
        keys = [_key(item) for item in split.items]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._read_index()
            missing = {
                key: item
                for key, item in zip(keys, split.items, strict=True)
                if key not in self._index
            }
            if missing:
                self._extract(missing, batch_seconds, description)
        return self._gathered(keys)

    def _gathered(self, keys: Sequence[str]) -> Features:
        spans = [self._index[key] for key in keys]
        place = np.concatenate([np.arange(first, first + count) for first, count in spans])
        item = np.repeat(np.arange(len(spans)), [count for _, count in spans])
        within, seconds = (self._table(name, dtype, 1)[place, 0] for name, dtype in _ABOUT.items())
        starts = np.flatnonzero(
            np.diff(item, prepend=-1).astype(bool) | np.diff(within, prepend=-1).astype(bool)
        )
        window = np.zeros(len(place), dtype=np.int64)
        window[starts[1:]] = 1
        rows = Rows(item, window.cumsum(), seconds)
        widths = json.loads((self.folder / "widths.json").read_text())
        layers = [
            self._table(f"layer-{i:02}", self._dtype, width) for i, width in enumerate(widths)
        ]
        return Features(layers, place, rows).in_memory()

    def _table(self, name: str, dtype: np.dtype, width: int) -> np.ndarray:
        num_rows = sum(
            count for _, count in self._index.values()
        )  # another process may be writing more
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=(num_rows, width))

    def _read_index(self) -> None:
        """The index, and tables no longer than it says: what a killed extraction wrote behind is cut."""
        path = self.folder / "index.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        self._index = {key: (first, count) for key, first, count in map(json.loads, whole)}
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        num_rows = max((first + count for first, count in self._index.values()), default=0)
        widths = self.folder / "widths.json"
        sizes = {name: dtype.itemsize for name, dtype in _ABOUT.items()}
        if widths.is_file():
            sizes |= {
                f"layer-{i:02}": width * self._dtype.itemsize
                for i, width in enumerate(json.loads(widths.read_text()))
            }
        for name, row_bytes in sizes.items():
            table = self.folder / name
            if table.is_file() and table.stat().st_size > num_rows * row_bytes:
                with table.open("r+b") as file:
                    file.truncate(num_rows * row_bytes)

    def _extract(self, missing: dict[str, Item], batch_seconds: float, description: str) -> None:
        """Append the rows of some stretches, a handful at a time."""
        num_rows = sum(count for _, count in self._index.values())
        heard = map_threads(self._heard, missing.values(), _READERS, num_submitted=2 * _AT_ONCE)
        progress = track_progress(zip(missing, heard, strict=True), description, total=len(missing))
        items, checked = list(missing.values()), False
        while handful := list(islice(progress, _AT_ONCE)):
            layers, about, counts = self._encoded(
                items, [waveform for _, waveform in handful], batch_seconds
            )
            items = items[len(handful) :]
            if not checked:
                checked = True
                self._check_room(
                    sum(layer.nbytes for layer in layers) / len(handful) * len(missing)
                )
                (self.folder / "widths.json").write_text(
                    json.dumps([layer.shape[1] for layer in layers])
                )
            tables = {f"layer-{i:02}": layer for i, layer in enumerate(layers)} | about
            for name, table in tables.items():
                with (self.folder / name).open("ab") as file:
                    table.tofile(file)
            with (self.folder / "index.jsonl").open("a") as index:
                for (key, _), count in zip(handful, counts, strict=True):
                    self._index[key] = num_rows, count
                    index.write(json.dumps([key, num_rows, count]) + "\n")
                    num_rows += count

    def _heard(self, item: Item) -> Float32[Tensor, "C S"]:
        waveform = load_waveform(item, self.encoder.sample_rate, self.encoder.num_channels)
        if self.preparation.condition is None:
            return waveform
        seed = int.from_bytes(hashlib.sha256(item.uid.encode()).digest()[:4])
        return self.preparation.condition(waveform, self.encoder.sample_rate, seed)

    def _encoded(
        self, items: Sequence[Item], waveforms: Sequence[Tensor], batch_seconds: float
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[int]]:
        """Rows of every layer, windows and seconds of the rows, and how many each waveform has."""
        rate, windows = self.encoder.sample_rate, self.preparation.windows
        spans = [
            (i, *span)
            for i, waveform in enumerate(waveforms)
            for span in windows.spans(waveform.shape[-1], rate)
        ]
        parts = self._encoded_spans(items, waveforms, spans, batch_seconds)
        counts = [0] * len(waveforms)
        within = np.concatenate(
            [
                np.full(len(seconds), number)
                for number, (_, seconds) in zip(_numbers(spans), parts, strict=True)
            ]
        )
        for (i, *_), (_, seconds) in zip(spans, parts, strict=True):
            counts[i] += len(seconds)
        layers = [
            np.concatenate(tables) for tables in zip(*(layers for layers, _ in parts), strict=True)
        ]
        seconds = np.concatenate([seconds for _, seconds in parts])
        return (
            layers,
            {"window": within.astype(np.int32), "seconds": seconds.astype(np.float32)},
            counts,
        )

    def _encoded_spans(
        self,
        items: Sequence[Item],
        waveforms: Sequence[Tensor],
        spans: Sequence[tuple[int, int, int]],
        batch_seconds: float,
    ) -> list[tuple[list[np.ndarray], np.ndarray]]:
        """Rows of every layer and their seconds, by span; spans of one length are encoded together, none is padded."""
        lengths = np.array([stop - start for _, start, stop in spans])
        parts: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        for length in np.unique(lengths):
            at_once = max(1, int(batch_seconds * self.encoder.sample_rate / max(length, 1)))
            alike = np.flatnonzero(lengths == length).tolist()
            for first in range(0, len(alike), at_once):
                places = alike[first : first + at_once]
                clips = torch.stack(
                    [waveforms[spans[k][0]][:, spans[k][1] : spans[k][2]] for k in places]
                )
                try:
                    layers, times = self._vectors(clips)
                except ValueError as error:
                    raise UserError(f"{items[spans[places[0]][0]].where}: {error}") from error
                for row, k in enumerate(places):
                    start_seconds, where = (
                        spans[k][1] / self.encoder.sample_rate,
                        items[spans[k][0]].where,
                    )
                    parts[k] = (
                        [self._stored(layer[row], where) for layer in layers],
                        start_seconds + times,
                    )
        return [parts[k] for k in range(len(spans))]

    def _vectors(
        self, clips: Float32[Tensor, "B C S"]
    ) -> tuple[list[Float[Tensor, "B rows _"]], Float[np.ndarray, " rows"]]:
        """One row a clip, or one a column of time; and their seconds from the start of the clip."""
        seconds = clips.shape[-1] / self.encoder.sample_rate
        if not self.preparation.in_time:
            layers = self.encoder.clip_vectors(clips)
            self._check_layers(layers)
            return [layer[:, None] for layer in layers], np.array([seconds / 2])
        layers, features = self.encoder.vectors_in_time(clips)
        self._check_layers(layers)
        times, grid_hz = features.times[0].cpu().double(), self.preparation.grid_hz
        if grid_hz is None:
            return layers, times.numpy()
        grid = (torch.arange(max(1, int(seconds * grid_hz))) + 0.5) / grid_hz
        return [_interpolated(layer, times, grid) for layer in layers], grid.numpy()

    def _stored(self, rows: Float[Tensor, "rows D"], where: str) -> np.ndarray:
        stored = rows.float().cpu().numpy().astype(self._dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"{where}: {self.encoder.name} gives features that are not finite, or too large for {self._dtype}"
            )
        return stored

    def _check_layers(self, layers: Sequence[Tensor]) -> None:
        if len(layers) != len(self.encoder.layer_names):
            raise UserError(
                f"{self.encoder.name} gives {len(layers)} layers and names {list(self.encoder.layer_names)}; `encode` "
                "must give those in `layers`, in that order"
            )

    def _check_room(self, num_bytes: float) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_bytes + _SPARE_BYTES > free:
            raise UserError(
                f"features of {len(self.encoder.layer_names)} layers would take {num_bytes / 1e9:.1f} GB in "
                f"{self.folder}, {free / 1e9:.1f} GB are free: keep fewer with `--layers`, or give another `--output`"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def load_waveform(item: Item, sample_rate: int, num_channels: int) -> Float32[Tensor, "C S"]:
    """A stretch as an encoder takes it: one channel is the mean of all, a mono file fills every channel.

    Raises:
        AudioReadError: if the file cannot be read.
        UserError: if the file has several channels, but not `num_channels`; if the stretch lies
            behind its end.
    """
    samples, rate = read(item.path)
    stop = None if item.end_seconds is None else round(item.end_seconds * rate)
    waveform = torch.from_numpy(samples[:, round(item.start_seconds * rate) : stop])
    if not waveform.shape[-1]:
        raise UserError(f"{item.where}: starts at {item.start_seconds} s, {item.path} ends before")
    if num_channels == 1:
        waveform = waveform.mean(dim=0, keepdim=True)
    elif len(waveform) not in (1, num_channels):
        raise UserError(
            f"{item.path} has {len(waveform)} channels, the encoder takes {num_channels}: give 1 or as many"
        )
    return resample(waveform, rate, sample_rate).expand(num_channels, -1)


def _key(item: Item) -> str:
    """Of a stretch of a file as it is now."""
    status = item.path.stat()
    said = f"{item.path.resolve()} {status.st_size} {status.st_mtime_ns} {item.start_seconds} {item.end_seconds}"
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _numbers(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """Of the windows of each waveform, from 0."""
    return [
        number for _, of_one in groupby(spans, key=itemgetter(0)) for number, _ in enumerate(of_one)
    ]


def _interpolated(
    layer: Float[Tensor, "B T E"], times: Float[Tensor, " T"], grid: Float[Tensor, " G"]
) -> Float[Tensor, "B G E"]:
    """A layer at other times, straight between its own; before the first and behind the last it stays."""
    if len(times) == 1:
        return layer.expand(-1, len(grid), -1)
    right = torch.searchsorted(times, grid).clamp(1, len(times) - 1)
    share = ((grid - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1).to(layer)
    return torch.lerp(layer[:, right - 1], layer[:, right], share[:, None])
