"""Decode one audio file; every defect of a file raises an `AudioReadError` that names the file."""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile as sf
from jaxtyping import Float32

from jepa_audio.errors import UserError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})

# A header with values outside these bounds is corrupt. Decoding with such values could exhaust the
# memory of the machine.
_SAMPLE_RATES = range(1_000, 1_000_001)
_MAX_HOURS = 24
_MAX_CHANNELS = 128
# flac reaches 5,000 frames per byte, for digital silence with the longest blocks.
_MAX_FRAMES_PER_BYTE = 10_000

_MAX_PEAK = 1e3
_BLOCK_FRAMES = 1 << 20
_BUFFER_BYTES = 1 << 18
# Tar members up to this size are read into memory, because libsndfile seeks every few bytes.
_MAX_BYTES_IN_MEMORY = 1 << 22

# The line in libsndfile's log for a wav or aiff file whose header gives more bytes than the file
# has. A recorder that writes into a pipe does not know the length and writes the largest number.
_HEADER_LENGTH = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 2**31 - 2**16

# An mp3 frame needs bits of up to 23 earlier frames. After a seek, a decoder does not have these
# bits and outputs silence or noise. Decoding therefore starts this many samples earlier.
_MP3_WARM_UP = 16 * 1152


@dataclass(frozen=True)
class TarMember:
    """An audio file inside an uncompressed tar; `read` reads this file without extraction."""

    path: Path
    name: str
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


AudioLocation = Path | TarMember


def audio_location(path: Path, member: str, offset: int, num_bytes: int) -> AudioLocation:
    """Location of the file in a row of a corpus table; `member` is "" outside a tar."""
    return TarMember(path, member, offset, num_bytes) if member else path


class AudioReadError(UserError):
    """An audio file cannot be used; `reason` does not contain the name of the file."""

    def __init__(self, audio: AudioLocation, reason: str) -> None:
        super().__init__(audio, reason)
        self.audio = audio
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.audio}: {self.reason}"


@dataclass(frozen=True)
class AudioInfo:
    """Measurements of a file over all samples of all channels.

    Attributes:
        num_frames: samples per channel.
        sample_rate: in Hz.
        num_channels: audio channels.
        peak: largest magnitude; full scale is 1.
        rms: root mean square.
    """

    num_frames: int
    sample_rate: int
    num_channels: int
    peak: float
    rms: float


