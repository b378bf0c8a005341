"""Shards return what was packed, byte for byte, also after interruptions."""

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
import webdataset

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus import shards as shards_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import Packing, read_checksums, sha256_of, write_shards
from jepa_audio.data.corpus.table import Corpus, CorpusError, load_corpus
from jepa_audio.data.loading.clips import ClipSettings, CropDataset
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.order import SampleIndex
from tests.sounds import audio, noise, pairs, tar, write

STEP = 2**-15  # of 16 bits
RATE = 8000


def sounds(folder: Path, count: int = 5, suffix: str = ".wav") -> Corpus:
    for number in range(count):
        write(folder / "sub" / f"{number}{suffix}", audio(number, suffix[1:].upper()))
    return index_corpus(folder)


def float_file(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples.T, rate, subtype="FLOAT")
    return path


def facts(directory: Path) -> dict[str, dict[str, Any]]:
    """The JSON of every packed file by its source, with the bytes of the audio as `content`."""
    packed: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as archive:
            content = {info.name: archive.extractfile(info).read() for info in archive}
        for name in sorted(name for name in content if name.endswith(".json")):
            known, key = json.loads(content[name]), Path(name).stem
            packed[known["source"]] = {**known, "key": key, "content": content[f"{key}.flac"]}
    return packed


def samples(directory: Path) -> dict[str, np.ndarray]:
    """Samples of the packed files by their source, decoded as in training."""
    corpus = load_corpus(directory)
    rows = {member: row for row, member in enumerate(corpus.table["member"].to_pylist())}
    return {
        name: read(corpus.file(rows[f"{known['key']}.flac"]).audio)[0]
        for name, known in facts(directory).items()
    }


def packed_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Faint noise for three shards: its flac files are as small as estimated."""
    folder = tmp_path_factory.mktemp("faint")
    for number in range(9):
        samples = np.random.default_rng(number).normal(0, 100, (120_000, 2)).astype(np.int16)
        sf.write(folder / f"{number}.wav", samples, RATE)
    return index_corpus(folder)


@pytest.fixture(scope="module")
def once(faint: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three shards, packed by one worker; read-only."""
    write_shards(faint, tmp_path_factory.mktemp("once"), THREE, num_workers=1)
    return tmp_path_factory.getbasetemp() / "once0"


@pytest.fixture
def shards(once: Path, tmp_path: Path) -> Path:
    """A copy of them that a test can damage."""
    return shutil.copytree(once, tmp_path / "out")


THREE = Packing(shard_mb=1)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".aiff"])
def test_16_bit_audio_is_exact_and_keeps_its_labels(tmp_path: Path, suffix: str):
    corpus = sounds(tmp_path / "in", suffix=suffix).assign_splits(
        {"train": 0.5, "test": 0.5}, groups=list("ababa")
    )
    packed = write_shards(corpus, tmp_path / "out", Packing())
    for number in range(5):
        name = f"sub/{number}{suffix}"
        np.testing.assert_array_equal(samples(tmp_path / "out")[name][0] / STEP, noise(number))
        known = facts(tmp_path / "out")[name]
        row = corpus.table.slice(number, 1).to_pylist()[0]
        assert {field: known[field] for field in ("group", "split")} == {
            "group": "ab"[number % 2],
            "split": row["split"],
        }
        assert (known["sample_rate"], known["gain"]) == (RATE, 1.0)
    assert {(row["group"], row["split"]) for row in packed.table.to_pylist()} == {
        (row["group"], row["split"]) for row in corpus.table.to_pylist()
    }


def test_24_bits_are_kept_with_bits_24(tmp_path: Path):
    wave = np.random.default_rng(0).integers(-(2**23), 2**23, (2, 500)) * 0.9 // 1 / 2**23
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "a.wav", wave.T, RATE, subtype="PCM_24")
    # Both into the same folder: the shard is written again.
    for bits, tolerance in ((16, 0.5 * STEP), (24, 0.0)):
        write_shards(index_corpus(tmp_path / "in"), tmp_path / "out", Packing(bits=bits))
        np.testing.assert_allclose(samples(tmp_path / "out")["a.wav"], wave, atol=tolerance, rtol=0)


