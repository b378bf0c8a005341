"""What a FLAC file contains, and where tags end; nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase

REMEDY = "split the file, or convert it with `ffmpeg -i IN OUT.flac`"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What a file contains, by its headers, frames and pages.

    Attributes:
        num_frames: samples per channel; `None` if only a decoder can count them.
        problem: why the file is not complete, or "".
        header: the first bytes of the file with corrected values, or b"" if they are correct.
        try_torchcodec: torchcodec may decode what libsndfile cannot read, or reads short.
    """

    num_frames: int | None = None
    problem: str = ""
    header: bytes = b""
    try_torchcodec: bool = False


def read_at(file: BufferedIOBase, offset: int, count: int) -> bytes:
    """Up to `count` bytes from `offset`."""
    file.seek(offset)
    return file.read(count)


# --- FLAC: https://www.rfc-editor.org/rfc/rfc9639 ---

_STREAMINFO = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_STREAMINFO_SIZE = 34
_FLAC_FRAME_BYTES = 1 << 20


def flac(file: BufferedIOBase, size: int) -> Contents:
    """Compare STREAMINFO with the number of the last frame; `total` 0 means "unknown"."""
    start, end = after_id3v2(file, 0), before_tags(file, size)
    info = read_at(file, start + 8, _STREAMINFO_SIZE)
    if len(info) < _STREAMINFO_SIZE:
        return Contents(problem="truncated: the file ends in its header")
    if _has_second_stream(file, start + 8):
        return Contents(problem=f"joined flac files: {REMEDY}")
    total = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    block_size, longest = int.from_bytes(info[2:4], "big"), int.from_bytes(info[7:10], "big")
    tail_start = max(end - (longest + 64 if longest else _FLAC_FRAME_BYTES), start)
    tail = read_at(file, tail_start, end - tail_start)
    last = _last_flac_sample(tail, block_size, total)
    if total and last in (None, total):
        return Contents(total)  # libsndfile decodes `total` samples or reports an error
    if total and last is not None:
        kind = "joined flac files" if last > total else "truncated or damaged"
        counts = f"the header gives {total} samples, the last frame ends at {last}"
        return Contents(problem=f"{kind} ({counts}): {REMEDY}")
    if last is None:
        return Contents(problem="truncated: the last frame is incomplete")
    header = bytearray(read_at(file, 0, start + 26))
    header[-5] |= last >> 32
    header[-4:] = (last & 0xFFFFFFFF).to_bytes(4, "big")
    return Contents(last, header=bytes(header))


def _has_second_stream(file: BufferedIOBase, start: int) -> bool:
    file.seek(start)
    rest = b""
    while chunk := file.read(CHUNK):
        rest += chunk
        if any(mark in rest for mark in _STREAMINFO):
            return True
        rest = rest[-8:]
    return False


def _last_flac_sample(tail: bytes, block_size: int, total: int) -> int | None:
    """Number of samples up to the end of the last frame; `None` if no complete frame is last."""
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        end = _flac_frame_end(tail[position : position + 16], block_size)
        # The checksum of a complete frame, including its last two bytes, is 0.
        if end is not None and (end == total or not crc(tail[position:], 0x8005, 16)):
            return end
    return None


def _flac_frame_end(header: bytes, block_size: int) -> int | None:
    """Number of the last sample of a frame, or `None` if this is not the header of a frame."""
    if len(header) < 6 or header[1] not in (0xF8, 0xF9) or header[3] & 1:
        return None
    first = header[4]
    ones = 8 - (first ^ 0xFF).bit_length()
    if ones in (1, 8):
        return None
    number = first & (0x7F >> ones)
    position = 5
    for byte in header[5 : 4 + max(ones, 1)]:
        number, position = number << 6 | byte & 0x3F, position + 1
    code = header[2] >> 4
    explicit = {6: 1, 7: 2}.get(code, 0)
    samples = {1: 192, **{c: 576 << c - 2 for c in range(2, 6)}}.get(code, 256 << max(code - 8, 0))
    if explicit:
        samples = int.from_bytes(header[position : position + explicit], "big") + 1
    position += explicit + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if code == 0 or len(header) <= position or crc(header[: position + 1], 0x07, 8):
        return None
    return (number if header[1] & 1 else number * block_size) + samples


def crc(content: bytes | bytearray, polynomial: int, width: int) -> int:
    """Cyclic redundancy check of the content, without reflection; starts with 0."""
    table, value = _crc_table(polynomial, width), 0
    for byte in content:
        value = (value << 8 ^ table[value >> width - 8 ^ byte]) & (1 << width) - 1
    return value


@lru_cache
def _crc_table(polynomial: int, width: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << width - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> width - 1 else 0)
            value &= (1 << width) - 1
        table.append(value)
    return table


# --- Tags ---

_APE = b"APETAGEX"


def after_id3v2(file: BufferedIOBase, position: int) -> int:
    """The first byte after all ID3v2 tags at a position."""
    while (tag := read_at(file, position, 10)).startswith(b"ID3") and len(tag) == 10:
        size = sum((byte & 0x7F) << 7 * (3 - number) for number, byte in enumerate(tag[6:10]))
        position += 10 + size + (10 if tag[5] & 0x10 else 0)
    return position


def before_tags(file: BufferedIOBase, end: int) -> int:
    """The end of the audio before ID3v1, APE and Lyrics3 tags."""
    while True:
        tail = read_at(file, max(end - 128, 0), min(128, end))
        if len(tail) == 128 and tail.startswith(b"TAG"):
            end -= 128
        elif tail[-32:-24] == _APE:
            has_header = tail[-9] & 0x80
            end -= int.from_bytes(tail[-20:-16], "little") + (32 if has_header else 0)
        elif tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
            end -= int(tail[-15:-9]) + 15
        else:
            return max(end, 0)
