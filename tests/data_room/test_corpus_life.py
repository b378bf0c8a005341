"""Changes of a corpus: files that change, disappear, get new labels, or are listed twice."""

import math
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import AudioInfo, inspect
from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import CHECKSUMS, Packing, write_shards
from jepa_audio.data.corpus.survey import verify_corpus
from jepa_audio.data.corpus.table import CorpusError, load_corpus
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.order import evaluation_batches
from jepa_audio.parallel import map_threads
from tests.sounds import audio, pairs, tar, write

RATE = 8000


def module(root: object, **settings: object) -> AudioDataModule:
    data = AudioDataModule(
        root, RATE, 0.01, **{"num_workers": 0, "batch_size": 2, "min_seconds": 0.0, **settings}
    )
    data.prepare_data()
    data.setup("fit")
    return data


def folder_of(path: Path, count: int = 4) -> Path:
    for number in range(count):
        write(path / f"{number}.wav", audio(number))
    return path


def test_a_file_in_two_sources_of_a_run_is_refused(tmp_path: Path):
    folder_of(tmp_path / "all" / "sub")
    write(tmp_path / "all" / "5.wav", audio(5))
    with pytest.raises(CorpusError, match=r"both contain .*sub/0\.wav: remove it from one"):
        module([str(tmp_path / "all"), str(tmp_path / "all" / "sub")])


def test_a_resumed_run_on_another_corpus_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder_of(tmp_path, 6)
    first = module(tmp_path, valid_share=0.0).train_dataloader()
    list(islice(first, 1))
    state = first.state_dict()
    module(tmp_path, valid_share=0.0).train_dataloader().load_state_dict(state)
    assert not any(
        "the files have changed since the checkpoint" in message for message in caplog.messages
    )
    (tmp_path / "3.wav").unlink()
    module(tmp_path, valid_share=0.0).train_dataloader().load_state_dict(state)
    assert any(
        "the files have changed since the checkpoint" in message for message in caplog.messages
    )


def test_a_run_refuses_a_table_with_too_many_bad_files(tmp_path: Path):
    folder_of(tmp_path / "audio", 2)
    for number in range(8):
        write(tmp_path / "audio" / f"bad{number}.wav", b"")
    index_corpus(tmp_path / "audio", tmp_path / "c.parquet", max_bad_share=1.0)
    with pytest.raises(
        CorpusError, match=r"8 of the 10 audio files of .*c\.parquet cannot be used, more than"
    ):
        module(tmp_path / "c.parquet")
    assert (
        "2 training files"
        in module(tmp_path / "c.parquet", max_bad_share=0.9, valid_share=0.0).summary
    )


def test_a_file_rewritten_after_it_was_indexed_is_replaced(tmp_path: Path):
    folder_of(tmp_path)
    data = module(tmp_path, valid_share=0.0)
    sf.write(tmp_path / "1.wav", np.full(9000, 0.5), RATE)
    list(islice(data.train_dataloader(), 8))
    assert data._bad_reads.reasons == {
        str(tmp_path / "1.wav"): "changed since it was indexed: other size"
    }


def test_files_that_could_not_be_opened_are_tried_again_and_broken_files_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder_of(tmp_path, 3)
    write(tmp_path / "broken.wav", b"")
    tried: list[str] = []

    def flaky(path: Path) -> AudioInfo:
        tried.append(path.name)
        if path.name == "1.wav" and tried.count("1.wav") == 1:
            raise AudioReadError(path, "cannot be opened: Input/output error")
        return inspect(path)

    monkeypatch.setattr(index_module, "inspect", flaky)
    assert len(index_corpus(tmp_path).usable()) == 2
    tried.clear()
    tried.append("1.wav")
    assert len(index_corpus(tmp_path).usable()) == 3
    assert tried == ["1.wav", "1.wav"]


def test_a_changed_file_keeps_its_group_and_split(tmp_path: Path):
    folder_of(tmp_path / "audio")
    table = tmp_path / "c.parquet"
    index_corpus(tmp_path / "audio", table).assign_splits({"train": 1.0}, ["x"] * 4).save(table)
    write(tmp_path / "audio" / "2.wav", audio(7))
    corpus = index_corpus(tmp_path / "audio", table)
    assert (
        corpus.table["num_frames"].to_pylist()[2]
        != load_corpus(table).table["num_frames"].to_pylist()[0]
    )
    assert corpus.table["group"].to_pylist() == ["x"] * 4
    assert corpus.table["split"].to_pylist() == ["train"] * 4


def test_new_labels_of_tars_in_a_manifest_are_applied(tmp_path: Path):
    for name in "ab":
        tar(tmp_path / f"{name}.tar", {f"{name}.wav": audio(ord(name))})
    for splits in (("train", "valid"), ("valid", "train")):
        (tmp_path / "m.csv").write_text(f"path,split\na.tar,{splits[0]}\nb.tar,{splits[1]}\n")
        rows = index_corpus(tmp_path / "m.csv").table.to_pylist()
        assert {(row["source"], row["split"]) for row in rows} == {
            ("a.tar", splits[0]),
            ("b.tar", splits[1]),
        }


