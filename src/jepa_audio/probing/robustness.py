"""Degradations of the test clips, at one level or along a sweep of levels.

Each degradation is a function of the waveform [C, S] (full scale 1, not silent), the level, the
sample rate in Hz and a generator. It returns the degraded waveform in the same shape.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile as sf
import torch
from jaxtyping import Float32
from scipy.signal import butter, sosfiltfilt
from torch import Generator, Tensor
from torch.nn import functional as F
from torchaudio.functional import fftconvolve

from jepa_audio.data.audio.formats import audio_suffixes
from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError

REVISION = 1
"""Part of every cache key. It increases when a condition gives other samples than before."""

SNRS_DB = (30.0, 20.0, 10.0, 5.0, 0.0, -5.0)
"""Signal-to-noise ratios of every kind of noise, from mild to severe."""

_POSITIVE = (math.ulp(0.0), math.inf)

# libsndfile's Vorbis encoder copies its input to the stack: minutes of audio crash the process.
_BLOCK_SAMPLES = 1 << 14
# Samples that LAME (576) and a decoder (529) insert at the start. With a tag in the file, the
# decoder removes them and the padding at the end. At low bit rates, the tag does not fit into a
# frame: the decoded audio is then longer than the input.
_MP3_DELAY = 1105
# Sample rates in Hz of MPEG 2.5, 2 and 1, and bit rates in kbit/s of each.
_MP3_RATES = (
    ((8_000, 11_025, 12_000), (8, 16, 24, 32, 40, 48, 56, 64)),
    ((16_000, 22_050, 24_000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    ((32_000, 44_100, 48_000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
# The limits of libsndfile for one channel, in kbit/s.
_OPUS_KBITS = (6.0, 256.0)


@dataclass(frozen=True)
class Condition:
    """One degradation at one level.

    Random draws use a generator with the seed of the clip, not the global generator. They are the
    same at all levels: along a sweep, only the level of the noise of a clip changes. A clip of
    zeros is not changed.

    Args:
        level: strength; the docstring of `degrade` states which direction is more severe.
        degrade: function of the degradation; see the docstring of this module.
        limits: lowest and highest level.
        settings: other settings, for the cache key.
        library: version of the library, for the cache key.

    Raises:
        UserError: if the level is out of its limits.
    """

    level: float
    name: str
    unit: str
    degrade: Callable[[Tensor, float, int, Generator], Tensor]
    limits: tuple[float, float] = (-math.inf, math.inf)
    settings: str = ""
    library: str = ""

    def __post_init__(self) -> None:
        lowest, highest = self.limits
        if not lowest <= self.level <= highest:
            raise UserError(
                f"`level` of {self.name} ({self.level}) must be from {lowest:g} to {highest:g} "
                f"{self.unit}"
            )

    @property
    def key(self) -> str:
        """Name and all settings, for cache keys."""
        name = self.name.title().replace("_", "")
        return f"{name}(level={self.level!r}{self.settings}), revision {REVISION}{self.library}"

    def changes(self, sample_rate: int) -> bool:
        """False if clips of this sample rate are unchanged; their score is the clean one."""
        return self.name != "low_pass" or self.level < sample_rate / 2

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
        return self.degrade(waveform, self.level, sample_rate, Generator().manual_seed(seed))


def _white_noise(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """Gaussian noise with equal power per hertz, independent in every channel."""
    return _add_noise(waveform, torch.randn(waveform.shape, generator=generator), level)


def _pink_noise(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """Gaussian noise with equal power per octave above 20 Hz, independent in every channel."""
    num_samples = waveform.shape[1]
    spectrum = torch.fft.rfft(torch.randn(waveform.shape, generator=generator))
    # The spectrum is flat below 20 Hz: otherwise half of the power of long clips is inaudible.
    frequency = torch.fft.rfftfreq(num_samples, 1 / sample_rate).clamp_min(20.0)
    noise = torch.fft.irfft(spectrum / frequency.sqrt(), n=num_samples)
    return _add_noise(waveform, noise, level)


def _recorded_noise(
    waveform: Tensor, level: float, sample_rate: int, generator: Generator, *, files: Sequence[Path]
) -> Tensor:
    """A random part of a random recording, the same in all channels.

    Recordings are mixed down to one channel and resampled. A recording that is shorter than the
    clip is repeated.

    Raises:
        UserError: if the recording is silent.
    """
    path = files[int(torch.randint(len(files), (), generator=generator))]
    recording, num_samples = _read_mono(path, sample_rate), waveform.shape[1]
    if not recording.any():
        raise UserError(f"{path} is silent: remove it from the folder `noise`")
    start = int(torch.randint(len(recording), (), generator=generator))
    repeats = -(-num_samples // len(recording))
    noise = recording.roll(-start).repeat(repeats)[:num_samples]
    if not noise.any():
        # A pause of the recording: start at its loudest sample instead.
        noise = recording.roll(-int(recording.abs().argmax()))[:num_samples]
    return _add_noise(waveform, noise[None], level)


@lru_cache(maxsize=4)
def _read_mono(path: Path, sample_rate: int) -> Tensor:
    samples, rate = read(path)
    return resample(torch.from_numpy(samples).mean(dim=0, keepdim=True), rate, sample_rate)[0]


def _add_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Add noise at a signal-to-noise ratio in dB; lower is more severe.

    The mean powers are taken over the whole clip and all channels. Every clip has exactly this
    ratio.
    """
    noise = noise.to(waveform)
    return waveform + noise * (_rms(waveform) / _rms(noise) * 10 ** (-snr_db / 20))


