"""Batches of a folder of mixed audio files; stopped and resumed runs."""

import logging
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import CorpusError, default_table_path
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch
from tests.recorder import Recorder, make_trainer
from tests.sounds import make_corpus

RATE = 16_000

GOOD = {
    "8bit.wav": ("PCM_U8", 1, 8_000),
    "16bit.wav": ("PCM_16", 2, 44_100),
    "24bit.wav": ("PCM_24", 6, 96_000),
    "float.wav": ("FLOAT", 3, 16_000),
    "folder/a.flac": ("PCM_16", 2, 48_000),
    "folder/b.flac": ("PCM_24", 1, 22_050),
    "vorbis.ogg": ("VORBIS", 2, 32_000),
    "opus.opus": ("OPUS", 1, 48_000),
    "layer3.mp3": ("MPEG_LAYER_III", 2, 44_100),
    "apple.aiff": ("PCM_16", 4, 11_025),
    "LOUD.WAV": ("PCM_16", 5, 44_101),
}
BAD = {
    "zero.wav": "empty",
    "cut.flac": "cannot be decoded",
    "text.wav": "not recognised",
    "nan.wav": "non-finite",
    "short.wav": "too short",
    "silent.wav": "silent",
}


def write(path: Path, samples: np.ndarray, sample_rate: int = RATE, subtype: str = "FLOAT") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    container = "OGG" if path.suffix == ".opus" else None
    sf.write(path, samples.T, sample_rate, subtype=subtype, format=container)


def noise(num_channels: int, num_frames: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (num_channels, num_frames))


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    for name, (subtype, num_channels, sample_rate) in GOOD.items():
        write(tmp_path / name, noise(num_channels, sample_rate), sample_rate, subtype)
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("not audio data " * 20)
    write(tmp_path / "cut.flac", noise(1, 40_000), RATE, "PCM_16")
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:20_000])
    write(tmp_path / "nan.wav", np.full((1, RATE), np.nan))
    write(tmp_path / "short.wav", noise(1, 10))
    write(tmp_path / "silent.wav", np.zeros((1, RATE)))
    return tmp_path


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    """Twelve files of different levels."""
    for file in range(12):
        write(tmp_path / f"{file:02}.wav", np.full((1, 2000), (file + 1) / 100))
    return tmp_path


