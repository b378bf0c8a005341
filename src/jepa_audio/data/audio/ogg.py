"""What an Ogg file contains: RFC 3533, RFC 7845 (Opus), https://xiph.org/vorbis/doc/Vorbis_I_spec.html.

Nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import NamedTuple

from jepa_audio.data.audio.streams import REMEDY, Contents, before_tags, crc, read_at

_NUM_HEADERS = 3  # packets of Vorbis: identification, comment, setup
_TAIL = 1024  # bytes; the setup header of Vorbis ends with at most 64 modes of 41 bits
_MODE_BITS = 41
_PAGE_HEADER = 27
_MAX_PAGE = _PAGE_HEADER + 255 + 255 * 255
_IS_FIRST = 2
_OPUS_RATE = 48_000
_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC", b"Speex   ": "Speex"}


class OggPage(NamedTuple):
    """The header of a page; `granule` is the number of samples up to its end, or -1."""

    end: int
    flags: int
    granule: int
    serial: int
    number: int
    body: int
    lacing: bytes


@dataclass
class _OggStream:
    codec: str
    skip: int
    last_granule: int = 0
    next_number: int = field(default=1)


def ogg(file: BufferedIOBase, size: int) -> Contents:
    """Sum the last granule positions of all audio streams; check that no page is missing."""
    streams: list[_OggStream] = []
    by_serial: dict[int, _OggStream] = {}
    position, num_links, has_audio_page = 0, 0, False
    size = before_tags(file, size)
    for page in _ogg_pages(file, 0, size):
        if page.flags & _IS_FIRST:
            new = by_serial[page.serial] = _ogg_stream(read_at(file, page.body, 64))
            if new.codec:
                num_links += has_audio_page or not streams
                has_audio_page = False
                streams.append(new)
        elif stream := by_serial.get(page.serial):
            if page.number != stream.next_number:
                return Contents(problem=f"damaged: pages are missing before byte {page.body}")
            stream.next_number += 1
            stream.last_granule = max(stream.last_granule, page.granule)
            has_audio_page |= bool(stream.codec)
        position = page.end
    if position < size:
        problem = "the last page is incomplete" if size - position < _MAX_PAGE else "no Ogg page"
        return Contents(problem=f"truncated or damaged at byte {position}: {problem}")
    if len(streams) != num_links or not streams:
        count = f"{len(streams)} audio streams at the same time"
        return Contents(problem=f"{count}: {REMEDY}")
    codecs = {stream.codec for stream in streams}
    if num_links > 1 and codecs != {"Opus"}:
        # Decoders do not agree on the samples at the end of a link.
        return Contents(problem=f"{num_links} joined Ogg streams: {REMEDY}")
    total = sum(max(stream.last_granule - stream.skip, 0) for stream in streams)
    if num_links == 1 and codecs < {"Vorbis", "Opus"}:
        (serial,) = (serial for serial, stream in by_serial.items() if stream.codec)
        pages = (page for page in _ogg_pages(file, 0, size) if page.serial == serial)
        length_of = _VorbisLengths() if codecs == {"Vorbis"} else _opus_length
        total -= _first_sample(file, pages, length_of)
    header = _opus_header(file) if codecs == {"Opus"} else b""
    return Contents(total, header=header, try_torchcodec=True)


def _first_sample(
    file: BufferedIOBase, pages: Iterable[OggPage], length_of: Callable[[int, bytes], int]
) -> int:
    """Number of the first sample of a stream: 0, or another one if the stream was cut.

    It is the granule position of the first page with audio, minus the samples of its packets. If
    this is the last page too, the number is not known, because an encoder may shorten this page.

    Args:
        file: the Ogg file.
        pages: the pages of the stream.
        length_of: number of samples of a packet, from its number and content; called in order.
    """
    start: int | None = None
    packet, num_packets, total = b"", 0, 0
    for page in pages:
        if start is not None:
            return start
        file.seek(page.body)
        for length in page.lacing:
            packet += file.read(length)
            if length < 255:  # else the packet continues
                total += length_of(num_packets, packet)
                packet, num_packets = b"", num_packets + 1
        if page.granule >= 0 and total:
            start = page.granule - total
    return 0


def _opus_length(number: int, packet: bytes) -> int:
    """Samples of an Opus packet at 48 kHz (RFC 6716, 3.1)."""
    if number < 2 or not packet:  # the headers
        return 0
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        frame = (480, 960, 1920, 2880)[config & 3]
    elif config < 16:
        frame = (480, 960)[config & 1]
    else:
        frame = (120, 240, 480, 960)[config & 3]
    return frame * (1, 2, 2, packet[1] & 63 if len(packet) > 1 else 0)[code]


class _VorbisLengths:
    """Samples of Vorbis packets: a quarter of a packet's block plus a quarter of the one before."""

    def __init__(self) -> None:
        self._blocks, self._modes, self._before = (0, 0), [0], 0

    def __call__(self, number: int, packet: bytes) -> int:
        if number == 0 and len(packet) > 28:
            self._blocks = 1 << (packet[28] & 15), 1 << (packet[28] >> 4)
        elif number == _NUM_HEADERS - 1:
            self._modes = _modes(packet[-_TAIL:]) or [0]
        elif number >= _NUM_HEADERS and packet:
            mode = packet[0] >> 1 & (1 << (len(self._modes) - 1).bit_length()) - 1
            size = self._blocks[self._modes[mode]] if mode < len(self._modes) else 0
            before, self._before = self._before, size
            return (before + size) // 4 if before else 0
        return 0