@pytest.mark.parametrize("name", ["m.csv", "corpus", "foreign.parquet"])
def test_a_table_never_overwrites_another_file(tmp_path: Path, name: str):
    folder_of(tmp_path / "audio")
    (tmp_path / name).write_text("path\naudio/0.wav\n")
    with pytest.raises(ValueError, match=r"must end in \.parquet|is not a corpus table"):
        index_corpus(tmp_path / "audio", tmp_path / name)
    assert (tmp_path / name).read_text() == "path\naudio/0.wav\n"


def test_pipes_do_not_block_the_index(tmp_path: Path):
    folder_of(tmp_path, 2)
    os.mkfifo(tmp_path / "x.tar")
    os.mkfifo(tmp_path / "y.wav")
    corpus = index_corpus(tmp_path)
    reasons = dict(zip(corpus.names.to_pylist(), corpus.table["reason"].to_pylist(), strict=True))
    assert reasons["x.tar"] == reasons["y.wav"] == "not a file, but a folder, a pipe or a device"
    assert len(corpus.usable()) == 2


def test_invalid_characters_in_a_manifest_affect_only_their_line(tmp_path: Path):
    folder_of(tmp_path, 2)
    lines = [
        b'{"path": "0.wav", "group": "\\ud800"}',
        b'{"path": "a\\u0000b.wav"}',
        b'{"path": "1.wav"}',
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    corpus = index_corpus(tmp_path / "m.jsonl")
    assert corpus.usable().names.to_pylist() == ["0.wav", "1.wav"]
    reasons = [reason for reason in corpus.table["reason"].to_pylist() if reason]
    # The end of the text is that of Python, and differs between its versions.
    (reason,) = reasons
    assert reason.startswith("invalid file name: ")
    assert "embedded null" in reason
    (tmp_path / "latin.csv").write_bytes("path,group\n0.wav,é\n".encode("latin-1"))
    assert len(index_corpus(tmp_path / "latin.csv").usable()) == 1


def test_hidden_files_of_macos_are_skipped(tmp_path: Path):
    folder_of(tmp_path, 2)
    write(tmp_path / "._0.wav", b"\x00\x05\x16\x07")
    tar(tmp_path / "t.tar", {"a.wav": audio(3), "._a.wav": b"\x00\x05\x16\x07"})
    assert index_corpus(tmp_path).names.to_pylist() == ["0.wav", "1.wav", "t.tar:a.wav"]


def test_a_file_with_a_rate_that_flac_does_not_allow_is_not_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder_of(tmp_path / "in", 2)
    sf.write(tmp_path / "in" / "fast.wav", np.full(9000, 0.1), 800_000)
    packed = write_shards(index_corpus(tmp_path / "in"), tmp_path / "out", Packing())
    assert len(packed.usable()) == 2
    assert any("flac does not allow 800000 Hz" in message for message in caplog.messages)


def test_checksums_of_other_programs_are_read_and_other_files_ignored(tmp_path: Path):
    path = tar(tmp_path / "t.tar", pairs(2))
    corpus = index_corpus(tmp_path)
    (tmp_path / CHECKSUMS).write_text(f"\n{'0' * 64} *{path.name}\n{'1' * 64}  elsewhere.bin\n")
    assert verify_corpus(corpus) == [(str(path), f"its SHA-256 differs from {CHECKSUMS}")]


def test_two_runs_can_index_one_corpus_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of(tmp_path, 12)
    monkeypatch.setattr(index_module, "_SAVE_EVERY_SECONDS", 0.0)
    first, second = map_threads(lambda _: index_corpus(tmp_path), range(2), 2)
    assert first.table.equals(second.table)
    assert len(load_corpus(tmp_path).usable()) == 12
    assert sorted(path.name for path in (tmp_path / ".jepa_audio").iterdir()) == [
        "index.parquet",
        "index.skipped.csv",
    ]


def test_thread_results_are_in_order_and_few_are_pending():
    started: list[int] = []
    results = map_threads(
        lambda item: started.append(item) or item, range(50), num_workers=3, num_submitted=5
    )
    for number, result in enumerate(results):
        assert result == number
        assert max(started) <= number + 5


@pytest.mark.parametrize("num_batches", [1, 2, 3, 5, 8])
def test_even_ranks_get_equally_many_batches(num_batches: int):
    counts = {len(evaluation_batches(num_batches, 1, rank, 2, even=True)) for rank in range(2)}
    assert counts == {math.ceil(num_batches / 2)}


def test_a_corpus_that_disappears_ends_training_with_a_message(tmp_path: Path):
    folder_of(tmp_path)
    data = module(tmp_path, valid_share=0.0)
    for path in tmp_path.glob("*.wav"):
        path.unlink()
    with pytest.raises(
        CorpusError, match=r"20 files in a row cannot be read: .*and 17 more. Check that the disk"
    ):
        list(data.train_dataloader())


def test_a_table_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path: Path):
    folder_of(tmp_path / "audio")
    (tmp_path / "file").touch()
    with pytest.raises(
        CorpusError, match=r"file/c\.parquet cannot be written: .*-o TABLE\.parquet"
    ):
        index_corpus(tmp_path / "audio", tmp_path / "file" / "c.parquet")


@pytest.mark.parametrize("root", ["", [], {}, [""]])
def test_an_empty_root_is_refused(root: object):
    with pytest.raises(ValueError, match="`root` must be a source"):
        AudioDataModule(root, RATE, 0.01)
