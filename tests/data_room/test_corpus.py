"""Laws of a corpus's table: where it lies, what it believes, how it is divided, and whether it is still true."""

import logging
import multiprocessing
import os
import pickle
import shutil
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_audio.data.audio.read import TarMember, read
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import (
    SCHEMA,
    Corpus,
    CorpusError,
    default_table_path,
    load_corpus,
)
from jepa_audio.data.loading.file_table import FileTable
from tests.sounds import audio, made_up, noise, pairs, tar, write


def sides(corpus: Corpus, valid_share: float) -> tuple[set[str], set[str], set[str]]:
    train, valid, test = (set(part.names.to_pylist()) for part in corpus.split(valid_share))
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
def test_a_folder_moved_together_with_its_table_is_found_again(tmp_path: Path, where: str):
    sounds(tmp_path / "old" / "corpus")
    before = index_corpus(
        tmp_path / "old" / "corpus", None if "index" in where else tmp_path / "old" / where
    )
    shutil.move(tmp_path / "old", tmp_path / "new")
    corpus = Corpus.load(tmp_path / "new" / where)
    assert corpus.table.equals(before.table)
    for number in range(4):
        np.testing.assert_array_equal(
            read(corpus.audio(number))[0][0] * 2**15, noise([0, 2, 1, 3][number])
        )


def test_a_table_moved_away_from_its_audio_still_finds_it(tmp_path: Path):
    corpus = index_corpus(sounds(tmp_path / "audio"), tmp_path / "tables" / "t.parquet")
    assert all(Path(source).is_absolute() for source in corpus.table["source"].to_pylist())
    (tmp_path / "deeper" / "down").mkdir(parents=True)
    shutil.move(tmp_path / "tables" / "t.parquet", tmp_path / "deeper" / "down")
    moved = Corpus.load(tmp_path / "deeper" / "down" / "t.parquet")
    np.testing.assert_array_equal(read(moved.audio(3))[0][0] * 2**15, noise(3))
    elsewhere = index_corpus(tmp_path / "audio")
    elsewhere.save(tmp_path / "other" / "t.parquet")
    shutil.move(tmp_path / "other", tmp_path / "deeper")
    assert Corpus.load(tmp_path / "deeper" / "other" / "t.parquet") == elsewhere


