"""Sources → the table of a corpus: every file decoded once, and never again until it changes."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jepa_audio.data.audio.read import AudioInfo, AudioReadError, audio_location, inspect
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files, list_tar_members
from jepa_audio.data.corpus.table import SCHEMA, Corpus, CorpusError, default_table_path, is_table
from jepa_audio.errors import UserError
from jepa_audio.parallel import map_threads, track_progress

log = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 30.0
_CHUNK = 1024  # files handed to the threads ahead of time
_NAMED_IN_LOG = 100
_IDENTITY = ["source", "member", "offset", "num_bytes", "source_bytes", "mtime_ns"]
_FOUND = pa.schema([SCHEMA.field(name) for name in DiscoveredFile._fields])


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
    """The table of all audio files of the sources; only files new or changed since the last time are decoded.

    Bad files stay in the table, are named in the log and listed in a CSV beside it. What has been
    decoded is kept in `PATH.parts/` until the table is complete: an interrupted run goes on there.

    Args:
        sources: see `jepa_audio.data.corpus.sources.discover_files`.
        path: Parquet file of the table; `default_table_path` of a single source if `None`.
        num_workers: threads that decode.
        min_seconds: shorter files are bad for this use; the table on disk does not remember it.
        max_seconds: longer files likewise.
        num_channels: files with another number of channels likewise; `None` takes any.
        max_bad_share: above this share of bad files the corpus is refused.

    Raises:
        CorpusError: a source is missing or holds no audio, nothing in it is usable, or too much of
            it is bad.
    """
    if num_workers < 1:
        raise UserError(f"`num_workers` ({num_workers}) must be >= 1")
    names = (
        [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    )
    if path is None and len(names) != 1:
        raise UserError(f"several sources ({len(names)}) need a `path` for their table")
    if path is not None:
        _check_output(path)
    path, root = _place_of_table(names[0], path)
    known, parts = _known(path, root), _Parts(path)
    if len(known) and not os.access(path.parent, os.W_OK):
        log.info("%s cannot be written: the table is believed as it is", path.parent)
        corpus = Corpus(root, known).mark_unfit(min_seconds, max_seconds, num_channels)
        check_bad_share(corpus, ", ".join(names), max_bad_share)
        return corpus
    found, kept = _listing(names, root, known, num_workers)
    found = _first_of_each(_labelled_first(found), ["source", "offset", "member"])
    decoded = pa.concat_tables([known, parts.load()])
    decoded = _first_of_each(decoded.filter(_is_settled(decoded)), _IDENTITY)
    current, todo = _divided(found, decoded)
    fresh = parts.keep(_inspected(root, todo, num_workers, ", ".join(names)))
    in_order = [(name, "ascending") for name in ("source", "offset", "member")]
    table = pa.concat_tables([current, kept, fresh]).sort_by(in_order)
    corpus = Corpus(root, table.combine_chunks())
    if not table.equals(known):
        corpus.save(path)
    parts.remove()
    corpus, skipped = (
        corpus.mark_unfit(min_seconds, max_seconds, num_channels),
        path.with_suffix(".skipped.csv"),
    )
    _report(corpus, skipped)
    check_bad_share(corpus, ", ".join(names), max_bad_share, f"; all in {skipped}")
    return corpus


def check_bad_share(corpus: Corpus, what: str, max_bad_share: float, hint: str = "") -> None:
    """Refuse a corpus of which too little can be used.

    Raises:
        CorpusError: with some of the bad files and their reasons.
    """
    is_bad = pa.array(~corpus.is_usable)
    num_bad = pc.sum(is_bad).as_py() or 0
    if num_bad <= max_bad_share * len(corpus) and num_bad < len(corpus):
        return
    names, reasons = (
        column.filter(is_bad).slice(0, 5).to_pylist()
        for column in (corpus.names, corpus.table["reason"])
    )
    examples = "; ".join(f"{name} ({reason})" for name, reason in zip(names, reasons, strict=True))
    of = f"of the {len(corpus)} audio files of {what}"
    if num_bad == len(corpus):
        raise CorpusError(f"none {of} can be used: {examples}{hint}")
    raise CorpusError(
        f"{num_bad} {of} cannot be used, more than `max_bad_share` ({max_bad_share:g}): {examples}{hint}"
    )


def index_file(root: Path, entry: DiscoveredFile) -> dict[str, Any]:
    """Decode a file: its row of the table."""
    info, reason = AudioInfo(0, 0, 0, 0.0, 0.0), entry.reason
    if not reason:
        try:
            info = inspect(
                audio_location(root / entry.source, entry.member, entry.offset, entry.num_bytes)
            )
            reason = "silent: every sample is zero" if info.peak == 0 else ""
        except AudioReadError as error:
            reason = error.reason
    return {**entry._asdict(), **vars(info), "status": "bad" if reason else "ok", "reason": reason}


def _check_output(path: Path) -> None:
    if path.suffix != ".parquet":
        raise UserError(
            f"the table {path} must be called .parquet, by which `--data.root` knows it"
        )
    if path.exists() and not is_table(path):
        raise UserError(
            f"{path} is no table of a corpus and would be overwritten: choose another name"
        )


def _place_of_table(name: str, path: Path | None) -> tuple[Path, Path]:
    """The table's file, and the folder that its sources are relative to."""
    source = Path(os.path.abspath(name))  # noqa: PTH100 (Path.resolve would follow links)
    if path is not None:
        return path, Path(os.path.abspath(path)).parent  # noqa: PTH100
    return default_table_path(source), source if source.is_dir() else source.parent


