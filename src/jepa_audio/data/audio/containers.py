"""What an audio file contains, by its container; nothing is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BufferedIOBase
from typing import Literal, NamedTuple

from jepa_audio.data.audio.mpeg import mpeg
from jepa_audio.data.audio.ogg import ogg
from jepa_audio.data.audio.streams import Contents, after_id3v2, flac, read_at

Endian = Literal["little", "big"]

# Largest number of bytes after the last chunk: some programs append tags. More bytes are audio that
# the header does not count.
_MAX_UNEXPLAINED = 4096
# Zeros after the last chunk.
_MAX_PADDING = 1 << 20
# Recorders that write into a pipe do not know the length and write 0 or the largest number.
_UNKNOWN_32 = (*range(2**31 - 2**16, 2**31 + 1), *range(2**32 - 2**8, 2**32))
_UNKNOWN = frozenset({0, *_UNKNOWN_32})
_PCM_TAGS = frozenset({1, 3, 6, 7})  # integer, float, A-law, µ-law
_MP3_TAGS = frozenset({0x50, 0x55})
_GSM = 0x31
_BLOCK_TAGS = frozenset({0x02, 0x11, _GSM})  # Microsoft and IMA ADPCM, GSM 6.10
_EXTENSIBLE = 0xFFFE
_PCM_AIFC = frozenset({
    "NONE", "twos", "sowt", "in24", "42ni", "in32", "23ni", "raw ",
    "fl32", "FL32", "fl64", "FL64", "ulaw", "ULAW", "alaw", "ALAW",
})  # fmt: skip
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


class _Data(NamedTuple):
    """The samples of a file; `num_bytes` is -1 if the header does not give their size."""

    start: int
    num_bytes: int


def examine(file: BufferedIOBase, size: int) -> Contents:
    """Count the samples in a file, and check that the file is complete.

    Headers are read, and the frames or pages of mp3, FLAC and Ogg. Other formats give `Contents()`:
    only a decoder can count them.

    Args:
        file: the file at any position.
        size: number of bytes of the file.
    """
    magic = read_at(file, 0, 20)
    for prefix, walk in _WALKS.items():
        if magic.startswith(prefix):
            return walk(file, size)
    if magic[4:8] == b"ftyp":
        return _boxes(file, size)
    start = read_at(file, after_id3v2(file, 0), 4)
    if start == b"fLaC":
        return flac(file, size)
    # The header of AAC in ADTS frames has layer 0, which MPEG audio does not have.
    if start[:1] == b"\xff" and start[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9"):
        return Contents(try_torchcodec=True)
    is_mpeg = start[:1] == b"\xff" and start[1:2] >= b"\xe0"
    return mpeg(file, 0, size) if is_mpeg or magic.startswith(b"ID3") else Contents()


def _check_size(data: _Data, size: int, block: int | None, rest: int = 0) -> Contents:
    """Compare the size of the samples in the header with the file.

    `block` is the size of a frame in bytes, or `None` if the samples are compressed; `rest` is the
    number of bytes after the samples that are not part of a chunk.
    """
    present = size - data.start
    length = present if data.num_bytes < 0 else data.num_bytes
    if length > present:
        counts = f"the header gives {length} bytes of samples, the file has {present}"
        return Contents(problem=f"truncated: {counts}")
    if rest > _MAX_UNEXPLAINED:
        return Contents(
            problem=f"wrong length in the header: {rest} bytes follow after the samples; repair "
            "the header with `sox --ignore-length IN OUT.w64`"
        )
    return Contents(length // block if block else None)


def _chunks(
    file: BufferedIOBase, position: int, size: int, endian: Endian
) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and size of every chunk of a RIFF or IFF file."""
    while position + 8 <= size:
        header = read_at(file, position, 8)
        name, length = header[:4], int.from_bytes(header[4:], endian)
        if not (name.isascii() and name.decode().isprintable()):
            return
        yield name, position + 8, length
        position += 8 + length + length % 2


def _unexplained(file: BufferedIOBase, position: int, size: int, endian: Endian) -> int:
    """Number of bytes from a position to the end of the file that are no complete chunks."""
    position = after_id3v2(file, position)
    for name, start, length in _chunks(file, position, size, endian):
        if start + length > size or name in (b"RIFF", b"FORM"):  # another file
            break
        position = start + length + length % 2
    rest = max(size - position, 0)
    is_padding = rest <= _MAX_PADDING and not read_at(file, position, rest).strip(b"\0")
    return 0 if is_padding else rest