def test_an_unchanged_flac_is_copied_byte_for_byte(tmp_path: Path):
    sounds(tmp_path / "in", suffix=".flac")
    tar(tmp_path / "in" / "t.tar", {"9.flac": audio(9, "FLAC")})
    corpus = index_corpus(tmp_path / "in")
    write_shards(corpus, tmp_path / "same", Packing(sample_rate=RATE, mono=True, bits=24))
    copied = {name: known["content"] for name, known in facts(tmp_path / "same").items()}
    assert copied == {f"sub/{n}.flac": audio(n, "FLAC") for n in range(5)} | {
        "t.tar:9.flac": audio(9, "FLAC")
    }
    write_shards(corpus, tmp_path / "other", Packing(sample_rate=RATE // 2))
    assert not set(copied.values()) & {
        known["content"] for known in facts(tmp_path / "other").values()
    }


@pytest.mark.parametrize(
    "rates", [(16_000, 8000), (8000, 16_000), (44_100, 16_000), (11_025, 8000)]
)
@pytest.mark.parametrize("mono", [False, True])
def test_resampling_in_blocks_equals_resampling_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: tuple[int, int], mono: bool
):
    monkeypatch.setattr(shards_module, "_BLOCK_SECONDS", 1)
    before, after = rates
    for name, seconds in (("short", 0.3), ("exact", 2.0), ("long", 3.37)):
        wave = (
            np.random.default_rng(before)
            .uniform(-0.4, 0.4, (2, round(seconds * before)))
            .astype(np.float32)
        )
        float_file(tmp_path / "in" / f"{name}.wav", wave, before)
    corpus = index_corpus(tmp_path / "in")
    packed = write_shards(corpus, tmp_path / "out", Packing(after, mono))
    assert set(packed.table["sample_rate"].to_pylist()) == {after}
    for name, wave in samples(tmp_path / "out").items():
        source = torch.from_numpy(read(tmp_path / "in" / name)[0])
        expected = resample(source.mean(0, keepdim=True) if mono else source, before, after)
        assert wave.shape == expected.shape
        np.testing.assert_allclose(wave, expected.numpy(), atol=0.51 * STEP, rtol=0)


def test_loud_audio_is_scaled_and_its_gain_recorded(tmp_path: Path):
    time = np.arange(20_000) / RATE
    for name, peak in (("loud", 1.9), ("full", 1.0), ("quiet", 0.01)):
        float_file(
            tmp_path / "in" / f"{name}.wav",
            (peak * np.sin(2 * np.pi * 440 * time))[None].astype(np.float32),
        )
    write_shards(index_corpus(tmp_path / "in"), tmp_path / "out", Packing())
    gains = {name: known["gain"] for name, known in facts(tmp_path / "out").items()}
    assert gains["quiet.wav"] == 1.0
    assert gains["loud.wav"] == pytest.approx(0.999 / 1.9, rel=1e-3)
    for name, wave in samples(tmp_path / "out").items():
        before, _ = read(tmp_path / "in" / name)
        assert np.abs(wave).max() < 1 - STEP
        np.testing.assert_allclose(wave, gains[name] * before, atol=0.51 * STEP, rtol=0)


def test_16_bit_audio_at_full_scale_is_exact(tmp_path: Path):
    full = np.random.default_rng(0).integers(-(2**15), 2**15, 5000, dtype=np.int16)
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "a.wav", full, RATE)
    write_shards(index_corpus(tmp_path / "in"), tmp_path / "out", Packing())
    np.testing.assert_array_equal(samples(tmp_path / "out")["a.wav"][0] / STEP, full)