def test_what_is_no_table_of_ours_is_refused_with_the_remedy(tmp_path: Path):
    path = tmp_path / "t.parquet"
    with pytest.raises(
        CorpusError, match=rf"there is no table .*data index SOURCE -o {path}` makes one"
    ):
        Corpus.load(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(
        CorpusError, match=r"cannot be read as a table of a corpus .*index the corpus anew"
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
            CorpusError, match=r"t.parquet is no table of this version .*index the corpus anew"
        ):
            Corpus.load(path)
        if other is wrong_version:
            assert index_corpus(sounds(tmp_path / "audio"), path).is_usable.all()  # makes it anew
            assert len(Corpus.load(path)) == 4


def test_the_place_of_a_table_is_inside_or_beside_its_source_and_its_own(tmp_path: Path):
    folder = tmp_path / "audio"
    folder.mkdir()
    assert default_table_path(folder) == folder / ".jepa_audio" / "index.parquet"
    assert default_table_path(tmp_path / "t.parquet") == tmp_path / "t.parquet"
    beside = [folder / name for name in ("a.tar", "b.tar", "m.csv", "{a,b}.tar", "*.tar")]
    tables = {default_table_path(source) for source in beside}
    assert {place.parent for place in tables} == {folder / ".jepa_audio"}
    assert len(tables) == len(beside)
    assert default_table_path(folder) not in tables


@pytest.mark.parametrize("name", ["", "a.tar", "m.csv"])
def test_the_table_lies_in_the_users_cache_where_the_corpus_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    tar(tmp_path / "corpus" / "a.tar", pairs(2))
    write(tmp_path / "corpus" / "b.wav")
    write(tmp_path / "corpus" / "m.csv", b"path\nb.wav\n")
    corpus = index_corpus(tmp_path / "corpus" / name)
    place = default_table_path(tmp_path / "corpus" / name)
    assert place.is_relative_to(tmp_path / "home" / ".cache" / "jepa_audio")
    assert load_corpus(tmp_path / "corpus" / name) == corpus == Corpus.load(place)
    assert not (tmp_path / "corpus" / ".jepa_audio").exists()
    shutil.move(place, tmp_path / "t.parquet")  # absolute: it is of the same audio wherever it is
    assert Corpus.load(tmp_path / "t.parquet") == corpus


def test_files_unfit_for_a_use_say_why_and_bad_ones_keep_their_reason():
    lengths, channels = [4000, 8000, 80_000, 8000, 0], [1, 1, 1, 2, 0]
    status = {"status": ["ok"] * 4 + ["bad"], "reason": [""] * 4 + ["silent"]}
    corpus = made_up(list("abcde"), num_frames=lengths, num_channels=channels, **status)
    fit = corpus.mark_unfit(min_seconds=0.75, max_seconds=9.5, num_channels=1)
    assert fit.table["reason"].to_pylist() == [
        "too short: 0.5000 s, at least 0.75 s are needed",
        "",
        "too long: 10 s, at most 9.5 s are wanted",
        "2 channels, 1 are needed",
        "silent",
    ]
    assert fit.table["status"].to_pylist() == ["bad", "ok", "bad", "bad", "bad"]
    assert corpus.usable(0.75, 9.5, 1).names.to_pylist() == ["b"]
    assert corpus.usable(min_seconds=1.0, max_seconds=1.0).names.to_pylist() == [
        "b",
        "d",
    ]  # both bounds are fit
    assert corpus.usable().names.to_pylist() == list("abcd")


def test_shuffling_depends_on_the_names_alone():
    names = [f"{number}.wav" for number in range(50)]
    order = made_up(names).shuffled().names.to_pylist()
    assert sorted(order) == sorted(names) != order
    assert made_up(names[::-1]).shuffled().names.to_pylist() == order
    assert [
        name for name in made_up([*names, "new"]).shuffled().names.to_pylist() if name != "new"
    ] == order


def test_the_splits_of_a_table_are_believed_and_files_without_one_left_out(
    caplog: pytest.LogCaptureFixture,
):
    corpus = made_up(
        list("abcdef"), split=["train", "valid", "test", "", "train", ""], group=["g"] * 6
    )
    with caplog.at_level(logging.WARNING):
        assert sides(corpus, 0.5) == ({"a", "e"}, {"b"}, {"c"})
    assert "2 files have no split and are left out" in caplog.text
    no_valid = made_up(list("abcd"), split=["train", "", "test", "train"])
    for seed_share in (0.01, 0.5):
        train, valid, test = sides(no_valid, seed_share)
        assert test == {"c"}
        assert train | valid == {"a", "b", "d"}
        assert not train & valid
        assert valid


def test_few_files_are_on_both_sides_only_if_there_is_one():
    assert sides(made_up(["a"]), 0.1) == ({"a"}, {"a"}, set())
    assert sides(made_up(["a"]), 0.0) == ({"a"}, set(), set())
    for share in (1e-9, 0.5, 1.0):
        train, valid, _ = sides(made_up(["a", "b"]), share)
        assert (len(train), len(valid)) == (1, 1)
        train, valid, _ = sides(
            made_up(list("abcd"), group=["g"] * 4), share
        )  # one group has to be divided
        assert train
        assert valid


@pytest.mark.parametrize("seed", range(10))
def test_no_group_is_on_two_sides_and_a_file_stays_where_it_is_when_others_come(seed: int):
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.05, 0.6)
    group = rng.integers(0, 60, 300)
    names = [f"{number}.wav" for number in range(300)]
    groups = [
        "" if number == 0 else f"g{number}" for number in group
    ]  # those of no group stand for themselves
    corpus = made_up(names, group=groups)
    train, valid, _ = sides(corpus, share)
    assert train | valid == set(names)
    assert not train & valid
    for number in range(1, 60):
        assert (
            len({name in valid for name, of in zip(names, group, strict=True) if of == number}) <= 1
        )
    fewer = sides(corpus.take(np.flatnonzero(group % 2 == 0)), share)
    assert fewer[0] <= train
    assert fewer[1] <= valid


