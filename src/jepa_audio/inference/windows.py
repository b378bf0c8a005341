"""Divide clips that are longer than a training crop into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from jepa_audio.steps.front_ends import FrontEnd


@dataclass(frozen=True)
class Windows:
    """The W windows of a clip, and the time columns that become features.

    Attributes:
        starts: first sample of each window.
        num_samples: length of each window; the samples after the end of the clip are zeros.
        kept: True where a time column becomes a feature, `[W, T]`; in a window, these columns are
            neighbours. Where windows overlap, each column is kept in one window only.
        times: time of every kept column in seconds.
        mask_dropped: True if attention excludes the columns that are not kept.
        rms_dbfs: level to which the clip is scaled; `None` keeps its level.
    """

    starts: Sequence[int]
    num_samples: int
    kept: Bool[np.ndarray, "W T"]
    times: Float[np.ndarray, " _"]
    mask_dropped: bool = False
    rms_dbfs: float | None = None

    @property
    def end(self) -> int:
        """End of the last window, in samples."""
        return self.starts[-1] + self.num_samples


def exact_windows(
    num_samples: int, front_end: FrontEnd, window_samples: int, overlap: float
) -> Windows:
    """Windows without padding: the last window ends with the clip.

    Where two windows overlap, a column is kept only in the window in which it is farther from the
    border. Columns before the middle of the overlap are kept in the first window, the others in
    the second window.
    """
    rate, window = front_end.sample_rate, min(window_samples, num_samples)
    hop = max(1, round(window * (1 - overlap)))
    starts = [*range(0, num_samples - window, hop), num_samples - window]
    columns = front_end.times(window)
    start = torch.tensor(starts)[:, None] / rate
    times = start + columns  # [W, T]
    # The middle of the overlap of two neighbouring windows.
    middle = (start[1:] + start[:-1] + window / rate) / 2
    kept = torch.ones_like(times, dtype=torch.bool)
    kept[1:] &= times[1:] >= middle
    kept[:-1] &= times[:-1] < middle
    # In float64, because float32 has steps of 4 ms after 10 h.
    exact = np.array(starts)[:, None] / rate + columns.double().numpy()
    return Windows(starts, window, kept.numpy(), exact[kept.numpy()])


def padded_window(num_samples: int, front_end: FrontEnd, min_samples: int) -> Windows:
    """One window of `min_samples`, for a clip that is too short for one token.

    With most transforms, this window has one column. The CQT and the VQT need a clip that is longer
    than one token. Their columns are then kept in proportion to the length of the clip, but at
    least one; attention excludes the other columns.
    """
    times = front_end.times(min_samples).double().numpy()
    num_columns = max(1, len(times) * num_samples // min_samples)
    kept = np.arange(len(times)) < num_columns
    return Windows([0], min_samples, kept[None], times[:num_columns], not kept.all())


def windows_as_wavjepa(num_samples: int, front_end: FrontEnd, window_samples: int) -> Windows:
    """The windows of the published WavJEPA code.

    Each clip is scaled to an RMS level of -14 dBFS. The last window is padded with zeros. If a clip
    fills its last window exactly, one window of zeros is added. The front end includes the zeros in
    its normalisation. The tokens of the zeros are excluded from attention and are not returned. A
    clip that is too short for one column has one column.

    Two roundings of the published code are kept. A window has int(16000 * 2.01) = 32159 samples,
    one less than a training crop. The zeros of a clip have int(200 / (32159 // 16000)) = 100 tokens
    a second: the length of the window is rounded down to whole seconds. For windows shorter than a
    second, where the published code fails, the length is not rounded.
    """
    rate = front_end.sample_rate
    window = int(rate * (window_samples / rate))
    # Between 1 and `window`.
    padding = window - num_samples % window
    num_windows = (num_samples + padding) // window
    per_window = front_end.grid(window).num_time
    per_second = int(per_window / (window // rate or window / rate))
    num_columns = max(1, num_windows * per_window - int(padding / rate * per_second))
    kept = np.arange(num_windows * per_window).reshape(num_windows, per_window) < num_columns
    times = np.arange(num_columns) * (num_samples / rate / num_columns)
    starts = range(0, num_windows * window, window)
    return Windows(starts, window, kept, times, mask_dropped=True, rms_dbfs=-14.0)
