"""Decode one audio file; every defect of a file raises an `AudioReadError` that names the file."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import soundfile as sf
from jaxtyping import Float32

from jepa_audio.data.audio.codec import CodecError, torchcodec_decode
from jepa_audio.data.audio.containers import examine
from jepa_audio.data.audio.location import (
    AudioLocation,
    AudioReadError,
    TarMember,
    cannot_open,
    open_bytes,
    read_bytes,
)
from jepa_audio.data.audio.ogg import start_of_last_page
from jepa_audio.errors import UserError

_Block: TypeAlias = Float32[np.ndarray, "S C"]
_Result = TypeVar("_Result")

# A header with values outside these bounds is corrupt. Decoding with such values could exhaust the
# memory of the machine.
_SAMPLE_RATES = range(1_000, 1_000_001)
_MAX_HOURS = 24
_MAX_CHANNELS = 128
# flac reaches 5,000 frames per byte, for digital silence with the longest blocks.
_MAX_FRAMES_PER_BYTE = 10_000

_MAX_PEAK = 1e3
_BLOCK_FRAMES = 1 << 20

# Largest difference after a seek, compared with a decoding from the start. The state of an Opus
# decoder converges, but not to exactly the same samples.
_SEEKS = {"VORBIS": 1e-5, "MPEG_LAYER": 1e-5, "OPUS": 2e-3}
_NUM_COMPARED = 64

# An mp3 frame needs bits of up to 23 earlier frames. After a seek, a decoder does not have these
# bits and outputs silence or noise. Decoding therefore starts this many samples earlier.
_MP3_WARM_UP = 16 * 1152


@dataclass(frozen=True)
class AudioInfo:
    """Measurements of a file over all samples of all channels.

    Attributes:
        num_frames: samples per channel.
        sample_rate: in Hz.
        num_channels: audio channels.
        peak: largest magnitude; full scale is 1.
        rms: root mean square.
        decoder: what decodes the complete file; "" if nothing does.
    """

    num_frames: int
    sample_rate: int
    num_channels: int
    peak: float
    rms: float
    decoder: str


def read(
    audio: AudioLocation, start: int = 0, num_frames: int | None = None, decoder: str = ""
) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Decode a file or a slice of it; return the samples and the sample rate in Hz.

    Args:
        audio: file in a format of libsndfile or torchcodec; it may be inside a tar.
        start: first frame.
        num_frames: length of the slice; `None` reads to the end.
        decoder: `AudioInfo.decoder` of the file, which gives fast random access. Without it or
            without `num_frames`, the complete file is decoded and checked as by `inspect`.

    Raises:
        AudioReadError: if the file cannot be decoded, has fewer frames than requested, or has
            samples that are not finite or implausibly large.
    """
    if start < 0 or (num_frames is not None and num_frames < 1):
        raise UserError(
            f"`start` ({start}) must be >= 0 and `num_frames` ({num_frames}) >= 1 or None"
        )
    if not decoder or num_frames is None:
        blocks, info = _decode_complete(audio, list)
        samples, rate = np.concatenate(blocks).T, info.sample_rate
    elif decoder == "torchcodec":
        samples, rate = _decode_by_torchcodec(audio, keep=True)
    else:
        samples, rate = _read_slice(audio, start, num_frames, is_repaired=decoder == "repaired")
        start, num_frames = 0, None
    end = samples.shape[1] if num_frames is None else start + num_frames
    if end > samples.shape[1] or start >= end:
        reason = f"frames {start} to {end} requested, the file has {samples.shape[1]}"
        raise AudioReadError(audio, f"too short: {reason}")
    samples = samples[:, start:end]
    # What torchcodec has decoded is kept for the next slice: the caller gets a copy of it.
    samples = samples.copy() if decoder == "torchcodec" else np.ascontiguousarray(samples)
    _check_peak(audio, samples)
    return samples, rate


def inspect(audio: AudioLocation) -> AudioInfo:
    """Decode a complete file in blocks and measure its samples; count the decoded frames.

    The number of frames is compared with what the container holds (see `examine`).

    Raises:
        AudioReadError: if `read` would raise it for the complete file, or if the decoded frames
            are not all frames of the file.
    """
    (peak, energy), info = _decode_complete(audio, partial(_measure, audio))
    rms = math.sqrt(energy / (info.num_frames * info.num_channels))
    return AudioInfo(info.num_frames, info.sample_rate, info.num_channels, peak, rms, info.decoder)