def module(
    root: Path | list[str] | dict[str, float],
    crop_seconds: float = 0.5,
    sample_rate: int = RATE,
    **arguments: object,
) -> AudioDataModule:
    data = AudioDataModule(
        root, sample_rate, crop_seconds, **{"num_workers": 0, "batch_size": 4, **arguments}
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_mixed_folder_gives_finite_batches_of_one_shape_and_logs_bad_files(
    mixture: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        data = module(mixture, crops_per_clip=2, clip_seconds=0.9, loudness_dbfs=-14.0)
    for name, reason in BAD.items():
        (message,) = [message for message in caplog.messages if name in message]
        assert reason in message
    assert not any(name in message for message in caplog.messages for name in GOOD)
    summaries = [message for message in caplog.messages if "10 training files" in message]
    assert len(summaries) == 1
    assert "6 files skipped" in summaries[0]
    num_short = sum(sf.info(mixture / name).duration < 0.5 for name in GOOD)
    assert f"{num_short} padded to" in summaries[0]
    batches = [
        *islice(data.train_dataloader(), 3),
        *data.train_dataloader(),
        *data.val_dataloader()[0],
    ]
    for batch in batches:
        assert batch.waveform.shape[1:] == (1, RATE // 2)
        assert batch.waveform.dtype == torch.float32
        assert batch.waveform.isfinite().all()
        assert (batch.waveform.square().mean(-1).sqrt() > 0.05).all()
    assert batches[0].row.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("mono", ["mean", "first", "random"])
def test_all_ways_to_one_channel_accept_all_files(mixture: Path, mono: str):
    batch = next(iter(module(mixture, mono=mono, batch_size=16).train_dataloader()))
    assert batch.waveform.shape == (16, 1, RATE // 2)
    assert batch.waveform.isfinite().all()


def test_with_kept_channels_files_with_another_number_are_skipped(
    mixture: Path, caplog: pytest.LogCaptureFixture
):
    data = module(mixture, mono="keep", num_channels=2, max_bad_share=1.0)
    assert next(iter(data.train_dataloader())).waveform.shape == (4, 2, RATE // 2)
    assert any("LOUD.WAV: 5 channels, 2 required" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "no audio files under"),
        (lambda root: (root.mkdir(), (root / "a.wav").touch()), "none of the 1 audio files"),
        (lambda root: write(root / "a.wav", noise(1, 10)), "too short: 0.0006 s"),
    ],
)
def test_a_folder_without_usable_audio_is_refused(tmp_path: Path, make, message: str):
    make(tmp_path / "root")
    with pytest.raises(CorpusError, match=message) as refusal:
        module(tmp_path / "root")
    assert str(tmp_path / "root") in str(refusal.value)


def test_the_split_contains_each_file_once_and_has_about_the_given_share():
    names = {f"{file}.wav" for file in range(1000)}
    train, valid, test = make_corpus(sorted(names)).split(0.1)
    assert set(train.names.to_pylist()) | set(valid.names.to_pylist()) == names
    assert len(train) + len(valid) == 1000
    assert 70 < len(valid) < 130
    assert len(test) == 0


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_neither_split_is_empty(share: float):
    train, valid, _ = make_corpus(list("abcde")).split(share)
    assert len(train) >= 1
    assert len(valid) >= 1
    assert len(train) + len(valid) == 5


def test_a_single_file_is_in_both_splits_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path / "only.wav", noise(1, RATE))
    data = module(tmp_path)
    assert any("used for training and validation" in message for message in caplog.messages)
    assert len(next(iter(data.train_dataloader())).row) == 4
    assert next(iter(data.val_dataloader()[0])).row.tolist() == [0]


def test_a_share_of_zero_holds_out_nothing(levels: Path):
    data = module(levels, crop_seconds=0.01, valid_share=0.0)
    assert data.val_dataloader() == []
    assert data.summary.startswith(f"{levels}: 12 training files")


def test_validation_and_test_files_can_come_from_other_folders(
    levels: Path, tmp_path_factory: pytest.TempPathFactory
):
    valid_root, test_root = tmp_path_factory.mktemp("valid"), tmp_path_factory.mktemp("test")
    for file in range(5):
        write(valid_root / f"{file}.wav", np.full((1, 2000), 0.5))
        write(test_root / f"{file}.wav", np.full((1, 2000), 0.7))
    data = module(levels, 0.01, valid_root=valid_root, test_root=test_root, num_valid_clips=3)
    (valid,), (test,) = data.val_dataloader(), data.test_dataloader()
    assert torch.cat([batch.waveform for batch in valid]).unique().tolist() == [0.5]
    assert [batch.row.tolist() for batch in valid] == [[0, 1, 2]]
    assert [batch.row.tolist() for batch in test] == [[0, 1, 2, 3], [4]]
    assert "12 training files" in data.summary
    assert "3 validation files" in data.summary


def level_of(batch: AudioBatch) -> list[int]:
    return (batch.waveform[:, 0, 0] * 100).round().long().tolist()


def test_a_table_is_used_without_indexing_its_folder(levels: Path, tmp_path: Path):
    corpus = index_corpus(levels, tmp_path / "corpus.parquet")
    write(levels / "new.wav", np.full((1, 2000), 0.9))
    data = module(tmp_path / "corpus.parquet", 0.01, valid_share=0.0)
    assert "12 training files" in data.summary
    assert len(corpus) == 12
    assert not (levels / ".jepa_audio").exists()


def test_a_list_of_sources_is_one_corpus_and_a_mapping_a_mixture(
    levels: Path, tmp_path_factory: pytest.TempPathFactory
):
    other = tmp_path_factory.mktemp("other")
    write(other / "loud.wav", np.full((1, 2000), 0.9))
    write(other / "louder.wav", np.full((1, 2000), 0.95))
    corpus = module([str(levels), str(other)], 0.01, valid_share=0.0, batch_size=14)
    assert sorted(level_of(next(iter(corpus.train_dataloader())))) == [*range(1, 13), 90, 95]
    mixture = module({str(levels): 1.0, str(other): 3.0}, 0.01, valid_share=0.0, batch_size=1000)
    share = np.mean(np.array(level_of(next(iter(mixture.train_dataloader())))) > 50)
    assert 0.7 < share < 0.8
    assert f"{levels}, {other}: 14 training files" in mixture.summary


def test_the_splits_of_the_table_are_used(levels: Path, tmp_path: Path):
    lines = [
        f"{levels / f'{file:02}.wav'},{split}"
        for file, split in enumerate(["train"] * 8 + ["val", "val", "test"])
    ]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *lines]))
    data = module(tmp_path / "split.csv", 0.01, batch_size=8)
    assert sorted(level_of(next(iter(data.train_dataloader())))) == list(range(1, 9))
    (valid,), (test,) = data.val_dataloader(), data.test_dataloader()
    assert sorted(level_of(next(iter(valid)))) == [9, 10]
    assert level_of(next(iter(test))) == [11]


def test_a_source_without_training_files_is_refused(levels: Path, tmp_path: Path):
    (tmp_path / "test.csv").write_text(f"path,split\n{levels}/00.wav,test\n")
    with pytest.raises(CorpusError, match=r"test\.csv has no training file"):
        module(tmp_path / "test.csv", 0.01)


