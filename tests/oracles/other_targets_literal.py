"""Targets of another front end, literally: loops over columns, with exact fractions of samples."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from jepa_audio.steps.front_ends import FrontEnd, SpectrogramPatches
from jepa_audio.steps.grid import Masks


def centres(front_end: FrontEnd, num_samples: int) -> list[Fraction]:
    """The centres of the columns in samples; they are multiples of half a sample."""
    times = front_end.times(num_samples).tolist()
    return [Fraction(round(2 * time * front_end.sample_rate), 2) for time in times]


def source_columns(source: FrontEnd, front_end: FrontEnd, num_samples: int) -> list[list[int]]:
    """For each column of `front_end`, the columns of `source` that it averages."""
    ours, others = centres(front_end, num_samples), centres(source, num_samples)
    chosen = []
    for i, centre in enumerate(ours):
        before = centre - ours[i - 1] if i > 0 else ours[1] - ours[0]
        after = ours[i + 1] - centre if i + 1 < len(ours) else ours[-1] - ours[-2]
        low, high = centre - before / 2, centre + after / 2
        inside = [j for j, other in enumerate(others) if low <= other < high]
        nearest = min(range(len(others)), key=lambda j: abs(others[j] - centre))
        chosen.append(inside or [nearest])
    return chosen


def patch_targets(source: SpectrogramPatches, front_end: FrontEnd, clip: Tensor) -> Tensor:
    """The values `[T, W]` at each column: patches of the normalised log spectrogram of a clip."""
    spectrogram = source.spectrogram(clip[None])[0]  # [C, F, frames]
    image = (spectrogram - source.mean) / (source.std + 1e-8)
    columns = []
    for chosen in source_columns(source, front_end, clip.shape[-1]):
        patches = []
        for j in chosen:
            frames = image[:, :, j * source.patch_frames : (j + 1) * source.patch_frames]
            values = []
            for first in range(0, image.shape[1], source.patch_bands):
                bands = frames[:, first : first + source.patch_bands]  # [C, q, p]
                values.append(bands.transpose(1, 2).flatten())
            patches.append(torch.cat(values))
        columns.append(torch.stack(patches).mean(dim=0))
    return torch.stack(columns)


def mean_squared_error(prediction: Tensor, columns: list[Tensor], masks: Masks, rows: int) -> float:
    """The sum of the errors at all targets / (expected number * masks), by loops."""
    total, prediction = 0.0, prediction.detach()
    for mask in range(masks.num_masks):
        values = columns[mask // masks.per_clip]
        for group in range(masks.targets.index.shape[1]):
            count = int(masks.targets.counts[mask, group])
            for k in range(count):
                column = int(masks.targets.index[mask, group, k]) // rows
                error = prediction[mask, group, k] - values[column]
                total += float(error.square().mean())
    return total / (masks.targets_per_clip * masks.num_masks)