class _SoundFile(sf.SoundFile):
    """A file whose position stays where the decoder is: `SoundFile.read` seeks after each read.

    A seek changes the samples of some decoders, and takes time.
    """

    def seekable(self) -> bool:
        """False: `SoundFile.read` then does not seek; `seek` works nevertheless."""
        return False


class _Decoded(NamedTuple):
    num_frames: int
    sample_rate: int
    num_channels: int
    decoder: str


def _decode_complete(
    audio: AudioLocation, collect: Callable[[Iterator[_Block]], _Result]
) -> tuple[_Result, _Decoded]:
    """Give all samples of a file to `collect`, by the first decoder that decodes all of them."""
    with open_bytes(audio) as (content, num_bytes):
        contents = examine(content, num_bytes)
    if contents.problem:
        raise AudioReadError(audio, contents.problem)
    decoder = "repaired" if contents.header else "libsndfile"
    try:
        with _open_audio(audio, contents.header) as file:
            counter = _Counter()
            result = collect(counter.count(_blocks(file)))
            decoded = _Decoded(counter.num_frames, file.samplerate, file.channels, decoder)
            # libsndfile only estimates the length of an mp3.
            estimate = None if file.format == "MP3" else file.frames
            expected = estimate if contents.num_frames is None else contents.num_frames
        can_seek = _can_seek(audio, contents.header, counter.samples, file.subtype)
    except AudioReadError as error:
        if not (contents.try_torchcodec and isinstance(error.__cause__, sf.LibsndfileError)):
            raise
        failure = error.reason
    else:
        if decoded.num_frames == expected and expected and can_seek:
            return result, decoded
        if expected is None:
            reason = "mp3 frames do not start at the first byte: remove the bytes before them"
            raise AudioReadError(audio, reason)
        failure = f"libsndfile decodes {decoded.num_frames} of the {expected} frames of the file"
        if not decoded.num_frames:
            failure = f"no sample could be decoded: {failure}"
        elif decoded.num_frames == expected:
            failure = "libsndfile finds other samples after a seek"
        if not contents.try_torchcodec:
            raise AudioReadError(audio, failure)
    try:
        samples, rate = _decode_by_torchcodec(audio)
    except AudioReadError as error:
        raise AudioReadError(audio, f"{failure}; {error.reason}") from error
    if contents.num_frames not in (None, samples.shape[1]) or not samples.size:
        raise AudioReadError(audio, f"{failure}; torchcodec decodes {samples.shape[1]}")
    result = collect(iter([samples.T]))
    return result, _Decoded(samples.shape[1], rate, len(samples), "torchcodec")


