"""The table of a corpus: its path, its validity, its splits, and sharing it between processes."""

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_audio.data.audio.read import read
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import (
    SCHEMA,
    Corpus,
    CorpusError,
    default_table_path,
    load_corpus,
)
from tests.sounds import audio, make_corpus, noise, pairs, tar, write


def split_names(corpus: Corpus, valid_share: float) -> tuple[set[str], set[str], set[str]]:
    train, valid, test = (set(files.names.to_pylist()) for files in corpus.split(valid_share))
    return train, valid, test


def splits(corpus: Corpus) -> dict[str, str]:
    return dict(zip(corpus.names.to_pylist(), corpus.table["split"].to_pylist(), strict=True))


def sounds(folder: Path, count: int = 4) -> Path:
    for number in range(count):
        write(folder / f"{'ab'[number % 2]}_{number}.wav", audio(number))
    return folder


@pytest.mark.parametrize(
    "where", ["corpus/.jepa_audio/index.parquet", "table.parquet", "corpus/table.parquet"]
)
def test_a_table_can_be_moved_together_with_its_audio(tmp_path: Path, where: str):
    sounds(tmp_path / "old" / "corpus")
    before = index_corpus(
        tmp_path / "old" / "corpus", None if "index" in where else tmp_path / "old" / where
    )
    shutil.move(tmp_path / "old", tmp_path / "new")
    corpus = Corpus.load(tmp_path / "new" / where)
    assert corpus.table.equals(before.table)
    for number in range(4):
        np.testing.assert_array_equal(
            read(corpus.file(number).audio)[0][0] * 2**15, noise([0, 2, 1, 3][number])
        )


def test_a_table_can_be_moved_without_its_audio(tmp_path: Path):
    corpus = index_corpus(sounds(tmp_path / "audio"), tmp_path / "tables" / "t.parquet")
    assert all(Path(source).is_absolute() for source in corpus.table["source"].to_pylist())
    (tmp_path / "deeper" / "down").mkdir(parents=True)
    shutil.move(tmp_path / "tables" / "t.parquet", tmp_path / "deeper" / "down")
    moved = Corpus.load(tmp_path / "deeper" / "down" / "t.parquet")
    np.testing.assert_array_equal(read(moved.file(3).audio)[0][0] * 2**15, noise(3))
    elsewhere = index_corpus(tmp_path / "audio")
    elsewhere.save(tmp_path / "other" / "t.parquet")
    shutil.move(tmp_path / "other", tmp_path / "deeper")
    assert Corpus.load(tmp_path / "deeper" / "other" / "t.parquet") == elsewhere


