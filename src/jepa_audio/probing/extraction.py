"""Audio of items → windows → feature rows of a frozen encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError
from jepa_audio.probing.encoders import ProbeEncoder
from jepa_audio.probing.robustness import Condition
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.records import Item

REVISION = 1
"""Part of every cache key. It increases when the same audio gives other features than before."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the audio before the encoder, and to its features after it.

    Args:
        windows: how an item is cut into windows.
        per_frame: True for one feature row per time frame; False for one row per window.
        grid_hz: frames per second to which features are interpolated; `None` keeps the times of
            the encoder.
        condition: degradation of the waveform; `None` for clean audio.
    """

    windows: Windows
    per_frame: bool = False
    grid_hz: float | None = None
    condition: Condition | None = None

    @property
    def key(self) -> str:
        """Text with all settings, for cache keys."""
        condition = self.condition.key if self.condition else "clean"
        return f"revision {REVISION} {self.windows} {self.per_frame} {self.grid_hz} {condition}"


@dataclass(frozen=True)
class _Window:
    """Samples `start` to `stop` of one item, the `number`-th window of that item."""

    item: int
    number: int
    start: int
    stop: int


def load_waveform(item: Item, sample_rate: int, num_channels: int) -> Float32[Tensor, "C S"]:
    """The audio of an item with the rate and channels of an encoder.

    One channel is the mean of all channels of the file; a mono file fills all channels.

    Raises:
        AudioReadError: if the file cannot be read.
        UserError: if the file has a number of channels that is neither 1 nor `num_channels`, or if
            the item starts after the end of the file.
    """
    samples, rate = read(item.path)
    stop = None if item.end_seconds is None else round(item.end_seconds * rate)
    waveform = torch.from_numpy(samples[:, round(item.start_seconds * rate) : stop])
    if not waveform.shape[-1]:
        raise UserError(
            f"{item.where}: starts at {item.start_seconds} s, after the end of {item.path}"
        )
    if num_channels == 1:
        waveform = waveform.mean(dim=0, keepdim=True)
    elif len(waveform) not in (1, num_channels):
        raise UserError(
            f"{item.path} has {len(waveform)} channels, the encoder takes {num_channels}: "
            f"convert the file to 1 or {num_channels}"
        )
    return resample(waveform, rate, sample_rate).expand(num_channels, -1)


def load_degraded(
    item: Item, encoder: ProbeEncoder, condition: Condition | None
) -> Float32[Tensor, "C S"]:
    """The audio of an item under a condition, whose random draws depend on the `uid` alone."""
    waveform = load_waveform(item, encoder.sample_rate, encoder.num_channels)
    if condition is None:
        return waveform
    seed = int.from_bytes(hashlib.sha256(item.uid.encode()).digest()[:4])
    return condition(waveform, encoder.sample_rate, seed)


def encode_waveforms(
    encoder: ProbeEncoder,
    preparation: Preparation,
    items: Sequence[Item],
    waveforms: Sequence[Tensor],
    batch_seconds: float,
    dtype: np.dtype,
) -> tuple[list[np.ndarray], Int32[np.ndarray, " rows"], Float32[np.ndarray, " rows"], list[int]]:
    """Encode all windows of the waveforms of some items; windows are never padded.

    Returns:
        The rows of every layer, in the order of items and windows; the index of each row's window
        in its item; the centre of each row in seconds in its item; and the rows of each item.

    Raises:
        UserError: naming the item, if it cannot be encoded or its features are not finite.
    """
    windows = [
        _Window(i, number, start, stop)
        for i, waveform in enumerate(waveforms)
        for number, (start, stop) in enumerate(
            preparation.windows.spans(waveform.shape[-1], encoder.sample_rate)
        )
    ]
    layers_of: dict[_Window, list[np.ndarray]] = {}
    seconds_of: dict[_Window, np.ndarray] = {}
    for batch in _equal_length_batches(windows, batch_seconds * encoder.sample_rate):
        clips = torch.stack([waveforms[w.item][:, w.start : w.stop] for w in batch])
        try:
            layers, seconds = _encode_clips(encoder, preparation, clips)
        except ValueError as error:
            raise UserError(f"{items[batch[0].item].where}: {error}") from error
        for i, window in enumerate(batch):
            where = items[window.item].where
            layers_of[window] = [_to_array(x[i], dtype, encoder.name, where) for x in layers]
            seconds_of[window] = window.start / encoder.sample_rate + seconds
    counts = [len(seconds_of[window]) for window in windows]
    per_item = np.bincount([window.item for window in windows], counts, len(waveforms))
    tables = zip(*(layers_of[window] for window in windows), strict=True)
    return (
        [np.concatenate(table) for table in tables],
        np.repeat([window.number for window in windows], counts).astype(np.int32),
        np.concatenate([seconds_of[window] for window in windows]).astype(np.float32),
        per_item.astype(int).tolist(),
    )


def _equal_length_batches(
    windows: Sequence[_Window], num_samples: float
) -> Iterator[list[_Window]]:
    """Batches of windows of one length with at most `num_samples` samples, or one window."""
    lengths = np.array([window.stop - window.start for window in windows])
    for length in np.unique(lengths):
        size = max(1, int(num_samples / max(length, 1)))
        same = np.flatnonzero(lengths == length)
        for batch in np.split(same, range(size, len(same), size)):
            yield [windows[i] for i in batch]


def _encode_clips(
    encoder: ProbeEncoder, preparation: Preparation, clips: Float32[Tensor, "B C S"]
) -> tuple[list[Float[Tensor, "B rows _"]], Float[np.ndarray, " rows"]]:
    """Rows of every layer, one per clip or per time frame, and their seconds in the clip."""
    clip_seconds = clips.shape[-1] / encoder.sample_rate
    if not preparation.per_frame:
        layers = [layer[:, None] for layer in encoder.encode_clips(clips)]
        _check_num_layers(encoder, layers)
        return layers, np.array([clip_seconds / 2])
    layers, features = encoder.encode_frames(clips)
    _check_num_layers(encoder, layers)
    times = features.times[0].cpu().double()
    if preparation.grid_hz is None:
        return layers, times.numpy()
    num_frames = max(1, int(clip_seconds * preparation.grid_hz))
    grid = (torch.arange(num_frames) + 0.5) / preparation.grid_hz
    return [_interpolate(layer, times, grid) for layer in layers], grid.numpy()


def _check_num_layers(encoder: ProbeEncoder, layers: Sequence[Tensor]) -> None:
    if len(layers) != len(encoder.layer_names):
        raise UserError(
            f"{encoder.name} gives {len(layers)} layers, but names {list(encoder.layer_names)}: "
            "`encode` must return the layers in `layers`, in that order"
        )


def _to_array(rows: Float[Tensor, "rows D"], dtype: np.dtype, name: str, where: str) -> np.ndarray:
    array = rows.float().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} gives features that are not finite in {dtype}")
    return array


def _interpolate(
    layer: Float[Tensor, "B T E"], times: Float[Tensor, " T"], grid: Float[Tensor, " G"]
) -> Float[Tensor, "B G E"]:
    """Linear interpolation to other times; constant before the first frame and after the last."""
    if len(times) == 1:
        return layer.expand(-1, len(grid), -1)
    right = torch.searchsorted(times, grid).clamp(1, len(times) - 1)
    share = ((grid - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1).to(layer)
    return torch.lerp(layer[:, right - 1], layer[:, right], share[:, None])
