"""`fit`, `validate` and `test` as users run them: folders, locks, damaged checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import FLAVOURS
from tests.training.run.test_checkpointing import wait_for

CONFIGS = Path(__file__).parents[2] / "configs"
# With loggers and progress bar.
SETTINGS = re.sub(r"  (logger|enable_progress_bar): false\n", "", FLAVOURS["wave"])


@pytest.fixture
def run(
    wavs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`run("fit", "--overwrite")`: exit code and standard error of a command for the folder `run`.

    All paths are relative to `tmp_path`.
    """
    from jepa_audio.cli.main import main

    (tmp_path / "wave.yaml").write_text(SETTINGS)
    (tmp_path / "sounds").symlink_to(wavs)
    monkeypatch.chdir(tmp_path)

    def call(command: str, *settings: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            main([command, "--config=wave.yaml", "--data.root=sounds", "--run_dir=run", *settings])
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def step_of(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_a_run_states_the_size_of_its_parts_in_one_line(
    run: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    assert run("fit", "--trainer.enable_model_summary=null")[0] == 0
    (line,) = (text for text in caplog.messages if "M parameters, " in text)
    for name in ("front_end", "encoder", "predictor", "target_encoder"):
        assert f"{name} 0.0" in line
    assert "M trained" in line
    assert run("fit", "--overwrite", "--trainer.enable_model_summary=true")[0] == 0
    assert sum("M parameters, " in text for text in caplog.messages) == 1


def test_a_second_run_is_refused_resumed_or_replaces_the_first_one(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "run"
    assert run("fit", "--ckpt_path=last")[0] == 0, "a job that can be requeued, at its first start"
    before = contents(folder)
    for fails in ((), ("--ckpt_path=last", "--model.encoder.embed_dim=32")):
        code, message = run("fit", *fails)
        assert code == 1
        assert contents(folder) == before
    assert "`model.encoder.embed_dim` is 32, the checkpoint has 16" in message
    for command in ("validate", "test"):
        assert run(command, "--ckpt_path=last", "--data.valid_share=0.3")[0] == 0
    assert run("validate", "--ckpt_path=last", "--model.encoder.depth=1")[0] == 1
    assert contents(folder) == before, "an evaluation writes nothing"
    assert run("fit", "--trainer.fast_dev_run=true")[0] == 0
    assert contents(folder) == before, "fast_dev_run writes nothing"

    assert run("fit", "--ckpt_path=last", "--trainer.max_steps=8")[0] == 0
    steps = {
        name: yaml.safe_load((folder / name).read_text())["trainer"]["max_steps"]
        for name in ("config.yaml", "config.1.yaml")
    }
    assert steps == {"config.yaml": 8, "config.1.yaml": 6}

    (folder / "notes.txt").write_text("mine")
    assert run("fit", "--overwrite", "--trainer.max_steps=2")[0] == 0
    assert step_of(folder) == 2
    assert (folder / "notes.txt").exists()
    assert not list(folder.glob("config.*.yaml"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["overwrite"] is False, "the saved configuration does not overwrite"


def test_a_run_that_fails_before_its_first_step_leaves_the_old_run_as_it_was(
    run: Callable, tmp_path: Path
):
    assert run("fit")[0] == 0
    before = contents(tmp_path / "run")
    assert run("fit", "--overwrite", "--data.root=nowhere")[0] == 1
    assert contents(tmp_path / "run") == before


def test_paths_in_a_saved_configuration_are_absolute_and_it_runs_in_any_folder(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from jepa_audio.cli.main import main

    assert run("fit", "--trainer.max_steps=2")[0] == 0
    assert run("fit", "--weights=run/checkpoints/last.ckpt", "--run_dir=more")[0] == 0
    config = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert config["data"]["root"] == str(tmp_path / "sounds")
    assert config["run_dir"] == str(tmp_path / "more")
    assert config["weights"] == str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["fit", "--config=../more/config.yaml", "--ckpt_path=last", "--trainer.max_steps=8"])
    assert step_of(tmp_path / "more") == 8
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damaged_checkpoints_end_every_command_in_one_sentence(run: Callable, tmp_path: Path):
    from jepa_audio.cli.main import main

    assert run("fit", "--checkpoint.every_n_train_steps=2", "--trainer.max_steps=5")[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-300])
    shutil.copytree(tmp_path / "run", tmp_path / "runs" / "damaged")
    whole = f"of step 4: `--ckpt_path {last.with_name('previous.ckpt')}`"
    for command in ("fit", "validate", "test"):
        code, message = run(command, "--ckpt_path=last", "--trainer.max_steps=5")
        assert (code, message.count("Traceback")) == (1, 0)
        assert f"{last} is damaged" in message
        assert whole in message
    code, message = run("fit", f"--weights={last}", "--run_dir=new")
    assert code == 1
    assert f"{last} is damaged" in message
    code, message = run("fit", "--ckpt_path=run/checkpoints/previous.ckpt", "--trainer.max_steps=5")
    assert code == 0, message
    assert step_of(tmp_path / "run") == 5

    (tmp_path / "run").replace(tmp_path / "runs" / "whole")
    (tmp_path / "runs" / "whole" / "metrics" / "version_0" / "metrics.csv").write_bytes(
        b"step,train/loss\n1,x\n\0"
    )
    main(["report", "runs"])
    page = (tmp_path / "runs" / "report.html").read_text()
    for file in ("damaged/checkpoints/last.ckpt", "whole/metrics/version_0/metrics.csv"):
        assert re.search(rf"{file} is (damaged|not CSV)|{file}, after line \d+: not CSV", page), (
            file
        )
    assert page.count('<span class="badge behind">damaged</span>') == 2


def test_two_processes_are_one_run_and_a_killed_run_frees_its_folder(run: Callable, tmp_path: Path):
    words = ["--config=wave.yaml", "--data.root=sounds", "--run_dir=run"]
    words += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=100000"]
    words += ["--data.batch_size=2", "--checkpoint.every_n_train_steps=2"]
    with (tmp_path / "log.txt").open("w") as log:
        first = subprocess.Popen(
            [sys.executable, "-m", "jepa_audio", "fit", *words], stdout=log, stderr=log
        )
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        wait_for(lambda: last.exists() or first.poll() is not None, 120)
        assert first.poll() is None, (tmp_path / "log.txt").read_text()
        code, message = run("fit", "--ckpt_path=last")
        assert code == 1
        assert f"process {first.pid} on" in message
        os.kill(first.pid, signal.SIGKILL)
        first.wait(60)
    code, message = run("fit")
    assert code == 1
    assert "holds a run (checkpoints/last.ckpt)" in message
    steps = step_of(tmp_path / "run") + 2
    assert run("fit", "--ckpt_path=last", f"--trainer.max_steps={steps}")[0] == 0
    assert step_of(tmp_path / "run") == steps


LINKED = {
    "trainer.default_root_dir": ("X", "run_dir"),
    "checkpoint.dirpath": ("X", "run_dir"),
    "data.sample_rate": ("8000", "model.front_end.sample_rate"),
    "data.num_channels": ("2", "model.front_end.num_channels"),
    "model.front_end.embed_dim": ("8", "model.encoder.embed_dim"),
    "model.front_end.init_args.embed_dim": ("8", "model.encoder.embed_dim"),
    "model.predictor.embed_dim": ("8", "model.encoder.embed_dim"),
}


@pytest.mark.parametrize(("key", "value", "source"), [(k, *v) for k, v in LINKED.items()])
def test_a_copy_of_another_setting_is_answered_with_the_setting_to_give(
    key: str, value: str, source: str, run: Callable, tmp_path: Path
):
    for settings in ((f"--{key}={value}",), (f"--{key}", value)):
        code, message = run("fit", *settings)
        assert code == 1
        assert f"set `--{source}` instead" in message
    nested: object = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        nested = {name: nested}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(nested))
    code, message = run("fit", "--config=own.yaml")
    assert code == 1
    assert f"own.yaml: `{key.replace('.init_args', '')}` ({value})" in message
    assert f"set `{source}` instead" in message
