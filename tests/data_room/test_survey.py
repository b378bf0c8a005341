"""The summary of a corpus, its verification, and the commands on corpora."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import Packing, write_shards
from jepa_audio.data.corpus.survey import summarize_corpus, verify_corpus
from jepa_audio.data.corpus.table import Corpus, load_corpus
from tests.sounds import audio, make_corpus, noise, pairs, tar, write

Main = Callable[..., None]


def sounds(folder: Path, count: int = 4) -> Path:
    for number in range(count):
        write(folder / f"{'ab'[number % 2]}_{number}.wav", audio(number))
    return folder


def summary(corpus: Corpus) -> str:
    page = io.StringIO()
    Console(file=page, width=120).print(summarize_corpus(corpus))
    return page.getvalue()


def test_the_summary_counts_files_and_lists_the_worst():
    names = [f"{number}.wav" for number in range(10)]
    corpus = make_corpus(
        names,
        num_frames=[8000 * 1800] * 7 + [80, 8000, 0],
        sample_rate=[8000] * 8 + [16_000, 0],
        num_channels=[1] * 8 + [2, 0],
        rms=[0.1] * 6 + [1e-4, 0.1, 0.1, 0.0],
        peak=[0.5] * 4 + [1.0] * 4 + [0.5, 0.0],
        group=["x", "y", "y", *[""] * 7],
        split=["train"] * 4 + ["test"] * 2 + [""] * 4,
        status=["ok"] * 9 + ["bad"],
        reason=[""] * 9 + ["truncated: 9 frames"],
    )
    page = summary(corpus)
    for line in (
        "9 usable files, 3.50 hours, 0.00 GB; 1 unusable",
        "8000 Hz: 8, 16000 Hz: 1",
        "1: 8, 2: 1",
        "none: 3, test: 2, train: 4",
        "groups    2",
        "300 to 3600  7      3.50",
    ):
        assert line in page
    rows = [" ".join(line.split()) for line in page.splitlines()]
    assert "shortest 7.wav 0.010 s" in rows
    assert "quietest 6.wav -80 dBFS" in rows
    assert "clipped 4 files reach full scale 44.4 %" in rows
    assert "1 truncated 9.wav" in rows
    assert "0 usable files, 0.00 hours, 0.00 GB; 1 unusable" in summary(
        corpus.take(~corpus.is_usable)
    )


@pytest.mark.parametrize("name", ["song [live].wav", "b [/x].wav"])
def test_the_summary_does_not_interpret_brackets_in_file_names(name: str):
    assert name in summary(make_corpus([name, "a.wav"]))


def packed(tmp_path: Path) -> Corpus:
    return write_shards(index_corpus(sounds(tmp_path / "in")), tmp_path / "out", Packing())


def test_an_unchanged_corpus_and_new_files_have_no_problems(tmp_path: Path):
    corpus = index_corpus(sounds(tmp_path / "in"))
    write(tmp_path / "in" / "new.wav")
    os.utime(tmp_path / "in" / "a_0.wav")
    assert verify_corpus(corpus) == []
    assert verify_corpus(packed(tmp_path)) == []


def test_missing_truncated_and_replaced_files_are_reported(tmp_path: Path):
    corpus = index_corpus(sounds(tmp_path / "in", 6))
    (tmp_path / "in" / "a_0.wav").unlink()
    write(tmp_path / "in" / "b_1.wav", audio(9))
    write(tmp_path / "in" / "a_2.wav", audio(2)[:-100])
    write(tmp_path / "in" / "b_3.wav", b"")
    assert dict(verify_corpus(corpus)) == {
        "a_0.wav": "cannot be opened: No such file or directory",
        "b_1.wav": f"`num_frames` is {len(noise(9))}, but {len(noise(1))} in the table",
        "a_2.wav": f"truncated: the header gives {2 * len(noise(2))} bytes of samples, "
        f"the file has {2 * len(noise(2)) - 100}",
        "b_3.wav": "the file is empty (0 bytes)",
    }


def test_another_sound_of_the_same_length_is_reported(tmp_path: Path):
    corpus = index_corpus(sounds(tmp_path / "in"))
    content = bytearray(audio(0))
    content[44:] = bytes(byte // 2 for byte in content[44:])
    write(tmp_path / "in" / "a_0.wav", bytes(content))
    assert [name for name, _ in verify_corpus(corpus)] == ["a_0.wav"]


@pytest.mark.parametrize("what", ["audio", "json", "end"])
def test_any_changed_byte_of_a_shard_is_reported(tmp_path: Path, what: str):
    corpus = packed(tmp_path)
    shard = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    offset = {
        "audio": corpus.table["offset"][1].as_py() + 300,
        "json": content.index(b"source"),
        "end": -1,
    }[what]
    content[offset] ^= 1
    shard.write_bytes(content)
    problems = verify_corpus(corpus)
    assert (str(shard), "its SHA-256 differs from SHA256SUMS") in problems
    assert len(problems) == (2 if what == "audio" else 1)
    shard.unlink()
    assert (str(shard), "listed in SHA256SUMS, but missing") in verify_corpus(corpus)


@pytest.fixture
def main() -> Main:
    from jepa_audio.cli.main import main

    return lambda *args: main(list(map(str, args)))


def test_data_index_writes_one_table_of_several_sources(tmp_path: Path, main: Main):
    folder, file = sounds(tmp_path / "a"), tar(tmp_path / "b.tar", pairs(2))
    main("data", "index", folder, file, "-o", tmp_path / "out.parquet")
    assert len(Corpus.load(tmp_path / "out.parquet").usable()) == 6
    with pytest.raises(SystemExit):
        main("data", "index", folder, file)


def test_data_split_groups_by_a_pattern(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
):
    index_corpus(sounds(tmp_path / "a"))
    main(
        "data",
        "split",
        tmp_path / "a",
        "{train: 0.5, valid: 0.25, test: 0.25}",
        "--pattern",
        "^([^_]+)_",
    )
    corpus = load_corpus(tmp_path / "a")
    assert corpus.table["group"].to_pylist() == ["a", "a", "b", "b"]
    split = corpus.table["split"].to_pylist()
    assert split[0] == split[1] != ""
    assert split[2] == split[3] != ""
    assert f"{split[0]}: {split.count(split[0])} files, 0.00 hours" in capsys.readouterr().out
    assert index_corpus(tmp_path / "a") == corpus  # and later indexing keeps it
    with pytest.raises(SystemExit):
        main("data", "split", tmp_path / "a", "{train: 1.0}", "--pattern", "nothing(x)")


def test_data_describe_and_verify_read_the_output_of_pack(
    tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
):
    main(
        "data",
        "pack",
        sounds(tmp_path / "a"),
        tmp_path / "out",
        "--sample_rate=4000",
        "--shard_mb=1",
    )
    assert "4 files in 1 shards, 0 files left out" in capsys.readouterr().out
    main("data", "describe", tmp_path / "out")
    assert "4000 Hz: 4" in capsys.readouterr().out
    main("data", "verify", tmp_path / "out")
    assert "all 4 usable files agree with the table" in capsys.readouterr().out
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit) as exit_error:
        main("data", "verify", tmp_path / "out")
    assert exit_error.value.code == 1
    output = capsys.readouterr()
    assert f"{shard}: its SHA-256 differs from SHA256SUMS" in output.out
    assert "1 of 4 files" in output.err
