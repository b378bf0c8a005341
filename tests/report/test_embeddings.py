"""Embeddings for pictures: files, labels, and clips of a corpus."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.report.embeddings import (
    Embeddings,
    embed_corpus,
    folders,
    is_embeddings,
    read_embeddings,
)

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
CLIPS = {
    "path": ["/x/a/1.wav", "/x/a/2.wav", "/x/b/1.wav", "/x/b/1.wav"],
    "start": [0.0, 0.0, 0.0, 1.0],
    "end": [1.0, 1.0, 1.0, 1.5],
}


def write(path: Path, **changes: object) -> Path:
    columns = {**CLIPS, "vector": VECTORS.tolist(), **changes}
    columns = {name: value for name, value in columns.items() if value is not None}
    if path.suffix == ".npz":
        np.savez(path, **{name: np.array(value) for name, value in columns.items()})
    else:
        pq.write_table(pa.table({**columns, "more": ["x"] * 4}), path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_files_of_embeddings_are_read(tmp_path, suffix):
    found = read_embeddings(write(tmp_path / f"e{suffix}"))
    assert found.paths == CLIPS["path"]
    assert found.spans.tolist() == [[0, 1], [0, 1], [0, 1], [1, 1.5]]
    assert np.array_equal(found.vectors, VECTORS)
    assert found.labels == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector": None}, "has no column `vector`"),
        ({"end": None}, "has no column `end`"),
        ({"vector": [VECTORS.tolist()] * 4}, "no frames"),
        ({"vector": [[1.0, np.nan, 0.0]] * 4}, "4 vectors are not finite"),
        ({"vector": ["a"] * 4}, "must be numbers"),
        ({"start": ["a"] * 4}, "must be numbers"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_wrong_files_are_refused(tmp_path, suffix, changes, message):
    path = write(tmp_path / f"e{suffix}", **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value)


def test_vectors_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(UserError, match="`vector`"):
        read_embeddings(write(tmp_path / "e.parquet", vector=[[1.0]] * 3 + [[1.0, 2.0]]))


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_files_that_are_no_tables_are_refused(tmp_path, suffix):
    path = tmp_path / f"e{suffix}"
    with pytest.raises(MissingFileError, match="no embeddings at"):
        read_embeddings(path)
    path.write_text("text")
    assert not is_embeddings(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_embeddings(path)


def test_labels_come_from_a_table_relative_to_its_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    names = [str(tmp_path / "audio" / f"{i}.wav") for i in range(4)]
    clips = Embeddings(names, np.zeros((4, 2)), VECTORS, ["audio"] * 4)
    table = tmp_path / "labels.csv"
    table.write_text("path,genre,split\naudio/0.wav,rock,train\naudio/2.wav,jazz,test\n")
    found = clips.labelled(table, "genre")
    assert found.labels == ["rock", "jazz"]
    assert found.label_name == "genre"
    assert np.array_equal(found.vectors, VECTORS[[0, 2]])
    assert f"2 of 4 clips have a label in {table}" in caplog.messages
    table.write_text("path,genre\nother/0.wav,rock\n")
    with pytest.raises(UserError, match="no label for any of 4 clips"):
        clips.labelled(table, "genre")
    with pytest.raises(UserError, match="no column `mood`"):
        clips.labelled(table, "mood")


def test_folders_are_named_without_their_common_part():
    assert folders(["/a/b/c/1.wav", "/a/b/d/2.wav", "/a/b/d/e/3.wav"]) == ["c", "d", "d/e"]
    assert folders(["/a/b/1.wav", "/a/b/2.wav"]) == ["b", "b"]
    assert folders(["1.wav"]) == ["."]


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_the_middle_of_every_file_is_embedded(tiny_jepa, tmp_path, flavour):
    """Files shorter and longer than a crop, in one batch."""
    generator = np.random.default_rng(0)
    lengths = {"a": 300, "b": 500, "c": 900}
    for name, length in lengths.items():
        (tmp_path / name).mkdir()
        sf.write(tmp_path / name / "1.wav", 0.1 * generator.normal(size=length), 1000)
    encoder = Encoder.from_jepa(tiny_jepa(flavour), 500)
    found = embed_corpus(encoder, str(tmp_path), 10)
    assert sorted(found.labels) == ["a", "b", "c"]
    for path, (start, end), vector in zip(found.paths, found.spans, found.vectors, strict=True):
        length = lengths[Path(path).parent.name]
        first = max(0, length - 500) // 2
        assert (start, end) == (first / 1000, (first + min(500, length)) / 1000)
        samples = sf.read(path, dtype="float32")[0][first : first + 500]
        features = encoder.encode_batch(torch.from_numpy(samples)[None, None])
        expected = features.pool()[-1][0]
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_at_most_some_clips_are_used(caplog):
    caplog.set_level("INFO")
    clips = Embeddings(CLIPS["path"], np.zeros((4, 2)), VECTORS, list("abcd"))
    assert clips.sample(4) is clips
    assert len(clips.sample(2)) == 2
    assert any("2 of 4 clips are used" in message for message in caplog.messages)
