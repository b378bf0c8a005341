"""Several masks of a clip, literally: a complete forward pass of the clips for each mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.steps.masking.source import MaskSource, MaskStream
from jepa_audio.training.jepa import JEPA


def masks_one_by_one(jepa: JEPA, batch: AudioBatch, num_masks: int, step: int = 0) -> list[Masks]:
    """For each k, mask k of every clip: that of a clip at row `row * num_masks + k`."""
    has_padding = batch.num_samples is not None
    source = MaskSource.of(jepa, batch.waveform.shape[-1], MaskStream.TRAINING, has_padding)
    single = replace(source, masks_per_clip=1)
    return [
        single.draw(batch.row * num_masks + k, step, batch.num_samples) for k in range(num_masks)
    ]


def loss_mask_by_mask(jepa: JEPA, batch: AudioBatch, num_masks: int) -> Tensor:
    """The mean loss of complete forward passes of the batch, each with another mask."""
    losses = [
        jepa.loss(batch.waveform, masks) for masks in masks_one_by_one(jepa, batch, num_masks)
    ]
    return torch.stack(losses).mean()
