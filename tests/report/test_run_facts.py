"""Facts about runs: recipe, state, steps and scores; damaged folders are named, not fatal."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from jepa_audio.errors import UserError
from jepa_audio.probing.rows import append_rows
from jepa_audio.recipes import find_recipe
from jepa_audio.report.run_facts import (
    RunFacts,
    differing_settings,
    find_similar_recipe,
    flatten,
    read_facts,
)
from jepa_audio.training.run.folder import CONFIG_HEADER
from tests.probing.rows import a_row, baseline

CONFIG = {
    "run_dir": "/runs/a",
    "trainer": {"max_steps": 6, "default_root_dir": "/runs/a"},
    "model": {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "masker": {"class_path": "jepa_audio.steps.masking.RandomMasker", "init_args": {}},
    },
    "data": {"root": {"/a": 1.0, "/b": 2.0}},
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("a", step=6, lr=0.1)`: the folder of a run, with the files that a run writes."""

    def make(name: str, step: int | None = 6, logged: int = 6, lr: float = 0.003) -> Path:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        config = yaml.safe_load(yaml.safe_dump(CONFIG))
        config["model"]["optimizer"]["init_args"]["lr"] = lr
        config["run_dir"] = config["trainer"]["default_root_dir"] = str(folder)
        (folder / "config.yaml").write_text(f"{CONFIG_HEADER}2.6.6\n{yaml.safe_dump(config)}")
        if step is not None:
            content = {"state_dict": {}, "hyper_parameters": {}, "global_step": step}
            torch.save(content, folder / "checkpoints" / "last.ckpt")
        metrics = folder / "metrics" / "version_0" / "metrics.csv"
        metrics.parent.mkdir(parents=True)
        lines = "".join(f"{s},{1 / s},{0.5 + lr}\n" for s in range(2, logged + 1, 2))
        metrics.write_text(f"step,train/loss,valid/loss\n{lines}")
        return folder

    return make


def only(directory: Path) -> RunFacts:
    (run,), _ = read_facts([directory])
    return run


def test_a_run_that_reached_its_last_step_is_finished(make_run: Callable[..., Path]):
    run = only(make_run("a"))
    assert (run.label, run.state, run.step, run.max_steps) == ("a", "finished", 6, 6)
    assert run.metrics == {"train/loss": 1 / 6, "valid/loss": 0.503}
    assert run.problems == []
    assert run.written is not None


def test_a_run_below_its_last_step_is_stopped_and_counts_the_later_of_checkpoint_and_logs(
    make_run: Callable[..., Path],
):
    assert (only(make_run("a", step=2, logged=4)).state, only(make_run("b", 5, 4)).step) == (
        "stopped",
        5,
    )


def test_a_run_is_running_while_a_process_has_its_lock(make_run: Callable[..., Path]):
    folder = make_run("a", step=2, logged=2)
    with (folder / ".lock").open("w") as file:
        file.write("process 7 on here")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        run = only(folder)
        assert (run.state, run.holder) == ("running", "process 7 on here")
    assert only(folder).state == "stopped", "the lock of a killed run remains as a file"


def test_a_folder_with_only_a_configuration_has_not_started(
    make_run: Callable[..., Path], tmp_path: Path
):
    folder = make_run("a", step=None, logged=0)
    assert only(folder).state == "not started"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text("model: {}")
    assert only(tmp_path).label == "a", "a configuration that no run has written is not a run"


def test_damaged_files_are_named_and_the_other_files_are_read(make_run: Callable[..., Path]):
    folder = make_run("a", step=6, logged=4)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"PK\3\4")
    run = only(folder)
    assert (run.state, run.step) == ("stopped", 4)
    assert any("last.ckpt is damaged" in text for text in run.problems)
    for text, problem in {"a: [": "is not YAML", "- 1": "has no settings"}.items():
        (folder / "config.yaml").write_text(text)
        assert problem in " ".join(only(folder).problems)
    (folder / "config.yaml").write_bytes(b"\xff\xfe")
    assert "config.yaml" in " ".join(only(folder).problems)
    (folder / "config.yaml").unlink()
    run = only(folder)
    assert "config.yaml is missing" in " ".join(run.problems)
    assert (run.recipe, run.max_steps, run.state) == (None, None, "stopped")
    (folder / "metrics" / "version_0" / "metrics.csv").write_bytes(b"step,train/loss\n1,x\n2,0.5\n")
    assert "without numbers" in " ".join(only(folder).problems)
    for text in ("", "step,train/loss\n"):
        (folder / "metrics" / "version_0" / "metrics.csv").write_text(text)
        assert "metrics.csv is empty" in " ".join(only(folder).problems)