def test_resampling_does_not_clip(tmp_path: Path):
    square = (
        0.99
        * np.sign(np.sin(2 * np.pi * 100.3 * np.arange(44_100) / 44_100)).astype(np.float32)[None]
    )
    float_file(tmp_path / "in" / "a.wav", square, 44_100)
    write_shards(index_corpus(tmp_path / "in"), tmp_path / "out", Packing(16_000))
    gain = facts(tmp_path / "out")["a.wav"]["gain"]
    expected = gain * resample(torch.from_numpy(square), 44_100, 16_000).numpy()
    np.testing.assert_allclose(
        samples(tmp_path / "out")["a.wav"], expected, atol=0.51 * STEP, rtol=0
    )


def test_a_file_with_too_many_channels_for_flac_is_not_packed(tmp_path: Path):
    sounds(tmp_path / "in", 1)
    float_file(tmp_path / "in" / "nine.wav", np.full((9, 400), 0.1, np.float32))
    corpus = index_corpus(tmp_path / "in")
    packed = write_shards(corpus, tmp_path / "out", Packing())
    (reason,) = packed.table.filter(~packed.is_usable)["reason"].to_pylist()
    problem = f"{tmp_path}/in/nine.wav: 9 channels, flac allows 8: pack with `mono`"
    assert reason == f"not packed: {problem}"
    assert list(facts(tmp_path / "out")) == ["sub/0.wav"]
    assert write_shards(corpus, tmp_path / "mono", Packing(mono=True)).is_usable.all()
    np.testing.assert_allclose(
        samples(tmp_path / "mono")["nine.wav"], np.full((1, 400), 0.1), atol=STEP
    )


def test_bad_files_are_not_packed_and_a_corpus_of_bad_files_is_refused(tmp_path: Path):
    sounds(tmp_path / "in", 2)
    write(tmp_path / "in" / "bad.wav", b"no audio")
    corpus = index_corpus(tmp_path / "in")
    assert len(write_shards(corpus, tmp_path / "out", Packing())) == 2
    with pytest.raises(CorpusError, match="none of the 1 files can be used"):
        write_shards(corpus.take(~corpus.is_usable), tmp_path / "none", Packing())


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_that_disappears_affects_no_other_file(tmp_path: Path, suffix: str):
    corpus = sounds(tmp_path / "in", suffix=suffix)
    (tmp_path / "in" / "sub" / f"2{suffix}").unlink()
    packed = write_shards(corpus, tmp_path / "out", Packing())
    assert packed.is_usable.sum() == 4
    (reason,) = packed.table.filter(~packed.is_usable)["reason"].to_pylist()
    assert f"sub/2{suffix}: cannot be opened: No such file" in reason
    assert (
        index_corpus(tmp_path / "out")
        .table.sort_by("member")
        .equals(packed.table.sort_by("member"))
    )


@pytest.mark.parametrize("now", [(1, 2 * RATE), (2, RATE)])
def test_a_file_with_another_rate_or_channels_than_indexed_is_not_packed(
    tmp_path: Path, now: tuple[int, int]
):
    corpus = sounds(tmp_path / "in")
    num_channels, rate = now
    float_file(
        tmp_path / "in" / "sub" / "2.wav", np.full((num_channels, 9000), 0.1, np.float32), rate
    )
    packed = write_shards(corpus, tmp_path / "out", Packing())
    assert "sub/2.wav" not in facts(tmp_path / "out")
    assert packed.is_usable.sum() == 4


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_changed_member_of_a_tar_is_not_packed(tmp_path: Path, suffix: str):
    contents = {f"{number}{suffix}": audio(number, suffix[1:].upper()) for number in range(4)}
    tar(tmp_path / "in" / "t.tar", contents)
    corpus = index_corpus(tmp_path / "in")
    tar(
        tmp_path / "in" / "t.tar",
        {**contents, f"2{suffix}": b"q" * len(contents[f"2{suffix}"]) + b"other"},
    )
    with pytest.raises(AudioReadError, match="changed since it was indexed"):
        read(corpus.file(2).audio)
    packed = write_shards(corpus, tmp_path / "out", Packing())
    (reason,) = packed.table.filter(~packed.is_usable)["reason"].to_pylist()
    assert "changed since it was indexed" in reason
    assert f"t.tar:2{suffix}" not in facts(tmp_path / "out")


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    faint: Corpus, once: Path, tmp_path: Path
):
    write_shards(faint, tmp_path / "out", THREE, num_workers=3)
    content = packed_bytes(once)
    assert packed_bytes(tmp_path / "out") == content
    assert list(content) == ["SHA256SUMS", *(f"shard-00000{number}.tar" for number in range(3))]
    sizes = [len(content[f"shard-00000{number}.tar"]) for number in range(3)]
    assert max(sizes) < 1.3e6
    assert min(sizes[:-1]) > 0.7e6