def test_other_files_and_versions_are_refused_with_the_remedy(tmp_path: Path):
    path = tmp_path / "t.parquet"
    with pytest.raises(
        CorpusError,
        match=rf"does not exist; create it with `jepa-audio data index SOURCE -o {path}`",
    ):
        Corpus.load(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(
        CorpusError, match=r"cannot be read as a corpus table .*index the corpus again"
    ):
        Corpus.load(path)
    ours = {b"jepa_audio.index": b"2", b"jepa_audio.root": b"."}
    wrong_version = SCHEMA.empty_table().replace_schema_metadata(
        {**ours, b"jepa_audio.index": b"1"}
    )
    foreign = pa.table({"source": ["a.wav"]})
    for other in (
        foreign,
        wrong_version,
        SCHEMA.empty_table(),
        foreign.replace_schema_metadata(ours),
    ):
        pq.write_table(other, path)
        with pytest.raises(
            CorpusError,
            match=r"t.parquet is not a corpus table of this version .*index the corpus again",
        ):
            Corpus.load(path)
        if other is wrong_version:
            assert index_corpus(sounds(tmp_path / "audio"), path).is_usable.all()  # rebuilds it
            assert len(Corpus.load(path)) == 4


DAMAGES: dict[str, tuple[str, object, str]] = {
    "no rate": ("sample_rate", None, "no `sample_rate`"),
    "rate 0": ("sample_rate", 0, "impossible `sample_rate`"),
    "negative length": ("num_frames", -5, "impossible `num_frames`"),
    "huge length": ("num_frames", 2**63 - 1, "impossible `num_frames`"),
    "no channels": ("num_channels", 0, "impossible `num_channels`"),
    "negative offset": ("offset", -1, "impossible `offset`"),
    "level is NaN": ("rms", math.nan, "impossible `rms`"),
    "peak is infinite": ("peak", math.inf, "impossible `peak`"),
    "no name": ("source", None, "no `source`"),
    "no group": ("group", None, "no `group`"),
    "no status": ("status", None, "no `status`"),
    "other status": ("status", "fine", "unknown `status`"),
    "other split": ("split", "fold1", "unknown `split`"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_row_with_an_impossible_value_is_bad_and_is_indexed_again(tmp_path: Path, damage: str):
    column, value, reason = DAMAGES[damage]
    path, folder = tmp_path / "t.parquet", sounds(tmp_path / "audio")
    whole = index_corpus(folder, path)
    table = pq.read_table(path)
    values = [value, *table[column].to_pylist()[1:]]
    number = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(number, field, pa.array(values, field.type)), path)
    damaged = Corpus.load(path)
    assert damaged.table["reason"].to_pylist() == [f"damaged table: {reason}", "", "", ""]
    assert damaged.is_usable.tolist() == [False, True, True, True]
    assert damaged.table["status"].null_count == damaged.table["source"].null_count == 0
    assert damaged.usable().seconds.min() > 0
    if column != "split":  # Splits that a table assigns stay, and the row stays bad.
        assert index_corpus(folder, path) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.set_column(8, "num_frames", pa.array([0.5, 1.5, 2.5, 3.5])),
            "it has column `num_frames` of double, not int64",
        ),
        (lambda table: table.drop_columns(["peak"]), "it has no column `peak`"),
        (
            lambda table: table.append_column("note", table["group"]),
            "it has an unknown column `note`",
        ),
    ],
)
def test_a_table_with_other_columns_is_refused_with_their_names(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
):
    path = tmp_path / "t.parquet"
    index_corpus(sounds(tmp_path / "audio"), path)
    table = pq.read_table(path)
    metadata = table.schema.metadata
    pq.write_table(change(table).replace_schema_metadata(metadata), path)
    with pytest.raises(CorpusError, match=f"t.parquet is not .*: {message}; index the corpus"):
        Corpus.load(path)


def test_a_table_that_pandas_wrote_is_read(tmp_path: Path):
    path, folder = tmp_path / "t.parquet", sounds(tmp_path / "audio")
    whole = index_corpus(folder, path)
    metadata = pq.read_schema(path).metadata
    frame = pq.read_table(path).to_pandas()
    frame["sample_rate"] = [None, *frame["sample_rate"][1:]]  # floating-point numbers and NaN
    pq.write_table(pa.Table.from_pandas(frame).replace_schema_metadata(metadata), path)
    damaged = Corpus.load(path)
    assert damaged.table["reason"].to_pylist() == ["damaged table: no `sample_rate`", "", "", ""]
    assert damaged.usable().table.equals(whole.take(np.arange(1, 4)).table)


def test_every_source_has_its_own_default_table_path(tmp_path: Path):
    folder = tmp_path / "audio"
    folder.mkdir()
    assert default_table_path(folder) == folder / ".jepa_audio" / "index.parquet"
    assert default_table_path(tmp_path / "t.parquet") == tmp_path / "t.parquet"
    sources = [folder / name for name in ("a.tar", "b.tar", "m.csv", "{a,b}.tar", "*.tar")]
    tables = {default_table_path(source) for source in sources}
    assert {path.parent for path in tables} == {folder / ".jepa_audio"}
    assert len(tables) == len(sources)
    assert default_table_path(folder) not in tables


