"""Crops of files, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from typing_extensions import override

from jepa_audio.data.corpus.table import IndexedFile
from jepa_audio.data.loading.clips import BadRead, ClipDataset, Sample, WithBadReads, fit_length
from jepa_audio.steps.grid import AudioBatch

Batch = TypeVar("Batch")


class Crops(NamedTuple):
    """The crops of one clip.

    Attributes:
        waveform: waveforms of all crops.
        position: position of the clip in the order of the run.
        num_samples: samples of each crop without padding.
    """

    waveform: Float32[Tensor, "crops C S"]
    position: int
    num_samples: int


class CropDataset(ClipDataset[Crops]):
    """Crops of files; see `ClipDataset`."""

    @override
    def draw_sample(
        self,
        file: IndexedFile,
        position: int,
        rng: np.random.Generator,
        bad_reads: list[BadRead],
    ) -> Crops:
        num_samples, num_crops = self.settings.crop_samples, self.settings.crops_per_clip
        if self.settings.clip_samples is not None:
            clip = self.read_clip(file, self.settings.clip_samples, rng)
            length = clip.shape[-1]
            starts = self.draw_starts(length, num_samples, num_crops, rng)
            crops = torch.stack([fit_length(clip[:, start:], num_samples) for start in starts])
        else:
            channel, length = self.draw_channel(file, rng), self.file_samples(file)
            starts = self.draw_starts(length, num_samples, num_crops, rng)
            segments = [self.read_segment(file, start, num_samples, channel) for start in starts]
            crops = self.scale(torch.stack(segments), file.rms)
        return Crops(crops, position, min(length, num_samples))


def collate_crops(samples: list[Crops], mask_padding: bool = False) -> AudioBatch:
    """A batch of all crops; row = position * crops per clip + number of the crop.

    With `mask_padding`, the batch holds the number of samples of each crop without padding.
    """
    waveform = torch.stack([sample.waveform for sample in samples])  # [B, crops, C, S]
    num_crops = waveform.shape[1]
    position = torch.tensor([sample.position for sample in samples])
    row = position[:, None] * num_crops + torch.arange(num_crops)
    num_samples = torch.tensor([sample.num_samples for sample in samples])
    return AudioBatch(
        waveform.flatten(0, 1),
        row.flatten(),
        num_samples.repeat_interleave(num_crops) if mask_padding else None,
    )


def collate_with_bad_reads(
    samples: Sequence[WithBadReads[Sample]], collate: Callable[[list[Sample]], Batch]
) -> WithBadReads[Batch]:
    """Collate samples to a batch, and concatenate their failed reads."""
    batch = collate([sample for sample, _ in samples])
    return batch, [bad_read for _, bad_reads in samples for bad_read in bad_reads]
