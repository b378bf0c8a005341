"""Lossy codecs as conditions: a clip coded, decoded, and put back where it was."""

from __future__ import annotations

import io
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import soundfile as sf
import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError
from jepa_audio.probing.robustness.conditions import Condition

_CODER_BLOCK = 1 << 14
"""libsndfile's Vorbis coder takes what it is given onto its stack: minutes of audio at once end the process."""

_MP3_DELAY = 1105
"""Samples that LAME (576) and a decoder (529) put before the first. The tag that tells a decoder to drop them, and the
filling at the end, does not fit into frames of low bit rates: what comes back is then longer than
what went in."""

_MP3_RATES = (
    ((8_000, 11_025, 12_000), (8, 16, 24, 32, 40, 48, 56, 64)),
    ((16_000, 22_050, 24_000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    ((32_000, 44_100, 48_000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
)
"""Sample rates in Hz of MPEG 2.5, 2 and 1, and bit rates in kbit/s of each."""

_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_OPUS_KBITS = (6, 256)  # for one channel, by libsndfile


class Codec(Condition):
    """Coded and decoded again by libsndfile, every channel as a mono stream of its own.

    What comes back is as long as what went in and not moved in time (by Opus, at low bit rates, up
    to 0.1 ms). Sample rates that the codec does not know are resampled there and back. A clip that
    is louder than full scale is coded at full scale.
    """

    _container: ClassVar[str]
    _subtype: ClassVar[str]
    _bitrate_mode: ClassVar[str | None] = None

    @property
    def key(self) -> str:
        """Kind, all settings, and the library, whose versions need not decode alike."""
        return f"{super().key}, libsndfile {sf.__libsndfile_version__}"

    @abstractmethod
    def _settings(self, sample_rate: int) -> tuple[int, float]:
        """Sample rate of the coder, and libsndfile's compression level from 0 to 1."""

    def _degraded(self, waveform: Tensor, sample_rate: int, generator: torch.Generator) -> Tensor:
        if not sf.check_format(self._container, self._subtype):
            raise UserError(
                f"libsndfile {sf.__libsndfile_version__} cannot write {self.name}: install a wheel of soundfile, which "
                "brings one that can"
            )
        rate, compression = self._settings(sample_rate)
        samples = resample(waveform.cpu(), sample_rate, rate)
        loudness = samples.abs().max().clamp_min(1.0)
        decoded = torch.stack(
            [self._round_trip(channel, rate, compression) for channel in samples / loudness]
        )
        return _of_length(resample(decoded * loudness, rate, sample_rate), waveform.shape[1]).to(
            waveform
        )

    def _round_trip(self, samples: Tensor, rate: int, compression: float) -> Tensor:
        content = io.BytesIO()
        settings = {
            "format": self._container,
            "subtype": self._subtype,
            "compression_level": min(
                compression, 0.9999
            ),  # at 1 libsndfile refuses what it takes just below
            "bitrate_mode": self._bitrate_mode,
        }
        with sf.SoundFile(content, "w", rate, 1, **settings) as coder:
            for block in samples.split(_CODER_BLOCK):
                coder.write(block.numpy())
        content.seek(0)
        decoded = torch.from_numpy(sf.read(content, dtype="float32")[0])
        late = _MP3_DELAY if len(decoded) > len(samples) else 0
        return _of_length(decoded[late:], len(samples))


@dataclass(frozen=True)
class Mp3(Codec):
    """MP3 of a constant bit rate, `level` for every channel; harder as it falls. See `Codec`.

    MP3 has low bit rates at low sample rates only: 16 kbit/s of a clip of 48 kHz is coded at 24
    kHz. The coder makes a clip softer by up to 0.45 dB, as it does for everyone.
    """

    level: float
    name = "mp3"
    unit = "kbit/s"
    _container = "MP3"
    _subtype = "MPEG_LAYER_III"
    _bitrate_mode = "CONSTANT"

    def __post_init__(self) -> None:
        known = sorted({kbits for _, bit_rates in _MP3_RATES for kbits in bit_rates})
        if self.level not in known:
            raise UserError(
                f"`level` ({self.level}) must be a bit rate of MP3 in kbit/s: one of {known}"
            )

    def _settings(self, sample_rate: int) -> tuple[int, float]:
        able = [
            (rate, rates)
            for version, rates in _MP3_RATES
            for rate in version
            if self.level in rates
        ]
        rate, rates = next((row for row in able if row[0] >= sample_rate), able[-1])
        return rate, (rates[-1] - self.level) / (rates[-1] - rates[0])


@dataclass(frozen=True)
class Vorbis(Codec):
    """Ogg Vorbis of quality `level`, 0 to 10 as its coder counts; harder as it falls. See `Codec`."""

    level: float
    name = "vorbis"
    unit = "quality"
    _container = "OGG"
    _subtype = "VORBIS"

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 10:
            raise UserError(f"`level` ({self.level}) must be a quality from 0 to 10")

    def _settings(self, sample_rate: int) -> tuple[int, float]:
        # Beyond these bounds the coder has no tables of its own.
        return min(max(sample_rate, 8_000), 48_000), 1 - self.level / 10


@dataclass(frozen=True)
class Opus(Codec):
    """Ogg Opus of a bit rate of about `level` for every channel; harder as it falls. See `Codec`."""

    level: float
    name = "opus"
    unit = "kbit/s"
    _container = "OGG"
    _subtype = "OPUS"

    def __post_init__(self) -> None:
        if not _OPUS_KBITS[0] <= self.level <= _OPUS_KBITS[1]:
            raise UserError(f"`level` ({self.level}) must be a bit rate from 6 to 256 kbit/s")

    def _settings(self, sample_rate: int) -> tuple[int, float]:
        lowest, highest = _OPUS_KBITS
        rate = next((rate for rate in _OPUS_RATES if rate >= sample_rate), _OPUS_RATES[-1])
        return rate, (highest - self.level) / (highest - lowest)


def _of_length(waveform: Tensor, num_samples: int) -> Tensor:
    """Cut, or filled up with silence, at the end."""
    return F.pad(waveform, (0, num_samples - waveform.shape[-1]))
