"""Checkpoints, configurations and result rows of the time before the package had rooms load."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.data.synthetic.corpus import synthesize_corpus
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop import WeightsError, export_weights
from jepa_audio.old_paths import current_path, with_current_paths
from jepa_audio.probing.encoders import EncoderOptions, load_encoders
from jepa_audio.probing.rows import read_rows
from jepa_audio.report.page import write_leaderboard

BEFORE = Path(__file__).parent / "data" / "before_rooms"
CHECKPOINTS = ["wave.ckpt", "mel.ckpt"]
# Every class of that time that a checkpoint or a configuration can name.
CLASSES = """
    callbacks: checkpointing.RunCheckpoint ema.TargetEncoderEMA finite.FiniteGuard
      monitor.CollapseMonitor probing.online.OnlineProbe cli.RunProgressBar
    trainer: checkpointing.AtomicCheckpointIO sharding.ShardedStrategy
    training: training.checkpointing.RunCheckpoint training.checkpointing.AtomicCheckpointIO
      training.finite_guard.FiniteGuard training.collapse_monitor.CollapseMonitor
      training.loss_log.LossLog training.progress.RunProgressBar
    data: data.datamodule.AudioDataModule data.scenes.Scenes
    model: jepa.JEPA transformer.Encoder predictor.Predictor targets.Targets
      front_ends.FrontEnd front_ends.SpectrogramFrontEnd front_ends.WaveformFrontEnd
      front_ends.base.FrontEnd front_ends.spectrogram.SpectrogramFrontEnd
      front_ends.waveform.WaveformFrontEnd front_ends.transforms.LogMel
      front_ends.transforms.CQT front_ends.transforms.VQT front_ends.transforms.Gammatone
      masking.BlockMasker masking.MixtureMasker masking.MultiBlockMasker masking.RandomMasker
      masking.SpanMasker masking.StripeMasker masking.TargetSpanMasker
      masking.blocks.BlockMasker masking.blocks.MultiBlockMasker masking.blocks.StripeMasker
      masking.mixture.MixtureMasker masking.random.RandomMasker masking.spans.SpanMasker
      masking.spans.TargetSpanMasker masking.base.Masker
      losses.MSE losses.SmoothL1 losses.NormalizedMSE
      positions.SinCosPositions positions.BinauralPositions positions.RotaryPositions
      schedules.Constant schedules.Linear schedules.Cosine schedules.WarmupCosine
      schedules.WarmupConstant
"""
OLD_PATHS = [f"jepa_audio.{word}" for word in CLASSES.split() if not word.endswith(":")]


@pytest.mark.parametrize("path", OLD_PATHS)
def test_every_old_class_is_found_at_its_present_path(path: str):
    module, _, name = current_path(path).rpartition(".")
    assert isinstance(getattr(import_module(module), name), type)


@pytest.mark.parametrize("path", OLD_PATHS)
def test_present_paths_and_other_texts_are_unchanged(path: str):
    assert current_path(current_path(path)) == current_path(path)
    package, _, rest = path.partition(".")
    for text in (rest, path.upper(), f"other.{rest}", f"{path}.more", f"{package}.new.{rest}"):
        assert current_path(text) == text


def test_paths_are_replaced_anywhere_in_nested_settings():
    old, new = "jepa_audio.losses.MSE", "jepa_audio.steps.losses.MSE"
    settings = {"a": [{"class_path": old, "init_args": {"b": (old, 1, None)}}], "c": old}
    replaced = {"a": [{"class_path": new, "init_args": {"b": (new, 1, None)}}], "c": new}
    assert with_current_paths(settings) == replaced
    assert settings["c"] == old


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("which", ["context", "target", "random"])
def test_an_old_checkpoint_is_loaded_to_encode(name: str, which: str):
    encoder = load_encoder(BEFORE / name, which)
    features = encoder.encode_batch(
        torch.randn(1, 1, 32_000, generator=torch.Generator().manual_seed(0))
    )
    assert all(torch.isfinite(layer).all() for layer in features.layers)
    weights = torch.load(BEFORE / name, weights_only=True)["state_dict"]
    if which == "context":
        loaded = encoder.encoder.state_dict()
        for key, value in loaded.items():
            assert torch.equal(value, weights[f"encoder.{key}"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_is_loaded_to_probe(name: str):
    encoders = list(load_encoders(str(BEFORE / name), EncoderOptions()))
    assert [encoder.variant for encoder in encoders] == ["random", "context", "target"]


def test_an_old_checkpoint_is_loaded_to_export(tmp_path: Path):
    with pytest.raises(WeightsError, match="the layout of PupuJEPA"):
        export_weights("pupujepa", BEFORE / "wave.ckpt", tmp_path)


@pytest.mark.parametrize("name", ["wave", "mel"])
def test_an_old_run_is_continued(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    synthesize_corpus(
        Path("corpus"),
        num_train=12,
        num_valid=2,
        num_test=2,
        seconds=2.0,
        sample_rate=16_000,
        seed=0,
        num_workers=1,
    )
    for suffix in (".yaml", ".ckpt"):
        shutil.copy(BEFORE / f"{name}{suffix}", tmp_path)
    main(
        [
            "fit",
            f"--config={name}.yaml",
            f"--ckpt_path={name}.ckpt",
            "--trainer.max_steps=4",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
        ]
    )
    last = torch.load(Path("runs") / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert "jepa_audio.transformer" not in str(last["hyper_parameters"])
    saved = yaml.safe_load((Path("runs") / name / "config.yaml").read_text())
    assert saved["model"]["encoder"]["class_path"] == current_path("jepa_audio.transformer.Encoder")


def test_a_new_run_starts_from_old_weights(tmp_path: Path):
    from jepa_audio.interop.convert import load_weights

    args = [f"--config={BEFORE / 'wave.yaml'}", f"--run_dir={tmp_path}", "--model.seed=7"]
    jepa = JEPACLI(args, run=False).model
    load_weights(jepa, BEFORE / "wave.ckpt")
    stored = torch.load(BEFORE / "wave.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[key]) for key, value in jepa.state_dict().items())


def test_old_class_paths_in_a_list_and_in_a_front_end_file_are_replaced(tmp_path: Path):
    front_end = yaml.safe_load((BEFORE / "mel.yaml").read_text())["model"]["front_end"]
    (tmp_path / "front_end.yaml").write_text(yaml.safe_dump(front_end))
    callbacks = {"trainer": {"callbacks": [{"class_path": "jepa_audio.finite.FiniteGuard"}]}}
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump(callbacks))
    cli = JEPACLI(
        [
            f"--config={BEFORE / 'wave.yaml'}",
            f"--config={tmp_path / 'callbacks.yaml'}",
            f"--model.front_end={tmp_path / 'front_end.yaml'}",
            "--model.distance=jepa_audio.losses.SmoothL1",
            f"--run_dir={tmp_path}",
        ],
        run=False,
    )
    assert type(cli.model.front_end).__name__ == "SpectrogramFrontEnd"
    assert type(cli.model.distance).__name__ == "SmoothL1"
    assert sum(type(one).__name__ == "FiniteGuard" for one in cli.trainer.callbacks) == 2


def test_old_result_rows_are_read_into_a_leaderboard(tmp_path: Path):
    shutil.copytree(BEFORE / "probe", tmp_path / "probe")
    results = tmp_path / "probe" / "results.jsonl"
    assert len(read_rows(results)) > 4
    write_leaderboard(results)
    assert "wave" in (tmp_path / "probe" / "leaderboard.md").read_text()