def test_the_shares_of_splits_are_met_roughly_and_no_group_is_divided():
    groups = [f"singer {number // 3}" for number in range(3000)]
    corpus = made_up([f"{number}.wav" for number in range(3000)], group=groups)
    divided = corpus.assign_splits({"train": 0.7, "valid": 0.1, "test": 0.2})
    split = divided.table["split"].to_pylist()
    for name, share in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        assert split.count(name) / 3000 == pytest.approx(share, abs=0.05)
    assert len(set(zip(groups, split, strict=True))) == 1000
    assert divided.assign_splits({"train": 1.0}) == divided
    some = corpus.take(np.arange(0, 3000, 7)).assign_splits(
        {"train": 0.7, "valid": 0.1, "test": 0.2}
    )
    assert splits(some).items() <= splits(divided).items()


def test_existing_splits_stay_and_their_groups_follow_them():
    corpus = made_up(
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


def test_a_group_that_is_divided_already_is_refused_and_can_be_divided_anew():
    corpus = made_up(list("abcd"), group=["z"] * 4, split=["test", "", "", "valid"])
    with pytest.raises(
        CorpusError, match=r"group 'z' holds files for test and for valid: .*--anew"
    ):
        corpus.assign_splits({"train": 1.0})
    anew = corpus.clear_splits().assign_splits({"train": 1.0})
    assert anew.table["split"].to_pylist() == ["train"] * 4


def test_new_files_without_a_group_are_not_divided_beside_those_with_one():
    corpus = made_up(list("abc"), group=["x", "y", ""], split=["train", "valid", ""])
    with pytest.raises(CorpusError, match="1 of 3 files have no group"):
        corpus.assign_splits({"train": 0.5, "valid": 0.5})


def test_a_corpus_of_one_group_is_divided_with_a_warning(caplog: pytest.LogCaptureFixture):
    train, valid, _ = made_up(list("abcdef"), group=["g"] * 6).split(0.5)
    assert len(train) + len(valid) == 6
    assert any("all files are of one group" in message for message in caplog.messages)


def test_a_table_that_is_there_is_found_where_the_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = index_corpus(sounds(tmp_path / "audio"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "audio" / "new.wav").write_bytes(b"")
    assert (
        default_table_path(tmp_path / "audio")
        == tmp_path / "audio" / ".jepa_audio" / "index.parquet"
    )
    assert index_corpus(tmp_path / "audio") == corpus, "and believed as it is"


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
def test_shares_that_are_none_are_refused(shares: dict[str, float]):
    with pytest.raises(ValueError, match="together 1"):
        made_up(["a"]).assign_splits(shares)


def test_files_of_several_corpora_follow_each_other(tmp_path: Path):
    loose = index_corpus(sounds(tmp_path / "loose", 3))
    packed = index_corpus(tar(tmp_path / "t.tar", pairs(2)))
    files = FileTable([loose.usable(), loose.take(np.arange(0)), packed.usable()])
    assert (len(files), files.sizes) == (5, [3, 0, 2])
    assert files.num_channels.tolist() == [1] * 5
    assert [isinstance(file.audio, TarMember) for file in files] == [False] * 3 + [True] * 2
    for file, number in zip(files, (0, 2, 1, 0, 1), strict=True):
        assert (file.num_frames, file.sample_rate, file.num_channels) == (
            len(noise(number)),
            8000,
            1,
        )
        np.testing.assert_array_equal(read(file.audio)[0][0] * 2**15, noise(number))
    with pytest.raises(IndexError):
        files[5]
    with pytest.raises(CorpusError, match=f"no usable audio file under {loose.root}"):
        FileTable([loose.take(np.arange(0))])


def tell(files: FileTable, answer: Connection) -> None:
    """What another process sees of the files."""
    answer.send((len(files), files.sizes, files[777], os.fstat(files._descriptor).st_ino))


def test_another_process_maps_the_same_table_instead_of_a_copy():
    names = [f"{number:05}.wav" for number in range(5000)]
    files = FileTable([made_up(names, num_frames=list(range(5000)))])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=tell, args=(files, there))
    process.start()
    try:
        assert here.poll(60)
        assert here.recv() == (5000, [5000], files[777], os.fstat(files._descriptor).st_ino)
    finally:
        process.join(60)
    assert process.exitcode == 0
    sent = ForkingPickler.dumps(files)  # through a queue
    assert len(sent) < 2000
    assert list(pickle.loads(sent)) == list(files)
