"""Find the audio files of folders, tars, manifests and NSynth; nothing is decoded here."""

from __future__ import annotations

import glob
import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from jepa_audio.data.audio.formats import (
    AUDIO_SUFFIXES,
    CODEC_SUFFIXES,
    OTHER_SUFFIXES,
    audio_suffixes,
    describe_unread,
)
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.errors import UserError
from jepa_audio.files import read_csv, read_json, scan_jsonl

log = logging.getLogger(__name__)

TAR_SUFFIX = ".tar"
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
NSYNTH_MANIFEST = "examples.json"
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_NUM_EXAMPLES = 3
_PATH_COLUMNS = ("path", "audio_path", "file")
_LABEL_COLUMNS = ("group", "split")
_SPLIT_NAMES = {
    **dict.fromkeys(("", "none"), ""),
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class FileLabels(NamedTuple):
    """Group and split of a file from a manifest or a JSON file; `reason` if they are invalid."""

    group: str = ""
    split: str = ""
    reason: str = ""


NO_LABELS = FileLabels()


class DiscoveredFile(NamedTuple):
    """The columns of `SCHEMA` that are known before a file is decoded.

    `reason` is set if the file cannot be used. Unknown sizes are -1, unknown labels "".
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
        """Whether the file is a tar whose members are not listed yet."""
        return self.source.lower().endswith(TAR_SUFFIX) and not self.member and not self.reason


def discover_files(sources: Sequence[str], root: Path) -> Iterator[DiscoveredFile]:
    """Yield every audio file of the sources, and each tar as one file (see `list_tar_members`).

    Args:
        sources: folders (with subfolders; links are followed, hidden folders are skipped), audio
            files, tars, brace or glob patterns of files, manifests (.csv, .tsv or .jsonl with a
            column path, audio_path or file, and optional columns group and split), or NSynth's
            `examples.json`.
        root: folder that `DiscoveredFile.source` is relative to.

    Raises:
        UserError: if a source does not exist, is unreadable, contains no audio, or is none of these
            kinds.
    """
    for source in sources:
        for path in _expand_pattern(source):
            yield from _discover_in(path, root)


def read_nsynth_examples(path: Path) -> dict[str, dict[str, Any]]:
    """Read NSynth's `examples.json`: the metadata of every note, by its name, in file order.

    Raises:
        MissingFileError: if the file does not exist.
        UserError: if the file is unreadable, or does not contain one JSON object per note.
    """
    notes = read_json(path)
    if not (isinstance(notes, dict) and notes and all(isinstance(n, dict) for n in notes.values())):
        raise UserError(
            f"{path} must map the name of each note to an object; extract NSynth's archive again"
        )
    return notes


def parse_labels(record: Mapping[str, Any]) -> FileLabels:
    """Group and split in a line of a manifest, or in the JSON file of a tar member.

    A file with an unknown name of its split cannot be used, because it may be a test file. The
    result then has a `reason`.
    """
    group, split = record.get("group"), record.get("split")
    if isinstance(group, float) and group.is_integer():
        group = int(group)  # A column with missing values has 1.0 instead of 1.
    if not isinstance(group, str | int | float | None):
        return FileLabels(reason=f"`group` is {type(group).__name__}, not text or a number")
    if isinstance(group, float) and not math.isfinite(group):
        return FileLabels(reason=f"`group` is {group}, not text or a finite number")
    if not isinstance(split, str | None):
        return FileLabels(reason=f"`split` is {type(split).__name__}; use train, valid or test")
    split = escape_surrogates(split or "").strip().lower()
    reason = "" if split in _SPLIT_NAMES else f"unknown split {split!r}; use train, valid or test"
    group = "" if group is None else escape_surrogates(str(group)).strip()
    return FileLabels(group, _SPLIT_NAMES.get(split, ""), reason)


def name_defect(name: str) -> str:
    """The reason why a file with this name cannot be used, or ""."""
    is_utf8 = name == escape_surrogates(name)
    return "" if is_utf8 else "its name is not UTF-8: rename the file"


def escape_surrogates(name: str) -> str:
    """Escape lone surrogates, which Python uses for the bytes of a name that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _expand_pattern(source: str) -> list[Path]:
    if "://" in source or source.startswith("pipe:"):
        remedy = "download it first, because training reads files in random order"
        raise CorpusError(f"{source} is not a local path; {remedy}")
    try:
        if Path(source).exists():
            return [Path(source)]
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise CorpusError(f"the audio source {source} {problem}") from error
    try:
        patterns = list(braceexpand(source))
    except ValueError as error:  # unbalanced braces
        problem = "does not exist, and its braces are not a valid pattern"
        raise CorpusError(f"the audio source {source} {problem}") from error
    paths: list[Path] = []
    for pattern in patterns:
        is_glob = glob.has_magic(pattern)
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches or not os.path.exists(matches[0]):
            part = "" if pattern == source else f" (part of {source})"
            problem = "matches no files" if is_glob else "does not exist"
            raise CorpusError(f"the audio source {pattern}{part} {problem}")
        paths += map(Path, matches)
    return paths


def _discover_in(path: Path, root: Path) -> Iterator[DiscoveredFile]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _discover_in_folder(path, root)
    elif path.name == NSYNTH_MANIFEST:
        yield from _discover_in_nsynth(path, root)
    elif suffix in MANIFEST_SUFFIXES:
        yield from _discover_in_manifest(path, root)
    elif suffix in AUDIO_SUFFIXES | CODEC_SUFFIXES or suffix == TAR_SUFFIX:
        yield _discovered_file(str(path), root)
    else:
        known = ", ".join(sorted(AUDIO_SUFFIXES | MANIFEST_SUFFIXES | {TAR_SUFFIX}))
        advice = f"use a folder, {NSYNTH_MANIFEST} or one of {known}"
        raise CorpusError(f"{path} is not an audio source; {advice}")


def _discovered_file(path: str, root: Path, labels: FileLabels = NO_LABELS) -> DiscoveredFile:
    path = os.path.abspath(path)  # links are kept
    source = path.removeprefix(str(root) + os.sep)
    if defect := name_defect(source):
        return DiscoveredFile(escape_surrogates(source), reason=defect)
    try:
        status = os.stat(path)
    except OSError:
        # A broken link, or a wrong path in a manifest; decoding sets the reason later.
        return DiscoveredFile(source, "", 0, -1, -1, -1, *labels)
    except ValueError as error:
        return DiscoveredFile(source.replace("\0", "\\0"), reason=f"invalid file name: {error}")
    if not stat.S_ISREG(status.st_mode):
        return DiscoveredFile(source, reason="not a file, but a folder, a pipe or a device")
    size = status.st_size
    return DiscoveredFile(source, "", 0, size, size, status.st_mtime_ns, *labels)


def _discover_in_folder(folder: Path, root: Path) -> Iterator[DiscoveredFile]:
    is_empty, unread, num_compressed, unreadable = True, Counter[str](), 0, list[str]()
    suffixes = audio_suffixes() | {TAR_SUFFIX}
    for directory, names in _walk(folder, unreadable):
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):  # macOS adds a hidden file `._NAME` to every file
                continue
            if suffix in suffixes:
                is_empty = False
                yield _discovered_file(os.path.join(directory, name), root)
            elif suffix in CODEC_SUFFIXES or suffix in OTHER_SUFFIXES:
                unread[suffix] += 1
            elif name.lower().endswith(_COMPRESSED_TARS):
                num_compressed += 1
    notes = [describe_unread(unread)] if unread else []
    if num_compressed:
        remedy = "decompress them to .tar for random access"
        notes.append(f"{num_compressed} compressed tars are not read ({remedy})")
    if unreadable:
        examples = ", ".join(map(escape_surrogates, unreadable[:_NUM_EXAMPLES]))
        notes.append(f"skipped {len(unreadable)} folders that cannot be read ({examples})")
    if is_empty:
        looked_for = f"looked for {', '.join(sorted(suffixes))}"
        raise CorpusError("; ".join([f"no audio files under {folder}: {looked_for}", *notes]))
    for note in notes:
        log.warning("%s: %s", folder, note)


