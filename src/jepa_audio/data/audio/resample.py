"""Resample complete files and slices of files with libsoxr, at its highest quality."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import ceil

import numpy as np
import soxr
import torch
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.errors import UserError

# The passband ends at 0.91 of the lower Nyquist frequency; aliases are below -160 dB. HQ takes two
# thirds of the time, but its slices differ by 1e-6 from those of the complete file.
# `benchmarks/resampling.py` measures both.
QUALITY = "VHQ"
# Half the length of the longest filter, in samples at the lower rate, rounded up generously.
_FILTER_REACH = 200
# The largest denominator of a conversion between a multiple of 8 kHz and 11 025, 22 050, 44 100 or
# 88 200 Hz.
_EXACT_DENOMINATOR = 1280
_ONE_CENT = 2 ** (1 / 1200) - 1


@lru_cache(maxsize=256)
def rate_ratio(from_rate: int, to_rate: int) -> Fraction:
    """Ratio of input to output samples, approximated if the exact ratio has a huge period.

    A slice of a file must begin at a period of the ratio (see `source_slice`). The period of 44 101
    to 16 000 Hz would be one second. For such rates, the ratio is the fraction with the smallest
    denominator whose error in pitch and duration is below one cent (a hundredth of a semitone,
    0.058 %).
    """
    if from_rate < 1 or to_rate < 1:
        raise UserError(f"sample rates must be >= 1 Hz, got {from_rate} Hz and {to_rate} Hz")
    exact = Fraction(from_rate, to_rate)
    if exact.denominator <= _EXACT_DENOMINATOR:
        return exact
    ratios = (exact.limit_denominator(limit) for limit in range(1, exact.denominator + 1))
    return next(ratio for ratio in ratios if abs(ratio / exact - 1) < _ONE_CENT)


def resample(
    waveform: Float32[Tensor, "C S"], from_rate: int, to_rate: int
) -> Float32[Tensor, "C R"]:
    """Resample a waveform on the CPU; see `rate_ratio` for the accuracy of the ratio.

    The samples before and after the waveform are assumed to be zero.
    """
    ratio = rate_ratio(from_rate, to_rate)
    if ratio == 1:
        return waveform
    length = resampled_length(waveform.shape[-1], from_rate, to_rate)
    # libsoxr rounds the length; with a few more zeros, it returns at least `length` samples.
    frames = np.pad(waveform.numpy(), ((0, 0), (0, ceil(ratio) + 1))).T
    resampled = soxr.resample(frames, ratio.numerator, ratio.denominator, QUALITY)
    return torch.from_numpy(np.ascontiguousarray(resampled[:length].T))


def resampled_length(num_frames: int, from_rate: int, to_rate: int) -> int:
    """Number of samples that `resample` returns for `num_frames` input samples per channel."""
    ratio = rate_ratio(from_rate, to_rate)
    return -(-num_frames * ratio.denominator // ratio.numerator)


def source_slice(
    start: int, num_samples: int, num_frames: int, from_rate: int, to_rate: int
) -> tuple[int, int, int]:
    """Frames of a file that are needed for a slice of the resampled file.

    The frames begin at a period of the ratio, and include the reach of the filters on both sides.
    The resampled slice therefore equals the same slice of the resampled complete file.

    Args:
        start: first sample of the slice, at `to_rate`.
        num_samples: length of the slice, at `to_rate`.
        num_frames: length of the file, at `from_rate`.
        from_rate: sample rate of the file, in Hz.
        to_rate: sample rate of the resampled file, in Hz.

    Returns:
        First frame to read, number of frames, and number of resampled samples to drop at the start.
    """
    ratio = rate_ratio(from_rate, to_rate)
    if ratio == 1:
        return start, min(num_samples, num_frames - start), 0
    margin = _FILTER_REACH * max(ceil(ratio), 1)
    first = max(int(start * ratio) - margin, 0) // ratio.numerator
    begin = first * ratio.numerator
    end = min(ceil((start + num_samples) * ratio) + margin, num_frames)
    return begin, end - begin, start - first * ratio.denominator
