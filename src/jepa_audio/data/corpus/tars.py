"""List the audio files of a tar, even if the tar is damaged; nothing is extracted or decoded."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from jepa_audio.data.audio.formats import AUDIO_SUFFIXES, CODEC_SUFFIXES, OTHER_SUFFIXES
from jepa_audio.data.corpus.sources import (
    NO_LABELS,
    DiscoveredFile,
    FileLabels,
    escape_surrogates,
    name_defect,
    parse_labels,
)
from jepa_audio.errors import UserError
from jepa_audio.files import parse_json_object

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_ALL_SUFFIXES = AUDIO_SUFFIXES | CODEC_SUFFIXES | OTHER_SUFFIXES
_MAX_JSON_BYTES = 1 << 24
_WEBDATASET_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key, extension


def list_tar_members(tar: DiscoveredFile, root: Path) -> list[DiscoveredFile]:
    """List the audio files of a tar, with their group and split from its JSON files.

    The JSON file of `STEM.wav` is `STEM.json`. Without this file, it is the JSON file of the same
    WebDataset sample: `KEY.json` or `KEY.*.json`, with the key up to the first dot of the name. A
    file whose JSON file is ambiguous is bad.

    A damaged part of the tar is listed as a file with a reason. A broken header loses only the file
    that follows this header.
    """
    try:
        with (root / tar.source).open("rb") as file:
            if file.read(6).startswith(_COMPRESSED_MAGIC):
                reason = "a compressed tar does not allow random access: decompress the tar"
                return [tar._replace(reason=reason)]
            infos, damages = _scan_tar(file)
            infos = [info for info in infos if not PurePosixPath(info.name).name.startswith("._")]
            labels = _TarLabels(file, infos)
    except (OSError, tarfile.TarError) as error:
        return [tar._replace(reason=f"cannot be opened as a tar: {error}")]
    files = [
        tar._replace(member=f"byte {damage.start}", offset=damage.start, reason=damage.reason)
        for damage in damages
    ]
    for info in infos:
        suffix = PurePosixPath(info.name).suffix.lower()
        if suffix in AUDIO_SUFFIXES | CODEC_SUFFIXES:
            is_truncated = info.offset_data + info.size > tar.source_bytes
            reason = "the tar ends inside this file: copy the tar again" if is_truncated else ""
        elif suffix in OTHER_SUFFIXES:
            reason = f"unsupported format ({suffix}): convert it to .flac"
        else:
            continue
        files.append(_tar_member(tar, info, labels.find(info.name), reason))
    damage_ends = {damage.end for damage in damages}
    files += [
        _tar_member(tar, info, NO_LABELS, "no audio file of this name in the tar")
        for info in labels.unused()
        # If a damaged part ends at the JSON file, the audio file was in the damaged part.
        if info.offset not in damage_ends
    ]
    return files or [tar._replace(reason="the tar contains no audio files")]


def _tar_member(
    tar: DiscoveredFile, info: tarfile.TarInfo, labels: FileLabels, reason: str
) -> DiscoveredFile:
    return tar._replace(
        member=escape_surrogates(info.name),
        offset=info.offset_data,
        num_bytes=info.size,
        group=labels.group or tar.group,
        split=labels.split or tar.split,
        reason=name_defect(info.name) or reason or labels.reason,
    )


class _Damage(NamedTuple):
    start: int
    end: int
    reason: str


def _scan_tar(file: IO[bytes]) -> tuple[list[tarfile.TarInfo], list[_Damage]]:
    """All regular files of a tar, and the damaged byte ranges, which belong to no file."""
    infos: list[tarfile.TarInfo] = []
    damages: list[_Damage] = []
    end = file.seek(0, os.SEEK_END)
    start = expected = 0
    while start < end:
        file.seek(start)
        try:
            # `ignore_zeros` continues after a broken header.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:
                for info in archive:
                    damages += _find_damage(file, expected, info.offset)
                    num_blocks = -(-info.size // tarfile.BLOCKSIZE) if info.isreg() else 0
                    expected = info.offset_data + num_blocks * tarfile.BLOCKSIZE
                    infos += [info] if info.isreg() else []
            break
        except tarfile.ReadError:
            # In spite of `ignore_zeros`, tarfile stops at the broken header of a long name.
            start = max(start, expected) + tarfile.BLOCKSIZE
    ends_inside_file = infos and infos[-1].offset_data + infos[-1].size > end
    if expected >= end and not ends_inside_file:
        reason = "the tar has no end mark and may be truncated: copy the tar again"
        damages.append(_Damage(end, end, reason))
    return infos, damages + _find_damage(file, expected, end)


def _find_damage(file: IO[bytes], start: int, end: int) -> list[_Damage]:
    """The bytes between two files are damaged, unless all of them are zero."""
    if end <= start:
        return []
    archive_position = file.tell()
    file.seek(start)
    block = file.read(min(end - start, tarfile.RECORDSIZE))
    file.seek(archive_position)
    if not block.strip(b"\0"):
        return []
    return [_Damage(start, end, "broken header: the file after this header is lost")]


class _TarLabels:
    """Group and split in the JSON files of a tar, found by the names of its audio files."""

    def __init__(self, file: IO[bytes], infos: list[tarfile.TarInfo]) -> None:
        self._infos = [info for info in infos if PurePosixPath(info.name).suffix.lower() == ".json"]
        self._audio_stems = {
            _stem(info.name)
            for info in infos
            if PurePosixPath(info.name).suffix.lower() in _ALL_SUFFIXES
        }
        self._by_stem: dict[str, dict[FileLabels, str]] = {}
        self._by_key: dict[str, dict[FileLabels, str]] = {}
        for info in self._infos:
            labels = _read_labels(file, info)
            self._by_stem.setdefault(_stem(info.name), {})[labels] = info.name
            self._by_key.setdefault(_webdataset_key(info.name), {})[labels] = info.name

    def find(self, name: str) -> FileLabels:
        """The labels of an audio file; with a reason if several JSON files could have them."""
        stem, key = _stem(name), _webdataset_key(name)
        found = self._by_stem.get(stem) or self._by_stem.get(key)
        if found is None:
            found = self._by_key.get(key, {})
            others = [other for other in found.values() if _stem(other) in self._audio_stems]
            if others and list(found) != [NO_LABELS]:
                rule = f"its key {key!r} (up to the first dot) is also that of {others[0]}"
                return FileLabels(reason=f"no JSON file of its own: {rule}; add {stem}.json")
        if len(found) > 1:
            names = " and ".join(dict.fromkeys(found.values()))
            return FileLabels(reason=f"JSON files differ in group or split: {names}")
        return next(iter(found), NO_LABELS)

    def unused(self) -> list[tarfile.TarInfo]:
        """The JSON files that no audio file of the tar has by its name or by its key."""
        names = self._audio_stems | {_webdataset_key(f"{stem}.") for stem in self._audio_stems}
        return [
            info
            for info in self._infos
            if _stem(info.name) not in names and _webdataset_key(info.name) not in names
        ]


def _read_labels(file: IO[bytes], info: tarfile.TarInfo) -> FileLabels:
    if info.size > _MAX_JSON_BYTES:
        size = f"{info.size} bytes, at most {_MAX_JSON_BYTES} are allowed"
        return FileLabels(reason=f"{info.name} is too large: {size}")
    file.seek(info.offset_data)
    try:
        return parse_labels(parse_json_object(file.read(info.size)))
    except UserError as error:
        return FileLabels(reason=f"{info.name} is {error}")


def _stem(name: str) -> str:
    """The name without its last suffix."""
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix) else name


def _webdataset_key(name: str) -> str:
    match = _WEBDATASET_NAME.match(name)
    return match[1] if match else name
