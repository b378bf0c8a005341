"""List the audio files of a tar, also of a damaged one; nothing is extracted or decoded here."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

from jepa_audio.data.audio.read import AUDIO_SUFFIXES
from jepa_audio.data.corpus.sources import (
    NO_LABELS,
    UNSUPPORTED_SUFFIXES,
    DiscoveredFile,
    FileLabels,
    escape_surrogates,
    name_defect,
    parse_labels,
)
from jepa_audio.errors import UserError
from jepa_audio.files import parse_json_object

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_MAX_JSON_BYTES = 1 << 24
_WEBDATASET_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key, extension


def list_tar_members(tar: DiscoveredFile, root: Path) -> list[DiscoveredFile]:
    """List the audio files of a tar; `KEY.json` holds group and split of `KEY.*`, as in WebDataset.

    Damage is listed as a file with a reason. A broken header loses only the file after it.
    """
    try:
        with (root / tar.source).open("rb") as file:
            if file.read(6).startswith(_COMPRESSED_MAGIC):
                reason = "a compressed tar does not allow random access: decompress it"
                return [tar._replace(reason=reason)]
            infos, damages = _scan_tar(file)
            labels = {
                _webdataset_key(info.name): _read_labels(file, info)
                for info in infos
                if info.name.endswith(".json")
            }
    except (OSError, tarfile.TarError) as error:
        return [tar._replace(reason=f"cannot be opened as a tar: {error}")]
    files = [
        tar._replace(member=f"byte {damage.start}", offset=damage.start, reason=damage.reason)
        for damage in damages
    ]
    audio_keys = set()
    for info in infos:
        key, suffix = _webdataset_key(info.name), Path(info.name).suffix.lower()
        if info.name.rpartition("/")[2].startswith("._"):  # a file of macOS
            continue
        if suffix in AUDIO_SUFFIXES:
            is_cut = info.offset_data + info.size > tar.source_bytes
            reason = "the tar ends inside this file: copy it again" if is_cut else ""
        elif suffix in UNSUPPORTED_SUFFIXES:
            reason = f"unsupported format ({suffix}): convert it to .flac"
        else:
            continue
        audio_keys.add(key)
        files.append(_tar_member(tar, info, labels.get(key, NO_LABELS), reason))
    damage_ends = {damage.end for damage in damages}
    for info in infos:
        is_orphan = info.name.endswith(".json") and _webdataset_key(info.name) not in audio_keys
        if is_orphan and info.offset not in damage_ends:  # else the damage is its audio file
            files.append(_tar_member(tar, info, NO_LABELS, "no audio file of this name in the tar"))
    return files or [tar._replace(reason="a tar without audio files")]


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
    """All regular files of a tar, and the byte ranges that belong to no file."""
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
        except tarfile.ReadError:  # `ignore_zeros` stops at the broken header of a long name
            start = max(start, expected) + tarfile.BLOCKSIZE
    is_cut_inside_file = infos and infos[-1].offset_data + infos[-1].size > end
    if expected >= end and not is_cut_inside_file:
        damages.append(_Damage(end, end, "the tar has no end mark and may be cut: copy it again"))
    return infos, damages + _find_damage(file, expected, end)


def _find_damage(file: IO[bytes], start: int, end: int) -> list[_Damage]:
    """The range between two files as damage, unless all its bytes are zero."""
    if end <= start:
        return []
    archive_position = file.tell()
    file.seek(start)
    block = file.read(min(end - start, tarfile.RECORDSIZE))
    file.seek(archive_position)
    is_zero = not block.strip(b"\0")
    return [] if is_zero else [_Damage(start, end, "broken header: the file after it is lost")]


def _read_labels(file: IO[bytes], info: tarfile.TarInfo) -> FileLabels:
    if info.size > _MAX_JSON_BYTES:
        size = f"{info.size} bytes, at most {_MAX_JSON_BYTES} are allowed"
        return FileLabels(reason=f"{info.name} is too large: {size}")
    file.seek(info.offset_data)
    try:
        return parse_labels(parse_json_object(file.read(info.size)))
    except UserError as error:
        return FileLabels(reason=f"{info.name} is {error}")


def _webdataset_key(name: str) -> str:
    match = _WEBDATASET_NAME.match(name)
    return match[1] if match else name
