"""A corpus as crops: which part of which file a place in the order of the run stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import Dataset

from jepa_audio.data.audio.read import AudioReadError, read
from jepa_audio.data.audio.resample import resample, resampled_length, source_slice
from jepa_audio.data.corpus.table import CorpusError, IndexedFile
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch

ChannelMode = Literal["mean", "first", "random", "keep"]
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")

_REPLACEMENTS = 20
_SILENCE_RMS = 1e-5  # -100 dBFS: below lies dither, not sound to be made louder


class BadRead(NamedTuple):
    """A file that could not be read when its turn came."""

    name: str
    reason: str


WithBadReads = tuple[Sample, list[BadRead]]
"""An item or a batch, and what could not be read on the way to it."""


class Crops(NamedTuple):
    """The crops of one place in the order of the run.

    Attributes:
        waveform: of all crops, `[crops, C, S]`.
        position: the place.
        num_samples: of every crop; what follows is padding.
    """

    waveform: Float32[Tensor, "crops C S"]
    position: int
    num_samples: int


class ClipDataset(Dataset[WithBadReads[Sample]], ABC, Generic[Sample]):
    """Something drawn from a file, from (seed, position) alone: the same on any rank, in any worker, in any run.

    A file that cannot be read when its turn comes is replaced by another one, drawn from the same
    numbers.

    Args:
        files: to read.
        sample_rate: of what is drawn, in Hz.
        num_channels: of what is drawn; more than one needs `mono="keep"` and files of just that
            many.
        mono: channels of a file are averaged, or the first or a random one is taken, or all are
            kept.
        loudness_dbfs: RMS level given to the clip before cropping (WavJEPA: -14); `None` leaves it
            as it is.
        seed: of all draws.
        random_crops: `False` takes the clip from the middle of the file and spreads the crops
            evenly over it.
    """

    def __init__(
        self,
        files: FileTable,
        sample_rate: int,
        *,
        num_channels: int = 1,
        mono: ChannelMode = "mean",
        loudness_dbfs: float | None = None,
        seed: int = 0,
        random_crops: bool = True,
    ) -> None:
        if seed < 0:
            raise UserError(f"`seed` ({seed}) must be >= 0")
        if mono not in get_args(ChannelMode):
            raise UserError(f"`mono` must be one of {get_args(ChannelMode)}, got {mono!r}")
        if num_channels != 1 and mono != "keep":
            raise UserError(
                f"`mono={mono!r}` makes one channel; set `mono='keep'` for {num_channels}"
            )
        if mono == "keep" and (files.num_channels != num_channels).any():
            raise UserError(
                f"`mono='keep'` needs files of `num_channels` ({num_channels}) channels, "
                f"the table has {sorted(set(files.num_channels.tolist()))}"
            )
        self.files = files
        self.sample_rate = sample_rate
        self.mono = mono
        self.loudness_dbfs = loudness_dbfs
        self.seed = seed
        self.random_crops = random_crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: tuple[int, int]) -> WithBadReads[Sample]:
        """What is drawn at (position in the order of the run, file)."""
        position, index = place
        bad: list[BadRead] = []
        for attempt in range(_REPLACEMENTS):
            # A generator for each attempt: where in a file reading failed has no influence on what
            # follows.
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt > 0:
                corpus = self.files.corpus_of(index)  # the shares of a mixture stay what they are
                index = int(rng.integers(corpus.start, corpus.stop))
            try:
                return self.draw(self.files[index], position, rng, bad), bad
            except AudioReadError as error:
                bad.append(BadRead(str(error.audio), error.reason))
        listed = "; ".join(f"{name} ({reason})" for name, reason in bad[:3])
        raise CorpusError(
            f"{_REPLACEMENTS} files in a row cannot be read: {listed}; and {_REPLACEMENTS - 3} more. "
            "Is the disk mounted, and has the audio been moved without its table?"
        )

    @abstractmethod
    def draw(
        self, file: IndexedFile, position: int, rng: np.random.Generator, bad: list[BadRead]
    ) -> Sample:
        """What is drawn from a file; other files that cannot be read on the way are added to `bad`.

        Raises:
            AudioReadError: if this file cannot be read.
        """

    def clip(
        self, file: IndexedFile, clip_samples: int, rng: np.random.Generator
    ) -> Float32[Tensor, "C S"]:
        """A window of the file at the loudness asked for, shorter than asked for if the file is."""
        channel, length = self.channel(file, rng), self.length(file)
        (start,) = self.starts(length, clip_samples, 1, rng)
        clip = self.read(file, start, min(clip_samples, length), channel)
        return (
            clip
            if self.loudness_dbfs is None
            else clip * self.gain(float(clip.square().mean().sqrt()))
        )

    def channel(self, file: IndexedFile, rng: np.random.Generator) -> int:
        """The channel that is taken, where one is."""
        return int(rng.integers(file.num_channels)) if self.mono == "random" else 0

    def length(self, file: IndexedFile) -> int:
        """Samples of the file at the rate of what is drawn."""
        return resampled_length(file.num_frames, file.sample_rate, self.sample_rate)

    def starts(self, length: int, window: int, count: int, rng: np.random.Generator) -> list[int]:
        """Where windows begin."""
        room = max(length - window, 0)
        if self.random_crops:
            return rng.integers(room, size=count, endpoint=True).tolist()
        return [(2 * crop + 1) * room // (2 * count) for crop in range(count)]

    def read(
        self, file: IndexedFile, start: int, length: int, channel: int
    ) -> Float32[Tensor, "C S"]:
        """A part of the file at the rate of what is drawn, filled up with zeros at its end."""
        source = source_slice(start, length, file.num_frames, file.sample_rate, self.sample_rate)
        samples, sample_rate = read(file.audio, source.start, source.num_frames)
        file.check_unchanged(samples, sample_rate)
        waveform = resample(
            self._mixed(torch.from_numpy(samples), channel), file.sample_rate, self.sample_rate
        )
        return cut(waveform[:, source.skip :], length)

    def gain(self, rms: float) -> float:
        """The factor that gives a clip of this RMS the loudness asked for."""
        if self.loudness_dbfs is None or rms < _SILENCE_RMS:
            return 1.0
        return 10 ** (self.loudness_dbfs / 20) / rms

    def _mixed(self, waveform: Float32[Tensor, "C S"], channel: int) -> Float32[Tensor, "K S"]:
        if self.mono == "keep" or len(waveform) == 1:
            return waveform
        return (
            waveform.mean(0, keepdim=True)
            if self.mono == "mean"
            else waveform[channel : channel + 1]
        )


class CropDataset(ClipDataset[Crops]):
    """Crops of files; see `ClipDataset`.

    Args:
        files: see `ClipDataset`.
        sample_rate: see `ClipDataset`.
        num_samples: length of a crop; a shorter file is padded with zeros at its end.
        crops_per_clip: crops of one file at one position.
        clip_seconds: all crops of a position come from one window of this length (WavJEPA: 10 s),
            drawn first; `None` draws them from the whole file. Unlike there, a file shorter than
            the window is not padded to it before the crops are drawn, which would make some of them
            silence.
        num_channels: see `ClipDataset`.
        mono: see `ClipDataset`.
        loudness_dbfs: see `ClipDataset`. Without `clip_seconds` the clip is the whole file, whose
            RMS over all channels the table knows.
        seed: see `ClipDataset`.
        random_crops: see `ClipDataset`.
    """

    def __init__(
        self,
        files: FileTable,
        sample_rate: int,
        num_samples: int,
        *,
        crops_per_clip: int = 1,
        clip_seconds: float | None = None,
        num_channels: int = 1,
        mono: ChannelMode = "mean",
        loudness_dbfs: float | None = None,
        seed: int = 0,
        random_crops: bool = True,
    ) -> None:
        super().__init__(
            files,
            sample_rate,
            num_channels=num_channels,
            mono=mono,
            loudness_dbfs=loudness_dbfs,
            seed=seed,
            random_crops=random_crops,
        )
        self.num_samples = num_samples
        self.crops_per_clip = crops_per_clip
        self.clip_samples = checked_clip(sample_rate, num_samples, crops_per_clip, clip_seconds)

    def draw(
        self, file: IndexedFile, position: int, rng: np.random.Generator, bad: list[BadRead]
    ) -> Crops:
        """Crops of a clip of the file, or of the whole file."""
        if self.clip_samples is not None:
            clip = self.clip(file, self.clip_samples, rng)
            starts = self.starts(clip.shape[-1], self.num_samples, self.crops_per_clip, rng)
            crops = torch.stack([cut(clip[:, start:], self.num_samples) for start in starts])
            return Crops(crops, position, min(clip.shape[-1], self.num_samples))
        channel, length = self.channel(file, rng), self.length(file)
        starts = self.starts(length, self.num_samples, self.crops_per_clip, rng)
        crops = torch.stack([self.read(file, start, self.num_samples, channel) for start in starts])
        crops = crops if self.loudness_dbfs is None else crops * self.gain(file.rms)
        return Crops(crops, position, min(length, self.num_samples))


def checked_clip(
    sample_rate: int, num_samples: int, crops_per_clip: int, clip_seconds: float | None
) -> int | None:
    """Samples of a clip, `None` for the whole file.

    Raises:
        UserError: if crops of it are impossible.
    """
    if num_samples < 1 or crops_per_clip < 1:
        raise UserError(
            f"`num_samples` ({num_samples}) and `crops_per_clip` ({crops_per_clip}) must be >= 1"
        )
    clip_samples = None if clip_seconds is None else round(clip_seconds * sample_rate)
    if clip_samples is not None and clip_samples < num_samples:
        raise UserError(
            f"`clip_seconds` ({clip_seconds}) must be at least the crop's {num_samples / sample_rate} s"
        )
    return clip_samples


class Collate(Generic[Sample, Batch]):
    """Items → a batch, with all that could not be read on the way.

    Args:
        collate: makes a batch of the items' contents.
    """

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self._collate = collate

    def __call__(self, items: Sequence[WithBadReads[Sample]]) -> WithBadReads[Batch]:
        """The batch."""
        return self._collate([item for item, _ in items]), [
            unread for _, bad in items for unread in bad
        ]


def collate(items: list[Crops], mask_padding: bool = False) -> AudioBatch:
    """A batch of all crops, numbered by their place in the order of the run; `mask_padding` tells what is padding."""
    waveform = torch.stack([item.waveform for item in items])  # [B, crops, C, S]
    position = torch.tensor([item.position for item in items])
    row = position[:, None] * waveform.shape[1] + torch.arange(waveform.shape[1])
    num_samples = torch.tensor([item.num_samples for item in items]).repeat_interleave(
        waveform.shape[1]
    )
    return AudioBatch(waveform.flatten(0, 1), row.flatten(), num_samples if mask_padding else None)


def cut(waveform: Float32[Tensor, "C S"], length: int) -> Float32[Tensor, "C R"]:
    """The first `length` samples, filled up with zeros where there are fewer."""
    missing = length - waveform.shape[-1]
    return torch.nn.functional.pad(waveform, (0, missing)) if missing > 0 else waveform[:, :length]
