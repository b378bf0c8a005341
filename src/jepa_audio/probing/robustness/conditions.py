"""Degradations of a waveform before it is encoded: one level each, and reproducible."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from scipy.signal import butter, sosfiltfilt
from torch import Generator, Tensor
from torch.nn import functional as F
from torchaudio.functional import fftconvolve
from typing_extensions import override

from jepa_audio.data.audio.read import AUDIO_SUFFIXES, read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError

REVISION = 1
"""Part of every cache key. It increases when a condition gives other samples than before."""

_POSITIVE = (math.ulp(0.0), math.inf)


@dataclass(frozen=True)
class Condition(ABC):
    """One degradation at one level. Conditions with equal settings are equal.

    Random draws use a generator with the seed of the clip, not the global one. They are the same at
    all levels: along a sweep, a clip gets the same noise at increasing level. Digital silence stays
    silent.

    Attributes:
        name: name of the kind of degradation, the same for all conditions of a sweep.
        unit: unit of `level`.
        level: strength of the degradation; each class states which direction is more severe.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    _level_rule: ClassVar[str] = "a number"
    _level_range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    level: float

    def __post_init__(self) -> None:
        if not self._is_valid_level():
            raise UserError(f"`level` ({self.level}) must be {self._level_rule}")

    def _is_valid_level(self) -> bool:
        lowest, highest = self._level_range
        return lowest <= self.level <= highest

    @property
    def key(self) -> str:
        """Kind and all settings, for cache keys."""
        return f"{self!r}, revision {REVISION}"

    def changes(self, sample_rate: int) -> bool:
        """False if clips of this sample rate are unchanged; their score is the clean one."""
        return True

    def __call__(
        self, waveform: Float32[Tensor, "C S"], sample_rate: int, seed: int
    ) -> Float32[Tensor, "C S"]:
        """The degraded clip; the input is not modified.

        Args:
            waveform: a whole clip, full scale 1. Levels that depend on its power use all samples of
                all channels.
            sample_rate: in Hz.
            seed: seed of the clip from 0 to 2^63 - 1, the same at all levels.
        """
        if not waveform.any() or not self.changes(sample_rate):
            return waveform
        return self._degrade(waveform, sample_rate, Generator().manual_seed(seed))

    @abstractmethod
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        """Degrade a clip that is not silent."""


class Noise(Condition):
    """Added noise at a signal-to-noise ratio of `level` dB; lower is more severe.

    The ratio of mean powers over the whole clip and all channels, exact for every clip.
    """

    unit = "dB"

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        noise = self._noise(waveform.shape, sample_rate, generator).to(waveform)
        return waveform + noise * (_rms(waveform) / _rms(noise) * 10 ** (-self.level / 20))

    @abstractmethod
    def _noise(self, shape: torch.Size, sample_rate: int, generator: Generator) -> Tensor:
        """Noise of any power above 0: [C, S], or [1, S] if it is the same in all channels."""


class WhiteNoise(Noise):
    """Gaussian noise with equal power per hertz, independent in every channel; see `Noise`."""

    name = "white_noise"

    @override
    def _noise(self, shape: torch.Size, sample_rate: int, generator: Generator) -> Tensor:
        return torch.randn(shape, generator=generator)


class PinkNoise(Noise):
    """Gaussian noise with equal power per octave above 20 Hz, independent in every channel.

    The spectrum is flat below 20 Hz. Otherwise, half of the power of long clips would be at
    inaudible frequencies. See `Noise`.
    """

    name = "pink_noise"

    @override
    def _noise(self, shape: torch.Size, sample_rate: int, generator: Generator) -> Tensor:
        spectrum = torch.fft.rfft(torch.randn(shape, generator=generator))
        frequency = torch.fft.rfftfreq(shape[1], 1 / sample_rate).clamp_min(20.0)
        return torch.fft.irfft(spectrum / frequency.sqrt(), n=shape[1])