def _riff(file: BufferedIOBase, size: int) -> Contents:
    """Wav and its large variants RF64 and BW64."""
    magic = read_at(file, 0, 4)
    endian: Endian = "big" if magic == b"RIFX" else "little"
    format_chunk, large = b"", -1
    for name, start, length in _chunks(file, 12, size, endian):
        if name == b"fmt ":
            format_chunk = read_at(file, start, min(length, 40))
        elif name == b"ds64":
            large = int.from_bytes(read_at(file, start + 8, 8), "little")
        elif name == b"data":
            is_large = 0 < large < 2**63 and length == 2**32 - 1
            data = _Data(start, large if is_large else length)
            return _wav_contents(file, size, endian, data, format_chunk)
    return Contents(problem="no samples: the file has no `data` chunk")


def _wav_contents(
    file: BufferedIOBase, size: int, endian: Endian, data: _Data, format_chunk: bytes
) -> Contents:
    if len(format_chunk) < 16:
        return Contents(problem="damaged: no `fmt ` chunk before the samples")
    tag, block, block_frames = (_u16(format_chunk, at, endian) for at in (0, 12, 18))
    if tag == _EXTENSIBLE:
        tag = _u16(format_chunk, 24, endian)
    after = data.start + data.num_bytes + data.num_bytes % 2
    rest = _unexplained(file, after, size, endian)
    is_unknown = data.num_bytes in _UNKNOWN and (data.num_bytes > size or rest > 0)
    if is_unknown:
        rest, data = 0, data._replace(num_bytes=-1)
    contents = _check_size(data, size, block if tag in _PCM_TAGS else None, rest)
    if contents.problem:
        return contents
    end = size if is_unknown else data.start + data.num_bytes
    if tag in _MP3_TAGS:
        return mpeg(file, data.start, end)
    if tag in _BLOCK_TAGS and block and (tag == _GSM or (end - data.start) % block == 0):
        return Contents((end - data.start) // block * block_frames)
    length_at = data.start - 4
    # libsndfile reads to the end of the file if the length is the largest number, but not if 0.
    if not is_unknown or any(read_at(file, length_at, 4)) or end - data.start >= 2**32:
        return contents
    header = read_at(file, 0, length_at) + (end - data.start).to_bytes(4, endian)
    return Contents(contents.num_frames, header=header)


def _u16(content: bytes, at: int, endian: Endian) -> int:
    return int.from_bytes(content[at : at + 2], endian)


def _iff(file: BufferedIOBase, size: int) -> Contents:
    """AIFF and AIFF-C."""
    common, kind = b"", read_at(file, 8, 4)
    if kind not in (b"AIFF", b"AIFC"):
        return Contents()
    for name, start, length in _chunks(file, 12, size, "big"):
        if name == b"COMM":
            common = read_at(file, start, min(length, 22))
        elif name == b"SSND":
            is_unknown = length in _UNKNOWN and read_at(file, 4, 4) in (b"\0" * 4, b"\xff" * 4)
            offset = int.from_bytes(read_at(file, start, 4), "big")
            samples = _Data(start + 8 + offset, -1 if is_unknown else length - 8 - offset)
            rest = 0 if is_unknown else _unexplained(file, start + length + length % 2, size, "big")
            num_channels, bits = (int.from_bytes(common[at : at + 2], "big") for at in (0, 6))
            is_pcm = kind == b"AIFF" or common[18:22].decode("latin-1") in _PCM_AIFC
            block = num_channels * -(-bits // 8) if is_pcm else None
            return _check_size(samples, size, block, rest)
    return Contents(problem="no samples: the file has no `SSND` chunk")


def _au(file: BufferedIOBase, size: int) -> Contents:
    header = read_at(file, 0, 24)
    endian: Endian = "big" if header.startswith(b".snd") else "little"
    start, length, encoding, _, channels = (
        int.from_bytes(header[at : at + 4], endian) for at in range(4, 24, 4)
    )
    is_unknown = length in _UNKNOWN and (length > size or length == 0)
    samples = _Data(start, -1 if is_unknown else length)
    rest = 0 if is_unknown else size - start - length
    width = _AU_BYTES.get(encoding)
    return _check_size(samples, size, channels * width if width else None, rest)


def _caf(file: BufferedIOBase, size: int) -> Contents:
    """Core Audio: a size of -1 means that the samples go to the end of the file."""
    position, block, packet_frames = 8, 0, 0
    num_frames: int | None = None
    data: _Data | None = None
    while position + 12 <= size:
        header = read_at(file, position, 12)
        start, length = position + 12, int.from_bytes(header[4:], "big", signed=True)
        if header.startswith(b"desc"):
            description = read_at(file, start, 32)
            block, packet_frames = (
                int.from_bytes(description[at : at + 4], "big") for at in (16, 20)
            )
        elif header.startswith(b"pakt"):
            num_frames = int.from_bytes(read_at(file, start + 8, 8), "big")
        elif header.startswith(b"data"):
            data = _Data(start + 4, length - 4 if length >= 0 else -1)
        if length < 0:
            break
        position = start + length
    if data is None:
        return Contents(problem="no samples: the file has no `data` chunk")
    contents = _check_size(data, size, block or None, max(size - position, 0) if length >= 0 else 0)
    if contents.problem:
        return contents
    if contents.num_frames is not None:
        num_frames = contents.num_frames * packet_frames
    start = data.start - 4
    if data.num_bytes >= 0:
        return Contents(num_frames)
    return Contents(
        num_frames, header=read_at(file, 0, start - 8) + (size - start).to_bytes(8, "big")
    )


def _w64(file: BufferedIOBase, size: int) -> Contents:
    """Sony Wave64: chunks with names of 16 bytes; a size includes the 24 bytes of its header."""
    position, format_chunk = 40, b""
    while position + 24 <= size:
        header = read_at(file, position, 24)
        length = int.from_bytes(header[16:], "little")
        if header.startswith(b"fmt "):
            format_chunk = read_at(file, position + 24, 40)
        elif header.startswith(b"data"):
            is_unknown = length in (0, 24, 2**63 - 1, 2**64 - 1)
            data = _Data(position + 24, -1 if is_unknown else length - 24)
            end = position + length + -length % 8
            rest = 0 if is_unknown or read_at(file, end, 4).isalpha() else size - end
            tag, block = (int.from_bytes(format_chunk[at : at + 2], "little") for at in (0, 12))
            tag = int.from_bytes(format_chunk[24:26], "little") if tag == _EXTENSIBLE else tag
            return _check_size(data, size, block if tag in _PCM_TAGS else None, rest)
        position += max(length + -length % 8, 24)
    return Contents(problem="no samples: the file has no `data` chunk")


def _nist(file: BufferedIOBase, size: int) -> Contents:
    """NIST Sphere: a header of text."""
    text = read_at(file, 0, 4096).decode("latin-1")
    lines = text.partition("end_head")[0].splitlines()
    values = {line.split()[0]: line.split()[-1] for line in lines[2:] if len(line.split()) >= 3}
    try:
        start = int(lines[1])
        names = ("sample_count", "channel_count", "sample_n_bytes")
        count, channels, width = (int(values[name]) for name in names)
    except (KeyError, ValueError, IndexError):
        return Contents()
    block = channels * width
    coding = values.get("sample_coding", "pcm")
    return _check_size(_Data(start, count * block), size, block if "," not in coding else None)


def _voc(file: BufferedIOBase, size: int) -> Contents:
    """Creative Voice: blocks with sizes of 3 bytes; a byte 0 is the end."""
    position = int.from_bytes(read_at(file, 20, 2), "little")
    while position < size and (kind := read_at(file, position, 1)) != b"\0":
        length = int.from_bytes(read_at(file, position + 1, 3), "little")
        if kind[0] not in (1, 2, 9):
            break
        if position + 4 + length > size:
            name = f"the block of kind {kind[0]} at byte {position} is incomplete"
            return Contents(problem=f"truncated: {name}")
        position += 4 + length
    return Contents()


def _boxes(file: BufferedIOBase, size: int) -> Contents:
    """MP4 and M4A: every box lies within the file."""
    position = 0
    while position + 8 <= size:
        header = read_at(file, position, 16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:
            break
        if length < 8 or position + length > size:
            name = header[4:8].decode("latin-1")
            return Contents(problem=f"truncated: the box {name!r} goes beyond the end of the file")
        position += length
    return Contents(try_torchcodec=True)


def _matroska(file: BufferedIOBase, size: int) -> Contents:
    """Matroska and WebM: the segment lies within the file."""
    position = 0
    for _ in range(2):  # the EBML header, then the segment
        header = read_at(file, position, 12)
        width = 9 - header[4].bit_length() if len(header) == 12 else 0
        value = int.from_bytes(header[4 : 4 + width], "big") & (1 << 7 * width) - 1
        if value == (1 << 7 * width) - 1:  # unknown size, in live streams
            break
        position += 4 + width + value
    if position > size:
        return Contents(
            problem=f"truncated: the segment ends at byte {position}, the file at {size}"
        )
    return Contents(try_torchcodec=True)


_WALKS: dict[bytes, Callable[[BufferedIOBase, int], Contents]] = {
    **dict.fromkeys((b"RIFF", b"RIFX", b"RF64", b"BW64"), _riff),
    b"FORM": _iff,
    **dict.fromkeys((b".snd", b"dns."), _au),
    b"caff": _caf,
    b"riff": _w64,
    b"NIST": _nist,
    b"Creative Voice File": _voc,
    b"\x1aE\xdf\xa3": _matroska,
    b"wvpk": lambda file, size: Contents(try_torchcodec=True),
    b"fLaC": flac,
    b"OggS": ogg,
}
