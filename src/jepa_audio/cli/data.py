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
from jepa_audio.data.synthetic.corpus import synthesize_corpus
from jepa_audio.errors import UserError
from jepa_audio.parallel import num_cores


def index(
    sources: list[str],
    output: Path | None = None,
    num_workers: int = num_cores(),
    max_bad_share: float = 0.5,
) -> None:
    """Look at every audio file of a corpus once; later runs look only at what has changed.

    Args:
        sources: folders, audio files, tars, patterns of them ("shards/{000..127}.tar"), manifests
            (.csv, .tsv, .jsonl) or NSynth's examples.json.
        output: table to write (-o), for `--data.root`; if not given, it lies inside or beside the
            one source.
        num_workers: files decoded at the same time.
        max_bad_share: above this share of unusable files the command fails.
    """
    corpus = index_corpus(sources, output, num_workers=num_workers, max_bad_share=max_bad_share)
    bad = len(corpus) - int(corpus.is_usable.sum())
    table = output or default_table_path(sources[0])
    print(
        f"{', '.join(sources)}: {len(corpus)} files, {bad} of them unusable; the table is {table}"
    )


def describe(source: str) -> None:
    """Print what a corpus holds: hours, rates, lengths, levels, groups, splits, and its worst files.

    Args:
        source: table (.parquet), or what `data index` takes.
    """
    Console().print(summarize_corpus(_indexed(source)))


def verify(source: str, num_workers: int = num_cores()) -> None:
    """Read every file of a corpus anew, and check the shards' checksums; what has changed is listed.

    Args:
        source: table (.parquet), or a source that has been indexed.
        num_workers: files decoded at the same time.

    Raises:
        CorpusError: if a file is not what the table says.
    """
    corpus = load_corpus(source)
    wrong = verify_corpus(corpus, num_workers)
    for name, reason in wrong:
        print(f"{name}: {reason}")
    if wrong:
        raise CorpusError(
            f"{len(wrong)} of {len(corpus)} entries of {source} are not what its table says"
        )
    print(f"{source}: all {int(corpus.is_usable.sum())} usable files are what its table says")


def split(
    source: str,
    shares: dict[str, float],
    group: Literal["table", "folder"] = "table",
    pattern: str | None = None,
    anew: bool = False,
) -> None:
    """Divide a corpus into train, valid and test in its table, never a group; files that have a split keep it.

    Args:
        source: table (.parquet), or a source that has been indexed.
        shares: of the groups, for instance "{train: 0.9, valid: 0.05, test: 0.05}".
        group: "table": the groups of the table (from a manifest, the JSON in a tar, or NSynth's
            instruments), a file without one by itself; "folder": files of one folder belong
            together.
        pattern: regular expression on the name of a file instead; what its first group matches is
            the group, for instance "^([^_]+)_".
        anew: forget former splits.
    """
    corpus = load_corpus(source)
    if anew:
        corpus = corpus.clear_splits()
    groups = None
    if pattern is not None:
        groups = [_matched(pattern, name) for name in corpus.names.to_pylist()]
    elif group == "folder":
        groups = [str(Path(name).parent) for name in corpus.names.to_pylist()]
    divided = corpus.assign_splits(shares, groups)
    divided.save(default_table_path(source))
    seconds, splits = divided.seconds, np.array(divided.table["split"].to_pylist())
    for name in shares:
        print(
            f"{name}: {int((splits == name).sum())} files, {seconds[splits == name].sum() / 3600:.2f} hours"
        )


def pack(
    source: str,
    directory: Path,
    sample_rate: int | None = None,
    mono: bool = False,
    bits: Literal[16, 24] = 16,
    shard_mb: int = 1000,
    num_workers: int = num_cores(),
) -> None:
    """Write a corpus as tars of flac files in WebDataset's layout, to train on with `--data.root DIRECTORY`.

    Args:
        source: table (.parquet), or what `data index` takes.
        directory: folder for the shards; the same command goes on where it was interrupted.
        sample_rate: in Hz, to which all is resampled, once and for all; if not given, every file
            keeps its own.
        mono: average the channels.
        bits: per sample; flac files that stay as they are are copied.
        shard_mb: size of a shard in 10^6 bytes.
        num_workers: files encoded at the same time.
    """
    packing = Packing(sample_rate, mono, bits, shard_mb)
    packed = write_shards(_indexed(source), directory, packing, num_workers)
    left_out = len(packed) - int(packed.is_usable.sum())
    num_shards = len(set(packed.table["source"].to_pylist()))
    print(
        f"{directory}: {len(packed) - left_out} files in {num_shards} shards, {left_out} left out"
    )


def _indexed(source: str) -> Corpus:
    return (
        load_corpus(source)
        if source.endswith(".parquet")
        else index_corpus(source, num_workers=num_cores())
    )


def _matched(pattern: str, name: str) -> str:
    match = re.search(pattern, name)
    if match is None or not match.groups():
        raise UserError(
            f"`pattern` {pattern!r} finds no group in {name}: put what tells groups apart in brackets"
        )
    return match[1]


def synth(
    directory: Path,
    num_train: int = 4000,
    num_valid: int = 500,
    num_test: int = 1000,
    seconds: float = 2.0,
    sample_rate: int = 16_000,
    seed: int = 0,
    num_workers: int = 2,
) -> None:
    """Write a labelled corpus of synthetic notes in NSynth's layout.

    Args:
        directory: folder to write; the same settings again change nothing.
        num_train: notes of the training split.
        num_valid: notes of the validation split.
        num_test: notes of the test split; its instruments are not those of the training split.
        seconds: length of a note.
        sample_rate: in Hz.
        seed: another seed, other notes.
        num_workers: processes that synthesise; their number does not change the notes.
    """
    synthesize_corpus(
        directory,
        num_train=num_train,
        num_valid=num_valid,
        num_test=num_test,
        seconds=seconds,
        sample_rate=sample_rate,
        seed=seed,
        num_workers=num_workers,
    )
