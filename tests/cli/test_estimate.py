"""`fit --estimate` works for every recipe, writes nothing, and has the numbers of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_audio.cli import estimate
from tests.cli.test_configs import CONFIGS, RECIPES, SMALL
from tests.cli.test_run_commands import contents, run, step_of
from tests.conftest import FLAVOURS

__all__ = ["run"]  # a fixture


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa_audio.training.trial._LOADER_SECONDS", 0.1)
    monkeypatch.setattr("jepa_audio.training.normalization.NUM_CLIPS", 12)


@pytest.fixture
def estimated(
    wavs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """`estimated("wave", "--data.batch_size=2")`: the numbers of `fit --estimate json`."""
    from jepa_audio.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(flavour: str, *settings: str) -> dict[str, Any]:
        path = Path(flavour)
        if flavour in FLAVOURS:
            path = tmp_path / f"{flavour}.yaml"
            path.write_text(FLAVOURS[flavour])
        capsys.readouterr()
        words = [f"--config={path}", f"--data.root={wavs}", "--run_dir=run", *settings]
        main(["fit", "--estimate", "json", *words])
        return json.loads(capsys.readouterr().out)

    return call


def test_the_numbers_of_a_run_with_several_masks_and_accumulated_gradients(
    estimated: Callable[..., dict[str, Any]], tiny_jepa: Callable, tmp_path: Path
):
    steps = "--trainer.max_steps=40", "--trainer.accumulate_grad_batches=3"
    costs = estimated("wave", *steps, "--model.masks_per_clip=2", "--data.crops_per_clip=2")
    assert not (tmp_path / "run").exists()

    jepa = tiny_jepa("wave")
    trained = sum(p.numel() for p in jepa.parameters() if p.requires_grad)
    copies = sum(p.numel() for p in jepa.target_encoder.parameters())
    assert costs["parameters"] == {
        "trained": trained,
        "momentum_copies": copies,
        "total": trained + copies,
    }
    tokens = costs["tokens"]
    assert tokens["per_crop"] == tokens["num_freq"] * tokens["num_time"] == 23
    assert 0 < tokens["context"] < 23
    assert tokens["target_groups"] == 2
    assert tokens["masks_per_clip"] == 2

    memory = costs["memory"]
    assert memory["gradients_bytes"] == 4 * trained
    # AdamW has two values and a step for each parameter.
    num_tensors = sum(1 for p in jepa.parameters() if p.requires_grad)
    assert memory["optimizer_bytes"] == 8 * trained + 4 * num_tensors
    assert memory["states_bytes"] == sum(
        memory[f"{name}_bytes"] for name in ("weights", "gradients", "optimizer")
    )
    assert memory["peak_bytes"] >= memory["weights_bytes"] >= 4 * (trained + copies)

    speed, loader, run = costs["speed"], costs["loader"], costs["run"]
    assert speed["timed_steps"] == 10
    assert speed["crops_per_step"] == 4 * 2 * 3
    assert speed["crops_per_second"] == pytest.approx(24 / speed["seconds_per_step"])
    assert 0 < speed["mfu"] < 1
    assert loader["keeps_up"] == (loader["crops_per_second"] >= loader["needed_crops_per_second"])
    assert (run["max_steps"], run["steps_left"], run["processes"]) == (40, 40, 1)
    assert run["hours"] == pytest.approx(40 * speed["seconds_per_step"] / 3600)
    assert costs["corpus"]["files"] == 12
    assert costs["corpus"]["hours"] == pytest.approx(11.58 / 3600, rel=0.01)
    assert costs["corpus"]["epochs"] == pytest.approx(40 * 12 / 12)
    assert costs["corpus"]["crop_hours"] == pytest.approx(40 * 12 * 2 * 0.5 / 3600)
    assert costs["disk"]["num_checkpoints"] == 3
    assert costs["disk"]["index_bytes"] > 0


def test_the_size_of_a_checkpoint_is_that_of_the_file(
    estimated: Callable[..., dict[str, Any]], run: Callable, tmp_path: Path
):
    costs = estimated("wave")
    assert run("fit")[0] == 0
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    # Names and settings, which do not grow with the model, are most of the rest here.
    assert costs["disk"]["checkpoint_bytes"] < size < costs["disk"]["checkpoint_bytes"] + 200_000
    kept = estimated("wave", "--checkpoint.keep_all=true", "--checkpoint.every_n_train_steps=2")
    assert kept["disk"]["num_checkpoints"] == 3 + 6 // 2 + 1


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_is_estimated(
    config: Path, estimated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jepa_audio.data.scenes.rooms import write_rooms

    monkeypatch.setattr(
        "jepa_audio.data.scenes.scenes.write_rooms", partial(write_rooms, num_rooms=1)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    text = config.read_text()
    settings = list(SMALL)
    if "WaveformFrontEnd" in text:
        layers = "[[8,10,5],[8,8,4],[8,4,4],[8,4,4]]"
        settings.append(f"--model.front_end.init_args.conv_layers={layers}")
    if "top_k: " in text:
        settings.append("--model.targets.top_k=1")
    costs = estimated(str(config), *settings)
    assert costs["speed"]["timed_steps"] == 2, "a run of two steps has no warm-up"
    assert costs["operations"]["total"] > 0
    assert not (tmp_path / "run").exists()


def test_the_table_names_every_part_and_callbacks_that_are_left_out(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
):
    from jepa_audio.cli.main import main

    words = ["--config=wave.yaml", "--data.root=sounds", "--run_dir=run", "--estimate"]
    words += ["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x"]
    main(["fit", *words])
    out = capsys.readouterr().out
    for name in (
        "parameters",
        "tokens of a crop",
        "context encoder",
        "target encoder",
        "predictor",
        "front end",
        "memory",
        "states",
        "speed",
        "loader",
        "time",
        "disk",
        "corpus",
    ):
        assert f"\n{name}" in out or f"\n  {name}" in out
    assert "measures without the callbacks of the run: OnExceptionCheckpoint" in caplog.text
    assert "next:" not in out
    assert not (tmp_path / "run").exists()


def test_errors_are_those_of_fit_and_a_run_in_the_folder_is_not_changed(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    code, message = run("fit", "--estimate", "--data.crop_seconds=0.01")
    assert code == 1
    assert "raise `data.crop_seconds`" in message
    code, message = run("validate", "--estimate")
    assert code == 1
    assert "`--estimate` belongs to `fit`" in message
    assert run("fit", "--estimate=yaml")[0] == 2
    assert run("fit")[0] == 0
    before = contents(tmp_path / "run")
    assert run("fit", "--estimate")[0] == 0
    code, message = run("fit", "--estimate", "--ckpt_path=last")
    assert code == 1
    assert "no optimizer step is left to measure" in message
    caplog.set_level("INFO")
    assert run("fit", "--estimate", "--ckpt_path=last", "--trainer.max_steps=9")[0] == 0
    changes = [text for text in caplog.messages if "in force from step 7" in text]
    assert any("`trainer.max_steps` is 9, the checkpoint has 6" in text for text in changes)
    assert not [text for text in changes for key in estimate.SWITCHED_OFF if key in text]
    assert contents(tmp_path / "run") == before
    assert step_of(tmp_path / "run") == 6


def test_a_batch_that_is_too_large_for_the_device_ends_in_one_sentence(
    run: Callable, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("jepa_audio.training.jepa.JEPA.training_step", fail)
    code, message = run("fit", "--estimate", "--data.batch_size=3")
    assert code == 1
    assert "a micro-batch of 3 crops does not fit into the memory of cpu" in message


@pytest.mark.parametrize(("seconds", "timed"), [(0.0, 1), (1e-9, 1), (60.0, 10)])
def test_a_trial_of_slow_steps_ends_after_a_minute(
    estimated: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    timed: int,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("jepa_audio.training.trial.MAX_SECONDS", seconds)
    monkeypatch.setattr("jepa_audio.cli.estimate.MAX_SECONDS", seconds)
    monkeypatch.setattr(
        "jepa_audio.cli.estimate.peak_flops", lambda *_: 1e6 if seconds == 1e-9 else 1e15
    )
    costs = estimated("wave", "--trainer.max_steps=40", "--data.batch_size=3")
    assert costs["speed"]["timed_steps"] == timed
    assert costs["speed"]["crops_per_step"] == 3
    assert costs["speed"]["seconds_per_step"] > 0
    assert ("a step of 3 crops needs at least" in caplog.text) == (seconds < 60)


def test_a_loader_that_is_slower_than_the_step_is_named(
    estimated: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimate, "measure_loader", lambda _: 0.5)
    costs = estimated("mel")
    assert not costs["loader"]["keeps_up"]
    assert costs["speed"]["crops_per_second"] == pytest.approx(0.5)
    assert costs["run"]["hours"] == pytest.approx(6 * 4 / 0.5 / 3600)
    assert dict(estimate._lines(costs))["loader"].startswith("is too slow")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_are_counted_together_and_one_prints(
    strategy: str, wavs: Path, tmp_path: Path
):
    (tmp_path / "wave.yaml").write_text(FLAVOURS["wave"])
    words = ["--estimate=json", "--config=wave.yaml", f"--data.root={wavs}", "--run_dir=run"]
    words += ["--trainer.devices=2", "--data.batch_size=2"]
    words += ["--config=fsdp"] if strategy == "fsdp" else ["--trainer.strategy=ddp"]
    command = [sys.executable, "-m", "jepa_audio", "fit", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert costs["run"]["processes"] == 2
    assert costs["speed"]["crops_per_step"] == 4
    trained = costs["parameters"]["trained"]
    share = 0.5 if strategy == "fsdp" else 1
    assert costs["memory"]["gradients_bytes"] == pytest.approx(4 * trained * share, rel=0.1)
    assert costs["disk"]["checkpoint_bytes"] > 12 * trained
    assert not (tmp_path / "run").exists()
