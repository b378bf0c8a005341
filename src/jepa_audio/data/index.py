"""The table of a corpus: every audio file decoded once, with what it holds or why it cannot be used."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from jepa_audio.data.read import AUDIO_SUFFIXES, AudioInfo, AudioReadError, inspect

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "num_frames": pa.int64(),
        "sample_rate": pa.int32(),
        "num_channels": pa.int32(),
        "peak": pa.float32(),
        "rms": pa.float32(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "status": pa.string(),
        "reason": pa.string(),
    },
    metadata={"jepa_audio.index": "1"},
)

# Audio that libsndfile cannot open: named in the log, for a folder full of it would look empty otherwise.
_FOREIGN_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".ape", ".wv", ".amr"})
_SAVE_EVERY = 20_000
_NAMED_IN_LOG = 100


class CorpusError(ValueError):
    """A folder of audio that cannot be trained on, said in one sentence."""


_Row = dict[str, object]


@dataclass(frozen=True)
class _Found:
    path: str
    size: int
    mtime_ns: int


def default_cache(root: Path) -> Path:
    """Where the table of `root` lies: inside it, or in the user's cache where that cannot be written."""
    folder = root / ".jepa_audio"
    if os.access(folder if folder.exists() else root, os.W_OK):
        return folder / "index.parquet"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "jepa_audio" / name / "index.parquet"