def _reverberation(
    waveform: Tensor, level: float, sample_rate: int, generator: Generator
) -> Tensor:
    """A room with a reverberation time (RT60) of `level` seconds; higher is more severe.

    The impulse response has two parts. The direct path is at time 0, so nothing is delayed. The
    diffuse tail starts at the next sample: Gaussian noise that decays exponentially to -60 dB.
    A sweep simulates one room whose walls absorb less and less. The tail is the same noise with the
    same initial power density at each level. A higher level makes it longer, so its energy is
    proportional to `level`. At 0.4 s, direct path and tail have equal energy, as at about 1 m from
    the source in a room of 120 m³.
    All channels have the same response. The clip keeps its level and its length: the tail after the
    end of the clip is cut off.
    """
    num_samples, length = waveform.shape[1], max(math.ceil(level * sample_rate), 1)
    # The noise is drawn in pieces of one second, so a long tail starts as a short tail does.
    seconds = [
        torch.randn(sample_rate, generator=generator) for _ in range(-(-length // sample_rate))
    ]
    decay = 10 ** (-3 * torch.arange(1, length + 1) / (level * sample_rate))
    tail = torch.cat(seconds)[:length] * decay
    tail *= math.sqrt(level / 0.4) / tail.norm()
    response = F.pad(tail, (1, 0), value=1.0)[:num_samples].to(waveform)
    reverberant = fftconvolve(waveform, response.expand(len(waveform), -1))[:, :num_samples]
    return _match_level(reverberant, waveform)


def _band_limit(
    waveform: Tensor,
    level: float,
    sample_rate: int,
    generator: Generator,
    *,
    side: Literal["lowpass", "highpass"],
) -> Tensor:
    """A Butterworth filter of order 8, applied forwards and backwards: zero phase.

    The slope is 96 dB per octave; the gain at `level` Hz is -6 dB. A low-pass filter is more severe
    at a lower `level`, a high-pass filter at a higher `level`. At half the sample rate or
    above, the low-pass filter changes nothing and the high-pass filter leaves silence.
    """
    if level >= sample_rate / 2:
        # This is a high-pass filter: `Condition.changes` is False for such a low-pass filter.
        return torch.zeros_like(waveform)
    sections = butter(8, level, side, fs=sample_rate, output="sos")
    # The transients at both ends need a padding of two periods of the cut-off frequency. The
    # padding must be shorter than the clip.
    padding = min(math.ceil(2 * sample_rate / level), waveform.shape[1] - 1)
    filtered = sosfiltfilt(sections, waveform.double().numpy(force=True), padlen=padding)
    # A copy, because torch does not support negative strides.
    return torch.from_numpy(filtered.copy()).to(waveform)


def _gain(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """A gain of `level` dB, without clipping; a level that is further from 0 is more severe."""
    return waveform * 10 ** (level / 20)


def _clipping(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """Clip the loudest `level` percent of the samples that are not 0; higher is more severe.

    The clip keeps its level, so only the shape of its waveform changes. `_gain` shows the effect of
    the level.
    """
    magnitude = waveform.abs()
    nonzero = magnitude[magnitude > 0]
    num_kept = max(len(nonzero) - round(level / 100 * len(nonzero)), 1)
    threshold = float(nonzero.kthvalue(num_kept).values)
    return _match_level(waveform.clamp(-threshold, threshold), waveform)


def _rms(waveform: Tensor) -> float:
    # In double precision: the squares of very soft samples underflow in float32.
    return float(waveform.double().square().mean().sqrt())


def _match_level(waveform: Tensor, reference: Tensor) -> Tensor:
    return waveform * (_rms(reference) / (_rms(waveform) or 1.0))


def _mp3(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """MP3 at a constant bit rate of `level` kbit/s per channel; lower is more severe.

    MP3 supports low bit rates at low sample rates only: a clip of 48 kHz is encoded at 24 kHz for
    16 kbit/s. The codec lowers the level of a clip by up to 0.45 dB.

    Raises:
        UserError: if MP3 does not have this bit rate.
    """
    supported = [(rate, kbits) for rates, kbits in _MP3_RATES if level in kbits for rate in rates]
    if not supported:
        known = sorted({rate for _, kbits in _MP3_RATES for rate in kbits})
        raise UserError(f"`level` of mp3 ({level}) must be a bit rate in kbit/s: {known}")
    sufficient = (row for row in supported if row[0] >= sample_rate)
    rate, kbits = next(sufficient, supported[-1])
    compression = (kbits[-1] - level) / (kbits[-1] - kbits[0])
    return _transcode(waveform, sample_rate, rate, ("MP3", "MPEG_LAYER_III"), compression)


def _vorbis(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """Ogg Vorbis at quality `level`, from 0 to 10; lower is more severe."""
    # The encoder has no presets for sample rates out of this range.
    rate = min(max(sample_rate, 8_000), 48_000)
    return _transcode(waveform, sample_rate, rate, ("OGG", "VORBIS"), 1 - level / 10)


def _opus(waveform: Tensor, level: float, sample_rate: int, generator: Generator) -> Tensor:
    """Ogg Opus at about `level` kbit/s per channel; lower is more severe."""
    lowest, highest = _OPUS_KBITS
    rate = next((rate for rate in _OPUS_RATES if rate >= sample_rate), _OPUS_RATES[-1])
    compression = (highest - level) / (highest - lowest)
    return _transcode(waveform, sample_rate, rate, ("OGG", "OPUS"), compression)


def _transcode(
    waveform: Tensor, sample_rate: int, codec_rate: int, codec: tuple[str, str], compression: float
) -> Tensor:
    """Encode and decode with libsndfile, every channel as a separate mono stream.

    The output has the length of the input and no delay (Opus: up to 0.1 ms at low bit rates). The
    clip is resampled to `codec_rate` and back. A clip that is louder than full scale is encoded at
    full scale. `codec` is libsndfile's container and subtype, `compression` its compression level
    from 0 to 1.
    """
    container, subtype = codec
    if not sf.check_format(container, subtype):
        raise UserError(
            f"libsndfile {sf.__libsndfile_version__} cannot write {subtype}: install "
            "soundfile from a wheel, which contains a newer libsndfile"
        )
    samples = resample(waveform.cpu(), sample_rate, codec_rate)
    peak = samples.abs().max().clamp_min(1.0)
    settings = {
        "format": container,
        "subtype": subtype,
        # libsndfile rejects 1 for some codecs, but accepts values just below.
        "compression_level": min(compression, 0.9999),
        "bitrate_mode": "CONSTANT" if container == "MP3" else None,
    }
    channels = []
    for channel in samples / peak:
        content = io.BytesIO()
        with sf.SoundFile(content, "w", codec_rate, 1, **settings) as file:
            for block in channel.split(_BLOCK_SAMPLES):
                file.write(block.numpy())
        content.seek(0)
        decoded = torch.from_numpy(sf.read(content, dtype="float32")[0])
        delay = _MP3_DELAY if len(decoded) > len(channel) else 0
        channels.append(_fit_length(decoded[delay:], len(channel)))
    restored = resample(torch.stack(channels) * peak, codec_rate, sample_rate)
    return _fit_length(restored, waveform.shape[1]).to(waveform)


def _fit_length(waveform: Tensor, num_samples: int) -> Tensor:
    """Cut the end, or fill it with silence."""
    return F.pad(waveform, (0, num_samples - waveform.shape[-1]))


_LOW_PASS, _HIGH_PASS = (partial(_band_limit, side=side) for side in ("lowpass", "highpass"))
_DIRECT_PATH = ", direct_db=0.0"
# Versions of libsndfile can decode differently.
_LIBRARY = f", libsndfile {sf.__libsndfile_version__}"

# Name, levels, unit, function, limits, and `settings` and `library` for the cache key.
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("white_noise", SNRS_DB, "dB", _white_noise),
    ("pink_noise", SNRS_DB, "dB", _pink_noise),
    ("reverberation", (0.2, 0.4, 0.8, 1.6), "s", _reverberation, _POSITIVE, _DIRECT_PATH),
    ("low_pass", (8000.0, 4000.0, 2000.0, 1000.0, 500.0), "Hz", _LOW_PASS, _POSITIVE),
    ("high_pass", (125.0, 250.0, 500.0, 1000.0, 2000.0), "Hz", _HIGH_PASS, _POSITIVE),
    ("gain", (10.0, -10.0, -20.0, -30.0), "dB", _gain),
    ("clipping", (1.0, 5.0, 10.0, 25.0, 50.0), "%", _clipping, (0.0, 100.0)),
    ("mp3", (128.0, 64.0, 32.0, 16.0, 8.0), "kbit/s", _mp3, _POSITIVE, "", _LIBRARY),
    ("vorbis", (8.0, 5.0, 3.0, 1.0), "quality", _vorbis, (0.0, 10.0), "", _LIBRARY),
    ("opus", (64.0, 32.0, 16.0, 8.0), "kbit/s", _opus, _OPUS_KBITS, "", _LIBRARY),
)

SWEEPS = {
    name: tuple(Condition(level, name, *settings) for level in levels)
    for name, levels, *settings in _TABLE
}
"""Conditions of each degradation from mild to severe; `gain` is ordered by distance from 0."""


def noise_sweep(folder: Path) -> tuple[Condition, ...]:
    """The user's own recordings as noise, at the same levels as the other kinds of noise.

    The cache key contains the names and sizes of the recordings, but not the path of the folder.

    Raises:
        UserError: if the folder and its subfolders have no recording.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in audio_suffixes())
    if not files:
        suffixes = ", ".join(sorted(audio_suffixes()))
        raise UserError(f"`noise` ({folder}) has no audio file ({suffixes})")
    listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    degrade = partial(_recorded_noise, files=files)
    return tuple(
        Condition(level, "recorded_noise", "dB", degrade, settings=f", files={digest!r}")
        for level in SNRS_DB
    )


def area(scores: Sequence[float], clean: float) -> float:
    """Mean height of the curve of scores along a sweep, starting at the clean score.

    The trapezoidal rule with equal steps: (c / 2 + s1 + ... + s(n-1) + sn / 2) / n. All levels
    count equally, whatever their units. The area has the unit of the score: a constant curve has
    the area `clean`. Scores below 0 stay below 0, for example the R² of predictions that are worse
    than the mean.

    Raises:
        UserError: if there is no level.
    """
    if not scores:
        raise UserError("the area of a curve needs the score of at least one level")
    return float(np.trapezoid([clean, *scores])) / len(scores)
