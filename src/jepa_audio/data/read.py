"""One audio file → samples; every way in which a file can be bad becomes one exception that names it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from jaxtyping import Float32

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})

# Beyond these bounds the header is wrong, and believing it costs the memory of the machine.
_SAMPLE_RATES = range(1_000, 1_000_001)
_LONGEST_SECONDS = 24 * 3600
_LOUDEST = 1e3
_BLOCK_FRAMES = 1 << 20

# A frame of an mp3 needs bits of up to 23 frames before it, which a decoder that has just jumped does not
# have: it gives silence or noise in their place. So decoding starts that much earlier.
_MP3_WARM_UP = 16 * 1152


class AudioReadError(Exception):
    """A file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong and what was expected, without the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class AudioInfo:
    """What a whole file holds, counted while decoding it.

    Attributes:
        num_frames: samples per channel.
        sample_rate: in Hz.
        num_channels: audio channels.
        peak: largest magnitude of all samples; full scale is 1.
        rms: root mean square of all samples of all channels.
    """

    num_frames: int
    sample_rate: int
    num_channels: int
    peak: float
    rms: float


def read(path: Path, start: int = 0, num_frames: int | None = None) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Samples of a file or of a slice of it, and its sample rate.

    Args:
        path: an audio file that libsndfile knows.
        start: first frame.
        num_frames: length of the slice; `None` reads to the end.

    Raises:
        AudioReadError: if the file cannot be decoded, gives fewer frames than asked for, or holds samples
            that are not finite or absurdly large.
    """
    if start < 0 or (num_frames is not None and num_frames < 1):
        raise ValueError(f"`start` ({start}) must be >= 0 and `num_frames` ({num_frames}) >= 1 or None")
    with _opened(path) as file:
        expected = file.frames - start if num_frames is None else num_frames
        if expected < 1 or start + expected > file.frames:
            raise AudioReadError(
                path, f"frames {start} to {start + expected} were asked for, the file has {file.frames}"
            )
        samples = _decoded(file, start, expected)
        # The frame count in an mp3 header is an estimate, so only a slice of known length is held to it.
        exact = num_frames is not None or file.format != "MP3"
        if len(samples) < (expected if exact else 1):
            raise AudioReadError(path, f"truncated: {expected} frames from {start} expected, {len(samples)} decoded")
        _check_peak(path, _peak(samples))
        return np.ascontiguousarray(samples.T), file.samplerate


def inspect(path: Path) -> AudioInfo:
    """Decode the whole file once, block by block, and measure it: lengths are counted, never believed.

    Raises:
        AudioReadError: as `read`; also if a header other than mp3's promises more frames than there are.
    """
    count, peak, energy = 0, 0.0, 0.0
    with _opened(path) as file:
        while len(block := _decoded(file, count, _BLOCK_FRAMES)):
            count += len(block)
            peak = max(peak, _check_peak(path, _peak(block)))
            energy += float(np.vdot(block, block))
            if len(block) < _BLOCK_FRAMES:
                break
        if count == 0:
            raise AudioReadError(path, f"no sample could be decoded, the header promises {file.frames} frames")
        if count < file.frames and file.format != "MP3":
            raise AudioReadError(path, f"truncated: the header promises {file.frames} frames, {count} decoded")
        rms = math.sqrt(energy / (count * file.channels))
        return AudioInfo(count, file.samplerate, file.channels, peak, rms)


@contextmanager
def _opened(path: Path) -> Iterator[sf.SoundFile]:
    try:
        if path.stat().st_size == 0:
            raise AudioReadError(path, "the file is empty (0 bytes)")
        with sf.SoundFile(path) as file:
            if file.samplerate not in _SAMPLE_RATES:
                raise AudioReadError(path, f"absurd sample rate: {file.samplerate} Hz, expected 1 kHz to 1 MHz")
            if file.frames > _LONGEST_SECONDS * file.samplerate:
                raise AudioReadError(path, f"the header promises {file.frames} frames, more than 24 hours")
            yield file
    except sf.LibsndfileError as error:
        # What libsndfile says of a broken mp3 is that it does not exist.
        unknown = "does not exist" in error.error_string
        cause = "Format not recognised." if unknown else error.error_string.strip()
        raise AudioReadError(path, f"cannot be decoded: {cause}") from error
    except (sf.SoundFileError, OSError) as error:
        raise AudioReadError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _decoded(file: sf.SoundFile, start: int, num_frames: int) -> Float32[np.ndarray, "S C"]:
    lead = min(start, _MP3_WARM_UP) if file.format == "MP3" else 0
    file.seek(start - lead)
    return file.read(lead + num_frames, dtype="float32", always_2d=True)[lead:]


def _peak(samples: Float32[np.ndarray, "S C"]) -> float:
    # min and max need no copy of the block, and a NaN wins in both.
    return float(np.maximum(-samples.min(), samples.max()))


def _check_peak(path: Path, peak: float) -> float:
    if not math.isfinite(peak):
        raise AudioReadError(path, "non-finite samples (NaN or infinity)")
    if peak > _LOUDEST:
        raise AudioReadError(path, f"absurd samples: the peak is {peak:g}, full scale is 1")
    return peak
