"""Polyphase resampling of complete files and of slices, with one cached kernel per ratio."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Float32
from torch import Tensor
from torchaudio.transforms import Resample

from jepa_audio.errors import UserError

# The largest denominator of a conversion between a multiple of 8 kHz and 11 025, 22 050, 44 100 or
# 88 200 Hz.
_EXACT_DENOMINATOR = 1280
_ONE_CENT = 2 ** (1 / 1200) - 1


@lru_cache(maxsize=256)
def rate_ratio(from_rate: int, to_rate: int) -> Fraction:
    """Ratio of input to output samples, approximated if the exact ratio needs a huge kernel.

    The number of phases of the kernel is the denominator. The exact ratio of 44 101 to 16 000 Hz
    would need 16 000 phases and gigabytes of memory. For such rates, the ratio is the fraction with
    the smallest denominator whose error in pitch and duration is below one cent (a hundredth of a
    semitone, 0.058 %).
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
    """Resample a waveform; see `rate_ratio` for the accuracy of the ratio."""
    ratio = rate_ratio(from_rate, to_rate)
    return waveform if ratio == 1 else _resampler(ratio)(waveform)


def resampled_length(num_frames: int, from_rate: int, to_rate: int) -> int:
    """Number of samples that `resample` returns for `num_frames` input samples per channel."""
    ratio = rate_ratio(from_rate, to_rate)
    return -(-num_frames * ratio.denominator // ratio.numerator)


def source_slice(
    start: int, num_samples: int, num_frames: int, from_rate: int, to_rate: int
) -> tuple[int, int, int]:
    """Frames of a file that are needed for a slice of the resampled file.

    The frames begin at a period of the polyphase filter, and include the width of the filter on
    both sides. The resampled slice therefore equals the same slice of the resampled complete file.

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
    margin = _resampler(ratio).width + ratio.numerator
    first = max(int(start * ratio) - margin, 0) // ratio.numerator
    begin = first * ratio.numerator
    end = min(int((start + num_samples) * ratio) + margin, num_frames)
    return begin, end - begin, start - first * ratio.denominator


@lru_cache(maxsize=64)
def _resampler(ratio: Fraction) -> Resample:
    with torch.no_grad():
        return Resample(ratio.numerator, ratio.denominator)