def _walk(root: Path, unreadable: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files); append subfolders that cannot be read to `unreadable`."""

    def skip(error: OSError) -> None:
        if error.filename == str(root):
            message = f"the folder {error.filename} cannot be read: {error.strerror}"
            raise CorpusError(message) from error
        unreadable.append(error.filename)

    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=skip):
        try:
            status = os.stat(folder)
        except OSError as error:
            skip(error)
            subfolders.clear()
            continue
        # The folder was already visited through another link, or is a link to a parent.
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, names


def _discover_in_manifest(manifest: Path, root: Path) -> Iterator[DiscoveredFile]:
    line, column = 0, ""
    for line, record in _scan_manifest(manifest):
        if isinstance(record, UserError):
            reason = str(record)
        else:
            column = column or _path_column(manifest, record)
            reason = _line_defect(record, column)
            if not reason:
                path = os.path.join(manifest.parent, record[column])
                yield _discovered_file(path, root, parse_labels(record))
                continue
        entry = _discovered_file(str(manifest), root)
        yield entry._replace(member=f"line {line}", reason=reason)
    if not line:
        raise CorpusError(f"the manifest {manifest} lists no audio files")


def _scan_manifest(manifest: Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """The lines of a manifest; column names in lower case, surplus cells of a CSV under "".

    The columns of a CSV are separated by commas (in a .tsv by tabs), or by the sign that gives the
    header a column for the audio file.
    """
    if manifest.suffix.lower() == ".jsonl":
        for line, record in scan_jsonl(manifest):
            known = record
            if not isinstance(record, UserError):
                known = {name.strip().lower(): value for name, value in record.items()}
                if len(known) < len(record):
                    known = UserError("two keys differ only in case")
            yield line, known
        return
    for separator in (None, ",", ";", "\t", "|", None):
        header, rows = read_csv(manifest, errors="surrogateescape", delimiter=separator)
        names = [name.strip().lower() for name in header]
        if not set(names).isdisjoint(_PATH_COLUMNS):
            break
    if repeated := [name for name, count in Counter(names).items() if name and count > 1]:
        raise CorpusError(f"{manifest}, line 1: there are two columns {repeated[0]!r}")
    if separator is not None:
        log.info("%s: the columns are separated by %r", manifest, separator)
    path = next((name for name in _PATH_COLUMNS if name in names), "")
    if unused := [name for name in names if name not in ("", path, *_LABEL_COLUMNS)]:
        log.info("%s: these columns are not used: %s", manifest, ", ".join(unused))
    keys = dict(zip(header, names, strict=True))
    for line, row in rows:
        cells = {keys.get(key, ""): cell for key, cell in row.items()}
        missing = [name for name in _LABEL_COLUMNS if name in cells and cells[name] is None]
        yield line, UserError(f"no {missing[0]!r} in this line") if missing else cells


def _line_defect(record: Mapping[str, Any], column: str) -> str:
    """The reason why a line of a manifest cannot be used, or ""."""
    if "" in record and isinstance(record[""], list):
        return (
            f"{len(record[''])} values more than the header has columns: quote values with commas"
        )
    path = record.get(column)
    if not isinstance(path, str) or not path:
        return f"no {column!r} in this line"
    if name_defect(path):
        remedy = "save the manifest as UTF-8, or rename the file"
        return f"the name {escape_surrogates(path)} is not UTF-8: {remedy}"
    for name in (column, *_LABEL_COLUMNS):
        value = record.get(name)
        if isinstance(value, str) and ("\n" in value or "\r" in value):
            return f"a line break in {name!r}: is a quote not closed?"
    return ""


def _path_column(manifest: Path, record: Mapping[str, Any]) -> str:
    for column in _PATH_COLUMNS:
        if column in record:
            return column
    remedy = f"rename one of {list(record)} to {_PATH_COLUMNS[0]!r}"
    raise CorpusError(f"{manifest} has no column for the audio file; {remedy}")


def _discover_in_nsynth(manifest: Path, root: Path) -> Iterator[DiscoveredFile]:
    """The notes of `nsynth-SPLIT/examples.json`; the notes of one instrument are a group."""
    split = manifest.parent.name.rpartition("-")[2]
    split = split if split in _SPLIT_NAMES else ""
    for name, note in read_nsynth_examples(manifest).items():
        path = os.path.join(manifest.parent, "audio", f"{name}.wav")
        labels = parse_labels({"group": note.get("instrument_str"), "split": split})
        yield _discovered_file(path, root, labels)
