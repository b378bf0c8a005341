"""Audio of items → windows → feature rows of a frozen encoder, cached on disk."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.inference.pooling import Pooling
from jepa_audio.parallel import file_lock, track_progress
from jepa_audio.probing.clips import (
    UnusableClipsError,
    item_segment,
    load_waveform,
    map_items,
    read_header,
    try_items,
)
from jepa_audio.probing.encoders import ProbeEncoder
from jepa_audio.probing.features import Features, FrameFeatures, Preparation
from jepa_audio.probing.row_file import RowFile, layer_field, row_type
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item, Split

# Items that are encoded between two writes to disk.
_ITEMS_PER_WRITE = 32
# Larger features stay on disk, and batches are read from there.
_MAX_BYTES_IN_MEMORY = 4 * 2**30
# Space on the disk that must stay free.
_SPARE_BYTES = 2**30


class _Window(NamedTuple):
    """Samples `start` to `stop` of one item, the `number`-th window of that item."""

    item: int
    number: int
    start: int
    stop: int


class FeatureStore:
    """Features of one encoder with one preparation, in files on disk to which rows are appended.

    There is a file for each pooling, with one row for each window (or time frame) of each item that
    was encoded before; see `RowFile`. An item is encoded once for all poolings that lack it. An
    interrupted extraction continues where it stopped, damaged rows are computed again, and tasks on
    the same audio share rows. One process at a time writes.

    Args:
        folder: parent of all stores.
        batch_seconds: seconds of audio that are encoded at once.
    """

    def __init__(
        self, folder: Path, encoder: ProbeEncoder, preparation: Preparation, batch_seconds: float
    ) -> None:
        self.folder, self.encoder = folder, encoder
        self.preparation = preparation.pooled_by(preparation.poolings)
        self.batch_seconds = batch_seconds
        self._dtype = np.dtype(np.float16 if preparation.per_frame else np.float32)
        self._files = {each: self._file_of(each) for each in self.preparation.poolings}

    def _file_of(self, pooling: Pooling) -> RowFile:
        key = f"{self.encoder.function_hash} {self.preparation.key(pooling)}"
        folder = self.folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        return RowFile(folder, self._dtype, "clips")

    def check(self, split: Split) -> int:
        """Find what cannot be encoded without encoding it: read headers, encode one short silence.

        Returns:
            The number of time columns of the shortest window.

        Raises:
            UnusableClipsError: if files cannot be read, if items are not in their files, or if
                files have another number of channels than the encoder.
            UserError: if the shortest window cannot be encoded.
        """
        encoder, windows = self.encoder, self.preparation.windows

        def shortest_window(item: Item) -> int:
            frames, rate, channels = read_header(item.path)
            num_frames = len(item_segment(item, frames, rate, channels, encoder.num_channels))
            num_samples = math.ceil(num_frames * encoder.sample_rate / rate)
            spans = windows.spans(num_samples, encoder.sample_rate)
            return min(stop - start for start, stop in spans)

        lengths = map_items(shortest_window, split.items)
        num_samples = min(lengths)
        silence = torch.zeros(1, encoder.num_channels, num_samples)
        try:
            list(self._encode_clips([silence[0]], self.preparation.poolings))
            return encoder.encode_for_clips(silence).times.shape[1]
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{split.items[lengths.index(num_samples)].where}: {encoder.name} cannot encode a "
                f"clip of {num_samples} samples "
                f"({num_samples / encoder.sample_rate:.3g} s at {encoder.sample_rate} Hz): {error}"
            ) from error

    def features(self, split: Split, description: str, pooling: Pooling | None = None) -> Features:
        """Features of all items of a split, by default of the first pooling.

        Items that are not in the store are encoded first, for all poolings. `description` is the
        text of the progress bar.

        Raises:
            UnusableClipsError: if files cannot be read; names all such items of the split.
            UserError: if the disk has not enough free space, if an item cannot be encoded, or if
                its features are not finite. The last two messages name the item.
        """
        keys = [_item_key(item) for item in split.items]
        items = dict(zip(keys, split.items, strict=True))
        with ExitStack() as locks:
            # In one order, so that two processes never wait for each other.
            for folder in sorted(file.folder for file in self._files.values()):
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(file_lock(folder / "lock"))
            # After an interrupt, poolings may lack different items.
            lacking: dict[tuple[str, ...], list[Pooling]] = {}
            for each, file in self._files.items():
                file.load(keys)
                missing = tuple(key for key in items if key not in file.spans)
                lacking.setdefault(missing, []).append(each)
            for missing, poolings in lacking.items():
                if missing:
                    self._extract({key: items[key] for key in missing}, poolings, description)
        return self._gather(keys, self._files[pooling or self.preparation.poolings[0]])

    def _gather(self, keys: Sequence[str], file: RowFile) -> Features:
        spans = [file.spans[key] for key in keys]
        place = np.concatenate([np.arange(first, first + count) for first, count in spans])
        item = np.repeat(np.arange(len(spans)), [count for _, count in spans])
        stored = file.rows()
        window_of_item, seconds, samples = (
            stored[name][place] for name in ("window", "seconds", "samples")
        )
        is_first = (np.diff(item, prepend=-1) != 0) | (np.diff(window_of_item, prepend=-1) != 0)
        rows = Rows(item, is_first.cumsum() - 1, seconds)
        num_padded = int((samples[is_first] < self.encoder.min_samples).sum())
        assert stored.dtype.names is not None
        layers = [stored[name] for name in stored.dtype.names if name.startswith("layer-")]
        if stored.dtype.itemsize * len(place) <= _MAX_BYTES_IN_MEMORY:
            layers, place = [layer[place] for layer in layers], np.arange(len(place))
        if not self.preparation.by_window:
            return Features(layers, place, rows, num_padded)
        first = np.flatnonzero(is_first)
        rows = Rows(item[first], np.arange(len(first)), seconds[first])
        counts = np.diff(first, append=len(item))
        return FrameFeatures(layers, place[first], rows, num_padded, counts=counts)

    def _extract(
        self, missing: dict[str, Item], poolings: Sequence[Pooling], description: str
    ) -> None:
        """Encode items and append their rows to the file of each pooling, some items at a time."""
        key_of = {id(item): key for key, item in missing.items()}
        waveforms = try_items(lambda item: self._load(item, key_of[id(item)]), missing.values())
        loaded = zip(missing, waveforms, strict=True)
        progress = track_progress(loaded, description, total=len(missing))
        is_first = True
        while chunk := list(islice(progress, _ITEMS_PER_WRITE)):
            if any(isinstance(waveform, str) for _, waveform in chunk):
                results = (waveform for _, waveform in [*chunk, *progress])
                raise UnusableClipsError([text for text in results if isinstance(text, str)])
            keys = [key for key, _ in chunk]
            items = [missing[key] for key in keys]
            waveforms_of_chunk = [w for _, w in chunk if not isinstance(w, str)]
            tables, rows_per_item = self._encode(items, waveforms_of_chunk, poolings)
            if is_first:
                num_bytes = sum(rows.nbytes for rows in tables)
                self._check_free_space(num_bytes / len(chunk) * len(missing))
                is_first = False
            for pooling, rows in zip(poolings, tables, strict=True):
                self._files[pooling].append(rows, dict(zip(keys, rows_per_item, strict=True)))

    def problems(self, split: Split) -> list[str]:
        """A line for each item whose audio cannot be read; reads all files completely."""
        results = try_items(lambda item: self._load(item, _item_key(item)), split.items)
        return [text for text in results if isinstance(text, str)]

    def _load(self, item: Item, key: str) -> Float32[Tensor, "C S"]:
        """The audio of an item, degraded by the condition.

        The random draws of the condition depend only on the `uid` of the item.
        """
        rate, condition = self.encoder.sample_rate, self.preparation.condition
        waveform = load_waveform(item, rate, self.encoder.num_channels)
        if _item_key(item) != key:
            raise UserError(f"{item.where}: {item.path} changed while it was read: probe again")
        seed = int.from_bytes(hashlib.sha256(item.uid.encode()).digest()[:4])
        return waveform if condition is None else condition(waveform, rate, seed)

    def _encode(
        self, items: Sequence[Item], waveforms: Sequence[Tensor], poolings: Sequence[Pooling]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Rows of each pooling in the order of items and windows; number of rows of each item."""
        rate = self.encoder.sample_rate
        windows = [
            _Window(i, number, start, stop)
            for i, waveform in enumerate(waveforms)
            for number, (start, stop) in enumerate(
                self.preparation.windows.spans(waveform.shape[-1], rate)
            )
        ]
        rows_of: dict[_Window, list[np.ndarray]] = {}
        for batch in _batches(windows, self.batch_seconds * rate):
            clips = [waveforms[w.item][:, w.start : w.stop] for w in batch]
            try:
                for number, layers_of, seconds in self._encode_clips(clips, poolings):
                    window = batch[number]
                    item = items[window.item]
                    rows_of[window] = [self._rows(window, x, seconds, item) for x in layers_of]
            except ValueError as error:
                raise UserError(f"{items[batch[0].item].where}: {error}") from error
        counts = [len(rows_of[window][0]) for window in windows]
        per_item = np.bincount([window.item for window in windows], counts, len(waveforms))
        tables = [np.concatenate(rows) for rows in zip(*map(rows_of.get, windows), strict=True)]
        return tables, per_item.astype(int).tolist()

    def _rows(
        self,
        window: _Window,
        layers: Sequence[Float[Tensor, "rows _"]],
        seconds: Float[np.ndarray, " rows"],
        item: Item,
    ) -> np.ndarray:
        """The rows of one window as they are written to disk."""
        of_row = row_type(self._dtype, [layer.shape[-1] for layer in layers])
        rows = np.empty(len(seconds), of_row)
        rows["window"], rows["samples"] = window.number, window.stop - window.start
        rows["seconds"] = window.start / self.encoder.sample_rate + seconds
        for number, layer in enumerate(layers):
            values = layer.float().cpu().numpy().astype(self._dtype)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{item.where}: {self.encoder.name} gives features that are not finite in "
                    f"{self._dtype}"
                )
            rows[layer_field(number)] = values
        return rows

    def _encode_clips(
        self, clips: Sequence[Float[Tensor, "C _"]], poolings: Sequence[Pooling]
    ) -> Iterator[tuple[int, list[list[Float[Tensor, "rows _"]]], Float[np.ndarray, " rows"]]]:
        """For each clip its number, for each pooling the rows of every layer, and their times.

        There is one row for each clip, or for each time frame.
        """
        encoder, grid_hz = self.encoder, self.preparation.grid_hz
        per_frame = self.preparation.per_frame
        for numbers, features in encoder.encode_clips(clips, per_frame=per_frame):
            if len(features.layers) != len(encoder.layer_names):
                raise UserError(
                    f"{encoder.name} returns {len(features.layers)} layers, but the names of its "
                    f"layers are {list(encoder.layer_names)}: `encode` must return one tensor for "
                    "each index in `layers`, in the same order"
                )
            layers_of = [pooling(features) for pooling in poolings]
            counts = features.valid.sum(dim=1).tolist()
            for row, (number, count) in enumerate(zip(numbers, counts, strict=True)):
                clip_seconds = clips[number].shape[-1] / encoder.sample_rate
                if not per_frame:
                    rows = [[layer[row] for layer in layers] for layers in layers_of]
                    yield number, rows, np.array([clip_seconds / 2])
                    continue
                times = features.times[row, :count].cpu().double()
                rows = [[layer[row, :count] for layer in layers] for layers in layers_of]
                if grid_hz is not None:
                    num_frames = max(1, int(clip_seconds * grid_hz))
                    grid = (torch.arange(num_frames) + 0.5) / grid_hz
                    rows = [[interpolate(x[None], times, grid)[0] for x in xs] for xs in rows]
                    times = grid
                yield number, rows, times.numpy()

    def _check_free_space(self, num_bytes: float) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_bytes + _SPARE_BYTES > free:
            raise UserError(
                f"features of {len(self.encoder.layer_names)} layers take {num_bytes / 1e9:.1f} GB "
                f"in {self.folder}, but {free / 1e9:.1f} GB are free: keep fewer with `--layers` "
                "or `--pooling`, "
                "or choose another `--output`"
            )


