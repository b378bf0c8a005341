"""Index a corpus: decode every file once, and again only after the file has changed."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jepa_audio.data.audio.codec import INSTALL, is_installed
from jepa_audio.data.audio.location import AudioReadError, audio_location
from jepa_audio.data.audio.read import AudioInfo, inspect
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files
from jepa_audio.data.corpus.table import (
    SCHEMA,
    UNCHECKED,
    Corpus,
    CorpusError,
    default_table_path,
    is_table,
    set_columns,
)
from jepa_audio.data.corpus.tars import list_tar_members
from jepa_audio.errors import UserError, printable
from jepa_audio.files import atomic_path, csv_cell
from jepa_audio.parallel import map_threads, track_progress

log = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 30.0
# A batch of an Arrow table needs far less memory than the Python objects of its files.
_BATCH_FILES = 100_000
_NUM_LOGGED = 100
_NUM_EXAMPLES = 5
_VERSION = ["source_bytes", "mtime_ns"]
_NAME = ["source", "member"]
_IDENTITY = [*_NAME, "offset", "num_bytes", *_VERSION]
_LABELS = ["group", "split"]
_DISCOVERED = pa.schema([SCHEMA.field(name) for name in DiscoveredFile._fields])


def index_corpus(
    sources: str | Path | Sequence[str | Path],
    path: Path | None = None,
    *,
    num_workers: int = 2,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
    num_channels: int | None = None,
    max_bad_share: float = 0.5,
) -> Corpus:
    """Write the table of all audio files of the sources; only new and changed files are decoded.

    Bad files stay in the table, are logged, and are listed in a CSV file in the folder of the
    table. Decoded rows are kept in `PATH.parts/` until the table is complete. After an interrupted
    call, the next call continues from these rows. If the folder of the table is not writable, an
    existing table is used without a check for changed files.

    The limits `min_seconds`, `max_seconds` and `num_channels` mark files as bad in the returned
    corpus, but not in the written table.

    Args:
        sources: see `jepa_audio.data.corpus.sources.discover_files`.
        path: Parquet file of the table; `None` for `default_table_path` of a single source.
        num_workers: decoding threads.
        min_seconds: shorter files are bad.
        max_seconds: longer files are bad; `None` for no limit.
        num_channels: files with another number of channels are bad; `None` allows any number.
        max_bad_share: largest allowed share of bad files.

    Raises:
        UserError: if a source is missing, unreadable or without audio, if the table cannot be
            written, if no file is usable, or if too many files are bad.
    """
    if num_workers < 1:
        raise UserError(f"`num_workers` ({num_workers}) must be >= 1")
    names = [str(sources)] if isinstance(sources, str | Path) else [*map(str, sources)]
    path, root = _table_location(names, path)
    title, hint = ", ".join(names), ""
    known = _load_known(path, root)
    if len(known) and not os.access(path.parent, os.W_OK):
        log.info("%s is not writable; the table is used without a check for changes", path.parent)
        corpus = Corpus(root, known).mark_unfit(min_seconds, max_seconds, num_channels)
    else:
        corpus = _update_table(names, path, root, known, num_workers)
        corpus = corpus.mark_unfit(min_seconds, max_seconds, num_channels)
        bad_files = path.with_suffix(".skipped.csv")
        _report_bad_files(corpus, bad_files)
        hint = f"; {bad_files} lists all of these files"
    check_bad_share(corpus, title, max_bad_share, hint)
    return corpus


def check_bad_share(corpus: Corpus, title: str, max_bad_share: float, hint: str = "") -> None:
    """Check that enough files of a corpus are usable.

    Args:
        corpus: corpus to check.
        title: name of the corpus in the message.
        max_bad_share: largest allowed share of bad files.
        hint: end of the message; names the list of all bad files.

    Raises:
        CorpusError: if too many files are bad; the message gives examples and their reasons.
    """
    bad = _bad_files(corpus)
    if len(bad) <= max_bad_share * len(corpus) and len(bad) < len(corpus):
        return
    examples = "; ".join(f"{name} ({reason})" for name, reason in bad[:_NUM_EXAMPLES])
    files = f"of the {len(corpus)} audio files of {title}"
    if len(bad) == len(corpus):
        raise CorpusError(f"none {files} can be used: {examples}{hint}")
    raise CorpusError(
        f"{len(bad)} {files} cannot be used, more than `max_bad_share` ({max_bad_share:g}) allows: "
        f"{examples}{hint}. Repair or remove these files, or raise `max_bad_share`"
    )


def index_file(root: Path, file: DiscoveredFile) -> dict[str, Any]:
    """Decode a file; return the row of the table for this file."""
    info, reason = AudioInfo(0, 0, 0, 0.0, 0.0, ""), file.reason
    if not reason:
        try:
            path = root / file.source
            info = inspect(audio_location(path, file.member, file.offset, file.num_bytes))
            reason = "silent: every sample is zero" if info.peak == 0 else ""
        except AudioReadError as error:
            reason = error.reason
    return {**file._asdict(), **vars(info), "status": "bad" if reason else "ok", "reason": reason}


def _table_location(sources: list[str], path: Path | None) -> tuple[Path, Path]:
    """Path of the table, and the folder that the sources in the table are relative to."""
    if path is None:
        if len(sources) != 1:
            remedy = "set its `path` (on the command line `-o PATH`)"
            raise UserError(f"{len(sources)} sources share one table: {remedy}")
        source = Path(os.path.abspath(sources[0]))  # noqa: PTH100 (Path.resolve follows links)
        return default_table_path(source), source if source.is_dir() else source.parent
    if path.suffix != ".parquet":
        raise UserError(f"the name of the table {path} must end in .parquet")
    if path.exists() and not is_table(path):
        raise UserError(f"{path} exists and is not a corpus table; choose another name")
    return path, Path(os.path.abspath(path)).parent  # noqa: PTH100


def _load_known(path: Path, root: Path) -> pa.Table:
    """The rows of the existing table; no rows if no valid table of this root exists."""
    if not path.exists():
        return SCHEMA.empty_table()
    try:
        corpus = Corpus.load(path)
    except CorpusError as error:
        log.warning("all files are indexed again: %s", error)
        return SCHEMA.empty_table()
    return corpus.table if corpus.root == root else SCHEMA.empty_table()


def _update_table(
    sources: list[str], path: Path, root: Path, known: pa.Table, num_workers: int
) -> Corpus:
    partial = _PartialTable(path)
    discovered, in_unchanged_tars = _discover(sources, root, known, num_workers)
    discovered = _refuse_conflicts(discovered)
    # A file may be in a folder and, with labels, in a manifest: keep the row with labels.
    unlabelled = pc.and_(pc.equal(discovered["group"], ""), pc.equal(discovered["split"], ""))
    discovered = discovered.take(np.argsort(unlabelled.to_numpy(), kind="stable"))
    discovered = _drop_duplicates(discovered, [*_NAME, "offset"])
    decoded = pa.concat_tables([known, partial.load()])
    current, changed = _find_changed(discovered, decoded)
    files = (
        DiscoveredFile(**row) for batch in changed.to_batches(1024) for row in batch.to_pylist()
    )
    rows = map_threads(lambda file: index_file(root, file), files, num_workers)
    title = f"Indexing {', '.join(sources)}"
    indexed = partial.collect(track_progress(rows, title, len(changed)))
    order = [(name, "ascending") for name in ("source", "offset", "member")]
    table = pa.concat_tables([current, in_unchanged_tars, indexed]).sort_by(order)
    corpus = Corpus(root, table.combine_chunks())
    if not table.equals(known):
        corpus.save(path)
    partial.remove()
    return corpus


def _discover(
    sources: list[str], root: Path, known: pa.Table, num_workers: int
) -> tuple[pa.Table, pa.Table]:
    """Return (discovered files without the members of unchanged tars, rows of unchanged tars)."""
    not_final = known["source"].filter(pc.invert(_is_final(known)))
    is_complete = pc.invert(pc.is_in(known["source"], not_final))
    in_tars = known.filter(pc.and_(pc.not_equal(known["member"], ""), is_complete))
    versions = in_tars.group_by(["source", *_VERSION]).aggregate([]).to_pydict().values()
    known_versions = {*zip(*versions, strict=True)}
    unchanged: set[str] = set()
    tars: list[DiscoveredFile] = []
    batches: list[pa.RecordBatch] = []
    loose_files: list[DiscoveredFile] = []
    for file in discover_files(sources, root):
        if not file.is_tar:
            loose_files.append(file)
            if len(loose_files) == _BATCH_FILES:
                batches.append(_to_batch(loose_files))
                loose_files.clear()
            continue
        is_known = (file.source, file.source_bytes, file.mtime_ns) in known_versions
        # A manifest may have given new labels to a tar: then list the tar again.
        if is_known and not (file.group or file.split):
            unchanged.add(file.source)
        else:
            tars.append(file)
    if loose_files:
        batches.append(_to_batch(loose_files))
    listed = map_threads(lambda tar: _to_batch(list_tar_members(tar, root)), tars, num_workers)
    batches += track_progress(listed, "Listing tars", len(tars))
    is_unchanged = pc.is_in(in_tars["source"], pa.array(sorted(unchanged), pa.string()))
    return pa.Table.from_batches(batches, _DISCOVERED), in_tars.filter(is_unchanged)


def _to_batch(files: list[DiscoveredFile]) -> pa.RecordBatch:
    columns = [*map(pa.array, zip(*files, strict=True))]
    return pa.RecordBatch.from_arrays(columns, schema=_DISCOVERED)


def _is_final(table: pa.Table) -> pa.ChunkedArray:
    """False for rows of an earlier version, and for errors that may be gone.

    A network or permission error may be temporary; torchcodec may have been installed.
    """
    is_open = pc.starts_with(table["reason"], "cannot be opened")
    if is_installed():
        is_open = pc.or_(is_open, pc.match_substring(table["reason"], INSTALL))
    return pc.invert(pc.or_(is_open, pc.equal(table["decoder"], UNCHECKED)))


def _refuse_conflicts(discovered: pa.Table) -> pa.Table:
    """Give files that are listed several times with different labels a reason."""
    is_labelled = pc.or_(
        pc.not_equal(discovered["group"], ""), pc.not_equal(discovered["split"], "")
    )
    place = [*_NAME, "offset"]
    labels = discovered.filter(is_labelled).group_by([*place, *_LABELS]).aggregate([])
    counts = labels.group_by(place).aggregate([("group", "count")])
    conflicts = counts.filter(pc.greater(counts["group_count"], 1)).select(place)
    if not len(conflicts):
        return discovered
    reason = pa.array(["listed several times, with different group or split"] * len(conflicts))
    found = discovered.join(conflicts.append_column("conflict", reason), place)
    # The first row of a file is kept, so all of its rows get the reason.
    reasons = pc.coalesce(found["conflict"], found["reason"])
    return set_columns(found.drop_columns(["conflict"]), reason=reasons).select(_DISCOVERED.names)


def _drop_duplicates(table: pa.Table, columns: list[str]) -> pa.Table:
    """Keep the first row of every combination of values in the columns."""
    numbered = table.append_column("order", pa.array(np.arange(len(table))))
    first = numbered.group_by(columns).aggregate([("order", "min")])["order_min"].to_numpy()
    return table if len(first) == len(table) else table.take(np.sort(first))


def _find_changed(discovered: pa.Table, decoded: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return (decoded rows of unchanged files, discovered files that are new or changed)."""
    is_readable = pc.equal(discovered["reason"], "")
    readable, unreadable = discovered.filter(is_readable), discovered.filter(pc.invert(is_readable))
    # Labels from a manifest or a tar replace the labels that `data split` wrote to the table.
    labels = readable.select([*_IDENTITY, *_LABELS])
    final = _drop_duplicates(decoded.filter(_is_final(decoded)), _IDENTITY)
    labels = labels.rename_columns([*_IDENTITY, *(f"new_{name}" for name in _LABELS)])
    current = labels.join(final, _IDENTITY, join_type="inner")
    current = _fill_labels(current, [f"new_{name}" for name in _LABELS], _LABELS)
    changed = readable.join(current.select(_IDENTITY), _IDENTITY, join_type="left anti")
    # A changed file keeps the group and split of its old row.
    old = _drop_duplicates(decoded.select([*_NAME, *_LABELS]), _NAME)
    old = old.rename_columns([*_NAME, *(f"old_{name}" for name in _LABELS)])
    changed = changed.join(old, _NAME, join_type="left outer")
    changed = _fill_labels(changed, _LABELS, [f"old_{name}" for name in _LABELS])
    changed = changed.sort_by([("source", "ascending"), ("offset", "ascending")])
    changed = pa.concat_tables([changed.select(_DISCOVERED.names), unreadable])
    return current.select(SCHEMA.names).cast(SCHEMA), changed