def test_the_files_of_rows_can_be_found(levels: Path):
    data = module(levels, 0.01, crops_per_clip=2, valid_share=0.0)
    batch = next(iter(data.train_dataloader()))
    names = data.find_row_files(batch.row.tolist())
    assert [int(Path(name).stem) + 1 for name in names] == level_of(batch)[::2]


def test_a_file_that_becomes_bad_during_the_run_is_logged_once_and_counted(
    levels: Path, caplog: pytest.LogCaptureFixture
):
    data = module(levels, 0.01, valid_share=0.0, num_workers=2, batch_size=3)
    (levels / "05.wav").write_bytes(b"")
    caplog.clear()
    list(islice(data.train_dataloader(), 30))
    data.teardown("fit")
    assert [message for message in caplog.messages if "05.wav" in message] == [
        f"replaced {levels / '05.wav'} by another file: the file is empty (0 bytes)"
    ]
    assert any(
        "reads failed and were replaced, of 1 files" in message for message in caplog.messages
    )


def test_without_test_files_the_validation_files_are_tested(levels: Path):
    data = module(levels, 0.01, valid_share=0.4)
    (valid,), (test,) = data.val_dataloader(), data.test_dataloader()
    for a, b in zip(valid, test, strict=True):
        assert torch.equal(a.waveform, b.waveform)


def test_a_process_that_did_not_index_reads_the_table_of_the_folder(levels: Path):
    module(levels, 0.01)
    other = AudioDataModule(levels, RATE, 0.01)
    other.setup("fit")
    assert default_table_path(levels).exists()
    assert len(other.train_dataloader()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": []}, "`root`"),
        ({"root": {"a": 1.0, "b": 0.0}}, r"`weights` \[1.0, 0.0\] must be 2 positive numbers"),
        ({"valid_share": 1.0}, r"`valid_share` \(1\) must be < 1"),
        ({"valid_share": -0.1}, r"`valid_share` \(-0.1\) must be in \[0, 1\]"),
        ({"max_bad_share": 1.5}, r"`max_bad_share` \(1.5\) must be in \[0, 1\]"),
        ({"batch_size": 0}, r"`batch_size` \(0\) must be >= 1"),
        ({"num_workers": -1}, r"`num_workers` \(-1\) must be in \[0, 4096\]"),
        ({"min_seconds": 2.0, "max_seconds": 1.0}, r"`max_seconds` \(1.0\) must be >= 2.0"),
        ({"crop_seconds": 1e-9}, r"`crop_seconds` \(1e-09\) must be at least one sample"),
        ({"num_channels": 2}, "set `mono='keep'`"),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, settings: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        AudioDataModule(**{"root": tmp_path, "sample_rate": RATE, "crop_seconds": 1.0, **settings})


def fit(
    root: Path, folder: Path, max_steps: int, num_workers: int, ckpt_path: Path | None = None
) -> list[tuple[int, float]]:
    """(row, level) of the training samples."""
    recorder = Recorder()
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    data = AudioDataModule(root, RATE, 0.01, batch_size=2, num_workers=num_workers, valid_share=0.2)
    make_trainer(max_steps, 2, checkpoint).fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return [*zip(recorder.rows.tolist(), recorder.values.tolist(), strict=True)]


def test_a_resumed_run_reads_the_samples_of_an_uninterrupted_run(levels: Path, tmp_path: Path):
    uninterrupted = fit(levels, tmp_path / "run", max_steps=8, num_workers=0)
    assert [row for row, _ in uninterrupted] == list(range(32))
    for step in (1, 4, 6):
        checkpoint = tmp_path / "run" / f"step={step}.ckpt"
        resumed = fit(levels, tmp_path / f"from {step}", 8, num_workers=0, ckpt_path=checkpoint)
        assert resumed == uninterrupted
    # Workers prefetch samples, which a checkpoint does not count.
    assert fit(levels, tmp_path / "workers", 5, num_workers=2) == uninterrupted[:20]
    checkpoint = tmp_path / "workers" / "step=3.ckpt"
    resumed = fit(levels, tmp_path / "resumed", 8, num_workers=2, ckpt_path=checkpoint)
    assert resumed == uninterrupted


def test_an_epoch_is_an_integer_number_of_optimizer_steps(levels: Path):
    data = module(levels, 0.01, batch_size=2, valid_share=0.0)
    assert len(data.train_dataloader()) == 6
    data.trainer = pl.Trainer(
        accelerator="cpu", accumulate_grad_batches=4, logger=False, enable_progress_bar=False
    )
    assert len(data.train_dataloader()) == 8


def test_the_loaders_do_not_change_the_global_generator(levels: Path):
    data = module(levels, 0.01)
    state = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()[0]))
    assert torch.equal(torch.get_rng_state(), state)
