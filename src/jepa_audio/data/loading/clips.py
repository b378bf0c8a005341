"""Read clips, cut crops, replace unreadable files by others, and collate batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from typing_extensions import override

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.resample import resampled_length
from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.errors import MAX_RATE, MAX_SECONDS, UserError, check_bounds
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.steps.masking.source import MaskSource

ChannelMode = Literal["mean", "first", "random", "keep"]
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")

MAX_BATCH_GB = 100
_MAX_ATTEMPTS = 20
# -100 dBFS: a quieter clip holds only dither and is not amplified.
_SILENCE_RMS = 1e-5


@dataclass(frozen=True)
class ClipSettings:
    """How clips are read from files, and crops are cut from clips; see `AudioDataModule`.

    The gain for `loudness_dbfs` comes from the RMS of the samples that are read for a sample, after
    the choice or the average of channels and after resampling: those of the clip, or without
    `clip_seconds` those of all its crops together. All crops of a clip have the same gain.

    Raises:
        UserError: if a value is out of range or contradicts another one.
    """

    sample_rate: int
    crop_seconds: float
    num_channels: int = 1
    mono: ChannelMode = "mean"
    crops_per_clip: int = 1
    clip_seconds: float | None = None
    loudness_dbfs: float | None = None
    mask_padding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, 1, MAX_RATE, "sample_rate")
        check_bounds(self, 1, 1024, "num_channels")
        check_bounds(self, 1, 10_000, "crops_per_clip")
        check_bounds(self, 0, MAX_SECONDS, "crop_seconds", "clip_seconds")
        check_bounds(self, 0, inf, "seed")
        if self.mono not in get_args(ChannelMode):
            raise UserError(f"`mono` must be one of {get_args(ChannelMode)}, got {self.mono!r}")
        if self.num_channels > 1 and self.mono != "keep":
            remedy = f"set `mono='keep'` for `num_channels` ({self.num_channels})"
            raise UserError(f"`mono={self.mono!r}` gives 1 channel; {remedy}")
        crop = f"`crop_seconds` ({self.crop_seconds})"
        if self.crop_samples < 1:
            raise UserError(f"{crop} must be at least one sample at {self.sample_rate} Hz")
        if self.clip_samples is not None and self.clip_samples < self.crop_samples:
            raise UserError(f"`clip_seconds` ({self.clip_seconds}) must be at least {crop}")

    @property
    def crop_samples(self) -> int:
        """Length of a crop in samples."""
        return round(self.crop_seconds * self.sample_rate)

    @property
    def clip_samples(self) -> int | None:
        """Length of a clip in samples; `None` for the whole file."""
        return None if self.clip_seconds is None else round(self.clip_seconds * self.sample_rate)


def check_batch_size(settings: ClipSettings, batch_size: int) -> None:
    """Refuse micro-batches that fit into the memory of no machine.

    Raises:
        UserError: if the crops of a micro-batch take more than `MAX_BATCH_GB`.
    """
    samples = batch_size * settings.crops_per_clip * settings.crop_samples * settings.num_channels
    if 4e-9 * samples > MAX_BATCH_GB:
        raise UserError(
            f"a micro-batch of `batch_size` ({batch_size}) x `crops_per_clip` "
            f"({settings.crops_per_clip}) crops of `crop_seconds` ({settings.crop_seconds}) takes "
            f"{4e-9 * samples:,.0f} GB, more than {MAX_BATCH_GB}: lower one of them"
        )


class BadRead(NamedTuple):
    """A file that could not be read during training."""

    name: str
    reason: str


WithBadReads = tuple[Sample, list[BadRead]]
"""A sample or batch, and the failed reads that happened while it was loaded."""


class ClipDataset(Dataset[WithBadReads[Sample]], ABC, Generic[Sample, Batch]):
    """Random samples of files; each is a function of (seed, position) alone.

    The same position gives the same sample on every rank, in every worker and in every run. A file
    that cannot be read is replaced by another file, drawn from the same (seed, position).

    Args:
        files: files to read.
        settings: lengths, channels and loudness of clips and crops.
        random_crops: False takes the clip from the middle of the file and distributes the crops
            evenly over it.
        masks: draws the masks of every batch; `None` leaves this to the model.

    Raises:
        UserError: if `mono="keep"` and a file has another number of channels.
    """

    def __init__(
        self,
        files: FileTable,
        settings: ClipSettings,
        random_crops: bool = True,
        masks: MaskSource | None = None,
    ) -> None:
        if settings.mono == "keep" and (files.num_channels != settings.num_channels).any():
            raise UserError(
                f"`mono='keep'` needs files of `num_channels` ({settings.num_channels}) channels, "
                f"but the table has {sorted(set(files.num_channels.tolist()))}"
            )
        self.files = files
        self.settings = settings
        self.random_crops = random_crops
        self.masks = masks

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SampleIndex) -> WithBadReads[Sample]:
        """The sample at an index of the order."""
        position, file_index, _ = index
        bad_reads: list[BadRead] = []
        for attempt in range(_MAX_ATTEMPTS):
            # Each attempt has its own generator: the draws do not depend on the numbers that a
            # failed attempt has used.
            rng = np.random.default_rng([self.settings.seed, position, attempt])
            if attempt > 0:
                # Replacements come from the same corpus, so the shares of a mixture stay constant.
                corpus = self.files.corpus_of(file_index)
                file_index = int(rng.integers(corpus.start, corpus.stop))
            try:
                return self.draw_sample(self.files[file_index], index, rng, bad_reads), bad_reads
            except AudioReadError as error:
                bad_reads.append(BadRead(str(error.audio), error.reason))
        examples = "; ".join(f"{name} ({reason})" for name, reason in bad_reads[:3])
        raise CorpusError(
            f"{_MAX_ATTEMPTS} files in a row cannot be read: {examples}; and {_MAX_ATTEMPTS - 3} "
            "more. Check that the disk is mounted, and that the paths in the table are still valid"
        )

    @abstractmethod
    def draw_sample(
        self, file: IndexedFile, index: SampleIndex, rng: np.random.Generator, bad: list[BadRead]
    ) -> Sample:
        """Draw a sample of a file, which can be another one than that of `index`.

        A sample can need other files, for example noise. If one of these cannot be read, it is
        appended to `bad`.

        Raises:
            AudioReadError: if this file cannot be read.
        """

    @abstractmethod
    def collate_samples(self, samples: list[Sample]) -> Batch:
        """Collate samples to a batch."""

    def draw_masks(
        self, row: Int[Tensor, " B"], step: Int[Tensor, " clips"], lengths: Tensor | None = None
    ) -> Masks | None:
        """The masks of a batch, whose samples all have the same optimizer step."""
        return None if self.masks is None else self.masks.draw(row, int(step[0]), lengths)

    def collate(self, samples: list[WithBadReads[Sample]]) -> WithBadReads[Batch]:
        """Collate samples to a batch, and concatenate their failed reads."""
        batch = self.collate_samples([sample for sample, _ in samples])
        return batch, [bad_read for _, bad_reads in samples for bad_read in bad_reads]

    def read_segments(
        self, file: IndexedFile, num_samples: int, count: int, rng: np.random.Generator
    ) -> list[Float32[Tensor, "C S"]]:
        """Read `count` segments of `num_samples`; of a shorter file, each is the complete file.

        Together, the segments have the loudness of the settings; silence is not amplified.
        """
        channels: dict[str, int | Literal["mean"] | None] = {"mean": "mean", "first": 0}
        channel = channels.get(self.settings.mono)
        if self.settings.mono == "random":
            channel = int(rng.integers(file.num_channels))
        rate = self.settings.sample_rate
        length = resampled_length(file.num_frames, file.sample_rate, rate)
        starts = self.draw_starts(length, num_samples, count, rng)
        length = min(num_samples, length)
        segments = [file.read_slice(start, length, rate, channel) for start in starts]
        if self.settings.loudness_dbfs is None:
            return segments
        rms = float(torch.stack(segments).square().mean().sqrt())
        if rms < _SILENCE_RMS:
            return segments
        gain = 10 ** (self.settings.loudness_dbfs / 20) / rms
        return [gain * segment for segment in segments]

    def read_clip(
        self, file: IndexedFile, num_samples: int, rng: np.random.Generator
    ) -> Float32[Tensor, "C S"]:
        """Read a clip at the loudness of the settings; a shorter file is one complete clip."""
        (clip,) = self.read_segments(file, num_samples, 1, rng)
        return clip

    def draw_starts(
        self, length: int, window: int, count: int, rng: np.random.Generator
    ) -> list[int]:
        """Draw the first sample of `count` windows within `length` samples."""
        last_start = max(length - window, 0)
        if self.random_crops:
            return rng.integers(last_start, size=count, endpoint=True).tolist()
        return [(2 * crop + 1) * last_start // (2 * count) for crop in range(count)]


class Crops(NamedTuple):
    """The crops of one clip, their place in the order, and their samples without padding.

    The crops share the memory of the clip: they are copied once, into the batch.
    """

    waveforms: list[Float32[Tensor, "C S"]]
    position: int
    step: int
    num_samples: int


class CropDataset(ClipDataset[Crops, AudioBatch]):
    """Crops of files; see `ClipDataset`."""

    @override
    def draw_sample(
        self, file: IndexedFile, index: SampleIndex, rng: np.random.Generator, bad: list[BadRead]
    ) -> Crops:
        size, count = self.settings.crop_samples, self.settings.crops_per_clip
        if self.settings.clip_samples is None:
            segments = self.read_segments(file, size, count, rng)
        else:
            clip = self.read_clip(file, self.settings.clip_samples, rng)
            starts = self.draw_starts(clip.shape[-1], size, count, rng)
            segments = [clip[:, start : start + size] for start in starts]
        crops = [fit_length(segment, size) for segment in segments]
        return Crops(crops, index.position, index.step, segments[0].shape[-1])

    @override
    def collate_samples(self, samples: list[Crops]) -> AudioBatch:
        """A batch of all crops; row = position * crops per clip + number of the crop."""
        # In a loader process, `default_collate` stacks in memory that it shares with training.
        waveform = default_collate([crop for sample in samples for crop in sample.waveforms])
        position, step, lengths = default_collate([sample[1:] for sample in samples])
        num_crops = len(samples[0].waveforms)
        row = rows_of(position, num_crops)
        has_padding = self.settings.mask_padding
        num_samples = lengths.repeat_interleave(num_crops) if has_padding else None
        masks = self.draw_masks(row, step, num_samples)
        return AudioBatch(waveform, row, num_samples, masks)


def rows_of(position: Int[Tensor, " B"], num_crops: int) -> Int[Tensor, " R"]:
    """The rows of the crops at the given positions; see `AudioBatch.row`."""
    return (position[:, None] * num_crops + torch.arange(num_crops)).flatten()


def fit_length(waveform: Float32[Tensor, "C S"], length: int) -> Float32[Tensor, "C R"]:
    """Cut the waveform to `length` samples, or pad it with zeros at the end."""
    missing = length - waveform.shape[-1]
    return torch.nn.functional.pad(waveform, (0, missing)) if missing > 0 else waveform[:, :length]