def read(
    audio: AudioLocation, start: int = 0, num_frames: int | None = None
) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Decode a file or a slice of it; return the samples and the sample rate in Hz.

    Args:
        audio: file in a format of libsndfile; it may be inside a tar.
        start: first frame.
        num_frames: length of the slice; `None` reads to the end.

    Raises:
        AudioReadError: if the file cannot be decoded, has fewer frames than requested, or has
            samples that are not finite or implausibly large.
    """
    if start < 0 or (num_frames is not None and num_frames < 1):
        raise UserError(
            f"`start` ({start}) must be >= 0 and `num_frames` ({num_frames}) >= 1 or None"
        )
    with _open_audio(audio) as file:
        expected = _frames_in_header(file) - start if num_frames is None else num_frames
        end = start + expected
        if expected < 1 or end > file.frames:
            reason = f"too short: frames {start} to {end} requested, the file has {file.frames}"
            raise AudioReadError(audio, reason)
        samples = _decode(file, start, expected)
        # The header of an mp3 only estimates the length: fewer frames to the end are not an error.
        is_exact = num_frames is not None or file.format != "MP3"
        if len(samples) < (expected if is_exact else 1):
            reason = f"truncated: {len(samples)} of {expected} frames from {start} decoded"
            raise AudioReadError(audio, reason)
        _check_peak(audio, samples)
        return np.ascontiguousarray(samples.T), file.samplerate


def inspect(audio: AudioLocation) -> AudioInfo:
    """Decode a complete file in blocks and measure its samples; count the decoded frames.

    Raises:
        AudioReadError: if `read` would raise it for the complete file, or if the header gives more
            frames than the file has; the header of an mp3 may give more frames.
    """
    count, peak, energy = 0, 0.0, 0.0
    with _open_audio(audio) as file:
        while len(block := _decode(file, count, _BLOCK_FRAMES)):
            count += len(block)
            peak = max(peak, _check_peak(audio, block))
            energy += float(np.vdot(block, block))
            if len(block) < _BLOCK_FRAMES:
                break
        expected = _frames_in_header(file)
        if count == 0 or (count < expected and file.format != "MP3"):
            problem = "truncated" if count else "no sample could be decoded"
            reason = f"{problem}: the header gives {expected} frames, {count} could be decoded"
            raise AudioReadError(audio, reason)
        rms = math.sqrt(energy / (count * file.channels))
        return AudioInfo(count, file.samplerate, file.channels, peak, rms)


def read_bytes(audio: AudioLocation) -> bytes:
    """Read the encoded bytes of a file.

    Raises:
        AudioReadError: if the file cannot be opened, or its tar has changed.
    """
    try:
        if not isinstance(audio, TarMember):
            return audio.read_bytes()
        with _open_member(audio) as file:
            return file.read(audio.num_bytes)
    except OSError as error:
        raise _cannot_open(audio, error) from error


@contextmanager
def _open_audio(audio: AudioLocation) -> Iterator[sf.SoundFile]:
    try:
        with ExitStack() as stack:
            content: Any = audio
            if isinstance(audio, TarMember):
                num_bytes = audio.num_bytes
                tar = stack.enter_context(_open_member(audio))
                if num_bytes <= _MAX_BYTES_IN_MEMORY:
                    content = io.BytesIO(tar.read(num_bytes))
                else:
                    content = io.BufferedReader(_FileSlice(tar, num_bytes), _BUFFER_BYTES)
            else:
                num_bytes = audio.stat().st_size
            if num_bytes == 0:
                raise AudioReadError(audio, "the file is empty (0 bytes)")
            file = stack.enter_context(sf.SoundFile(content))
            _check_header(audio, file, num_bytes)
            yield file
    except sf.LibsndfileError as error:
        # libsndfile reports a corrupt mp3 as "does not exist".
        is_unknown = "does not exist" in error.error_string
        cause = "Format not recognised." if is_unknown else error.error_string.strip()
        raise AudioReadError(audio, f"cannot be decoded: {cause}") from error
    except (sf.SoundFileError, OSError) as error:
        raise _cannot_open(audio, error) from error


def _cannot_open(audio: AudioLocation, error: Exception) -> AudioReadError:
    # If a reason begins with "cannot be opened", `index_corpus` decodes the file again next time.
    return AudioReadError(audio, f"cannot be opened: {getattr(error, 'strerror', None) or error}")


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


def _frames_in_header(file: sf.SoundFile) -> int:
    """Number of frames in the header; `file.frames` is lower if libsndfile found fewer bytes."""
    match = _HEADER_LENGTH.search(file.extra_info)
    if match is None or int(match[1]) >= _UNKNOWN_LENGTH or int(match[2]) == 0:
        return file.frames
    return max(file.frames, int(match[1]) * file.frames // int(match[2]))


@contextmanager
def _open_member(member: TarMember) -> Iterator[IO[bytes]]:
    """Open the tar of a member at the first byte of the member."""
    start = member.offset - tarfile.BLOCKSIZE
    changed = f"changed since it was indexed: the tar has %s at byte {start}; index the tar again"
    with member.path.open("rb") as file:
        file.seek(start)
        try:
            header = file.read(tarfile.BLOCKSIZE)
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise AudioReadError(member, changed % "no file") from error
        is_plain_name = len(member.name) <= tarfile.LENGTH_NAME and member.name.isascii()
        if found.size != member.num_bytes or (is_plain_name and found.name != member.name):
            raise AudioReadError(member, changed % found.name)
        yield file


class _FileSlice(io.RawIOBase):
    """A file object of the next `size` bytes of a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._start, self._size, self._position = file, file.tell(), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        chunk = self._file.read(min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)


def _decode(file: sf.SoundFile, start: int, num_frames: int) -> Float32[np.ndarray, "S C"]:
    lead = min(start, _MP3_WARM_UP) if file.format == "MP3" else 0
    file.seek(start - lead)
    return file.read(lead + num_frames, dtype="float32", always_2d=True)[lead:]


def _check_peak(audio: AudioLocation, samples: Float32[np.ndarray, "S C"]) -> float:
    # min and max need no copy of the samples, and both propagate NaN.
    peak = float(np.maximum(-samples.min(), samples.max()))
    if not math.isfinite(peak):
        raise AudioReadError(audio, "non-finite samples (NaN or infinity)")
    if peak > _MAX_PEAK:
        raise AudioReadError(audio, f"implausible samples: the peak is {peak:g}, full scale is 1")
    return peak
