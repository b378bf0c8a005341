"""One audio file → samples; every way in which a file can be bad becomes one exception that names it."""

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
from typing import Any

import numpy as np
import soundfile as sf
from jaxtyping import Float32

from jepa_audio.errors import UserError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})

# Beyond these bounds the header is wrong, and believing it costs the memory of the machine.
_SAMPLE_RATES = range(1_000, 1_000_001)
_LONGEST_SECONDS = 24 * 3600
_MOST_CHANNELS = 128
_MOST_FRAMES_PER_BYTE = 10_000  # flac reaches 5,000 in digital silence, by its longest blocks
_LOUDEST = 1e3
_BLOCK_FRAMES = 1 << 20
_AT_ONCE_BYTES = (
    1 << 22
)  # a smaller member is read as a whole: the decoder asks for its place at every few bytes
_BUFFER_BYTES = 1 << 18

# What libsndfile says of a wav or aiff whose header promises more than there is. Recorders that
# write into a pipe leave the largest number there.
_PROMISED = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 2**31 - 2**16

# A frame of an mp3 needs bits of up to 23 frames before it, which a decoder that has just jumped
# does not have: it gives silence or noise in their place. So decoding starts that much earlier.
_MP3_WARM_UP = 16 * 1152


@dataclass(frozen=True)
class TarMember:
    """An audio file inside an uncompressed tar, read where it lies.

    Attributes:
        path: the tar.
        name: of the file in it.
        offset: its first byte in the tar.
        num_bytes: its size.
    """

    path: Path
    name: str
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


AudioLocation = Path | TarMember
"""Where an audio file lies."""


def audio_location(path: Path, member: str, offset: int, num_bytes: int) -> AudioLocation:
    """The file of a row of a table: `member` is "" for a file by itself."""
    return TarMember(path, member, offset, num_bytes) if member else path


class AudioReadError(UserError):
    """A file that cannot be used.

    Attributes:
        audio: the file.
        reason: what is wrong and what was expected, without the name of the file.
    """

    def __init__(self, audio: AudioLocation, reason: str) -> None:
        super().__init__(audio, reason)
        self.audio = audio
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.audio}: {self.reason}"


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