class _Counter:
    """Counts the frames of all blocks, and keeps some samples of the first block."""

    def __init__(self) -> None:
        self.num_frames = 0
        self.samples: dict[int, _Block] = {}

    def count(self, blocks: Iterator[_Block]) -> Iterator[_Block]:
        for block in blocks:
            if not self.num_frames:
                starts = (len(block) // 2, max(len(block) - _NUM_COMPARED, 0))
                self.samples = {at: block[at : at + _NUM_COMPARED].copy() for at in starts}
            self.num_frames += len(block)
            yield block


def _can_seek(
    audio: AudioLocation, header: bytes, samples: dict[int, _Block], subtype: str
) -> bool:
    """Whether a seek to these samples, in a file that was not read yet, gives the same samples."""
    tolerance = next((_SEEKS[kind] for kind in _SEEKS if subtype.startswith(kind)), None)
    if tolerance is None:
        return True
    for start, expected in samples.items():
        with _open_audio(audio, header) as file:
            found = _decode(audio, file, start, len(expected))
        if len(found) < len(expected) or not np.allclose(found, expected, atol=tolerance):
            return False
    return True


def _measure(audio: AudioLocation, blocks: Iterator[_Block]) -> tuple[float, float]:
    """Peak and energy of all samples."""
    peak, energy = 0.0, 0.0
    for block in blocks:
        peak = max(peak, _check_peak(audio, block))
        energy += float(np.vdot(block, block))
    return peak, energy


def _blocks(file: sf.SoundFile) -> Iterator[_Block]:
    # To the end of the samples and not of the file, where libsndfile would decode tags.
    for start in range(0, file.frames, _BLOCK_FRAMES):
        num_frames = min(_BLOCK_FRAMES, file.frames - start)
        block = file.read(num_frames, dtype="float32", always_2d=True)
        if len(block):
            yield block
        if len(block) < num_frames:
            return


def _decode(audio: AudioLocation, file: sf.SoundFile, start: int, num_frames: int) -> _Block:
    """Decode a slice as a complete decoding gives it."""
    begin = 0
    if sf.SoundFile.seekable(file):
        begin = _seek_target(audio, file, start)
        file.seek(begin)
    return file.read(start - begin + num_frames, dtype="float32", always_2d=True)[start - begin :]


def _read_slice(
    audio: AudioLocation, start: int, num_frames: int, is_repaired: bool
) -> tuple[Float32[np.ndarray, "C S"], int]:
    header = b""
    if is_repaired:
        with open_bytes(audio) as (content, num_bytes):
            header = examine(content, num_bytes).header
    with _open_audio(audio, header) as file:
        if start + num_frames > file.frames:
            reason = f"frames {start} to {start + num_frames} requested, the file has {file.frames}"
            raise AudioReadError(audio, f"too short: {reason}")
        samples = _decode(audio, file, start, num_frames)
        if len(samples) < num_frames:
            reason = f"truncated: {len(samples)} of {num_frames} frames from {start} decoded"
            raise AudioReadError(audio, reason)
        return samples.T, file.samplerate


def _seek_target(audio: AudioLocation, file: sf.SoundFile, start: int) -> int:
    """The frame to seek to, so that the samples are those of a complete decoding."""
    if file.subtype.startswith("MPEG_LAYER"):
        return max(start - _MP3_WARM_UP, 0)
    if file.subtype == "VORBIS" and start:
        with open_bytes(audio) as (content, num_bytes):
            return min(start, max(start_of_last_page(content, num_bytes) - 1, 0))
    return start


_cache = threading.local()


def _decode_by_torchcodec(
    audio: AudioLocation, keep: bool = False
) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Decode a complete file by torchcodec; with `keep`, each thread keeps its last file."""
    try:
        status = (audio.path if isinstance(audio, TarMember) else audio).stat()
        key = (audio, status.st_size, status.st_mtime_ns)
        if getattr(_cache, "key", None) == key:
            return _cache.decoded
        decoded = torchcodec_decode(read_bytes(audio) if isinstance(audio, TarMember) else audio)
    except CodecError as error:
        raise AudioReadError(audio, str(error)) from error
    except OSError as error:
        raise cannot_open(audio, error) from error
    if keep:
        _cache.key, _cache.decoded = key, decoded
    return decoded


@contextmanager
def _open_audio(audio: AudioLocation, header: bytes = b"") -> Iterator[sf.SoundFile]:
    try:
        with open_bytes(audio, header) as (content, num_bytes):
            # libsndfile reads a file faster by its path.
            is_file = isinstance(audio, Path) and not header
            with _SoundFile(audio if is_file else content) as file:
                _check_header(audio, file, num_bytes)
                yield file
    except sf.LibsndfileError as error:
        # libsndfile reports a corrupt mp3 as "does not exist".
        is_unknown = "does not exist" in error.error_string
        cause = "Format not recognised." if is_unknown else error.error_string.strip()
        raise AudioReadError(audio, f"cannot be decoded: {cause}") from error
    except sf.SoundFileError as error:
        raise cannot_open(audio, error) from error


def _check_header(audio: AudioLocation, file: sf.SoundFile, num_bytes: int) -> None:
    """Refuse a corrupt header before its values are used to allocate memory."""
    hours = file.frames / max(file.samplerate, 1) / 3600
    if file.samplerate not in _SAMPLE_RATES:
        reason = f"implausible sample rate: {file.samplerate} Hz, expected 1 kHz to 1 MHz"
    elif file.channels > _MAX_CHANNELS:
        reason = f"implausible number of channels: {file.channels}, at most {_MAX_CHANNELS} allowed"
    elif hours > _MAX_HOURS:
        reason = f"too long: the header gives {hours:.3g} hours, at most {_MAX_HOURS} are allowed"
    elif file.frames > _MAX_FRAMES_PER_BYTE * num_bytes:
        reason = f"implausible header: {file.frames} frames in {num_bytes} bytes"
    else:
        return
    raise AudioReadError(audio, reason)


def _check_peak(audio: AudioLocation, samples: Float32[np.ndarray, "S C"]) -> float:
    # min and max need no copy of the samples, and both propagate NaN.
    peak = float(np.maximum(-samples.min(), samples.max()))
    if not math.isfinite(peak):
        raise AudioReadError(audio, "non-finite samples (NaN or infinity)")
    if peak > _MAX_PEAK:
        raise AudioReadError(audio, f"implausible samples: the peak is {peak:g}, full scale is 1")
    return peak
