"""An index has every file once, bad files with their reason, and decodes no file twice."""

import csv
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from jepa_audio.data.audio.location import AudioLocation
from jepa_audio.data.audio.read import AudioInfo, inspect
from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import (
    SCHEMA,
    Corpus,
    CorpusError,
    default_table_path,
    load_corpus,
)


def names(corpus: Corpus) -> list[str]:
    return corpus.names.to_pylist()


def write(path: Path, seconds: float = 0.5, level: float = 0.25, num_channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.full((round(8000 * seconds), num_channels), level), 8000)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "corpus" / "b.wav", seconds=1.0)
    write(tmp_path / "corpus" / "sub" / "deep" / "a.FLAC", num_channels=2)
    write(tmp_path / "corpus" / "c.wav")
    (tmp_path / "corpus" / "notes.txt").write_text("no audio")
    return tmp_path / "corpus"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the decoded files, in any order."""
    names: list[str] = []

    def recording_inspect(audio: AudioLocation) -> AudioInfo:
        names.append(audio.name)
        return inspect(audio)

    monkeypatch.setattr(index_module, "inspect", recording_inspect)
    return names


def test_every_audio_file_is_in_the_table_once_sorted_by_path(root: Path):
    corpus = index_corpus(root)
    table = corpus.table
    assert table.schema.equals(SCHEMA)
    assert names(corpus) == ["b.wav", "c.wav", "sub/deep/a.FLAC"]
    assert table["num_frames"].to_pylist() == [8000, 4000, 4000]
    assert table["num_channels"].to_pylist() == [1, 1, 2]
    assert set(table["sample_rate"].to_pylist()) == {8000}
    assert set(table["status"].to_pylist()) == {"ok"}
    for name in ("peak", "rms"):
        np.testing.assert_allclose(table[name].to_numpy(), 0.25, atol=1e-4)
    assert load_corpus(root) == corpus


def test_only_new_and_changed_files_are_decoded_again_and_removed_files_are_dropped(
    root: Path, decoded: list[str]
):
    index_corpus(root)
    assert sorted(decoded) == ["a.FLAC", "b.wav", "c.wav"]
    decoded.clear()
    index_corpus(root)
    assert decoded == []
    write(root / "new.wav")
    write(root / "b.wav", seconds=2.0)
    (root / "c.wav").unlink()
    corpus = index_corpus(root)
    assert sorted(decoded) == ["b.wav", "new.wav"]
    assert names(corpus) == ["b.wav", "new.wav", "sub/deep/a.FLAC"]
    assert corpus.table["num_frames"].to_pylist()[0] == 16_000
    (root / "new.wav").unlink()
    index_corpus(root)
    assert names(load_corpus(root)) == ["b.wav", "sub/deep/a.FLAC"]


def test_interrupted_indexing_keeps_its_decoded_files(
    root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(audio: AudioLocation) -> AudioInfo:
        if audio.name == "a.FLAC":
            raise KeyboardInterrupt
        return original(audio)

    original = index_module.inspect
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_module, "inspect", interrupted)
        index_corpus(root)
    assert sorted(decoded) == ["b.wav", "c.wav"]
    decoded.clear()
    assert names(index_corpus(root)) == ["b.wav", "c.wav", "sub/deep/a.FLAC"]
    assert decoded == ["a.FLAC"]
    assert not list(root.rglob("*.parts"))


def test_the_table_does_not_depend_on_the_number_of_threads(root: Path, tmp_path: Path):
    one, four = (
        index_corpus(root, tmp_path / f"{workers}.parquet", num_workers=workers)
        for workers in (1, 4)
    )
    assert one.table.equals(four.table)


def test_a_broken_table_is_rebuilt(root: Path, decoded: list[str]):
    corpus = index_corpus(root)
    default_table_path(root).write_bytes(b"half a table")
    assert index_corpus(root) == corpus
    assert len(decoded) == 6


def test_no_temporary_file_is_left_in_the_folder_of_the_table(root: Path):
    index_corpus(root)
    assert sorted(path.name for path in default_table_path(root).parent.iterdir()) == [
        "index.parquet",
        "index.skipped.csv",
    ]
    assert pq.read_schema(default_table_path(root)).names == [*SCHEMA.names, "name_hash"]


def test_the_table_of_a_read_only_corpus_is_in_the_home_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cache = default_table_path(root)
    assert cache.is_relative_to(tmp_path / "home" / ".cache" / "jepa_audio")
    assert cache != default_table_path(root / "sub")
    index_corpus(root)
    assert cache.exists()
    assert not (root / ".jepa_audio").exists()


def test_links_are_followed_without_cycles(root: Path, tmp_path: Path):
    write(tmp_path / "elsewhere" / "linked.wav")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "up").symlink_to(root)
    (root / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    corpus = index_corpus(root)
    assert names(corpus) == ["b.wav", "c.wav", "gone.wav", "link/linked.wav", "sub/deep/a.FLAC"]
    assert corpus.table["reason"].to_pylist()[2] == "cannot be opened: No such file or directory"


def test_bad_files_are_in_the_table_the_csv_and_the_log_once(
    root: Path, caplog: pytest.LogCaptureFixture
):
    (root / "text.wav").write_text("not audio at all " * 9)
    write(root / "silent.wav", level=0.0)
    with caplog.at_level(logging.WARNING):
        corpus = index_corpus(root)
    reasons = {
        row["source"]: row["reason"] for row in corpus.table.to_pylist() if row["status"] == "bad"
    }
    assert reasons == {
        "text.wav": "cannot be decoded: Format not recognised.",
        "silent.wav": "silent: every sample is zero",
    }
    with (default_table_path(root).parent / "index.skipped.csv").open() as file:
        assert {row["path"]: row["reason"] for row in csv.DictReader(file)} == reasons
    for path, reason in reasons.items():
        assert [path in message and reason in message for message in caplog.messages].count(
            True
        ) == 1
    assert names(corpus.usable()) == ["b.wav", "c.wav", "sub/deep/a.FLAC"]


def test_unfit_files_are_bad_in_the_result_but_not_in_the_written_table(root: Path):
    table = index_corpus(root, min_seconds=0.75, max_bad_share=1.0).table
    assert table["status"].to_pylist() == ["ok", "bad", "bad"]
    assert table["reason"].to_pylist()[1] == "too short: 0.5000 s, at least 0.75 s are required"
    assert set(load_corpus(root).table["status"].to_pylist()) == {"ok"}
    stereo = load_corpus(root).mark_unfit(num_channels=2).table
    long = load_corpus(root).mark_unfit(max_seconds=0.75).table
    assert long["reason"].to_pylist() == ["too long: 1 s, at most 0.75 s are allowed", "", ""]
    assert stereo["status"].to_pylist() == ["bad", "bad", "ok"]
    assert stereo["reason"].to_pylist()[0] == "1 channels, 2 required"


def error_message(root: Path, **arguments: float) -> str:
    with pytest.raises(CorpusError) as error:
        index_corpus(root, **arguments)
    return str(error.value)


def test_a_source_without_audio_is_refused(tmp_path: Path):
    assert (
        error_message(tmp_path / "nowhere")
        == f"the audio source {tmp_path / 'nowhere'} does not exist"
    )
    (tmp_path / "file").touch()
    assert "is not an audio source; use a folder" in error_message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no audio files" in error_message(tmp_path / "empty")
    assert ".flac, .ircam, .m1a, .m2a, .m3a, .mp1" in error_message(tmp_path / "empty")
    (tmp_path / "empty" / "song.wma").touch()
    assert "1 files are not read: 1 .wma (convert" in error_message(tmp_path / "empty")


def test_files_of_all_formats_of_libsndfile_are_read_and_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    formats = {"AIFF": "aif aiff aifc", "AU": "au snd AU", "CAF": "caf", "W64": "w64 W64"}
    formats |= {"RF64": "rf64", "WAV": "wav wave bwf WAV Bwf", "FLAC": "flac", "OGG": "ogg oga"}
    formats |= {"NIST": "sph nist", "VOC": "voc", "MP3": "mp3 mp1 mp2 m1a MP3", "IRCAM": "sf"}
    for kind, suffixes in formats.items():
        for suffix in suffixes.split():
            sf.write(tmp_path / f"{kind}.{suffix}", np.full(8000, 0.25), 8000, format=kind)
    for name in ("a.m4a", "b.M4A", "c.webm", "d.wma", "e.txt", "f.raw"):
        (tmp_path / name).touch()
    monkeypatch.setattr("jepa_audio.data.audio.formats.is_installed", lambda: False)
    with caplog.at_level(logging.WARNING):
        corpus = index_corpus(tmp_path)
    num_files = sum(len(suffixes.split()) for suffixes in formats.values())
    assert corpus.table["status"].to_pylist() == ["ok"] * num_files
    listed = "5 files are not read: 2 .m4a, 1 .raw, 1 .webm, 1 .wma (install torchcodec with"
    assert [message for message in caplog.messages if listed in message]


def write_version_2(path: Path, corpus: Corpus) -> None:
    """A table as versions without the column `decoder` wrote it."""
    table = corpus.table.drop_columns(["decoder"])
    pq.write_table(
        table.replace_schema_metadata({b"jepa_audio.index": b"2", b"jepa_audio.root": b".."}), path
    )


def test_a_table_of_an_earlier_version_is_loaded_and_its_files_are_decoded_again(
    root: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
):
    corpus = index_corpus(root)
    corpus = corpus.assign_splits({"train": 0.5, "valid": 0.5})
    table = corpus.table.set_column(8, "num_frames", pa.array([10, 20, 30]))
    write_version_2(default_table_path(root), Corpus(root, table))
    decoded.clear()
    old = load_corpus(root)
    assert "of an earlier version, which read some mp3 and ogg files too short" in caplog.text
    assert old.table.drop_columns(["decoder"]) == table.drop_columns(["decoder"])
    assert old.file(0).read_slice(0, 5, 8000).shape == (1, 5)
    assert index_corpus(root) == corpus
    assert len(decoded) == 3


def test_a_file_that_needs_torchcodec_is_decoded_again_when_it_is_installed(
    root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    manifest = root / "all.csv"
    manifest.write_text("path\nb.wav\na.m4a\n")
    (root / "a.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(12))
    monkeypatch.setattr("jepa_audio.data.audio.codec.is_installed", lambda: False)
    monkeypatch.setattr(index_module, "is_installed", lambda: False)
    (reason,) = index_corpus(manifest).table["reason"].to_pylist()[:1]
    assert "install torchcodec with `pip install 'jepa-audio[codec]'`" in reason
    index_corpus(manifest)
    assert sorted(decoded) == ["a.m4a", "b.wav"]
    monkeypatch.setattr(index_module, "is_installed", lambda: True)
    index_corpus(manifest)
    assert sorted(decoded) == ["a.m4a", "a.m4a", "b.wav"]


def test_a_folder_of_bad_files_is_refused_with_examples_and_the_path_of_the_list(tmp_path: Path):
    for number in range(7):
        (tmp_path / f"{number}.wav").touch()
    message = error_message(tmp_path)
    assert message.startswith(
        f"none of the 7 audio files of {tmp_path} can be used: 0.wav (the file is empty"
    )
    assert message.count("0 bytes") == 5
    assert str(default_table_path(tmp_path).parent / "index.skipped.csv") in message


def test_a_corpus_with_too_many_bad_files_is_refused(root: Path):
    (root / "bad.wav").touch()
    index_corpus(root, max_bad_share=0.25)
    assert "1 of the 4 audio files" in error_message(root, max_bad_share=0.24)


def test_loading_a_source_that_is_not_indexed_names_the_command(root: Path):
    with pytest.raises(CorpusError, match="jepa-audio data index"):
        load_corpus(root)


def test_a_line_feed_in_a_file_name_does_not_break_the_line_of_the_log(
    root: Path, caplog: pytest.LogCaptureFixture
):
    (root / "new\nline.wav").write_bytes(b"")
    index_corpus(root)
    (message,) = [text for text in caplog.messages if "line.wav" in text]
    assert r"new\nline.wav: the file is empty" in message
    assert "\n" not in message
