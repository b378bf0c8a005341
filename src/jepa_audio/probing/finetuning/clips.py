"""Clips of a split: random crops to train on, all windows to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.probing.clips import load_waveform
from jepa_audio.probing.finetuning.augmentations import soft_targets
from jepa_audio.probing.finetuning.network import frame_times
from jepa_audio.probing.tasks import ProbeData
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item, Split


class CropBatch(NamedTuple):
    """Clips of a training step.

    Attributes:
        waveform: the clips, padded to S samples.
        lengths: number of samples of each clip.
        seeds: of the random masks of each clip.
        targets: of the rows of all clips, see `loss_of`.
    """

    waveform: Float[Tensor, "B C S"]
    lengths: list[int]
    seeds: list[int]
    targets: Tensor


class WindowBatch(NamedTuple):
    """Windows to evaluate.

    Attributes:
        waveform: the windows, padded to S samples.
        lengths: number of samples of each window.
        places: index of the item in the split, and first sample of each window in the item.
    """

    waveform: Float[Tensor, "B C S"]
    lengths: list[int]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class ClipFormat:
    """Sample rate and channels of the clips, and rows of labels per second.

    Args:
        windows: how an item is cut into windows for an evaluation.
        min_samples: samples of the shortest clip that is not padded.
        grid_hz: rows per second; `None` for one row per clip.
    """

    sample_rate: int
    num_channels: int
    min_samples: int
    windows: Windows
    grid_hz: float | None

    @staticmethod
    def of(encoder: Encoder, data: ProbeData) -> ClipFormat:
        """The format that an encoder and a task need; the windows are those of a probe."""
        protocols = data.task.protocols
        protocol = protocols.get("marble-v1") or next(iter(protocols.values()))
        sizes = encoder.sample_rate, encoder.num_channels, encoder.min_samples
        return ClipFormat(*sizes, protocol.windows, data.task.grid_hz)

    def load(self, item: Item) -> Float32[Tensor, "C S"]:
        """The audio of an item.

        Raises:
            UserError: if it cannot be read; names the record and the remedy.
        """
        try:
            return load_waveform(item, self.sample_rate, self.num_channels)
        except UserError as error:
            place = "" if str(error).startswith(item.where) else f"{item.where}: "
            raise UserError(f"{place}{error}; repair the file, or remove its row") from error

    def row_seconds(self, start: int, num_samples: int) -> Float[np.ndarray, " rows"]:
        """Centres of the rows of a clip that starts at a sample of an item."""
        if self.grid_hz is None:
            return np.array([(start + num_samples / 2) / self.sample_rate])
        times = frame_times(num_samples, self.sample_rate, self.grid_hz)
        return start / self.sample_rate + times.double().numpy()

    def rows(self, places: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Rows:
        """The rows of windows, see `WindowBatch`."""
        pairs = zip(places, lengths, strict=True)
        seconds = [self.row_seconds(start, length) for (_, start), length in pairs]
        counts = [len(each) for each in seconds]
        items = np.array([item for item, _ in places], dtype=np.int64)
        windows = np.arange(len(places), dtype=np.int64)
        return Rows(items.repeat(counts), windows.repeat(counts), np.concatenate(seconds))


@dataclass(frozen=True)
class CropSettings:
    """How training clips are cut and changed; see `LabelledClips`.

    Args:
        samples: length of a crop.
    """

    samples: int
    mixup: float
    gain_db: float
    time_shift: float
    seed: int


class TrainingCrops(Dataset[tuple[Tensor, int, Tensor]]):
    """Random crops of training items with their targets, by (epoch, item)."""

    def __init__(self, data: ProbeData, format: ClipFormat, settings: CropSettings) -> None:  # noqa: A002
        self.split, self.labels = data.splits["train"], data.labels
        self.format, self.settings = format, settings

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, where: tuple[int, int]) -> tuple[Tensor, int, Tensor]:
        """The waveform `[C, S]`, the seed of its masks and the targets of its rows."""
        epoch, index = where
        settings = self.settings
        rng = np.random.default_rng([settings.seed, epoch, index])
        seed = int(rng.integers(2**31))
        waveform, start = self._crop(index, rng)
        if not settings.mixup:
            return waveform, seed, self._targets(index, start, waveform.shape[-1])
        other = int(rng.integers(len(self.split)))
        share = float(rng.beta(settings.mixup, settings.mixup))
        second, second_start = self._crop(other, rng)
        length = min(waveform.shape[-1], second.shape[-1])
        targets = [
            soft_targets(self.labels, self._targets(item, first, length))
            for item, first in ((index, start), (other, second_start))
        ]
        mixed = torch.lerp(second[:, :length], waveform[:, :length], share)
        return mixed, seed, torch.lerp(targets[1], targets[0], share)

    def _crop(self, index: int, rng: np.random.Generator) -> tuple[Float32[Tensor, "C S"], int]:
        """A crop of an item at a random time and level, and its first sample."""
        settings, clip = self.settings, self.format.load(self.split.items[index])
        rate, first_seconds = self.format.sample_rate, self.format.windows.first_seconds
        if first_seconds is not None:
            clip = clip[:, : round(first_seconds * rate)]
        length = clip.shape[-1]
        position, level = rng.random(), rng.uniform(-1, 1)
        if length > settings.samples:
            start = int(position * (length - settings.samples + 1))
        else:
            shift = int(position * settings.time_shift * rate)
            start = min(shift, max(0, length - self.format.min_samples))
        return clip[:, start:][:, : settings.samples] * 10 ** (level * settings.gain_db / 20), start

    def _targets(self, index: int, start: int, num_samples: int) -> Tensor:
        seconds = self.format.row_seconds(start, num_samples)
        zeros = np.zeros(len(seconds), dtype=np.int64)
        only = Split((self.split.items[index],))
        return self.labels.row_targets(only, Rows(zeros, zeros, seconds))


class EvaluationWindows(Dataset[tuple[list[Tensor], list[tuple[int, int]]]]):
    """The windows of an item, and the place of each."""

    def __init__(self, split: Split, format: ClipFormat) -> None:  # noqa: A002
        self.split, self.format = split, format

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
        clip = self.format.load(self.split.items[index])
        spans = self.format.windows.spans(clip.shape[-1], self.format.sample_rate)
        windows = [clip[:, start:stop] for start, stop in spans]
        return windows, [(index, start) for start, _ in spans]


class EpochOrder(Sampler[tuple[int, int]]):
    """(epoch, item) in an order that depends on seed and epoch alone, for one of several processes.

    The steps of all processes together have the same clips as the steps of one process.

    Args:
        num_items: number of training items.
        step_size: clips of a step on all processes; the rest of an epoch is left out.
        seed: of the order.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(self, num_items: int, step_size: int, seed: int, rank: int, world: int) -> None:
        self.num_items, self.seed, self.rank, self.world = num_items, seed, rank, world
        self.num_used = num_items // step_size * step_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_used // self.world

    @override
    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items)
        chosen = order[: self.num_used][self.rank :: self.world]
        return iter([(self.epoch, int(item)) for item in chosen])


def collate_crops(clips: Sequence[tuple[Tensor, int, Tensor]]) -> CropBatch:
    """A batch of training clips."""
    waveforms, seeds, targets = zip(*clips, strict=True)
    return CropBatch(*_pad(waveforms), list(seeds), torch.cat(targets))


def collate_windows(
    items: Sequence[tuple[list[Tensor], list[tuple[int, int]]]],
) -> WindowBatch:
    """A batch of the windows of some items."""
    waveforms = [window for windows, _ in items for window in windows]
    return WindowBatch(*_pad(waveforms), [place for _, places in items for place in places])


def _pad(waveforms: Sequence[Float[Tensor, "C _"]]) -> tuple[Float[Tensor, "B C S"], list[int]]:
    lengths = [waveform.shape[-1] for waveform in waveforms]
    padded = waveforms[0].new_zeros(len(waveforms), len(waveforms[0]), max(lengths))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[:, : waveform.shape[-1]] = waveform
    return padded, lengths
