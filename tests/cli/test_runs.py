"""The commands `runs ls`, `show`, `compare` and `best`, as users run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_audio.cli.main import main
from jepa_audio.probing.rows import append_rows
from tests.probing.rows import a_row
from tests.report.test_run_facts import make_run

__all__ = ["make_run"]  # a fixture


@pytest.fixture
def runs(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, of which one is damaged, and probe results of another one."""
    monkeypatch.chdir(tmp_path)
    make_run("runs/mel")
    make_run("runs/low", step=4, logged=4, lr=0.001)
    (make_run("runs/damaged", step=2, lr=0.1) / "config.yaml").write_text("a: [")
    append_rows(tmp_path / "probe" / "results.jsonl", [a_row()])
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main(["runs", *words])
    return capsys.readouterr().out


@pytest.mark.usefixtures("runs")
def test_ls_lists_all_runs_and_names_damage(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    out = answer(capsys, "ls", "runs", "--results", "[probe/results.jsonl]")
    lines = {line.split()[0]: line for line in out.splitlines() if "/" in line}
    assert lines.keys() == {"damaged", "low", "mel"}
    assert "6/6" in lines["mel"]
    assert "finished" in lines["mel"]
    assert "nsynth_pitch 0.350 (+0.100 to random-init)" in lines["mel"]
    assert "stopped" in lines["low"]
    assert "6/?" in lines["damaged"]
    assert "config.yaml is not YAML" in caplog.text


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("words", [["runs", "--json"], ["--json", "runs"], ["--json=true", "runs"]])
def test_json_can_be_given_before_and_after_the_folders(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    found = json.loads(answer(capsys, "ls", *words))
    assert [run["state"] for run in found] == ["stopped", "stopped", "finished"]
    assert [run["run"] for run in found] == ["damaged", "low", "mel"]
    assert found[2]["metrics"]["train/loss"] == pytest.approx(1 / 6)
    assert found[0]["max_steps"] is None


@pytest.mark.usefixtures("runs")
def test_show_has_the_facts_of_a_run_and_the_command_that_continues_it(
    capsys: pytest.CaptureFixture[str],
):
    out = answer(capsys, "show", "runs/low")
    for text in ("stopped", "4/6", "train/loss", "last.ckpt"):
        assert text in out
    assert "jepa-audio fit --config runs/low/config.yaml --ckpt_path last" in out
    assert "continue it" not in answer(capsys, "show", "runs/mel")
    found = json.loads(answer(capsys, "show", "runs/mel", "--json"))
    assert found[0]["settings"]["model.optimizer.lr"] == 0.003


@pytest.mark.usefixtures("runs")
def test_compare_shows_what_differs(capsys: pytest.CaptureFixture[str]):
    out = answer(capsys, "compare", "runs")
    line = next(line for line in out.splitlines() if "model.optimizer.lr" in line)
    assert line.split() == ["model.optimizer.lr", "unknown", "0.001", "0.003"]
    assert "model.masker" not in out
    losses = next(line for line in out.splitlines() if "valid loss" in line)
    assert losses.split()[2:] == ["0.6", "0.501", "0.503"]
    found = json.loads(answer(capsys, "compare", "runs/low", "runs/mel", "--json"))
    assert found["settings"] == {"model.optimizer.lr": {"low": 0.001, "mel": 0.003}}
    with pytest.raises(SystemExit):
        main(["runs", "compare", "runs/mel"])
    assert "only one run in runs/mel" in capsys.readouterr().err


@pytest.mark.usefixtures("runs")
def test_best_ranks_by_a_metric_or_a_task(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    def ranking(*words: str) -> list[str]:
        return [run["run"] for run in json.loads(answer(capsys, "best", "runs", *words, "--json"))]

    caplog.set_level("INFO")
    assert ranking() == ["low", "mel", "damaged"], "a low loss is good"
    assert ranking("--order", "highest") == ["damaged", "mel", "low"]
    assert ranking("--by", "nsynth_pitch", "--results", "[probe/results.jsonl]") == ["mel"]
    assert "without nsynth_pitch: damaged, low" in caplog.text
    task = ("--by", "nsynth_pitch", "--results", "[probe/results.jsonl]")
    (found,) = json.loads(answer(capsys, "best", "runs", *task, "--json"))
    assert found["scores"] == {"nsynth_pitch": 0.35}
    assert found["against_random"]["nsynth_pitch"]["verdict"] == "ahead"
    assert "0.350 (+0.100 to random-init)" in answer(capsys, "best", "runs", *task)
    assert "valid/loss (lowest)" in answer(capsys, "best", "runs")
    with pytest.raises(SystemExit):
        main(["runs", "best", "runs", "--by", "valid/los"])
    assert "did you mean 'valid/loss'?" in capsys.readouterr().err
