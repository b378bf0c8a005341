"""Polyphase resampling with kernels made once per pair of sample rates, for whole files and for slices."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Float32
from torch import Tensor
from torchaudio.transforms import Resample

from jepa_audio.errors import UserError

# 11 025, 22 050, 44 100 and 88 200 Hz from and to the multiples of 8 kHz need denominators up to
# 1280.
_EXACT_DENOMINATOR = 1280
_ONE_CENT = 2 ** (1 / 1200) - 1


@lru_cache(maxsize=256)
def rate_ratio(from_rate: int, to_rate: int) -> Fraction:
    """Input samples per output sample, as the resampler takes it.

    The kernel has one phase per unit of the denominator: 44 101 → 16 000 Hz taken literally would
    need 16 000 phases and gigabytes. Between such rates the ratio is the simplest one that is wrong
    by less than one cent (a hundredth of a semitone, 0.058 %) in pitch and duration.
    """
    if from_rate < 1 or to_rate < 1:
        raise UserError(f"sample rates must be >= 1 Hz, got {from_rate} and {to_rate}")
    exact = Fraction(from_rate, to_rate)
    if exact.denominator <= _EXACT_DENOMINATOR:
        return exact
    nearest = (exact.limit_denominator(limit) for limit in range(1, exact.denominator + 1))
    return next(ratio for ratio in nearest if abs(ratio / exact - 1) < _ONE_CENT)


def resample(
    waveform: Float32[Tensor, "C S"], from_rate: int, to_rate: int
) -> Float32[Tensor, "C R"]:
    """The waveform at `to_rate`; see `rate_ratio` for rates without a common measure."""
    ratio = rate_ratio(from_rate, to_rate)
    return waveform if ratio == 1 else _resampler(ratio)(waveform)


def resampled_length(num_frames: int, from_rate: int, to_rate: int) -> int:
    """Number of samples that `resample` makes of `num_frames`."""
    ratio = rate_ratio(from_rate, to_rate)
    return -(-num_frames * ratio.denominator // ratio.numerator)


@dataclass(frozen=True)
class SourceSlice:
    """The frames of a file from which one slice of the resampled file can be made.

    Attributes:
        start: first frame to read.
        num_frames: frames to read.
        skip: resampled samples to drop at the front.
    """

    start: int
    num_frames: int
    skip: int


def source_slice(
    start: int, num_samples: int, num_frames: int, from_rate: int, to_rate: int
) -> SourceSlice:
    """What to read of a file of `num_frames` for samples `start` to `start + num_samples` of it, resampled.

    The slice begins at a whole period of the polyphase filter and is as much longer as the filter
    is wide, so that the samples are those of the whole file resampled at once.
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