def _known(path: Path, root: Path) -> pa.Table:
    """The rows of the table as it was, none if it cannot be used."""
    if not path.exists():
        return SCHEMA.empty_table()
    try:
        corpus = Corpus.load(path)
    except CorpusError as error:
        log.warning("the table is made anew: %s", error)
        return SCHEMA.empty_table()
    return corpus.table if corpus.root == root else SCHEMA.empty_table()


def _listing(
    sources: list[str], root: Path, known: pa.Table, num_workers: int
) -> tuple[pa.Table, pa.Table]:
    """What was found, tars listed, and the known rows of tars that have not changed, which need no listing."""
    again = known["source"].filter(pc.invert(_is_settled(known)))
    in_tar = known.filter(
        pc.and_(pc.not_equal(known["member"], ""), pc.invert(pc.is_in(known["source"], again)))
    )
    stats = in_tar.group_by(["source", "source_bytes", "mtime_ns"]).aggregate([]).to_pylist()
    complete = {(row["source"], row["source_bytes"], row["mtime_ns"]) for row in stats}
    unchanged: set[str] = set()
    tars: list[DiscoveredFile] = []
    batches: list[pa.RecordBatch] = []

    def files() -> Iterator[DiscoveredFile]:
        for entry in discover_files(sources, root):
            if not entry.is_tar:
                yield entry
            # What a manifest says of a tar may have changed without it: then its members are listed
            # again.
            elif (
                not any(entry[-3:])
                and (entry.source, entry.source_bytes, entry.mtime_ns) in complete
            ):
                unchanged.add(entry.source)
            else:
                tars.append(entry)

    waiting = files()
    while chunk := list(islice(waiting, 100_000)):
        batches.append(_as_batch(chunk))
    listed = map_threads(lambda tar: _as_batch(list_tar_members(tar, root)), tars, num_workers)
    batches += track_progress(listed, "Listing tars", len(tars))
    kept = in_tar.filter(pc.is_in(in_tar["source"], pa.array(sorted(unchanged), pa.string())))
    return pa.Table.from_batches(batches, _FOUND), kept


def _as_batch(entries: list[DiscoveredFile]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*map(pa.array, zip(*entries, strict=True))], schema=_FOUND)


def _is_settled(table: pa.Table) -> pa.ChunkedArray:
    """False for what could not even be opened: that may have been the network, or a permission."""
    return pc.invert(pc.starts_with(table["reason"], "cannot be opened"))


def _labelled_first(found: pa.Table) -> pa.Table:
    """A manifest knows more of a file than the folder it lies in, whichever comes first."""
    unlabelled = pc.and_(pc.equal(found["group"], ""), pc.equal(found["split"], ""))
    return found.take(np.argsort(unlabelled.to_numpy(), kind="stable"))


def _first_of_each(table: pa.Table, columns: list[str]) -> pa.Table:
    """The table without the rows that repeat the columns of an earlier one."""
    numbered = table.append_column("order", pa.array(np.arange(len(table))))
    first = numbered.group_by(columns).aggregate([("order", "min")])["order_min"].to_numpy()
    return table if len(first) == len(table) else table.take(np.sort(first))