def _fill_labels(table: pa.Table, preferred: list[str], others: list[str]) -> pa.Table:
    """Set each label to its preferred column, or to the other column if the preferred one is ""."""
    columns = {
        label: pc.if_else(pc.equal(table[name], ""), pc.fill_null(table[other], ""), table[name])
        for label, name, other in zip(_LABELS, preferred, others, strict=True)
    }
    return set_columns(table, **columns)


class _PartialTable:
    """Decoded rows on disk: a killed process loses only the work of about 30 seconds."""

    def __init__(self, path: Path) -> None:
        self._folder = path.with_name(f"{path.name}.parts")

    def load(self) -> pa.Table:
        tables = [SCHEMA.empty_table()]
        for part in sorted(self._folder.glob("*.parquet")):
            try:
                tables.append(pq.read_table(part, schema=SCHEMA))
            except (pa.ArrowException, OSError) as error:
                log.warning("%s cannot be read (%s): these files are decoded again", part, error)
        return pa.concat_tables(tables)

    def collect(self, rows: Iterator[dict[str, Any]]) -> pa.Table:
        """Return all rows as a table; save them every 30 seconds and if an exception occurs."""
        tables: list[pa.Table] = []
        unsaved: list[dict[str, Any]] = []
        saved_at = time.monotonic()
        try:
            for row in rows:
                unsaved.append(row)
                if time.monotonic() - saved_at > _SAVE_EVERY_SECONDS:
                    tables.append(self._save(unsaved))
                    unsaved, saved_at = [], time.monotonic()
        except BaseException:
            self._save(unsaved)
            raise
        return pa.concat_tables([*tables, pa.Table.from_pylist(unsaved, schema=SCHEMA)])

    def remove(self) -> None:
        # Errors are ignored, because another process may use the folder at the same time.
        shutil.rmtree(self._folder, ignore_errors=True)

    def _save(self, rows: list[dict[str, Any]]) -> pa.Table:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if rows:
            part = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex}.parquet"
            try:
                with atomic_path(part) as unfinished:
                    pq.write_table(table, unfinished)
            except FileNotFoundError:
                log.warning("%s was removed: another run may index this corpus", self._folder)
        return table


def _bad_files(corpus: Corpus) -> list[tuple[str, str]]:
    """(name, reason) of every bad file."""
    bad = corpus.take(~corpus.is_usable)
    return [*zip(bad.names.to_pylist(), bad.table["reason"].to_pylist(), strict=True)]


def _report_bad_files(corpus: Corpus, path: Path) -> None:
    bad = _bad_files(corpus)
    with atomic_path(path) as unfinished, unfinished.open("w", newline="") as file:
        rows = [tuple(map(csv_cell, row)) for row in bad]
        csv.writer(file).writerows([("path", "reason"), *rows])
    for name, reason in bad[:_NUM_LOGGED]:
        log.warning("skipped %s: %s", printable(corpus.root / name, one_line=True), reason)
    if len(bad) > _NUM_LOGGED:
        log.warning("skipped %d more files; %s lists all of them", len(bad) - _NUM_LOGGED, path)
