"""Hashes of names, which choose splits: computed, or read from the table."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_audio.data.corpus import table as table_module
from jepa_audio.data.corpus.hashes import name_hashes
from jepa_audio.data.corpus.table import Corpus
from tests.sounds import make_corpus

NAMES = [f"{number:05}.wav" for number in range(5000)]


def test_the_hash_that_chooses_splits_is_the_one_of_all_versions():
    names = ["a.wav", "", "Ünïcode/日本.flac", "x" * 300, "shard.tar:0001.wav"]
    expected = [
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
        for name in names
    ]
    assert name_hashes(pa.chunked_array([names[:2], names[2:]])).tolist() == expected
    assert expected[0] == pytest.approx(0.4431731948)


def names_of_split(corpus: Corpus) -> list[list[str]]:
    """Names of the training, validation and test files, in their order."""
    return [part.names.to_pylist() for part in corpus.split(0.1)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The table of a corpus."""
    path = tmp_path / "table.parquet"
    make_corpus(NAMES).save(path)
    return path


def test_a_saved_table_has_the_hashes_and_they_are_not_computed_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    expected, num_computed = names_of_split(make_corpus(NAMES)), []

    def counted(names: pa.ChunkedArray) -> np.ndarray:
        num_computed.append(len(names))
        return name_hashes(names)

    monkeypatch.setattr(table_module, "name_hashes", counted)
    corpus = Corpus.load(saved)
    assert names_of_split(corpus) == expected
    assert sum(num_computed) == 1000
    assert corpus.take(np.arange(9, 3, -1)).name_hashes.tolist() == [
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
        for name in NAMES[9:3:-1]
    ]


def change(path: Path, table: pa.Table) -> None:
    """Write a table in place of a saved one, with its metadata."""
    metadata = pq.read_schema(path).metadata
    pq.write_table(table.replace_schema_metadata(metadata), path)


def other_names(table: pa.Table) -> pa.Table:
    """Give the files other names."""
    names = pa.array([f"other/{name}" for name in NAMES])
    return table.set_column(table.schema.get_field_index("source"), "source", names)


def missing_hash(table: pa.Table) -> pa.Table:
    """Remove the hash of one file."""
    hashes = table["name_hash"].to_pylist()
    hashes[2] = None
    return table.drop_columns("name_hash").append_column("name_hash", pa.array(hashes))


CHANGES = {
    "other names": other_names,
    "no hashes, as in old versions": lambda table: table.drop_columns("name_hash"),
    "a missing hash": missing_hash,
    "other type": lambda table: table.set_column(
        table.schema.get_field_index("name_hash"),
        "name_hash",
        table["name_hash"].cast(pa.string()),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_hashes_of_a_changed_table_are_computed(saved: Path, kind: str):
    change(saved, CHANGES[kind](pq.read_table(saved)))
    corpus = Corpus.load(saved)
    names = corpus.names.to_pylist()
    assert corpus.name_hashes.tolist() == name_hashes(pa.chunked_array([names])).tolist()
    assert names_of_split(corpus) == names_of_split(make_corpus(names))


def test_groups_choose_the_split_also_with_stored_hashes(tmp_path: Path):
    groups = [f"g{number % 40}" if number % 3 else "" for number in range(len(NAMES))]
    corpus = make_corpus(NAMES, group=groups)
    corpus.save(tmp_path / "table.parquet")
    loaded = Corpus.load(tmp_path / "table.parquet")
    assert names_of_split(loaded) == names_of_split(corpus)
    keys = [group or name for group, name in zip(groups, NAMES, strict=True)]
    expected = name_hashes(pa.chunked_array([keys]))
    np.testing.assert_array_equal(loaded._group_hashes(), expected)