@pytest.mark.parametrize("name", ["", "a.tar", "m.csv"])
def test_the_table_of_a_read_only_corpus_is_in_the_cache_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    tar(tmp_path / "corpus" / "a.tar", pairs(2))
    write(tmp_path / "corpus" / "b.wav")
    write(tmp_path / "corpus" / "m.csv", b"path\nb.wav\n")
    corpus = index_corpus(tmp_path / "corpus" / name)
    path = default_table_path(tmp_path / "corpus" / name)
    assert path.is_relative_to(tmp_path / "home" / ".cache" / "jepa_audio")
    assert load_corpus(tmp_path / "corpus" / name) == corpus == Corpus.load(path)
    assert not (tmp_path / "corpus" / ".jepa_audio").exists()
    shutil.move(path, tmp_path / "t.parquet")  # its root is absolute
    assert Corpus.load(tmp_path / "t.parquet") == corpus


def test_unfit_files_get_a_reason_and_bad_files_keep_theirs():
    lengths, channels = [4000, 8000, 80_000, 8000, 0], [1, 1, 1, 2, 0]
    status = {"status": ["ok"] * 4 + ["bad"], "reason": [""] * 4 + ["silent"]}
    corpus = make_corpus(list("abcde"), num_frames=lengths, num_channels=channels, **status)
    fit = corpus.mark_unfit(min_seconds=0.75, max_seconds=9.5, num_channels=1)
    assert fit.table["reason"].to_pylist() == [
        "too short: 0.5000 s, at least 0.75 s are required",
        "",
        "too long: 10 s, at most 9.5 s are allowed",
        "2 channels, 1 required",
        "silent",
    ]
    assert fit.table["status"].to_pylist() == ["bad", "ok", "bad", "bad", "bad"]
    assert corpus.mark_unfit(0.75, 9.5, 1).usable().names.to_pylist() == ["b"]
    # Both bounds are inclusive.
    assert corpus.mark_unfit(min_seconds=1.0, max_seconds=1.0).usable().names.to_pylist() == [
        "b",
        "d",
    ]
    assert corpus.usable().names.to_pylist() == list("abcd")


def test_the_shuffled_order_depends_only_on_the_names():
    names = [f"{number}.wav" for number in range(50)]
    order = make_corpus(names).shuffled().names.to_pylist()
    assert sorted(order) == sorted(names) != order
    assert make_corpus(names[::-1]).shuffled().names.to_pylist() == order
    assert [
        name for name in make_corpus([*names, "new"]).shuffled().names.to_pylist() if name != "new"
    ] == order


def test_the_splits_of_a_table_are_used_and_files_without_a_split_are_left_out(
    caplog: pytest.LogCaptureFixture,
):
    corpus = make_corpus(
        list("abcdef"), split=["train", "valid", "test", "", "train", ""], group=["g"] * 6
    )
    with caplog.at_level(logging.WARNING):
        assert split_names(corpus, 0.5) == ({"a", "e"}, {"b"}, {"c"})
    assert "2 files without a split are left out" in caplog.text
    no_valid = make_corpus(list("abcd"), split=["train", "", "test", "train"])
    for seed_share in (0.01, 0.5):
        train, valid, test = split_names(no_valid, seed_share)
        assert test == {"c"}
        assert train | valid == {"a", "b", "d"}
        assert not train & valid
        assert valid


def test_only_a_single_file_is_in_both_splits():
    assert split_names(make_corpus(["a"]), 0.1) == ({"a"}, {"a"}, set())
    assert split_names(make_corpus(["a"]), 0.0) == ({"a"}, set(), set())
    for share in (1e-9, 0.5, 1.0):
        train, valid, _ = split_names(make_corpus(["a", "b"]), share)
        assert (len(train), len(valid)) == (1, 1)
        one_group = make_corpus(list("abcd"), group=["g"] * 4)  # it must be divided
        train, valid, _ = split_names(one_group, share)
        assert train
        assert valid


