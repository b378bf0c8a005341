"""A corpus as crops: which part of which file a place in the order of the run stands for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import Dataset

from jepa_audio.data.index import CorpusError
from jepa_audio.data.read import AudioReadError, read
from jepa_audio.data.resample import resample, resampled_length, source_slice
from jepa_audio.grid import AudioBatch

log = logging.getLogger(__name__)

Mono = Literal["mean", "first", "random", "keep"]

_READS_BEFORE_JUDGING = 100
_REPLACEMENTS = 20
_SILENCE_RMS = 1e-5  # -100 dBFS: below lies dither, not sound to be made louder


class File(NamedTuple):
    """A row of the table."""

    path: Path
    num_frames: int
    sample_rate: int
    num_channels: int
    rms: float


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


class CropDataset(Dataset[Crops]):
    """Crops of files, drawn from (seed, position) alone: the same on any rank, in any worker, in any run.

    A file that cannot be read when its turn comes is replaced by another one, drawn from the same numbers.

    Args:
        root: folder of the table's paths.
        table: usable rows of the index.
        sample_rate: of the crops, in Hz.
        num_samples: length of a crop; a shorter file is padded with zeros at its end.
        num_channels: of the crops; more than one needs `mono="keep"` and files of just that many.
        mono: channels of a file are averaged, or the first or a random one is taken, or all are kept.
        crops_per_clip: crops of one file at one position.
        clip_seconds: all crops of a position come from one window of this length (WavJEPA: 10 s), drawn
            first; `None` draws them from the whole file. Unlike there, a file shorter than the window is not
            padded to it before the crops are drawn, which would make some of them silence.
        loudness_dbfs: RMS level given to the clip before cropping (WavJEPA: -14); `None` leaves it as it is.
            Without `clip_seconds` the clip is the whole file, whose RMS over all channels the index knows.
        seed: of all draws.
        random_crops: `False` takes the clip from the middle of the file and spreads the crops evenly over it.
        max_bad_share: above this share of bad reads, counted in each process, the run stops.
    """

    def __init__(
        self,
        root: Path,
        table: pa.Table,
        sample_rate: int,
        num_samples: int,
        *,
        num_channels: int = 1,
        mono: Mono = "mean",
        crops_per_clip: int = 1,
        clip_seconds: float | None = None,
        loudness_dbfs: float | None = None,
        seed: int = 0,
        random_crops: bool = True,
        max_bad_share: float = 0.5,
    ) -> None:
        if num_samples < 1 or crops_per_clip < 1 or seed < 0:
            raise ValueError(
                f"`num_samples` ({num_samples}) and `crops_per_clip` ({crops_per_clip}) must be >= 1, "
                f"`seed` ({seed}) >= 0"
            )
        if mono not in get_args(Mono):
            raise ValueError(f"`mono` must be one of {get_args(Mono)}, got {mono!r}")
        if num_channels != 1 and mono != "keep":
            raise ValueError(f"`mono={mono!r}` makes one channel; set `mono='keep'` for {num_channels}")
        clip_samples = None if clip_seconds is None else round(clip_seconds * sample_rate)
        if clip_samples is not None and clip_samples < num_samples:
            raise ValueError(
                f"`clip_seconds` ({clip_seconds}) must be at least the crop's {num_samples / sample_rate} s"
            )
        if len(table) == 0:
            raise CorpusError(f"no usable audio file under {root}")
        self._root = root
        self._paths = table["path"].combine_chunks()
        self._num_frames = table["num_frames"].to_numpy()
        self._sample_rates = table["sample_rate"].to_numpy()
        self._num_channels = table["num_channels"].to_numpy()
        self._rms = table["rms"].to_numpy()
        if mono == "keep" and (self._num_channels != num_channels).any():
            raise ValueError(
                f"`mono='keep'` needs files of `num_channels` ({num_channels}) channels, "
                f"the table has {sorted(set(self._num_channels.tolist()))}"
            )
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.mono = mono
        self.crops_per_clip = crops_per_clip
        self.clip_samples = clip_samples
        self.loudness_dbfs = loudness_dbfs
        self.seed = seed
        self.random_crops = random_crops
        self.max_bad_share = max_bad_share
        self._reads = 0
        self._bad_reads = 0
        self._bad_files: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: tuple[int, int]) -> Crops:
        """The crops at (position in the order of the run, file)."""
        return self._load(place)

    def _load(self, place: tuple[int, int]) -> Any:
        position, index = place
        for attempt in range(_REPLACEMENTS):
            # A generator for each attempt: where in a file reading failed has no influence on what follows.
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt > 0:
                index = int(rng.integers(len(self)))
            try:
                self._reads += 1
                return self._crops(self._file(index), position, rng)
            except AudioReadError as error:
                self._note_bad(error)
        raise CorpusError(f"{_REPLACEMENTS} files in a row cannot be read: {self._bad_list()}")

    def _file(self, index: int) -> File:
        return File(
            self._root / self._paths[index].as_py(),
            int(self._num_frames[index]),
            int(self._sample_rates[index]),
            int(self._num_channels[index]),
            float(self._rms[index]),
        )

    def _crops(self, file: File, position: int, rng: np.random.Generator) -> Crops:
        if self.clip_samples is not None:
            clip = self._clip(file, self.clip_samples, rng)
            starts = self._starts(clip.shape[-1], self.num_samples, self.crops_per_clip, rng)
            crops = torch.stack([cut(clip[:, start:], self.num_samples) for start in starts])
            return Crops(crops, position, min(clip.shape[-1], self.num_samples))
        channel, length = self._channel(file, rng), self._length(file)
        starts = self._starts(length, self.num_samples, self.crops_per_clip, rng)
        crops = torch.stack([self._read(file, start, self.num_samples, channel) for start in starts])
        return Crops(crops * self._gain(file.rms), position, min(length, self.num_samples))

    def _clip(self, file: File, clip_samples: int, rng: np.random.Generator) -> Float32[Tensor, "C S"]:
        """A window of the file, shorter than asked for if the file is."""
        channel, length = self._channel(file, rng), self._length(file)
        (start,) = self._starts(length, clip_samples, 1, rng)
        clip = self._read(file, start, min(clip_samples, length), channel)
        return clip * self._gain(float(clip.square().mean().sqrt()))

    def _channel(self, file: File, rng: np.random.Generator) -> int:
        return int(rng.integers(file.num_channels)) if self.mono == "random" else 0

    def _length(self, file: File) -> int:
        return resampled_length(file.num_frames, file.sample_rate, self.sample_rate)

    def _starts(self, length: int, window: int, count: int, rng: np.random.Generator) -> list[int]:
        room = max(length - window, 0)
        if self.random_crops:
            return rng.integers(room, size=count, endpoint=True).tolist()
        return [(2 * crop + 1) * room // (2 * count) for crop in range(count)]

    def _read(self, file: File, start: int, length: int, channel: int) -> Float32[Tensor, "C S"]:
        source = source_slice(start, length, file.num_frames, file.sample_rate, self.sample_rate)
        samples, sample_rate = read(file.path, source.start, source.num_frames)
        if (sample_rate, len(samples)) != (file.sample_rate, file.num_channels):
            raise AudioReadError(file.path, "changed since it was indexed: other sample rate or channels")
        waveform = resample(self._mixed(torch.from_numpy(samples), channel), file.sample_rate, self.sample_rate)
        return cut(waveform[:, source.skip :], length)

    def _mixed(self, waveform: Float32[Tensor, "C S"], channel: int) -> Float32[Tensor, "K S"]:
        if self.mono == "keep":
            return waveform
        return waveform.mean(0, keepdim=True) if self.mono == "mean" else waveform[channel : channel + 1]

    def _gain(self, rms: float) -> float:
        if self.loudness_dbfs is None or rms < _SILENCE_RMS:
            return 1.0
        return 10 ** (self.loudness_dbfs / 20) / rms

    def _note_bad(self, error: AudioReadError) -> None:
        self._bad_reads += 1
        if error.path not in self._bad_files:
            log.warning("replaced %s by another file: %s", error.path, error.reason)
            self._bad_files[error.path] = error.reason
        if self._reads >= _READS_BEFORE_JUDGING and self._bad_reads > self.max_bad_share * self._reads:
            raise CorpusError(
                f"{self._bad_reads} of {self._reads} reads failed, more than `max_bad_share` "
                f"({self.max_bad_share:g}): {self._bad_list()}"
            ) from error

    def _bad_list(self) -> str:
        return "; ".join(f"{path} ({reason})" for path, reason in self._bad_files.items())


def collate(items: list[Crops], mask_padding: bool = False) -> AudioBatch:
    """A batch of all crops, numbered by their place in the order of the run; `mask_padding` tells what is padding."""
    waveform = torch.stack([item.waveform for item in items])  # [B, crops, C, S]
    position = torch.tensor([item.position for item in items])
    row = position[:, None] * waveform.shape[1] + torch.arange(waveform.shape[1])
    num_samples = torch.tensor([item.num_samples for item in items]).repeat_interleave(waveform.shape[1])
    return AudioBatch(waveform.flatten(0, 1), row.flatten(), num_samples if mask_padding else None)


def cut(waveform: Float32[Tensor, "C S"], length: int) -> Float32[Tensor, "C R"]:
    """The first `length` samples, filled up with zeros where there are fewer."""
    return torch.nn.functional.pad(waveform[:, :length], (0, max(0, length - waveform.shape[-1])))