def _item_key(item: Item) -> str:
    """Hash of path, size, modification time and span of an item."""
    status = item.path.stat()
    file = f"{item.path.resolve()} {status.st_size} {status.st_mtime_ns}"
    key = f"{file} {item.start_seconds} {item.end_seconds}"
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _batches(windows: Sequence[_Window], num_samples: float) -> Iterator[list[_Window]]:
    """Batches of windows of similar length: at most `num_samples` samples, or one window."""
    batch: list[_Window] = []
    total = 0
    for window in sorted(windows, key=lambda window: window.stop - window.start):
        length = window.stop - window.start
        if batch and total + length > num_samples:
            yield batch
            batch, total = [], 0
        batch.append(window)
        total += length
    if batch:
        yield batch


def interpolate(
    layer: Float[Tensor, "B T E"], times: Float[Tensor, " T"], grid: Float[Tensor, " G"]
) -> Float[Tensor, "B G E"]:
    """Linear interpolation to other times; constant before the first frame and after the last."""
    if len(times) == 1:
        return layer.expand(-1, len(grid), -1)
    right = torch.searchsorted(times, grid).clamp(1, len(times) - 1)
    share = ((grid - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1).to(layer)
    return torch.lerp(layer[:, right - 1], layer[:, right], share[:, None])
