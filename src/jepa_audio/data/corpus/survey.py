"""What a corpus holds, as a page of text, and whether it still holds it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jepa_audio.data.corpus.index import index_file
from jepa_audio.data.corpus.shards import CHECKSUMS, read_checksums, sha256_of
from jepa_audio.data.corpus.sources import TAR_SUFFIX, DiscoveredFile
from jepa_audio.data.corpus.table import Corpus
from jepa_audio.parallel import map_threads, track_progress

_BAR = 40
_WORST = 5
_SECONDS = (0, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, np.inf)
_CLIPPED = 0.9999
_MEASURED = ("num_frames", "sample_rate", "num_channels", "peak", "rms")
_AS_DECODED = 1e-3  # another version of a decoder of mp3 or ogg may round differently


def summarize_corpus(corpus: Corpus) -> Group:
    """Hours, rates, channels, lengths, levels, groups and splits of a corpus, and its worst files."""
    usable = corpus.take(corpus.is_usable)
    seconds = usable.seconds
    num_bad = len(corpus) - len(usable)
    gigabytes = float(usable.table["num_bytes"].to_numpy().clip(0).sum()) / 1e9
    title = f"{len(usable)} usable files, {seconds.sum() / 3600:.2f} hours, {gigabytes:.2f} GB; {num_bad} unusable"
    parts = [_facts(usable)]
    if len(usable):
        parts += [_lengths(seconds), _extremes(usable)]
    if num_bad:
        parts.append(_reasons(corpus.take(~corpus.is_usable)))
    return Group(title, *parts)


def verify_corpus(corpus: Corpus, num_workers: int = 2) -> list[tuple[str, str]]:
    """Read every usable file anew: (name, what is wrong) of those that are not what the table says.

    Shards are held to the checksums beside them, too.
    """
    usable = corpus.take(corpus.is_usable)
    wrong: list[tuple[str, str]] = []
    sources = pc.unique(usable.table["source"]).to_pylist()
    for shard in sorted(corpus.root / source for source in sources if source.endswith(TAR_SUFFIX)):
        wrong += _wrong_shard(shard)
    rows = (row for batch in usable.table.to_batches(1024) for row in batch.to_pylist())
    entries = (
        DiscoveredFile(**{name: row[name] for name in DiscoveredFile._fields}) for row in rows
    )
    fresh = map_threads(lambda entry: index_file(corpus.root, entry), entries, num_workers)
    known = (row for batch in usable.table.to_batches(1024) for row in batch.to_pylist())
    names = usable.names.to_pylist()
    watched = track_progress(zip(names, known, fresh, strict=True), "Verifying", len(usable))
    for name, before, now in watched:
        if now["status"] != "ok":
            wrong.append((name, now["reason"]))
        elif field := next((field for field in _MEASURED if not _same(field, now, before)), None):
            wrong.append(
                (name, f"`{field}` is {now[field]:.6g}, the table says {before[field]:.6g}")
            )
    return wrong


def _same(field: str, now: dict[str, Any], before: dict[str, Any]) -> bool:
    tolerance = _AS_DECODED if field in ("peak", "rms") else 0.0
    return math.isclose(now[field], before[field], rel_tol=tolerance)


def _wrong_shard(path: Path) -> list[tuple[str, str]]:
    digest = read_checksums(path.parent).get(path.name)
    if digest is None or (path.exists() and sha256_of(path) == digest):
        return []
    wrong = (
        f"its SHA-256 is not that in {CHECKSUMS}"
        if path.exists()
        else f"named in {CHECKSUMS}, but not there"
    )
    return [(str(path), wrong)]


def _facts(usable: Corpus) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False)
    for name, column in (
        ("rates", "sample_rate"),
        ("channels", "num_channels"),
        ("splits", "split"),
    ):
        counts = sorted(
            (count["values"], count["counts"])
            for count in usable.table[column].value_counts().to_pylist()
        )
        unit = " Hz" if column == "sample_rate" else ""
        grid.add_row(
            name, ", ".join(f"{value or 'none'}{unit}: {count}" for value, count in counts)
        )
    groups = [group for group in pc.unique(usable.table["group"]).to_pylist() if group]
    grid.add_row("groups", str(len(groups)) if groups else "none")
    return grid


def _lengths(seconds: np.ndarray) -> Table:
    table = Table("seconds", "files", "hours", "", title="lengths", title_justify="left", box=None)
    for low, high in pairwise(_SECONDS):
        among = seconds[(seconds >= low) & (seconds < high)]
        if len(among):
            bar = "█" * max(1, round(_BAR * len(among) / len(seconds)))
            bounds = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} or more"
            table.add_row(bounds, str(len(among)), f"{among.sum() / 3600:.2f}", bar)
    return table


def _extremes(usable: Corpus) -> Table:
    table = Table("", "file", "", title="worst usable files", title_justify="left", box=None)
    rms, peak, seconds = (
        usable.table["rms"].to_numpy(),
        usable.table["peak"].to_numpy(),
        usable.seconds,
    )
    level = 20 * np.log10(np.maximum(rms, 1e-10))
    names = usable.names
    for row in np.argsort(seconds)[:_WORST]:
        table.add_row("shortest", escape(names[int(row)].as_py()), f"{seconds[row]:.3f} s")
    for row in np.argsort(level)[:_WORST]:
        table.add_row("quietest", escape(names[int(row)].as_py()), f"{level[row]:.0f} dBFS")
    clipped = int((peak >= _CLIPPED).sum())
    table.add_row(
        "clipped", f"{clipped} files reach full scale", f"{100 * clipped / len(usable):.1f} %"
    )
    return table


def _reasons(bad: Corpus) -> Table:
    table = Table(
        "files", "reason", "for instance", title="cannot be used", title_justify="left", box=None
    )
    reasons = np.array([reason.partition(":")[0] for reason in bad.table["reason"].to_pylist()])
    kinds, first, counts = np.unique(reasons, return_index=True, return_counts=True)
    for place in np.argsort(-counts)[:20]:
        table.add_row(
            str(counts[place]), escape(kinds[place]), escape(bad.names[int(first[place])].as_py())
        )
    return table