@dataclass(frozen=True)
class RecordedNoise(Noise):
    """A random part of a random recording, the same in all channels of a clip; see `Noise`.

    Recordings are mixed down to one channel and resampled. A recording that is shorter than the
    clip is repeated.

    Args:
        level: signal-to-noise ratio in dB.
        folder: folder of the recordings; subfolders are included.

    Raises:
        UserError: if there is no recording, or if the one drawn for a clip is silent.
    """

    folder: Path
    name = "recorded_noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
            raise UserError(f"`folder` ({self.folder}) has no audio file ({suffixes})")

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The recordings in alphabetical order."""
        paths = self.folder.rglob("*")
        return tuple(sorted(path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES))

    @cached_property
    @override
    def key(self) -> str:
        """Level, and names and sizes of the recordings, but not the location of the folder."""
        listing = [
            (path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in self.files
        ]
        digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
        return f"RecordedNoise(level={self.level!r}, files={digest!r}), revision {REVISION}"

    @override
    def _noise(self, shape: torch.Size, sample_rate: int, generator: Generator) -> Tensor:
        path = self.files[int(torch.randint(len(self.files), (), generator=generator))]
        recording, num_samples = _read_mono(path, sample_rate), shape[1]
        if not recording.any():
            raise UserError(f"{path} is silent: remove it from `folder`")
        start = int(torch.randint(len(recording), (), generator=generator))
        repeats = -(-num_samples // len(recording))
        noise = recording.roll(-start).repeat(repeats)[:num_samples]
        if not noise.any():
            # A pause of the recording: start at its loudest sample instead.
            noise = recording.roll(-int(recording.abs().argmax()))[:num_samples]
        return noise[None]


@dataclass(frozen=True)
class Reverberation(Condition):
    """A room with a reverberation time (RT60) of `level` seconds; higher is more severe.

    The impulse response is a direct path at time 0, so nothing is delayed, and a diffuse tail from
    the next sample on: Gaussian noise that decays exponentially to -60 dB. Along a sweep, the walls
    of one room absorb less and less: the tail is the same noise with the same initial power
    density, but it lasts longer, so its energy is proportional to `level`. All channels have the
    same response. The clip keeps its level and its length, so the tail after its end is lost.

    Args:
        level: reverberation time in seconds.
        direct_db: energy of the direct path relative to that of the tail, for a reverberation time
            of 0.4 s; 3 dB less for every doubling of the time. 0 dB is about 1 m from the source in
            a room of 120 m³.
    """

    direct_db: float = 0.0
    name = "reverberation"
    unit = "s"
    _level_rule, _level_range = "a reverberation time above 0 s", _POSITIVE

    def _response(self, sample_rate: int, generator: Generator) -> Tensor:
        length = max(math.ceil(self.level * sample_rate), 1)
        # Drawn one second at a time, so that long tails start like short ones.
        seconds = [
            torch.randn(sample_rate, generator=generator) for _ in range(-(-length // sample_rate))
        ]
        decay = 10 ** (-3 * torch.arange(1, length + 1) / (self.level * sample_rate))
        tail = torch.cat(seconds)[:length] * decay
        tail *= math.sqrt(self.level / 0.4) * 10 ** (-self.direct_db / 20) / tail.norm()
        return F.pad(tail, (1, 0), value=1.0)

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        num_samples = waveform.shape[1]
        response = self._response(sample_rate, generator)[:num_samples].to(waveform)
        reverberant = fftconvolve(waveform, response.expand(len(waveform), -1))[:, :num_samples]
        return _match_level(reverberant, waveform)


class BandLimit(Condition):
    """A Butterworth filter of order 8, applied forwards and backwards: zero phase.

    96 dB per octave, -6 dB at `level` Hz.
    """

    unit = "Hz"
    _level_rule, _level_range = "a cut-off above 0 Hz", _POSITIVE
    _side: ClassVar[Literal["lowpass", "highpass"]]

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        if self.level >= sample_rate / 2:
            # A high-pass filter (see `LowPass.changes`): it removes everything.
            return torch.zeros_like(waveform)
        sections = butter(8, self.level, self._side, fs=sample_rate, output="sos")
        # The transients at both ends take two periods of the cut-off, or all of a short clip.
        padding = min(math.ceil(2 * sample_rate / self.level), waveform.shape[1] - 1)
        samples = waveform.numpy(force=True).astype(np.float64)
        filtered = sosfiltfilt(sections, samples, padlen=padding)
        # A copy, because torch does not support negative strides.
        return torch.from_numpy(filtered.copy()).to(waveform)


class LowPass(BandLimit):
    """A low-pass filter; lower is more severe. See `BandLimit`.

    A cut-off at half the sample rate or above changes nothing.
    """

    name = "low_pass"
    _side = "lowpass"

    @override
    def changes(self, sample_rate: int) -> bool:
        return self.level < sample_rate / 2


class HighPass(BandLimit):
    """A high-pass filter; higher is more severe. See `BandLimit`.

    A cut-off at half the sample rate or above leaves silence.
    """

    name = "high_pass"
    _side = "highpass"


class Gain(Condition):
    """A gain of `level` dB, without clipping; more severe with the distance from 0."""

    name = "gain"
    unit = "dB"

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        return waveform * 10 ** (self.level / 20)


class Clipping(Condition):
    """The loudest `level` percent of the samples that are not 0 are clipped; higher is more severe.

    The clip keeps its level, so only its shape changes. `Gain` measures the effect of level.
    """

    name = "clipping"
    unit = "%"
    _level_rule, _level_range = "a share from 0 to 100 %", (0, 100)

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        magnitude = waveform.abs()
        nonzero = magnitude[magnitude > 0]
        num_kept = max(len(nonzero) - round(self.level / 100 * len(nonzero)), 1)
        threshold = float(nonzero.kthvalue(num_kept).values)
        return _match_level(waveform.clamp(-threshold, threshold), waveform)


def _rms(waveform: Tensor) -> float:
    # In double precision: the squares of very soft samples underflow in float32.
    return float(waveform.double().square().mean().sqrt())


def _match_level(waveform: Tensor, reference: Tensor) -> Tensor:
    return waveform * (_rms(reference) / (_rms(waveform) or 1.0))


@lru_cache(maxsize=4)
def _read_mono(path: Path, sample_rate: int) -> Tensor:
    samples, rate = read(path)
    return resample(torch.from_numpy(samples).mean(dim=0, keepdim=True), rate, sample_rate)[0]
