"""Summarise a corpus as a page of text, and compare its files with its table."""

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
from jepa_audio.errors import printable
from jepa_audio.parallel import map_threads, track_progress

_BAR_WIDTH = 40
_NUM_WORST = 5
_NUM_REASONS = 20
_LENGTH_BOUNDS = (0, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, np.inf)  # seconds
_FULL_SCALE = 0.9999
_COMPARED = ("num_frames", "sample_rate", "num_channels", "peak", "rms")
# Relative; another version of an mp3 or ogg decoder may round differently.
_LEVEL_TOLERANCE = 1e-3


def summarize_corpus(corpus: Corpus) -> Group:
    """Hours, rates, channels, lengths, levels, groups, splits and worst files of a corpus."""
    usable, bad = corpus.usable(), corpus.take(~corpus.is_usable)
    hours = usable.seconds.sum() / 3600
    gigabytes = float(usable.table["num_bytes"].to_numpy().clip(0).sum()) / 1e9
    size = f"{len(usable)} usable files, {hours:.2f} hours, {gigabytes:.2f} GB"
    sections = [_properties(usable)]
    if len(usable):
        sections += [_length_histogram(usable.seconds), _worst_files(usable)]
    if len(bad):
        sections.append(_bad_reasons(bad))
    return Group(f"{size}; {len(bad)} unusable", *sections)


def verify_corpus(corpus: Corpus, num_workers: int = 2) -> list[tuple[str, str]]:
    """Decode every usable file again; return (name, problem) of files that differ from the table.

    Shards are also compared with their checksums in `SHA256SUMS`.
    """
    usable = corpus.usable()
    sources = pc.unique(usable.table["source"]).to_pylist()
    shards = sorted(corpus.root / source for source in sources if source.endswith(TAR_SUFFIX))
    problems = [(str(path), _shard_problem(path)) for path in shards]
    rows = (row for batch in usable.table.to_batches(1024) for row in batch.to_pylist())
    found = map_threads(lambda row: _file_problem(corpus.root, row), rows, num_workers)
    found = track_progress(found, "Verifying", len(usable))
    problems += zip(usable.names.to_pylist(), found, strict=True)
    return [(name, problem) for name, problem in problems if problem]


def _file_problem(root: Path, old: dict[str, Any]) -> str:
    new = index_file(root, DiscoveredFile(**{name: old[name] for name in DiscoveredFile._fields}))
    if new["status"] != "ok":
        return new["reason"]
    for name in _COMPARED:
        tolerance = _LEVEL_TOLERANCE if name in ("peak", "rms") else 0.0
        if not math.isclose(new[name], old[name], rel_tol=tolerance):
            return f"`{name}` is {new[name]:.6g}, but {old[name]:.6g} in the table"
    return ""


def _shard_problem(path: Path) -> str:
    digest = read_checksums(path.parent).get(path.name)
    if digest is None:
        return ""
    if not path.exists():
        return f"listed in {CHECKSUMS}, but missing"
    return "" if sha256_of(path) == digest else f"its SHA-256 differs from {CHECKSUMS}"


def _properties(usable: Corpus) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False)
    columns = {"rates": "sample_rate", "channels": "num_channels", "splits": "split"}
    for title, column in columns.items():
        counts = usable.table[column].value_counts().to_pylist()
        pairs = sorted((count["values"], count["counts"]) for count in counts)
        unit = " Hz" if title == "rates" else ""
        grid.add_row(title, ", ".join(f"{_cell(value or 'none')}{unit}: {n}" for value, n in pairs))
    groups = pc.unique(usable.table["group"]).to_pylist()
    grid.add_row("groups", str(len(set(groups) - {""}) or "none"))
    return grid


def _cell(value: object) -> str:
    return escape(printable(value, one_line=True))


def _length_histogram(seconds: np.ndarray) -> Table:
    table = Table("seconds", "files", "hours", "", title="lengths", title_justify="left", box=None)
    for low, high in pairwise(_LENGTH_BOUNDS):
        lengths = seconds[(seconds >= low) & (seconds < high)]
        if len(lengths):
            bar = "█" * max(1, round(_BAR_WIDTH * len(lengths) / len(seconds)))
            bounds = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} or more"
            table.add_row(bounds, str(len(lengths)), f"{lengths.sum() / 3600:.2f}", bar)
    return table


def _worst_files(usable: Corpus) -> Table:
    table = Table("", "file", "", title="worst usable files", title_justify="left", box=None)
    levels = 20 * np.log10(np.maximum(usable.table["rms"].to_numpy(), 1e-10))
    names = usable.names
    properties = ("shortest", usable.seconds, "{:.3f} s"), ("quietest", levels, "{:.0f} dBFS")
    for title, values, form in properties:
        for row in np.argsort(values)[:_NUM_WORST].tolist():
            table.add_row(title, _cell(names[row].as_py()), form.format(values[row]))
    num_clipped = int((usable.table["peak"].to_numpy() >= _FULL_SCALE).sum())
    share = f"{100 * num_clipped / len(usable):.1f} %"
    table.add_row("clipped", f"{num_clipped} files reach full scale", share)
    return table


def _bad_reasons(bad: Corpus) -> Table:
    columns = ("files", "reason", "example")
    table = Table(*columns, title="unusable files", title_justify="left", box=None)
    reasons = np.array([reason.partition(":")[0] for reason in bad.table["reason"].to_pylist()])
    kinds, first, counts = np.unique(reasons, return_index=True, return_counts=True)
    for number in np.argsort(-counts)[:_NUM_REASONS].tolist():
        name = bad.names[int(first[number])].as_py()
        table.add_row(str(counts[number]), _cell(kinds[number]), _cell(name))
    return table
