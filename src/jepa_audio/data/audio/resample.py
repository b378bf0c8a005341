"""Polyphase resampling of whole files and slices, with one cached kernel per pair of rates."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Float32
from torch import Tensor
from torchaudio.transforms import Resample

from jepa_audio.errors import UserError

# Conversions between multiples of 8 kHz and 11 025, 22 050, 44 100 or 88 200 Hz need at most 1280.
_EXACT_DENOMINATOR = 1280
_ONE_CENT = 2 ** (1 / 1200) - 1


@lru_cache(maxsize=256)
def rate_ratio(from_rate: int, to_rate: int) -> Fraction:
    """Ratio of input to output samples, approximated if the exact ratio needs a huge kernel.

    The kernel has one phase per unit of the denominator: the exact ratio of 44 101 to 16 000 Hz
    would need 16 000 phases and gigabytes. For such rates the ratio is the simplest fraction whose
    error in pitch and duration is below one cent (a hundredth of a semitone, 0.058 %).
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
    """Number of samples that `resample` returns for `num_frames` input samples."""
    ratio = rate_ratio(from_rate, to_rate)
    return -(-num_frames * ratio.denominator // ratio.numerator)


@dataclass(frozen=True)
class SourceSlice:
    """The frames of a file that one slice of the resampled file depends on.

    Attributes:
        start: first frame to read.
        num_frames: frames to read.
        skip: resampled samples to drop at the start.
    """

    start: int
    num_frames: int
    skip: int


def source_slice(
    start: int, num_samples: int, num_frames: int, from_rate: int, to_rate: int
) -> SourceSlice:
    """Frames to read for the samples `start` to `start + num_samples` of the resampled file.

    The slice begins at a period of the polyphase filter and is longer by the width of the filter on
    both sides. So its samples equal those of the whole file resampled at once.

    Args:
        start: first sample, at `to_rate`.
        num_samples: at `to_rate`.
        num_frames: length of the file, at `from_rate`.
        from_rate: of the file, in Hz.
        to_rate: in Hz.
    """
    ratio = rate_ratio(from_rate, to_rate)
    if ratio == 1:
        return SourceSlice(start, min(num_samples, num_frames - start), 0)
    margin = _resampler(ratio).width + ratio.numerator
    first = max(int(start * ratio) - margin, 0) // ratio.numerator
    begin = first * ratio.numerator
    end = min(int((start + num_samples) * ratio) + margin, num_frames)
    return SourceSlice(begin, end - begin, start - first * ratio.denominator)


@lru_cache(maxsize=64)
def _resampler(ratio: Fraction) -> Resample:
    with torch.no_grad():
        return Resample(ratio.numerator, ratio.denominator)
