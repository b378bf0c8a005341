"""Cut clips that are longer than a training crop into windows."""

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
    """The W windows of clips of equal length, and the time columns that become features.

    Attributes:
        waveforms: one tensor `[B, C, S]` for each window.
        kept: True where a time column becomes a feature, `[W, T]`. Where windows overlap, each
            column is kept in one window only.
        times: time of every kept column in seconds.
        mask_dropped: True if attention excludes the columns that are not kept.
    """

    waveforms: Sequence[Float[Tensor, "B C S"]]
    kept: Bool[Tensor, "W T"]
    times: Float[Tensor, " _"]
    mask_dropped: bool = False


def cut_exact(
    clips: Float[Tensor, "B C _"], front_end: FrontEnd, window_samples: int, overlap: float
) -> Windows:
    """Cut windows without padding: the last window ends with the clip.

    Where two windows overlap, a column is kept only in the window in which it is farther from the
    border. Columns before the middle of the overlap are kept in the first window, the others in
    the second window.
    """
    num_samples, rate = clips.shape[-1], front_end.sample_rate
    window = min(window_samples, num_samples)
    hop = max(1, round(window * (1 - overlap)))
    starts = [*range(0, num_samples - window, hop), num_samples - window]
    start = torch.tensor(starts)[:, None] / rate
    times = start + front_end.times(window)  # [W, T]
    # The middle of the overlap of two neighbouring windows.
    middle = (start[1:] + start[:-1] + window / rate) / 2
    kept = torch.ones_like(times, dtype=torch.bool)
    kept[1:] &= times[1:] >= middle
    kept[:-1] &= times[:-1] < middle
    return Windows([clips[..., s : s + window] for s in starts], kept, times[kept])


def pad_to_one_token(
    clips: Float[Tensor, "B C _"], front_end: FrontEnd, min_samples: int
) -> Windows:
    """One window of `min_samples`: clips that are too short for one token, padded with zeros.

    With most transforms, this window has one column. The CQT and the VQT need a clip that is longer
    than one token. Their columns are then kept in proportion to the length of the clip, but at
    least one; attention excludes the other columns.
    """
    num_samples, times = clips.shape[-1], front_end.times(min_samples)
    num_columns = max(1, len(times) * num_samples // min_samples)
    padded = F.pad(clips, (0, min_samples - num_samples))
    kept = torch.arange(len(times)) < num_columns
    return Windows([padded], kept[None], times[:num_columns], mask_dropped=not kept.all())


def cut_as_wavjepa(
    clips: Float[Tensor, "B C _"], front_end: FrontEnd, window_samples: int
) -> Windows:
    """Cut windows like the published WavJEPA code.

    Each clip is scaled to an RMS level of -14 dBFS. The last window is padded with zeros. If a clip
    fills its last window exactly, one window of zeros is added. The front end includes the zeros in
    its normalisation. The tokens of the zeros are excluded from attention and are not returned. A
    clip that is too short for one column has one column.

    Two roundings of the published code are kept. A window has int(16000 * 2.01) = 32159 samples,
    one less than a training crop. The zeros of a clip have int(200 / (32159 // 16000)) = 100 tokens
    a second: the length of the window is rounded down to whole seconds. For windows shorter than a
    second, where the published code fails, the length is not rounded.
    """
    num_samples, rate = clips.shape[-1], front_end.sample_rate
    window = int(rate * (window_samples / rate))
    rms = clips.square().mean(dim=(1, 2), keepdim=True).sqrt()
    # Between 1 and `window`.
    padding = window - num_samples % window
    padded = F.pad(clips * (10 ** (-14 / 20) / rms.clamp(min=1e-8)), (0, padding))
    waveforms = padded.unfold(-1, window, window).unbind(2)
    per_window = front_end.grid(window).num_time
    per_second = int(per_window / (window // rate or window / rate))
    dropped = int(padding / rate * per_second)
    num_columns = max(1, len(waveforms) * per_window - dropped)
    kept = torch.arange(len(waveforms) * per_window) < num_columns
    times = torch.arange(num_columns) * (num_samples / rate / num_columns)
    return Windows(waveforms, kept.unflatten(0, (-1, per_window)), times, mask_dropped=True)