def read(
    audio: AudioLocation, start: int = 0, num_frames: int | None = None
) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Samples of a file or of a slice of it, and its sample rate.

    Args:
        audio: an audio file that libsndfile knows, by itself or in a tar.
        start: first frame.
        num_frames: length of the slice; `None` reads to the end.

    Raises:
        AudioReadError: if the file cannot be decoded, gives fewer frames than asked for, or holds
            samples that are not finite or absurdly large.
    """
    if start < 0 or (num_frames is not None and num_frames < 1):
        raise UserError(
            f"`start` ({start}) must be >= 0 and `num_frames` ({num_frames}) >= 1 or None"
        )
    with _opened(audio) as file:
        expected = _promised_frames(file) - start if num_frames is None else num_frames
        if expected < 1 or start + expected > file.frames:
            raise AudioReadError(
                audio,
                f"too short: frames {start} to {start + expected} were asked for, the file has {file.frames}",
            )
        samples = _decoded(file, start, expected)
        # The frame count in an mp3 header is an estimate, so only a slice of known length is held
        # to it.
        exact = num_frames is not None or file.format != "MP3"
        if len(samples) < (expected if exact else 1):
            raise AudioReadError(
                audio, f"truncated: {expected} frames from {start} expected, {len(samples)} decoded"
            )
        _check_peak(audio, _peak(samples))
        return np.ascontiguousarray(samples.T), file.samplerate


def inspect(audio: AudioLocation) -> AudioInfo:
    """Decode the whole file once, block by block, and measure it: lengths are counted, never believed.

    Raises:
        AudioReadError: as `read`; also if a header other than mp3's promises more frames than there
            are.
    """
    count, peak, energy = 0, 0.0, 0.0
    with _opened(audio) as file:
        while len(block := _decoded(file, count, _BLOCK_FRAMES)):
            count += len(block)
            peak = max(peak, _check_peak(audio, _peak(block)))
            energy += float(np.vdot(block, block))
            if len(block) < _BLOCK_FRAMES:
                break
        if count == 0:
            raise AudioReadError(
                audio, f"no sample could be decoded, the header promises {file.frames} frames"
            )
        promised = _promised_frames(file)
        if count < promised and file.format != "MP3":
            raise AudioReadError(
                audio, f"truncated: the header promises {promised} frames, {count} decoded"
            )
        rms = math.sqrt(energy / (count * file.channels))
        return AudioInfo(count, file.samplerate, file.channels, peak, rms)


def read_bytes(audio: AudioLocation) -> bytes:
    """The file as it is, undecoded.

    Raises:
        AudioReadError: if it is gone, or its tar has been written anew.
    """
    try:
        if not isinstance(audio, TarMember):
            return audio.read_bytes()
        with _MemberBytes(audio) as content:
            _check_member(audio, content.fileno())
            return content.readall()
    except OSError as error:
        raise AudioReadError(audio, f"cannot be opened: {error.strerror or error}") from error


@contextmanager
def _opened(audio: AudioLocation) -> Iterator[sf.SoundFile]:
    try:
        with ExitStack() as stack:
            if isinstance(audio, TarMember):
                content: Any = stack.enter_context(_MemberBytes(audio))
                _check_member(audio, content.fileno())
                num_bytes = audio.num_bytes
                at_once = num_bytes <= _AT_ONCE_BYTES
                content = (
                    io.BytesIO(content.readall())
                    if at_once
                    else io.BufferedReader(content, _BUFFER_BYTES)
                )
            else:
                content, num_bytes = audio, audio.stat().st_size
            if num_bytes == 0:
                raise AudioReadError(audio, "the file is empty (0 bytes)")
            file = stack.enter_context(sf.SoundFile(content))
            _check_header(audio, file, num_bytes)
            yield file
    except sf.LibsndfileError as error:
        # What libsndfile says of a broken mp3 is that it does not exist.
        unknown = "does not exist" in error.error_string
        cause = "Format not recognised." if unknown else error.error_string.strip()
        raise AudioReadError(audio, f"cannot be decoded: {cause}") from error
    except (sf.SoundFileError, OSError) as error:
        raise AudioReadError(
            audio, f"cannot be opened: {getattr(error, 'strerror', None) or error}"
        ) from error


def _check_header(audio: AudioLocation, file: sf.SoundFile, num_bytes: int) -> None:
    """Refuse what would cost the memory of the machine, before any of it is taken."""
    if file.samplerate not in _SAMPLE_RATES:
        raise AudioReadError(
            audio, f"absurd sample rate: {file.samplerate} Hz, expected 1 kHz to 1 MHz"
        )
    if file.channels > _MOST_CHANNELS:
        raise AudioReadError(
            audio, f"absurd number of channels: {file.channels}, expected up to {_MOST_CHANNELS}"
        )
    if file.frames > _LONGEST_SECONDS * file.samplerate:
        hours = file.frames / file.samplerate / 3600
        raise AudioReadError(
            audio, f"the header promises {file.frames} frames, {hours:.3g} hours: more than 24"
        )
    if file.frames > _MOST_FRAMES_PER_BYTE * num_bytes:
        raise AudioReadError(
            audio, f"the header promises {file.frames} frames in {num_bytes} bytes"
        )


def _promised_frames(file: sf.SoundFile) -> int:
    """Frames by the header, which libsndfile has corrected where the file is shorter."""
    match = _PROMISED.search(file.extra_info)
    if match is None or int(match[1]) >= _UNKNOWN_LENGTH or int(match[2]) == 0:
        return file.frames
    return max(file.frames, int(match[1]) * file.frames // int(match[2]))


def _check_member(member: TarMember, descriptor: int) -> None:
    """Look at the header before the member's bytes: the tar may have been written anew."""
    header = os.pread(descriptor, tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise AudioReadError(
            member, "changed since it was indexed: the tar has no file there now"
        ) from error
    plain = len(member.name) <= tarfile.LENGTH_NAME and member.name.isascii()
    if found.size != member.num_bytes or (plain and found.name != member.name):
        raise AudioReadError(
            member, f"changed since it was indexed: the tar has {found.name} there now"
        )


class _MemberBytes(io.RawIOBase):
    """The bytes of a tar's member as a file of its own."""

    def __init__(self, member: TarMember) -> None:
        self._start, self._size, self._position = member.offset, member.num_bytes, 0
        self._descriptor = os.open(member.path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        )
        return self._position

    def readall(self) -> bytes:
        parts = []
        while part := os.pread(
            self._descriptor, self._size - self._position, self._start + self._position
        ):
            self._position += len(part)
            parts.append(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(self._size - self._position, 0))
        content = os.pread(self._descriptor, length, self._start + self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _decoded(file: sf.SoundFile, start: int, num_frames: int) -> Float32[np.ndarray, "S C"]:
    lead = min(start, _MP3_WARM_UP) if file.format == "MP3" else 0
    file.seek(start - lead)
    return file.read(lead + num_frames, dtype="float32", always_2d=True)[lead:]


def _peak(samples: Float32[np.ndarray, "S C"]) -> float:
    # min and max need no copy of the block, and a NaN wins in both.
    return float(np.maximum(-samples.min(), samples.max()))


def _check_peak(audio: AudioLocation, peak: float) -> float:
    if not math.isfinite(peak):
        raise AudioReadError(audio, "non-finite samples (NaN or infinity)")
    if peak > _LOUDEST:
        raise AudioReadError(audio, f"absurd samples: the peak is {peak:g}, full scale is 1")
    return peak
