"""Lossy codecs as conditions: a clip is encoded, decoded and aligned with the original."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import ClassVar

import soundfile as sf
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError
from jepa_audio.probing.robustness.conditions import Condition

# libsndfile's Vorbis encoder copies its input to the stack: minutes of audio crash the process.
_BLOCK_SAMPLES = 1 << 14

# Samples that LAME (576) and a decoder (529) insert at the start. The tag for removing them, and
# the padding at the end, does not fit into frames of low bit rates; the output is longer then.
_MP3_DELAY = 1105

# Sample rates in Hz of MPEG 2.5, 2 and 1, and bit rates in kbit/s of each.
_MP3_RATES = (
    ((8_000, 11_025, 12_000), (8, 16, 24, 32, 40, 48, 56, 64)),
    ((16_000, 22_050, 24_000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    ((32_000, 44_100, 48_000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
)
_MP3_KBITS = sorted({kbits for _, bit_rates in _MP3_RATES for kbits in bit_rates})

_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)


class Codec(Condition):
    """Encoding and decoding by libsndfile, every channel as a separate mono stream.

    The output has the length of the input and no delay (Opus: up to 0.1 ms at low bit rates).
    Sample rates that the codec does not support are resampled and restored. A clip that is louder
    than full scale is encoded at full scale.
    """

    _container: ClassVar[str]
    _subtype: ClassVar[str]
    _bitrate_mode: ClassVar[str | None] = None

    @property
    @override
    def key(self) -> str:
        """Kind, settings, and the version of libsndfile: versions can decode differently."""
        return f"{super().key}, libsndfile {sf.__libsndfile_version__}"

    @abstractmethod
    def _settings(self, sample_rate: int) -> tuple[int, float]:
        """Sample rate of the codec, and libsndfile's compression level from 0 to 1."""

    @override
    def _degrade(self, waveform: Tensor, sample_rate: int, generator: Generator) -> Tensor:
        if not sf.check_format(self._container, self._subtype):
            raise UserError(
                f"libsndfile {sf.__libsndfile_version__} cannot write {self.name}: install a wheel "
                "of soundfile, which includes a newer one"
            )
        rate, compression = self._settings(sample_rate)
        samples = resample(waveform.cpu(), sample_rate, rate)
        peak = samples.abs().max().clamp_min(1.0)
        channels = [self._round_trip(channel, rate, compression) for channel in samples / peak]
        decoded = resample(torch.stack(channels) * peak, rate, sample_rate)
        return _fit_length(decoded, waveform.shape[1]).to(waveform)

    def _round_trip(self, samples: Tensor, rate: int, compression: float) -> Tensor:
        content = io.BytesIO()
        settings = {
            "format": self._container,
            "subtype": self._subtype,
            # libsndfile rejects 1 for some codecs, but accepts values just below.
            "compression_level": min(compression, 0.9999),
            "bitrate_mode": self._bitrate_mode,
        }
        with sf.SoundFile(content, "w", rate, 1, **settings) as file:
            for block in samples.split(_BLOCK_SAMPLES):
                file.write(block.numpy())
        content.seek(0)
        decoded = torch.from_numpy(sf.read(content, dtype="float32")[0])
        delay = _MP3_DELAY if len(decoded) > len(samples) else 0
        return _fit_length(decoded[delay:], len(samples))


class Mp3(Codec):
    """MP3 at a constant bit rate of `level` kbit/s per channel; lower is more severe. See `Codec`.

    MP3 supports low bit rates at low sample rates only: a clip of 48 kHz is encoded at 24 kHz for
    16 kbit/s. The codec lowers the level of a clip by up to 0.45 dB.
    """

    name = "mp3"
    unit = "kbit/s"
    _container = "MP3"
    _subtype = "MPEG_LAYER_III"
    _bitrate_mode = "CONSTANT"
    _level_rule = f"an MP3 bit rate in kbit/s: {_MP3_KBITS}"

    @override
    def _is_valid_level(self) -> bool:
        return self.level in _MP3_KBITS

    @override
    def _settings(self, sample_rate: int) -> tuple[int, float]:
        supported = [
            (rate, bit_rates)
            for rates, bit_rates in _MP3_RATES
            for rate in rates
            if self.level in bit_rates
        ]
        sufficient = (row for row in supported if row[0] >= sample_rate)
        rate, bit_rates = next(sufficient, supported[-1])
        return rate, (bit_rates[-1] - self.level) / (bit_rates[-1] - bit_rates[0])


class Vorbis(Codec):
    """Ogg Vorbis at quality `level`, from 0 to 10; lower is more severe. See `Codec`."""

    name = "vorbis"
    unit = "quality"
    _container = "OGG"
    _subtype = "VORBIS"
    _level_rule, _level_range = "a quality from 0 to 10", (0, 10)

    @override
    def _settings(self, sample_rate: int) -> tuple[int, float]:
        # The encoder has no presets for sample rates out of this range.
        return min(max(sample_rate, 8_000), 48_000), 1 - self.level / 10


class Opus(Codec):
    """Ogg Opus at about `level` kbit/s per channel; lower is more severe. See `Codec`."""

    name = "opus"
    unit = "kbit/s"
    _container = "OGG"
    _subtype = "OPUS"
    # The limits of libsndfile for one channel.
    _level_rule, _level_range = "a bit rate from 6 to 256 kbit/s", (6, 256)

    @override
    def _settings(self, sample_rate: int) -> tuple[int, float]:
        lowest, highest = self._level_range
        rate = next((rate for rate in _OPUS_RATES if rate >= sample_rate), _OPUS_RATES[-1])
        return rate, (highest - self.level) / (highest - lowest)


def _fit_length(waveform: Tensor, num_samples: int) -> Tensor:
    """Cut the end, or fill it with silence."""
    return F.pad(waveform, (0, num_samples - waveform.shape[-1]))