def index_folder(
    root: Path,
    cache: Path | None = None,
    *,
    num_workers: int = 2,
    min_seconds: float = 0.0,
    num_channels: int | None = None,
    max_bad_share: float = 0.5,
) -> pa.Table:
    """The table of all audio files under `root`, sorted by path; only files new or changed since are decoded.

    Bad files stay in the table, are named in the log and listed in `skipped.csv` beside it.

    Args:
        root: folder, searched with its subfolders; links are followed, hidden folders are not.
        cache: Parquet file of the table; `default_cache(root)` if `None`.
        num_workers: threads that decode.
        min_seconds: shorter files are bad for this use; the cache does not remember it.
        num_channels: files with another number of channels are bad for this use; `None` takes any.
        max_bad_share: above this share of bad files the corpus is refused.

    Raises:
        CorpusError: no such folder, no audio in it, nothing usable in it, or too much of it bad.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` ({num_workers}) must be >= 1")
    cache = cache or default_cache(root)
    found = _scan(root)
    known: dict[str, _Row] = {row["path"]: row for row in _load(cache).to_pylist()} if cache.exists() else {}
    rows = {file.path: known[file.path] for file in found if _is_current(known.get(file.path), file)}
    todo = iter([file for file in found if file.path not in rows])
    missing = len(found) - len(rows)
    fresh = _decoded(root, todo, missing, num_workers)
    while chunk := list(islice(fresh, _SAVE_EVERY)):
        rows |= {str(row["path"]): row for row in chunk}
        _save(_table(rows), cache)
    if len(rows) < len(known):
        _save(_table(rows), cache)
    table = mark_unusable(_table(rows), min_seconds, num_channels)
    _report(table, root, cache.with_name("skipped.csv"), max_bad_share)
    return table


def load_index(root: Path, cache: Path | None = None) -> pa.Table:
    """The table that `index_folder` wrote, as it is on disk."""
    cache = cache or default_cache(root)
    if not cache.exists():
        raise CorpusError(f"{root} has no index at {cache}; `jepa-audio data index {root}` makes one")
    return _load(cache)


def mark_unusable(table: pa.Table, min_seconds: float = 0.0, num_channels: int | None = None) -> pa.Table:
    """The table with files that are good, but not for this use, turned to 'bad' with the reason."""
    status, reason = (np.array(table[name].to_pylist(), dtype=object) for name in ("status", "reason"))
    channels = table["num_channels"].to_numpy()
    seconds = table["num_frames"].to_numpy() / np.maximum(table["sample_rate"].to_numpy(), 1)
    other = np.zeros(len(table), dtype=bool) if num_channels is None else channels != num_channels
    for row in np.flatnonzero((status == "ok") & (other | (seconds < min_seconds))):
        too_short = f"too short: {seconds[row]:.4f} s, at least {min_seconds:g} s are needed"
        wrong_channels = f"{channels[row]} channels, {num_channels} are needed"
        status[row], reason[row] = "bad", too_short if seconds[row] < min_seconds else wrong_channels
    for name, values in (("status", status), ("reason", reason)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def usable(table: pa.Table, min_seconds: float = 0.0, num_channels: int | None = None) -> pa.Table:
    """The rows that can be trained on."""
    table = mark_unusable(table, min_seconds, num_channels)
    return table.filter(pc.equal(table["status"], "ok")).combine_chunks()


def _scan(root: Path) -> list[_Found]:
    if not root.exists():
        raise CorpusError(f"the audio folder {root} does not exist")
    if not root.is_dir():
        raise CorpusError(f"{root} is a file, a folder of audio files was expected")
    found, foreign = [], 0
    for folder, names in _walk(root):
        for name in names:
            suffix = Path(name).suffix.lower()
            foreign += suffix in _FOREIGN_SUFFIXES
            if suffix in AUDIO_SUFFIXES:
                found.append(_stat(root, folder / name))
    ignored = f"{foreign} files in formats that are not read (such as .m4a; convert them to .flac)"
    if not found:
        looked_for = ", ".join(sorted(AUDIO_SUFFIXES))
        raise CorpusError(
            f"no audio files under {root} (looked for {looked_for})" + (f"; there are {ignored}" if foreign else "")
        )
    if foreign:
        log.warning("%s: ignored %s", root, ignored)
    return sorted(found, key=lambda file: file.path)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    def refuse(error: OSError) -> None:
        raise CorpusError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        stat = Path(folder).stat()
        if (stat.st_dev, stat.st_ino) in seen:  # a link back up, or two links to one folder
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), names


def _stat(root: Path, path: Path) -> _Found:
    relative = path.relative_to(root).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a broken link; reading it gives the reason
        return _Found(relative, -1, -1)
    return _Found(relative, stat.st_size, stat.st_mtime_ns)


def _is_current(row: _Row | None, file: _Found) -> bool:
    return row is not None and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns)


def _decoded(root: Path, todo: Iterator[_Found], total: int, num_workers: int) -> Iterator[_Row]:
    if total == 0:
        return
    # Threads suffice: libsndfile decodes and numpy measures without holding the interpreter's lock.
    with ThreadPoolExecutor(num_workers) as pool:
        console = Console(stderr=True)
        rows = pool.map(lambda file: _row(root, file), todo)
        yield from track(
            rows, f"Indexing {root}", total, console=console, transient=True, disable=not sys.stderr.isatty()
        )


def _row(root: Path, file: _Found) -> _Row:
    info, reason = AudioInfo(0, 0, 0, 0.0, 0.0), ""
    try:
        info = inspect(root / file.path)
        reason = "silent: every sample is zero" if info.peak == 0 else ""
    except AudioReadError as error:
        reason = error.reason
    return {**vars(file), **vars(info), "status": "bad" if reason else "ok", "reason": reason}


def _table(rows: dict[str, _Row]) -> pa.Table:
    return pa.Table.from_pylist([rows[path] for path in sorted(rows)], schema=SCHEMA)


def _load(cache: Path) -> pa.Table:
    try:
        table = pq.read_table(cache)
    except (pa.ArrowException, OSError) as error:
        log.warning("the index %s cannot be read (%s): it is made anew", cache, error)
        return SCHEMA.empty_table()
    return table if table.schema.equals(SCHEMA, check_metadata=True) else SCHEMA.empty_table()


def _save(table: pa.Table, cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    pq.write_table(table, unfinished)
    unfinished.replace(cache)


def _report(table: pa.Table, root: Path, skipped: Path, max_bad_share: float) -> None:
    bad = table.filter(pc.equal(table["status"], "bad")).select(["path", "reason"]).to_pylist()
    with skipped.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "reason"])
        writer.writeheader()
        writer.writerows(bad)
    for row in bad[:_NAMED_IN_LOG]:
        log.warning("skipped %s: %s", root / row["path"], row["reason"])
    if len(bad) > _NAMED_IN_LOG:
        log.warning("skipped %d more files, all listed in %s", len(bad) - _NAMED_IN_LOG, skipped)
    examples = "; ".join(f"{row['path']} ({row['reason']})" for row in bad[:5])
    if len(bad) == len(table):
        raise CorpusError(
            f"none of the {len(table)} audio files under {root} can be used: {examples}; all in {skipped}"
        )
    if len(bad) > max_bad_share * len(table):
        raise CorpusError(
            f"{len(bad)} of {len(table)} audio files under {root} cannot be used, more than `max_bad_share` "
            f"({max_bad_share:g}): {examples}; all in {skipped}"
        )
