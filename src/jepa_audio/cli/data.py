"""The commands on corpora; their docstrings are their `--help`."""

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
from jepa_audio.errors import UserError
from jepa_audio.parallel import num_cores


def index(
    sources: list[str],
    output: Path | None = None,
    num_workers: int = num_cores(),
    max_bad_share: float = 0.5,
) -> None:
    """Read every audio file of a corpus once into a table; later runs read only changed files.

    Args:
        sources: folders, audio files, tars, patterns of them ("shards/{000..127}.tar"), manifests
            (.csv, .tsv, .jsonl) or NSynth's examples.json.
        output: table to write (-o), for `--data.root`; by default it is in the source if that is a
            folder, or next to it.
        num_workers: files decoded at the same time.
        max_bad_share: above this share of unusable files the command fails.
    """
    corpus = index_corpus(sources, output, num_workers=num_workers, max_bad_share=max_bad_share)
    num_bad = len(corpus) - int(corpus.is_usable.sum())
    table = output or default_table_path(sources[0])
    print(f"{', '.join(sources)}: {len(corpus)} files, {num_bad} unusable; the table is {table}")


def describe(source: str) -> None:
    """Print hours, sample rates, lengths, levels, groups, splits and the worst files of a corpus.

    Args:
        source: table (.parquet), or what `data index` takes.
    """
    Console().print(summarize_corpus(_load_or_index(source)))


def verify(source: str, num_workers: int = num_cores()) -> None:
    """Read every file of a corpus again, check the checksums of shards, and list what has changed.

    Args:
        source: table (.parquet), or a source that has been indexed.
        num_workers: files decoded at the same time.

    Raises:
        CorpusError: if a file differs from its row in the table.
    """
    corpus = load_corpus(source)
    changed = verify_corpus(corpus, num_workers)
    for name, reason in changed:
        print(f"{name}: {reason}")
    if changed:
        raise CorpusError(
            f"{len(changed)} of {len(corpus)} files of {source} differ from its table"
        )
    print(f"{source}: all {int(corpus.is_usable.sum())} usable files agree with the table")


def split(
    source: str,
    shares: dict[str, float],
    group: Literal["table", "folder"] = "table",
    pattern: str | None = None,
    reassign: bool = False,
) -> None:
    """Split a corpus in its table, keeping each group in one split; files with a split keep it.

    Args:
        source: table (.parquet), or a source that has been indexed.
        shares: share of the groups in each split: "{train: 0.9, valid: 0.05, test: 0.05}".
        group: "table": the groups of the table (from a manifest, the JSON in a tar, or NSynth's
            instruments), where a file without a group is one; "folder": the files of one folder
            are a group.
        pattern: regular expression for file names, whose first group is the group of the file:
            "^([^_]+)_".
        reassign: clear the present splits first.
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
        print(f"{name}: {int((splits == name).sum())} files, {hours:.2f} hours")


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
        source: table (.parquet), or what `data index` takes.
        directory: folder for the shards; the same command continues after an interruption.
        sample_rate: in Hz, to which all files are resampled; by default every file keeps its own.
        mono: average the channels.
        bits: per sample; flac files that need no change are copied.
        shard_mb: size of a shard in 10^6 bytes.
        num_workers: files encoded at the same time.
    """
    packing = Packing(sample_rate, mono, bits, shard_mb)
    packed = write_shards(_load_or_index(source), directory, packing, num_workers)
    num_packed = int(packed.is_usable.sum())
    num_shards = len(set(packed.table["source"].to_pylist()))
    print(
        f"{directory}: {num_packed} files in {num_shards} shards, "
        f"{len(packed) - num_packed} left out"
    )


def _load_or_index(source: str) -> Corpus:
    if source.endswith(".parquet"):
        return load_corpus(source)
    return index_corpus(source, num_workers=num_cores())


def _match_group(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    if match is None or not match.groups():
        raise UserError(
            f"`pattern` {pattern!r} finds no group in {name}: put the part that names the group "
            "into parentheses"
        )
    return match[1]