def _modes(setup: bytes) -> list[int]:
    """Whether each mode has the long block, read backwards from the end of the setup header."""
    bits = int.from_bytes(setup, "little")
    position = bits.bit_length() - 1  # the framing bit
    flags: list[int] = []
    modes: list[int] = []
    while position >= _MODE_BITS + 6 and len(flags) < 64:
        position -= _MODE_BITS
        mode = bits >> position & (1 << _MODE_BITS) - 1
        # Window and transform are 0, there are at most 64 mappings.
        if mode >> 1 & 0xFFFFFFFF or mode >> 33 > 63:
            break
        flags.insert(0, mode & 1)
        if bits >> position - 6 & 63 == len(flags) - 1:
            modes = flags.copy()
    return modes


def _opus_header(file: BufferedIOBase) -> bytes:
    """The first page with 48 kHz as its rate, or b"" if libsndfile uses this rate anyway.

    Opus has 48,000 samples per second, but libsndfile decodes at the rate of the encoded file, if
    that is 24 kHz or less.
    """
    page = _ogg_page(file, 0, _MAX_PAGE)
    if page is None:
        return b""
    content = bytearray(read_at(file, 0, page.end))
    rate = slice(page.body + 12, page.body + 16)
    if not 0 < int.from_bytes(content[rate], "little") <= _OPUS_RATE // 2:
        return b""
    content[rate] = _OPUS_RATE.to_bytes(4, "little")
    content[22:26] = bytes(4)
    content[22:26] = crc(content, 0x04C11DB7, 32).to_bytes(4, "little")
    return bytes(content)


def _ogg_stream(first_packet: bytes) -> _OggStream:
    codec = next((name for magic, name in _CODECS.items() if first_packet.startswith(magic)), "")
    skip = int.from_bytes(first_packet[10:12], "little") if codec == "Opus" else 0
    return _OggStream(codec, skip)


def _ogg_pages(file: BufferedIOBase, position: int, size: int) -> Iterator[OggPage]:
    """The complete pages from a position to the first byte that is no complete page."""
    while (page := _ogg_page(file, position, size)) is not None:
        yield page
        position = page.end


def _ogg_page(file: BufferedIOBase, position: int, size: int) -> OggPage | None:
    header = read_at(file, position, _PAGE_HEADER)
    if len(header) < _PAGE_HEADER or not header.startswith(b"OggS"):
        return None
    lacing = file.read(header[26])
    body = position + _PAGE_HEADER + header[26]
    end = body + sum(lacing)
    granule = int.from_bytes(header[6:14], "little", signed=True)
    serial, number = (int.from_bytes(header[at : at + 4], "little") for at in (14, 18))
    page = OggPage(end, header[5], granule, serial, number, body, lacing)
    return None if end > size or len(lacing) < header[26] else page


def start_of_last_page(file: BufferedIOBase, size: int) -> int:
    """First sample of the last page of an Ogg stream, or 0 if it is not known.

    libsndfile computes the position of a sample in the last page from the end of the page, which a
    Vorbis encoder cuts to the length of the file. A seek into this page is therefore wrong.
    """
    for tail_size in (1 << 14, 3 * _MAX_PAGE):
        tail_start = max(size - tail_size, 0)
        tail = read_at(file, tail_start, size - tail_start)
        position = -1
        while (position := tail.find(b"OggS", position + 1)) >= 0:
            pages = list(_ogg_pages(file, tail_start + position, size))
            if pages and pages[-1].end == size:
                granules = [page.granule for page in pages if page.granule >= 0]
                if len(granules) > 1:
                    return granules[-2]
                break
    return 0
