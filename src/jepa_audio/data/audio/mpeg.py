"""What MPEG audio (mp1, mp2, mp3) contains; nothing is decoded. ISO/IEC 11172-3 and 13818-3."""

from __future__ import annotations

from functools import lru_cache
from io import BufferedIOBase
from typing import NamedTuple

from jepa_audio.data.audio.streams import (
    CHUNK,
    REMEDY,
    Contents,
    after_id3v2,
    before_tags,
    read_at,
)

_LAYER_1 = (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448)
_LAYER_2 = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_LAYER_3 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_LOW_LAYER_1 = (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_KBITS = {  # by (MPEG-1, layer)
    (True, 1): _LAYER_1, (True, 2): _LAYER_2, (True, 3): _LAYER_3,
    (False, 1): _LOW_LAYER_1, (False, 2): _LOW, (False, 3): _LOW,
}  # fmt: skip
_MPEG_RATES = (44_100, 48_000, 32_000)
_DECODER_DELAY = 529
# Version, layer and sample rate are the same in all frames of a stream.
_SAME_STREAM = 0xFFFE0C00


class _MpegFrame(NamedTuple):
    num_bytes: int  # 0 in free format
    num_samples: int
    padding: int
    is_mono: bool
    side_info: int


@lru_cache(maxsize=1024)
def _mpeg_frame(header: int) -> _MpegFrame | None:
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    bitrate, rate, padding = header >> 12 & 15, header >> 10 & 3, header >> 9 & 1
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or 15 in (bitrate, rate * 5):
        return None
    is_mpeg1, is_mono = version == 3, header >> 6 & 3 == 3
    num_samples = 384 if layer == 1 else 1152 if is_mpeg1 or layer == 2 else 576
    hertz = _MPEG_RATES[rate] >> (0 if is_mpeg1 else 1 if version == 2 else 2)
    slot = 4 if layer == 1 else 1
    bits = _KBITS[is_mpeg1, layer][bitrate] * 1000
    num_bytes = (num_samples // (8 * slot) * bits // hertz + padding) * slot if bits else 0
    side_info = (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17)
    return _MpegFrame(num_bytes, num_samples, padding * slot, is_mono, side_info)


def mpeg(file: BufferedIOBase, start: int, size: int) -> Contents:
    """Count the frames; compare them with the Xing, Info or VBRI header."""
    walk = _MpegWalk(file, after_id3v2(file, start), before_tags(file, size))
    walk.run(size)
    if walk.problem:
        return Contents(problem=walk.problem)
    if not walk.num_frames:
        return Contents(problem="cannot be decoded: no MPEG audio frame")
    if walk.declared and abs(missing := walk.declared - walk.num_frames) > 1:
        counts = f"the header gives {walk.declared} frames, the file has {walk.num_frames}"
        problem = f"truncated: {counts}" if missing > 0 else f"joined files ({counts}): {REMEDY}"
        return Contents(problem=problem)
    total = walk.num_frames * walk.frame_samples - walk.trimmed
    return Contents(max(total, 0), try_torchcodec=True)


class _MpegWalk:
    """A walk over all frames of an MPEG audio stream."""

    def __init__(self, file: BufferedIOBase, start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self._free_bytes = self._declared_bytes = self._delay = 0
        self.num_frames = self.declared = self.trimmed = self.frame_samples = 0
        self.problem = ""

    def run(self, size: int) -> None:
        """Walk over all frames of a file of `size` bytes."""
        first = position = self._find_frame(self._start, None)
        kind: int | None = None
        is_mono: bool | None = None
        while position is not None and position + 4 <= self._end:
            header = self._header(position)
            frame = _mpeg_frame(header)
            if frame is None or kind not in (None, header & _SAME_STREAM):
                if self._find_frame(position, kind) is not None:
                    # Decoders find different numbers of frames here.
                    self.problem = f"joined or damaged at byte {position}: {REMEDY}"
                break
            num_bytes = frame.num_bytes or self._free_format(position, header, frame)
            if kind is not None or not self._read_info(position, frame):
                self.num_frames += 1
                if is_mono not in (None, frame.is_mono):
                    self.problem = f"the number of channels changes at byte {position}: {REMEDY}"
                    return
                is_mono = frame.is_mono
            kind = header & _SAME_STREAM
            self.frame_samples = frame.num_samples
            position += num_bytes
        if first is None or not self.trimmed:
            return
        # As in ffmpeg: it does not read a Xing header after other bytes, and does not use the
        # padding in a header that counts much fewer bytes than the file has.
        if first > self._start:
            self.trimmed = 0
        elif 0 < self._declared_bytes * 17 // 16 < size - first:
            self.trimmed = self._delay + _DECODER_DELAY

    def _header(self, position: int) -> int:
        return int.from_bytes(read_at(self._file, position, 4), "big")

    def _find_frame(self, position: int, kind: int | None) -> int | None:
        """The next frame that another frame follows; sets `problem` if that is another stream."""
        if (after_tag := after_id3v2(self._file, position)) > position:
            position = after_tag
        while position + 4 <= self._end:
            chunk = read_at(self._file, position, min(CHUNK, self._end - position))
            at = -1
            while 0 <= (at := chunk.find(b"\xff", at + 1)) <= len(chunk) - 4:
                header = int.from_bytes(chunk[at : at + 4], "big")
                frame = _mpeg_frame(header)
                if frame is None or not self._is_followed(position + at, header, frame):
                    continue
                if kind not in (None, header & _SAME_STREAM):
                    self.problem = f"another stream begins at byte {position + at}: {REMEDY}"
                    return None
                return position + at
            position += max(len(chunk) - 3, 1)
        return None

    def _is_followed(self, position: int, header: int, frame: _MpegFrame) -> bool:
        following = position + (frame.num_bytes or self._free_format(position, header, frame))
        if following + 4 > self._end:
            return following == self._end
        return self._header(following) & _SAME_STREAM == header & _SAME_STREAM

    def _free_format(self, position: int, header: int, frame: _MpegFrame) -> int:
        """Bytes of a frame in free format: the distance to the next frame, without padding."""
        if not self._free_bytes:
            chunk = read_at(self._file, position, min(1 << 14, self._end - position))
            at = 4
            while 0 <= (at := chunk.find(header.to_bytes(4, "big")[:2], at + 1)) <= len(chunk) - 4:
                if (int.from_bytes(chunk[at : at + 4], "big") ^ header) & 0xFFFFFC00 == 0:
                    break
            self._free_bytes = max((len(chunk) if at < 0 else at) - frame.padding, 4)
        return self._free_bytes + frame.padding

    def _read_info(self, position: int, frame: _MpegFrame) -> bool:
        """Whether the frame is a Xing, Info or VBRI header, which contains no samples."""
        content = read_at(self._file, position, 512)
        if content[36:40] == b"VBRI":
            self.declared = int.from_bytes(content[50:54], "big")
            return True
        info = content[4 + frame.side_info :]
        if info[:4] not in (b"Xing", b"Info"):
            return False
        flags = info[7] if len(info) > 7 else 0
        if flags & 1:
            self.declared = int.from_bytes(info[8:12], "big")
        if flags & 2:
            at = 12 if flags & 1 else 8
            self._declared_bytes = int.from_bytes(info[at : at + 4], "big")
        fields = {1: 4, 2: 4, 4: 100, 8: 4}  # bytes by flag
        lame = 8 + sum(count for flag, count in fields.items() if flags & flag)
        if info[lame : lame + 4].strip(b"\0"):
            gap = int.from_bytes(info[lame + 21 : lame + 24], "big")
            self._delay = gap >> 12
            self.trimmed = self._delay + (gap & 0xFFF)  # delay and padding of the encoder
        return True
