"""Clips that are longer than a training crop, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.steps.front_ends import FrontEnd


@dataclass(frozen=True)
class Windows:
    """The windows of clips of equal length, and which of their time columns become features.

    Attributes:
        waveforms: one tensor `[B, C, S]` for each window.
        kept: True where a time column becomes a feature, `[W, T]`; a column that lies in several
            windows is kept in one of them.
        times: time of every kept column in seconds.
        mask_dropped: exclude the columns that are not kept from attention.
    """

    waveforms: Sequence[Float[Tensor, "B C S"]]
    kept: Bool[Tensor, "W T"]
    times: Float[Tensor, " _"]
    mask_dropped: bool = False


def cut_exact(
    clips: Float[Tensor, "B C _"], front_end: FrontEnd, window_samples: int, overlap: float
) -> Windows:
    """Windows without padding: the last one ends with the clip.

    Where windows overlap, a column is kept in the window in which it is farther from the border.
    """
    num_samples, rate = clips.shape[-1], front_end.sample_rate
    window = min(window_samples, num_samples)
    hop = max(1, round(window * (1 - overlap)))
    starts = [*range(0, num_samples - window, hop), num_samples - window]
    start = torch.tensor(starts)[:, None] / rate
    times = start + front_end.times(window)  # [W, T]
    # The middle of the overlap of two neighbours.
    border = (start[1:] + start[:-1] + window / rate) / 2
    kept = torch.ones_like(times, dtype=torch.bool)
    kept[1:] &= times[1:] >= border
    kept[:-1] &= times[:-1] < border
    return Windows([clips[..., s : s + window] for s in starts], kept, times[kept])


def cut_as_wavjepa(
    clips: Float[Tensor, "B C _"], front_end: FrontEnd, window_samples: int
) -> Windows:
    """Windows as the published WavJEPA code cuts them.

    The level is -14 dBFS. The last window is padded with zeros, and a clip that ends with a window
    gets a whole window of zeros more. The normalisation of the front end includes the zeros; their
    tokens are excluded from attention and dropped.
    """
    num_samples, rate = clips.shape[-1], front_end.sample_rate
    rms = clips.square().mean(dim=(1, 2), keepdim=True).sqrt()
    # Between 1 and `window_samples`.
    padding = window_samples - num_samples % window_samples
    padded = F.pad(clips * (10 ** (-14 / 20) / rms.clamp(min=1e-8)), (0, padding))
    waveforms = padded.unfold(-1, window_samples, window_samples).unbind(2)
    per_window = front_end.grid(window_samples).num_time
    dropped = int(padding / rate * int(per_window / (window_samples / rate)))
    num_columns = len(waveforms) * per_window - dropped
    kept = torch.arange(len(waveforms) * per_window) < num_columns
    times = torch.arange(num_columns) * (num_samples / rate / num_columns)
    return Windows(waveforms, kept.unflatten(0, (-1, per_window)), times, mask_dropped=True)