def test_checksums_are_those_of_sha256sum(once: Path):
    content = packed_bytes(once)
    lines = content.pop("SHA256SUMS").decode().splitlines()
    assert lines == [
        f"{hashlib.sha256(shard).hexdigest()}  {name}" for name, shard in content.items()
    ]
    assert read_checksums(once) == {name: sha256_of(once / name) for name in content}


def mtimes(directory: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(directory.glob("*.tar"))]


def test_interrupted_packing_continues_with_the_unfinished_shard(
    faint: Corpus, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = shards_module._encode_flac
    encoded: list[str] = []

    def interrupted(file: Any, *arguments: Any) -> Any:
        encoded.append(file.audio.name)
        if len(encoded) == 6:  # in the second shard
            raise KeyboardInterrupt
        return encode(file, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards_module, "_encode_flac", interrupted)
        write_shards(faint, tmp_path / "out", THREE, num_workers=1)
    assert list(packed_bytes(tmp_path / "out")) == ["shard-000000.tar"]
    finished = mtimes(tmp_path / "out")
    packed = write_shards(faint, tmp_path / "out", THREE)
    assert mtimes(tmp_path / "out")[:1] == finished
    assert packed_bytes(tmp_path / "out") == packed_bytes(once)
    after = mtimes(tmp_path / "out")
    assert write_shards(faint, tmp_path / "out", THREE) == packed
    assert mtimes(tmp_path / "out") == after


@pytest.mark.parametrize(("where", "failing"), [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_no_partial_shard_and_the_command_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, failing: str
):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    corpus = sounds(tmp_path / "in")
    write_shards(corpus, tmp_path / "complete", Packing())
    with monkeypatch.context() as patch, pytest.raises(CorpusError) as error:
        patch.setattr(where, failing, full)
        write_shards(corpus, tmp_path / "out", Packing())
    assert str(error.value) == (
        f"{tmp_path / 'out'} cannot be written: No space left on device; run the same command "
        "again to continue"
    )
    assert packed_bytes(tmp_path / "out") == {}
    write_shards(corpus, tmp_path / "out", Packing())
    assert packed_bytes(tmp_path / "out") == packed_bytes(tmp_path / "complete")


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"half"), Path.unlink, os.utime])
def test_only_a_modified_shard_is_written_again(
    faint: Corpus, once: Path, shards: Path, make: Callable[[Path], object]
):
    times = mtimes(shards)
    make(shards / "shard-000001.tar")
    write_shards(faint, shards, THREE)
    assert packed_bytes(shards) == packed_bytes(once)
    assert [old == new for old, new in zip(times, mtimes(shards), strict=True)] == [
        True,
        False,
        True,
    ]


