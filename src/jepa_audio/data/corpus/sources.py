"""What a user calls a corpus → its audio files: folders, tars, manifests, NSynth. Nothing is decoded here."""

from __future__ import annotations

import csv
import glob
import json
import logging
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from braceexpand import braceexpand

from jepa_audio.data.audio.read import AUDIO_SUFFIXES
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.errors import UserError
from jepa_audio.files import read_json

log = logging.getLogger(__name__)

TAR_SUFFIX = ".tar"
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
NSYNTH_MANIFEST = "examples.json"

# Audio that libsndfile cannot open, tars that cannot be read at an offset: named in the log, for a
# folder full of them would look empty otherwise.
_FOREIGN_SUFFIXES = frozenset(
    {".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".ape", ".wv", ".amr"}
)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC_OF_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_MOST_JSON_BYTES = 1 << 24
_PATH_COLUMNS = ("path", "audio_path", "file")
_SPLITS = {
    **dict.fromkeys(("", "none"), ""),
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NOT_TEXT = "its name is not UTF-8: rename it"
_WEBDATASET_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key, extension


class FileLabels(NamedTuple):
    """What is known of a file beside its sound; see `DiscoveredFile`."""

    group: str = ""
    split: str = ""
    reason: str = ""


NO_LABELS = FileLabels()


class DiscoveredFile(NamedTuple):
    """An audio file that was found, or something in its place that is none.

    Attributes:
        source: file on disk, relative to the root of the table where it lies below it.
        member: name within it, if it is a tar; "" for a file by itself.
        offset: first byte of the audio in `source`.
        num_bytes: of the audio.
        source_bytes: of `source`.
        mtime_ns: of `source`.
        group: what must not be divided between training and test; "" if nothing is known.
        split: "train", "valid", "test" or "".
        reason: why it cannot be used; "" if nothing speaks against it yet.
    """

    source: str
    member: str = ""
    offset: int = 0
    num_bytes: int = -1
    source_bytes: int = -1
    mtime_ns: int = -1
    group: str = ""
    split: str = ""
    reason: str = ""

    @property
    def is_tar(self) -> bool:
        """Whether this is a tar whose members are not listed yet."""
        return self.source.lower().endswith(TAR_SUFFIX) and not self.member and not self.reason


def discover_files(sources: Sequence[str], root: Path) -> Iterator[DiscoveredFile]:
    """Every audio file, and every tar as one; see `list_tar_members`.

    Args:
        sources: folders (searched with their subfolders; links are followed, hidden folders are
            not), audio files, tars, brace or glob patterns of them, manifests (.csv, .tsv, .jsonl
            with a column path, audio_path or file and optional columns group and split), or
            NSynth's `examples.json`.
        root: what `DiscoveredFile.source` is relative to.

    Raises:
        CorpusError: if a source does not exist, is of no kind known here, or holds no audio.
    """
    for source in sources:
        for path in _expanded(source):
            yield from _found_in(path, root)


def _expanded(source: str) -> list[Path]:
    if "://" in source or source.startswith("pipe:"):
        raise CorpusError(
            f"{source} is no local path: fetch it first, training reads at any place of any file"
        )
    if Path(source).exists():
        return [Path(source)]
    paths: list[Path] = []
    try:
        names = list(braceexpand(source))
    except ValueError as error:  # unbalanced braces
        raise CorpusError(
            f"the audio source {source} does not exist, and its braces are no pattern"
        ) from error
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        missing = not matches or not os.path.exists(matches[0])
        if missing:
            among = "" if name == source else f", one of {source},"
            kind = "matches nothing" if glob.has_magic(name) else "does not exist"
            raise CorpusError(f"the audio source {name}{among} {kind}")
        paths += map(Path, matches)
    return paths


def _found_in(path: Path, root: Path) -> Iterator[DiscoveredFile]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _in_folder(path, root)
    elif path.name == NSYNTH_MANIFEST:
        yield from _in_nsynth(path, root)
    elif suffix in MANIFEST_SUFFIXES:
        yield from _in_manifest(path, root)
    elif suffix in AUDIO_SUFFIXES or suffix == TAR_SUFFIX:
        yield _entry(str(path), root)
    else:
        known = ", ".join(sorted(AUDIO_SUFFIXES | MANIFEST_SUFFIXES | {TAR_SUFFIX}))
        raise CorpusError(
            f"{path} is no audio source: a folder, {NSYNTH_MANIFEST} or one of {known} was expected"
        )


def _entry(path: str, root: Path, labels: FileLabels = NO_LABELS) -> DiscoveredFile:
    where = os.path.abspath(path)  # links are kept
    source = where.removeprefix(str(root) + os.sep)
    if not _is_text(source):
        return DiscoveredFile(_shown(source), reason=_NOT_TEXT)
    try:
        status = os.stat(where)
    except OSError:  # a broken link, a wrong line of a manifest; reading it gives the reason
        return DiscoveredFile(source, "", 0, -1, -1, -1, *labels)
    except ValueError as error:
        return DiscoveredFile(source.replace("\0", "\\0"), reason=f"no name of a file: {error}")
    if not stat.S_ISREG(status.st_mode):
        return DiscoveredFile(source, reason="no file, but a pipe, a device or a folder")
    return DiscoveredFile(
        source, "", 0, status.st_size, status.st_size, status.st_mtime_ns, *labels
    )


def _in_folder(folder: Path, root: Path) -> Iterator[DiscoveredFile]:
    count, foreign, compressed = 0, 0, 0
    for directory, names in _walk(folder):
        for name in names:
            if name.startswith("."):  # macOS puts one beside every file
                continue
            suffix = os.path.splitext(name)[1].lower()
            foreign += suffix in _FOREIGN_SUFFIXES
            compressed += name.lower().endswith(_COMPRESSED)
            if suffix in AUDIO_SUFFIXES or suffix == TAR_SUFFIX:
                count += 1
                yield _entry(os.path.join(directory, name), root)
    ignored = [
        f"{number} {what}"
        for number, what in (
            (foreign, "files in formats that are not read (such as .m4a; convert them to .flac)"),
            (
                compressed,
                "compressed tars (unpack them to .tar: a compressed one cannot be read at an offset)",
            ),
        )
        if number
    ]
    if not count:
        looked_for = ", ".join(sorted(AUDIO_SUFFIXES | {TAR_SUFFIX}))
        there_are = "; there are " + " and ".join(ignored) if ignored else ""
        raise CorpusError(f"no audio files under {folder} (looked for {looked_for}){there_are}")
    if ignored:
        log.warning("%s: ignored %s", folder, " and ".join(ignored))


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"the folder {error.filename} cannot be read: {error.strerror}"
        ) from error

    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or two links to one folder
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, names


def _in_manifest(manifest: Path, root: Path) -> Iterator[DiscoveredFile]:
    records = (
        _json_lines(manifest) if manifest.suffix.lower() == ".jsonl" else _table_lines(manifest)
    )
    column: str | None = None
    line = 0
    for line, record in records:
        if isinstance(record, str):
            yield _entry(str(manifest), root)._replace(member=f"line {line}", reason=record)
            continue
        column = column or next((name for name in _PATH_COLUMNS if name in record), None)
        if column is None:
            raise CorpusError(
                f"{manifest}: none of {list(record)} is the audio file: call it {_PATH_COLUMNS[0]!r}"
            )
        if not isinstance(record.get(column), str) or not record[column]:
            yield _entry(str(manifest), root)._replace(
                member=f"line {line}", reason=f"no {column!r} in this line"
            )
            continue
        path = os.path.join(manifest.parent, record[column])
        yield _entry(path, root, _labels(record))
    if not line:
        raise CorpusError(f"{manifest} names no audio file")


def _json_lines(manifest: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Numbered lines; a string says what is wrong with one."""
    with manifest.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line)


def _table_lines(manifest: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if manifest.suffix.lower() == ".tsv" else ",")
        try:
            for record in reader:
                yield reader.line_num, record
        except csv.Error as error:
            raise CorpusError(f"{manifest}, line {reader.line_num}: {error}") from error


def _json_object(text: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    return (
        record
        if isinstance(record, dict)
        else f"a JSON object was expected, got {type(record).__name__}"
    )


def _labels(record: Mapping[str, Any]) -> FileLabels:
    group, split = record.get("group"), _shown(str(record.get("split")).strip().lower())
    # A word that says nothing to us may mean the test: the file is left out rather than trained on.
    reason = "" if split in _SPLITS else f"its split {split!r} is none of train, valid, test"
    return FileLabels("" if group is None else _shown(str(group)), _SPLITS.get(split, ""), reason)


def read_nsynth_examples(path: Path) -> dict[str, dict[str, Any]]:
    """Read NSynth's `examples.json`: the metadata of every note, by its name, in file order.

    Raises:
        MissingFileError: if the file does not exist.
        UserError: if the file is unreadable, or does not hold one JSON object per note.
    """
    notes = read_json(path)
    if not (isinstance(notes, dict) and notes and all(isinstance(n, dict) for n in notes.values())):
        raise UserError(
            f"{path} must map the name of each note to an object; extract NSynth's archive again"
        )
    return notes


def _in_nsynth(manifest: Path, root: Path) -> Iterator[DiscoveredFile]:
    """The notes of `nsynth-SPLIT/examples.json`; notes of one instrument are a group."""
    split = manifest.parent.name.rpartition("-")[2]
    split = split if split in _SPLITS else ""
    for name, note in read_nsynth_examples(manifest).items():
        path = os.path.join(manifest.parent, "audio", f"{name}.wav")
        yield _entry(path, root, _labels({"group": note.get("instrument_str"), "split": split}))


def list_tar_members(tar: DiscoveredFile, root: Path) -> list[DiscoveredFile]:
    """The audio files of a tar, with group and split from the JSON beside them in WebDataset's layout.

    What is damaged is an entry of its own: a broken header costs the one file it stands before.
    """
    path = root / tar.source
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(_MAGIC_OF_COMPRESSED):
                return [
                    tar._replace(reason="a compressed tar cannot be read at an offset: unpack it")
                ]
            infos, damages = _listed(file)
            metadata = {
                _key(info.name): _metadata(file, info)
                for info in infos
                if info.name.endswith(".json")
            }
    except (OSError, tarfile.TarError) as error:
        return [tar._replace(reason=f"cannot be opened as a tar: {error}")]
    found = [
        tar._replace(member=f"byte {start}", offset=start, reason=reason)
        for start, _, reason in damages
    ]
    damaged_up_to = {damage.end for damage in damages}
    heard = set()
    for info in infos:
        if info.name.rpartition("/")[2].startswith("._"):
            continue
        suffix = Path(info.name).suffix.lower()
        if suffix in AUDIO_SUFFIXES or suffix in _FOREIGN_SUFFIXES:
            heard.add(_key(info.name))
        if suffix in AUDIO_SUFFIXES:
            cut_off = info.offset_data + info.size > tar.source_bytes
            found.append(
                _member(
                    tar, info, metadata.get(_key(info.name), {}), "the tar ends within it" * cut_off
                )
            )
        elif suffix in _FOREIGN_SUFFIXES:
            found.append(
                _member(tar, info, {}, f"a format that is not read ({suffix}): convert it to .flac")
            )
    for info in infos:
        orphan = info.name.endswith(".json") and _key(info.name) not in heard
        if (
            orphan and info.offset not in damaged_up_to
        ):  # else its audio file is the one that was lost
            found.append(_member(tar, info, {}, "no audio file beside it in the tar"))
    if not found:
        found = [tar._replace(reason="a tar without audio files")]
    return found


def _member(
    tar: DiscoveredFile, info: tarfile.TarInfo, metadata: dict[str, Any] | str, reason: str
) -> DiscoveredFile:
    group, split = tar.group, tar.split  # of a manifest that names the tar
    if isinstance(metadata, str):
        reason = metadata
    else:
        own = _labels(metadata)
        group, split, reason = own.group or group, own.split or split, reason or own.reason
    if not _is_text(info.name):
        reason = _NOT_TEXT
    place = _shown(info.name), info.offset_data, info.size, tar.source_bytes, tar.mtime_ns
    return DiscoveredFile(tar.source, *place, group, split, reason)


class _Damage(NamedTuple):
    start: int
    end: int
    reason: str


def _listed(file: IO[bytes]) -> tuple[list[tarfile.TarInfo], list[_Damage]]:
    """All files of a tar, and the stretches where something else than a file stands."""
    infos: list[tarfile.TarInfo] = []
    damages: list[_Damage] = []
    end = file.seek(0, os.SEEK_END)
    start = expected = 0
    while start < end:
        file.seek(start)
        try:
            with tarfile.open(
                fileobj=file, mode="r:", ignore_zeros=True
            ) as archive:  # goes on after a broken header
                for info in archive:
                    damages += _damage(file, expected, info.offset)
                    num_blocks = -(-info.size // tarfile.BLOCKSIZE) if info.isreg() else 0
                    expected = info.offset_data + num_blocks * tarfile.BLOCKSIZE
                    infos += [info] if info.isreg() else []
            break
        except tarfile.ReadError:  # but not after the broken header of a long name
            start = max(start, expected) + tarfile.BLOCKSIZE
    cut_within_a_file = infos and infos[-1].offset_data + infos[-1].size > end
    if expected >= end and not cut_within_a_file:
        damages.append(_Damage(end, end, "the tar ends without an end mark: it is cut off"))
    return infos, damages + _damage(file, expected, end)


def _damage(file: IO[bytes], start: int, end: int) -> list[_Damage]:
    """Whether anything but zeros stands between two files."""
    if end <= start:
        return []
    position = file.tell()
    file.seek(start)
    block = file.read(min(end - start, tarfile.RECORDSIZE))
    file.seek(position)
    return (
        [_Damage(start, end, "a broken header: the file behind it is lost")]
        if block.strip(b"\0")
        else []
    )


def _metadata(file: IO[bytes], info: tarfile.TarInfo) -> dict[str, Any] | str:
    if info.size > _MOST_JSON_BYTES:
        return f"{info.name} beside it is too large for what is said of one file: {info.size} bytes"
    file.seek(info.offset_data)
    record = _json_object(file.read(info.size))
    return f"{info.name} beside it holds {record}" if isinstance(record, str) else record


def _key(name: str) -> str:
    match = _WEBDATASET_NAME.match(name)
    return match[1] if match else name


def _is_text(name: str) -> bool:
    """False for a name whose bytes are no UTF-8; Python holds them as lone surrogates."""
    return name == _shown(name)


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