def _divided(found: pa.Table, decoded: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of files already decoded, and the files still to be decoded."""
    news = found.rename_columns(
        [f"found_{name}" if name not in _IDENTITY else name for name in found.column_names]
    )
    both = news.join(decoded, _IDENTITY, join_type="left outer", coalesce_keys=True)
    both = both.filter(pc.equal(both["found_reason"], ""))
    is_decoded = pc.is_valid(both["status"])
    current = both.filter(is_decoded)
    for name in (
        "group",
        "split",
    ):  # a manifest or the JSON in a tar wins, else what `data split` gave stays
        said = current[f"found_{name}"]
        place = current.schema.get_field_index(name)
        current = current.set_column(
            place, name, pc.if_else(pc.equal(said, ""), current[name], said)
        )
    refused = found.filter(pc.not_equal(found["reason"], ""))
    todo = found.join(current.select(_IDENTITY), _IDENTITY, join_type="left anti")
    todo = _with_former_labels(todo.filter(pc.equal(todo["reason"], "")), decoded)
    todo = todo.sort_by([("source", "ascending"), ("offset", "ascending")])
    return current.select(SCHEMA.names).cast(SCHEMA), pa.concat_tables([todo, refused]).select(
        _FOUND.names
    )


def _with_former_labels(todo: pa.Table, decoded: pa.Table) -> pa.Table:
    """A file that has changed keeps the group and the split it was given."""
    former = _first_of_each(
        decoded.select(["source", "member", "group", "split"]), ["source", "member"]
    )
    former = former.rename_columns(["source", "member", "former_group", "former_split"])
    both = todo.join(former, ["source", "member"], join_type="left outer")
    for name in ("group", "split"):
        known = pc.fill_null(both[f"former_{name}"], "")
        place = both.schema.get_field_index(name)
        both = both.set_column(place, name, pc.if_else(pc.equal(both[name], ""), known, both[name]))
    return both.select(todo.column_names)


def _inspected(root: Path, todo: pa.Table, num_workers: int, what: str) -> Iterator[dict[str, Any]]:
    if len(todo) == 0:
        return iter(())
    entries = (
        DiscoveredFile(**row) for batch in todo.to_batches(_CHUNK) for row in batch.to_pylist()
    )
    rows = map_threads(lambda entry: index_file(root, entry), entries, num_workers)
    return track_progress(rows, f"Indexing {what}", len(todo))


class _Parts:
    """Rows decoded so far, on disk: a run that dies loses the last seconds of its work."""

    def __init__(self, path: Path) -> None:
        self._folder = path.with_name(f"{path.name}.parts")

    def load(self) -> pa.Table:
        if not self._folder.exists():
            return SCHEMA.empty_table()
        tables = [SCHEMA.empty_table()]
        for part in sorted(self._folder.glob("*.parquet")):
            try:
                tables.append(pq.read_table(part, schema=SCHEMA))
            except (pa.ArrowException, OSError) as error:
                log.warning("%s cannot be read (%s): its files are decoded again", part, error)
        return pa.concat_tables(tables)

    def keep(self, rows: Iterator[dict[str, Any]]) -> pa.Table:
        """All rows; every half minute, and when something goes wrong, those since the last time are saved."""
        tables, fresh = [SCHEMA.empty_table()], []
        saved_at = time.monotonic()
        try:
            for row in rows:
                fresh.append(row)
                if time.monotonic() - saved_at > _SAVE_EVERY_SECONDS:
                    tables.append(self._save(fresh))
                    fresh, saved_at = [], time.monotonic()
        except BaseException:
            self._save(fresh)
            raise
        return pa.concat_tables([*tables, pa.Table.from_pylist(fresh, schema=SCHEMA)])

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # another run may be at it too

    def _save(self, rows: list[dict[str, Any]]) -> pa.Table:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if rows:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex}.parquet"
            try:
                pq.write_table(table, part.with_suffix(".tmp"))
                part.with_suffix(".tmp").replace(part)
            except (
                FileNotFoundError
            ):  # another run on the same corpus has finished and removed the folder
                log.warning("%s is gone: is the corpus being indexed twice at once?", self._folder)
        return table


def _report(corpus: Corpus, skipped: Path) -> None:
    is_bad = pa.array(~corpus.is_usable)
    names, reasons = (
        column.filter(is_bad).to_pylist() for column in (corpus.names, corpus.table["reason"])
    )
    bad = list(zip(names, reasons, strict=True))
    with skipped.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *bad])
    for name, reason in bad[:_NAMED_IN_LOG]:
        log.warning("skipped %s: %s", corpus.root / name, reason)
    if len(bad) > _NAMED_IN_LOG:
        log.warning("skipped %d more files, all listed in %s", len(bad) - _NAMED_IN_LOG, skipped)
