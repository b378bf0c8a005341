"""Ways to degrade a waveform before it is encoded, each at one level and repeatable."""

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
from torch import Tensor
from torch.nn import functional as F
from torchaudio.functional import fftconvolve

from jepa_audio.data.audio.read import AUDIO_SUFFIXES, read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError

REVISION = 1
"""Part of every key; goes up whenever a condition gives other samples than before, so that caches are made anew."""


class Condition(ABC):
    """One way to degrade a clip, at one level. Conditions are frozen dataclasses: equal settings, equal conditions.

    What is random is drawn from a generator of the clip's own seed and never from the global one,
    and it is drawn alike at every level: along a sweep a clip meets the same noise, only more of
    it. Digital silence stays silence.

    Attributes:
        name: of the kind; the conditions of one sweep share it.
        unit: of `level`.
        level: how strong it is; what that means, and which way is harder, each kind says for
            itself.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    level: float

    @property
    def key(self) -> str:
        """Kind and all settings, for caches."""
        return f"{self!r}, revision {REVISION}"

    def changes(self, sample_rate: int) -> bool:
        """Whether a clip of this sample rate can come back other than it was; if not, its score is the clean one."""
        return True

    def __call__(
        self, waveform: Float32[Tensor, "C S"], sample_rate: int, seed: int
    ) -> Float32[Tensor, "C S"]:
        """The degraded clip; the one given is left as it is.

        Args:
            waveform: a whole clip, full scale 1; levels that depend on its power are of all samples
                of all channels.
            sample_rate: in Hz.
            seed: of the clip, the same at all levels; from 0 to 2^63 - 1.
        """
        if not waveform.any() or not self.changes(sample_rate):
            return waveform
        return self._degraded(waveform, sample_rate, torch.Generator().manual_seed(seed))

    @abstractmethod
    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        """The clip, which is not silent."""


class Noise(Condition):
    """Noise added at a signal-to-noise ratio of `level`; harder as it falls.

    The ratio is that of mean powers over the whole clip and all its channels, exact for every clip.
    """

    unit = "dB"

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        num_channels, num_samples = waveform.shape
        noise = self._noise(num_channels, num_samples, sample_rate, generator).to(waveform)
        return waveform + noise * (_rms(waveform) / _rms(noise) * 10 ** (-self.level / 20))

    @abstractmethod
    def _noise(
        self, num_channels: int, num_samples: int, sample_rate: int, generator: torch.Generator
    ) -> Tensor:
        """Noise of any power but none: [C, S], or [1, S] if all channels hear the same."""


@dataclass(frozen=True)
class WhiteNoise(Noise):
    """Gaussian noise of equal power in every hertz, independent in every channel; see `Noise`."""

    level: float
    name = "white_noise"

    def _noise(
        self, num_channels: int, num_samples: int, sample_rate: int, generator: torch.Generator
    ) -> Tensor:
        return torch.randn(num_channels, num_samples, generator=generator)


@dataclass(frozen=True)
class PinkNoise(Noise):
    """Gaussian noise of equal power in every octave above 20 Hz, independent in every channel; see `Noise`.

    Below 20 Hz its spectrum is flat: else half of the power of long clips would lie where nothing
    is heard.
    """

    level: float
    name = "pink_noise"

    def _noise(
        self, num_channels: int, num_samples: int, sample_rate: int, generator: torch.Generator
    ) -> Tensor:
        spectrum = torch.fft.rfft(torch.randn(num_channels, num_samples, generator=generator))
        frequency = torch.fft.rfftfreq(num_samples, 1 / sample_rate).clamp_min(20.0)
        return torch.fft.irfft(spectrum / frequency.sqrt(), n=num_samples)


@dataclass(frozen=True)
class RecordedNoise(Noise):
    """A stretch of a recording, both drawn for every clip, the same in all channels; see `Noise`.

    Recordings are mixed down to one channel and resampled; one that is shorter than the clip is
    repeated.

    Args:
        level: signal-to-noise ratio in dB.
        folder: of the recordings, and of folders of them.

    Raises:
        UserError: if there are none, or if the one drawn for a clip is silent.
    """

    level: float
    folder: Path
    name = "recorded_noise"

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(
                f"`folder` ({self.folder}) holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})"
            )

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The recordings, by the alphabet."""
        return tuple(
            sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        )

    @cached_property
    def key(self) -> str:
        """Level, and names and sizes of the recordings: where the folder lies is no matter."""
        listing = [
            (path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in self.files
        ]
        digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
        return f"RecordedNoise(level={self.level!r}, files={digest!r}), revision {REVISION}"

    def _noise(
        self, num_channels: int, num_samples: int, sample_rate: int, generator: torch.Generator
    ) -> Tensor:
        path = self.files[int(torch.randint(len(self.files), (), generator=generator))]
        recording = _read_mono(path, sample_rate)
        if not recording.any():
            raise UserError(
                f"{path} is silent and cannot be added as noise: take it out of `folder`"
            )
        start = int(torch.randint(len(recording), (), generator=generator))
        stretch = recording.roll(-start).repeat(-(-num_samples // len(recording)))[:num_samples]
        if not stretch.any():  # a pause: begin where the recording is loudest
            stretch = recording.roll(-int(recording.abs().argmax()))[:num_samples]
        return stretch[None]


@dataclass(frozen=True)
class Reverberation(Condition):
    """A room whose sound falls by 60 dB in `level` seconds; harder as it rises.

    The impulse response is a direct path at time 0 (nothing moves in time) and from the next sample
    on a diffuse tail: Gaussian noise that decays exponentially, down to -60 dB. Along a sweep a
    clip stays at one place in one room whose walls absorb less and less: the tail is the same
    noise, has the same power density at its beginning and lasts longer, so its energy grows as
    `level` does. One response serves all channels. The clip keeps its length, so the tail behind
    its end is lost, and its level.

    Args:
        level: reverberation time.
        direct_db: energy of the direct path over that of the tail at a reverberation time of 0.4 s;
            3 dB less for every doubling of the time. 0 is about 1 m from the source in a room of
            120 m³.
    """

    level: float
    direct_db: float = 0.0
    name = "reverberation"
    unit = "s"

    def __post_init__(self) -> None:
        if self.level <= 0:
            raise UserError(f"`level` ({self.level}) must be a reverberation time above 0 s")

    def _response(self, sample_rate: int, generator: torch.Generator) -> Tensor:
        length = max(math.ceil(self.level * sample_rate), 1)
        # Drawn second by second, a long tail begins as a short one does.
        seconds = [
            torch.randn(sample_rate, generator=generator) for _ in range(-(-length // sample_rate))
        ]
        decay = 10 ** (-3 * torch.arange(1, length + 1) / (self.level * sample_rate))
        tail = torch.cat(seconds)[:length] * decay
        tail *= math.sqrt(self.level / 0.4) * 10 ** (-self.direct_db / 20) / tail.norm()
        return F.pad(tail, (1, 0), value=1.0)

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        response = self._response(sample_rate, generator)[: waveform.shape[1]].to(waveform)
        reverberant = fftconvolve(waveform, response.expand(len(waveform), -1))[
            :, : waveform.shape[1]
        ]
        return _at_level_of(waveform, reverberant)


class BandLimit(Condition):
    """A Butterworth filter of order 8, run forwards and backwards: 96 dB an octave, -6 dB at `level`, no delay."""

    unit = "Hz"
    _side: ClassVar[Literal["lowpass", "highpass"]]

    def __post_init__(self) -> None:
        if self.level <= 0:
            raise UserError(f"`level` ({self.level}) must be a cut-off above 0 Hz")

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        if self.level >= sample_rate / 2:  # only a high-pass comes here: nothing is left
            return torch.zeros_like(waveform)
        sections = butter(8, self.level, self._side, fs=sample_rate, output="sos")
        # Two periods of the cut-off hold the transients at both ends; short clips have no room for
        # them.
        margin = min(math.ceil(2 * sample_rate / self.level), waveform.shape[1] - 1)
        filtered = sosfiltfilt(
            sections, waveform.numpy(force=True).astype(np.float64), padlen=margin
        )
        return torch.from_numpy(filtered.copy()).to(waveform)  # torch knows no negative strides


@dataclass(frozen=True)
class LowPass(BandLimit):
    """Nothing above `level`; harder as it falls. At half the sample rate and above nothing changes; see `BandLimit`."""

    level: float
    name = "low_pass"
    _side = "lowpass"

    def changes(self, sample_rate: int) -> bool:
        """Whether the cut-off is below half the sample rate."""
        return self.level < sample_rate / 2


@dataclass(frozen=True)
class HighPass(BandLimit):
    """Nothing below `level`; harder as it rises. At half the sample rate and above all is silent; see `BandLimit`."""

    level: float
    name = "high_pass"
    _side = "highpass"


@dataclass(frozen=True)
class Gain(Condition):
    """Louder or softer by `level`, harder as it leaves 0; no sample is clipped, whatever full scale is."""

    level: float
    name = "gain"
    unit = "dB"

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        return waveform * 10 ** (self.level / 20)


@dataclass(frozen=True)
class Clipping(Condition):
    """The loudest samples, `level` percent of those that are not 0, cut to one magnitude; harder as it rises.

    Afterwards the clip has the level it had before: what it has lost is its shape. The loss of
    level is `Gain`'s.
    """

    level: float
    name = "clipping"
    unit = "%"

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 100:
            raise UserError(f"`level` ({self.level}) must be a share from 0 to 100 %")

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        magnitude = waveform.abs()
        sounding = magnitude[magnitude > 0]
        num_kept = max(len(sounding) - round(self.level / 100 * len(sounding)), 1)
        threshold = float(sounding.kthvalue(num_kept).values)
        return _at_level_of(waveform, waveform.clamp(-threshold, threshold))


def _rms(waveform: Tensor) -> float:
    # In double precision: the squares of very soft samples vanish in single.
    return float(waveform.double().square().mean().sqrt())


def _at_level_of(reference: Tensor, waveform: Tensor) -> Tensor:
    return waveform * (_rms(reference) / (_rms(waveform) or 1.0))


@lru_cache(maxsize=4)
def _read_mono(path: Path, sample_rate: int) -> Tensor:
    samples, rate = read(path)
    return resample(torch.from_numpy(samples).mean(dim=0, keepdim=True), rate, sample_rate)[0]