def test_runs_of_several_folders_with_equal_names_have_their_paths_as_labels(
    make_run: Callable[..., Path], tmp_path: Path
):
    folders = [make_run("x/a"), make_run("y/a")]
    runs, _ = read_facts(folders)
    assert [run.label for run in runs] == list(map(str, folders))
    runs, _ = read_facts([tmp_path])
    assert [run.label for run in runs] == ["x/a", "y/a"]


def test_scores_are_the_best_of_the_last_results_of_the_encoders_of_a_run(
    make_run: Callable[..., Path], tmp_path: Path
):
    make_run("mel")
    rows = [a_row(), a_row(variant="target", task="gtzan"), baseline(), a_row(variant="random")]
    append_rows(tmp_path / "probe" / "results.jsonl", rows)
    run = only(tmp_path)
    assert {task: score.value for task, score in run.scores.items()} == {
        "gtzan": 0.35,
        "nsynth_pitch": 0.35,
    }
    assert list(run.scores) == ["gtzan", "nsynth_pitch"]
    assert only(tmp_path / "mel").scores == {}
    (run,), _ = read_facts([tmp_path / "mel"], [tmp_path / "probe" / "results.jsonl"])
    assert run.scores.keys() == {"nsynth_pitch", "gtzan"}


def test_a_damaged_file_of_results_is_named(make_run: Callable[..., Path], tmp_path: Path):
    make_run("mel")
    (tmp_path / "results.jsonl").write_text("{\n")
    runs, problems = read_facts([tmp_path])
    assert len(runs) == 1
    assert "results.jsonl, line 1" in problems[0]


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    for folder, message in ((tmp_path, "no run in"), (tmp_path / "x", "no folder at")):
        with pytest.raises(UserError, match=message):
            read_facts([folder])


def test_flat_settings_have_classes_by_their_short_names():
    assert flatten(CONFIG)["model.optimizer"] == "AdamW"
    assert flatten(CONFIG)["model.optimizer.lr"] == 0.003
    assert flatten(CONFIG)["data.root"] == {"/a": 1.0, "/b": 2.0}
    items = {"callbacks": [{"class_path": "x.Y", "init_args": {"n": 1}}], "sizes": [1, 2]}
    assert flatten(items) == {"callbacks[0]": "Y", "callbacks[0].n": 1, "sizes": [1, 2]}


@pytest.mark.parametrize("name", ["demo/wavjepa", "pupujepa", "wavjepa_nat"])
def test_the_recipe_of_a_run_is_found_by_its_settings(name: str):
    settings = flatten(yaml.safe_load(find_recipe(name).read_text()))
    found = find_similar_recipe(settings)
    assert found is not None
    assert (found.name, found.changed, str(found)) == (name, [], name)
    found = find_similar_recipe(settings | {"trainer.max_steps": 7})
    assert found is not None
    assert (found.name, found.changed) == (name, ["trainer.max_steps"])
    assert str(found) == f"{name}, 1 changed"


def test_other_settings_have_no_recipe():
    assert find_similar_recipe(flatten(CONFIG)) is None


def test_differing_settings_leave_out_copies_and_paths_of_the_run(
    make_run: Callable[..., Path], tmp_path: Path
):
    make_run("a")
    make_run("b", lr=0.1)
    runs, _ = read_facts([tmp_path])
    assert list(differing_settings(runs)) == [("model.optimizer.lr", [0.003, 0.1])]