def test_only_the_shard_of_a_changed_file_is_written_again(
    faint: Corpus, shards: Path, tmp_path: Path
):
    times = mtimes(shards)
    source = next(name for name, known in facts(shards).items() if known["key"] == "000000005")
    shutil.copytree(faint.root, tmp_path / "in")
    sf.write(tmp_path / "in" / source, np.full((120_000, 2), 0.25), RATE)
    write_shards(index_corpus(tmp_path / "in"), shards, THREE)
    assert [old == new for old, new in zip(times, mtimes(shards), strict=True)] == [
        True,
        False,
        True,
    ]
    np.testing.assert_array_equal(samples(shards)[source], 0.25)


def test_a_folder_with_other_tars_is_refused(tmp_path: Path):
    corpus = sounds(tmp_path / "in", 2)
    foreign = tar(tmp_path / "out" / "mine.tar", pairs(1)).read_bytes()
    with pytest.raises(CorpusError, match=r"contains other shards \(mine.tar\)"):
        write_shards(corpus, tmp_path / "out", Packing())
    assert packed_bytes(tmp_path / "out") == {"mine.tar": foreign}
    with pytest.raises(CorpusError, match="is a file"):
        write_shards(corpus, write(tmp_path / "file"), Packing())


def test_shards_are_not_packed_into_their_own_folder(once: Path, shards: Path):
    with pytest.raises(CorpusError):
        write_shards(load_corpus(shards), shards, Packing(sample_rate=7900, shard_mb=1))
    assert packed_bytes(shards) == packed_bytes(once)


@pytest.mark.parametrize("arguments", [{"bits": 8}, {"shard_mb": 0}, {"sample_rate": 999}])
def test_an_invalid_packing_is_refused_with_its_value(arguments: dict[str, int]):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"`{name}` \({value}\)"):
        Packing(**arguments)


def test_the_table_of_shards_equals_their_index_and_moves_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packed = write_shards(sounds(tmp_path / "in"), tmp_path / "out", Packing())
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.setattr(
        index_module, "inspect", lambda audio: pytest.fail(f"{audio} was decoded again")
    )
    assert index_corpus(tmp_path / "moved").table.equals(packed.table)
    assert samples(tmp_path / "moved").keys() == {f"sub/{number}.wav" for number in range(5)}


def test_the_webdataset_package_reads_our_shards(tmp_path: Path):
    write_shards(sounds(tmp_path / "in"), tmp_path / "out", Packing())
    known = facts(tmp_path / "out")
    by_key = {facts["key"]: facts for facts in known.values()}
    packaged = list(
        webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)
    )
    assert [sample["__key__"] for sample in packaged] == sorted(by_key)
    for sample in packaged:
        metadata = json.loads(sample["json"])
        number = int(Path(metadata["source"]).stem)
        assert sample["flac"] == by_key[sample["__key__"]]["content"]
        np.testing.assert_array_equal(
            sf.read(io.BytesIO(sample["flac"]), dtype="int16")[0], noise(number)
        )


@pytest.mark.parametrize("clip_seconds", [None, 0.02])
def test_crops_from_shards_equal_crops_from_the_files(tmp_path: Path, clip_seconds: float | None):
    corpus = sounds(tmp_path / "in", 8)
    write_shards(corpus, tmp_path / "out", Packing())
    in_order = corpus.shuffled()
    assert in_order.names.to_pylist() == list(facts(tmp_path / "out"))
    settings = ClipSettings(
        16_000, 150 / 16_000, crops_per_clip=2, clip_seconds=clip_seconds, loudness_dbfs=-14.0
    )
    loose, packed = (
        CropDataset(FileTable([files]), settings)
        for files in (in_order, index_corpus(tmp_path / "out").usable())
    )
    for file in range(8):
        loose_crop, loose_bad = loose[SampleIndex(file + 10, file)]
        packed_crop, packed_bad = packed[SampleIndex(file + 10, file)]
        assert loose_bad == packed_bad == []
        assert torch.equal(torch.stack(loose_crop.waveforms), torch.stack(packed_crop.waveforms))