@pytest.mark.parametrize("seed", range(10))
def test_no_group_is_in_two_splits_and_files_keep_their_split_when_others_are_added(seed: int):
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.05, 0.6)
    group = rng.integers(0, 60, 300)
    names = [f"{number}.wav" for number in range(300)]
    # A file without a group is a group of its own.
    groups = ["" if number == 0 else f"g{number}" for number in group]
    corpus = make_corpus(names, group=groups)
    train, valid, _ = split_names(corpus, share)
    assert train | valid == set(names)
    assert not train & valid
    for number in range(1, 60):
        assert (
            len({name in valid for name, of in zip(names, group, strict=True) if of == number}) <= 1
        )
    fewer = split_names(corpus.take(np.flatnonzero(group % 2 == 0)), share)
    assert fewer[0] <= train
    assert fewer[1] <= valid


def test_assigned_splits_have_about_their_shares_and_divide_no_group():
    groups = [f"singer {number // 3}" for number in range(3000)]
    corpus = make_corpus([f"{number}.wav" for number in range(3000)], group=groups)
    divided = corpus.assign_splits({"train": 0.7, "valid": 0.1, "test": 0.2})
    split = divided.table["split"].to_pylist()
    for name, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        assert split.count(name) / 3000 == pytest.approx(share, abs=0.05)
    assert len(set(zip(groups, split, strict=True))) == 1000
    assert divided.assign_splits({"train": 1.0}) == divided
    shares = {"train": 0.7, "valid": 0.1, "test": 0.2}
    subset = corpus.take(np.arange(0, 3000, 7)).assign_splits(shares)
    assert splits(subset).items() <= splits(divided).items()


def test_existing_splits_are_kept_and_extended_to_their_groups():
    corpus = make_corpus(
        list("abcdef"),
        group=["x", "x", "y", "y", "z", "w"],
        split=["test", "", "", "valid", "test", ""],
    )
    divided = corpus.assign_splits({"train": 1.0})
    assert divided.table["split"].to_pylist() == ["test", "test", "valid", "valid", "test", "train"]
    regrouped = corpus.assign_splits({"train": 1.0}, groups=["x"] * 2 + ["y"] * 2 + ["w"] * 2)
    assert regrouped.table["split"].to_pylist() == [
        "test",
        "test",
        "valid",
        "valid",
        "test",
        "test",
    ]


def test_a_group_in_two_splits_is_refused_and_can_be_assigned_again():
    corpus = make_corpus(list("abcd"), group=["z"] * 4, split=["test", "", "", "valid"])
    message = r"group 'z' has files in test and in valid; .*--reassign"
    with pytest.raises(CorpusError, match=message):
        corpus.assign_splits({"train": 1.0})
    reassigned = corpus.clear_splits().assign_splits({"train": 1.0})
    assert reassigned.table["split"].to_pylist() == ["train"] * 4


def test_splits_are_not_assigned_if_only_some_files_have_a_group():
    corpus = make_corpus(list("abc"), group=["x", "y", ""], split=["train", "valid", ""])
    with pytest.raises(CorpusError, match="1 of 3 files have no group"):
        corpus.assign_splits({"train": 0.5, "valid": 0.5})


def test_a_corpus_of_one_group_is_split_with_a_warning(caplog: pytest.LogCaptureFixture):
    train, valid, _ = make_corpus(list("abcdef"), group=["g"] * 6).split(0.5)
    assert len(train) + len(valid) == 6
    assert any("all files are in one group" in message for message in caplog.messages)


def test_the_existing_table_of_a_read_only_folder_is_used_without_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = index_corpus(sounds(tmp_path / "audio"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "audio" / "new.wav").write_bytes(b"")
    assert (
        default_table_path(tmp_path / "audio")
        == tmp_path / "audio" / ".jepa_audio" / "index.parquet"
    )
    assert index_corpus(tmp_path / "audio") == corpus


@pytest.mark.parametrize(
    "shares",
    [
        {"train": 0.9},
        {"train": 0.9, "dev": 0.1},
        {"train": 0.6, "valid": 0.6},
        {},
        {"train": 1.5, "valid": -0.5},
        {"train": float("nan")},
    ],
)
def test_invalid_shares_are_refused(shares: dict[str, float]):
    with pytest.raises(ValueError, match="their sum must be 1"):
        make_corpus(["a"]).assign_splits(shares)
