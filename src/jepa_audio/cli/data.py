"""The commands `data ...` for corpora; their docstrings are their `--help`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import Packing, write_shards
from jepa_audio.data.corpus.survey import summarize_corpus, verify_corpus
from jepa_audio.data.corpus.table import Corpus, CorpusError, default_table_path, load_corpus
from jepa_audio.errors import UserError, printable
from jepa_audio.parallel import num_cores


def index(
    sources: list[str],
    output: Path | None = None,
    num_workers: int = num_cores(),
    max_bad_share: float = 0.5,
) -> None:
    """Read every audio file of a corpus and write a table; later calls read only changed files.

    Args:
        sources: folders, tars, manifests or tables; `run_function` defines the help.
        output: output file (-o), a table for `--data.root`. The default is a file in the source
            folder, or next to the source file.
        num_workers: number of files that are decoded at the same time.
        max_bad_share: maximum share of unusable files; above it, the command fails.
    """
    corpus = index_corpus(sources, output, num_workers=num_workers, max_bad_share=max_bad_share)
    num_bad = len(corpus) - int(corpus.is_usable.sum())
    table = output or default_table_path(sources[0])
    found = f"{len(corpus)} files, {num_bad} unusable; table: {table}"
    print(printable(f"{', '.join(sources)}: {found}"))


def describe(source: str) -> None:
    """Print a summary of a corpus.

    The summary has hours, sample rates, lengths, levels, groups, splits, the shortest and the
    quietest files.

    Args:
        source: a table (.parquet), or a source as for `data index`.
    """
    Console().print(summarize_corpus(_load_or_index(source)))


def verify(source: str, num_workers: int = num_cores()) -> None:
    """Read every file of a corpus again, check the checksums of shards, and list changed files.

    Args:
        source: a table (.parquet), or a source that `data index` has read.
        num_workers: number of files that are decoded at the same time.

    Raises:
        CorpusError: if a file differs from its row in the table.
    """
    corpus = load_corpus(source)
    changed = verify_corpus(corpus, num_workers)
    for name, reason in changed:
        print(printable(f"{name}: {reason}", one_line=True))
    if changed:
        raise CorpusError(
            f"{source}: {len(changed)} of {len(corpus)} files differ from their rows in the table"
        )
    print(
        f"{printable(source)}: all {int(corpus.is_usable.sum())} usable files agree with the table"
    )


def split(
    source: str,
    shares: dict[str, float],
    group: Literal["table", "folder"] = "table",
    pattern: str | None = None,
    reassign: bool = False,
) -> None:
    """Assign a split to every file that has none, and write the splits into the table.

    All files of a group get the same split.

    Args:
        source: a table (.parquet), or a source that `data index` has read.
        shares: share of the groups in each split: "{train: 0.9, valid: 0.05, test: 0.05}".
        group: "table" takes the groups in the table (from a manifest, the JSON in a tar, or
            NSynth's instruments); a file without a group is a group of one file. "folder" makes all
            files of a folder a group.
        pattern: regular expression for file names, for example "^([^_]+)_". The part of the name in
            the first parentheses is the group of the file.
        reassign: remove all existing splits first.
    """
    corpus = load_corpus(source)
    if reassign:
        corpus = corpus.clear_splits()
    groups = None
    if pattern is not None:
        groups = [_match_group(pattern, name) for name in corpus.names.to_pylist()]
    elif group == "folder":
        groups = [str(Path(name).parent) for name in corpus.names.to_pylist()]
    corpus = corpus.assign_splits(shares, groups)
    corpus.save(default_table_path(source))
    splits = np.array(corpus.table["split"].to_pylist())
    for name in shares:
        hours = corpus.seconds[splits == name].sum() / 3600
        print(f"{printable(name)}: {int((splits == name).sum())} files, {hours:.2f} hours")


def pack(
    source: str,
    directory: Path,
    sample_rate: int | None = None,
    mono: bool = False,
    bits: Literal[16, 24] = 16,
    shard_mb: int = 1000,
    num_workers: int = num_cores(),
) -> None:
    """Write a corpus as tars of flac files in WebDataset's layout, for `--data.root DIRECTORY`.

    Args:
        source: a table (.parquet), or a source as for `data index`.
        directory: output folder; after an interruption, the same command continues.
        sample_rate: sample rate in Hz to which all files are resampled. By default, the sample
            rates do not change.
        mono: average the channels.
        bits: bits per audio sample; flac files that need no change are copied.
        shard_mb: size of a shard in 10^6 bytes.
        num_workers: number of files that are encoded at the same time.
    """
    packing = Packing(sample_rate, mono, bits, shard_mb)
    packed = write_shards(_load_or_index(source), directory, packing, num_workers)
    num_packed = int(packed.is_usable.sum())
    num_shards = len(set(packed.table["source"].to_pylist()))
    print(
        f"{printable(directory)}: {num_packed} files in {num_shards} shards, "
        f"{len(packed) - num_packed} files left out"
    )


def _load_or_index(source: str) -> Corpus:
    if source.endswith(".parquet"):
        return load_corpus(source)
    return index_corpus(source, num_workers=num_cores())


def _match_group(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    if match is None or not match.groups():
        raise UserError(
            f"`pattern` {pattern!r} finds no group in {name}: put parentheses around the part of "
            "the name that is the group"
        )
    return match[1]
