"""Where an audio file is, on disk or in a tar, and its encoded bytes."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_audio.errors import UserError

_BUFFER_BYTES = 1 << 18
# Tar members up to this size are read into memory, because libsndfile seeks every few bytes.
_MAX_BYTES_IN_MEMORY = 1 << 22


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
        raise cannot_open(audio, error) from error


@contextmanager
def open_bytes(
    audio: AudioLocation, header: bytes = b""
) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """The encoded bytes, with the first bytes replaced by `header`, and their number."""
    try:
        with ExitStack() as stack:
            if isinstance(audio, TarMember):
                num_bytes = audio.num_bytes
                file = stack.enter_context(_open_member(audio))
            else:
                file = stack.enter_context(audio.open("rb"))
                num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes == 0:
                raise AudioReadError(audio, "the file is empty (0 bytes)")
            content: io.BufferedIOBase = file
            if isinstance(audio, TarMember) and num_bytes <= _MAX_BYTES_IN_MEMORY:
                content = io.BytesIO(header + file.read(num_bytes)[len(header) :])
            elif isinstance(audio, TarMember) or header:
                raw = _FileSlice(file, num_bytes, header)
                content = io.BufferedReader(raw, _BUFFER_BYTES)
            yield content, num_bytes
    except OSError as error:
        raise cannot_open(audio, error) from error


def cannot_open(audio: AudioLocation, error: Exception) -> AudioReadError:
    """The error for a file that the system cannot open."""
    # If a reason begins with "cannot be opened", `index_corpus` decodes the file again next time.
    return AudioReadError(audio, f"cannot be opened: {getattr(error, 'strerror', None) or error}")


@contextmanager
def _open_member(member: TarMember) -> Iterator[io.BufferedIOBase]:
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
    """A file object of the next `size` bytes of a file; `header` replaces the first bytes."""

    def __init__(self, file: io.BufferedIOBase, size: int, header: bytes = b"") -> None:
        self._file, self._start, self._size, self._position = file, file.tell(), size, 0
        self._header = header

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        chunk = self._header[self._position : self._position + len(buffer)]
        if not chunk:
            self._file.seek(self._start + self._position)
            chunk = self._file.read(min(len(buffer), max(self._size - self._position, 0)))
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)
