"""The commands printed at the end of a run can be pasted, and name only files that exist."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_audio.class_paths import trusting
from jepa_audio.cli.main import COMMANDS
from jepa_audio.cli.next_commands import next_commands
from tests.cli.test_run_commands import run

__all__ = ["run"]  # a fixture


def commands_in(text: str) -> dict[str, list[str]]:
    lines = [line.split(maxsplit=1) for line in text.partition("next:\n")[2].splitlines()]
    return {name: shlex.split(command) for name, command in lines}


def test_the_end_of_a_run_prints_the_commands_that_continue(
    run: Callable, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    main(["fit", "--config=wave.yaml", "--data.root=sounds", "--run_dir=run"])
    found = commands_in(capsys.readouterr().out)
    assert found.keys() == {"curves", "report", "probe", "embeddings"}
    assert found["curves"] == ["tensorboard", "--logdir", "run/tensorboard"]
    assert found["report"] == ["jepa-audio", "report", "run"]
    assert Path(found["probe"][3]).is_file()
    assert found["embeddings"][:4] == ["jepa-audio", "embed", "run", "sounds"]
    assert {words[1] for words in found.values() if words[0] == "jepa-audio"} - {"embed"} <= set(
        COMMANDS
    )


def test_the_commands_trust_the_module_of_an_own_class(
    run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    Path("own_masks.py").write_text(
        "from jepa_audio.steps.masking import SpanMasker\nclass Own(SpanMasker): pass\n"
    )
    monkeypatch.syspath_prepend(".")
    words = ["--config=wave.yaml", "--data.root=sounds", "--run_dir=run"]
    main(["fit", *words, "--model.masker.class_path=own_masks.Own"])
    found = commands_in(capsys.readouterr().out)
    for name in ("report", "probe", "embeddings"):
        assert found[name][-2:] == ["--trust", "own_masks"]
    main(found["embeddings"][1:])
    assert Path("run/embeddings.parquet").is_file()


def test_a_run_that_writes_nothing_prints_no_commands(
    run: Callable, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    words = ["fit", "--config=wave.yaml", "--data.root=sounds", "--run_dir=run"]
    main([*words, "--trainer.fast_dev_run=true"])
    assert "next:" not in capsys.readouterr().out
    main([*words, "--trainer.logger=false"])
    assert commands_in(capsys.readouterr().out).keys() == {"probe", "embeddings"}


def test_paths_are_quoted_and_options_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "my runs" / "a'b"
    for part in ("tensorboard", "metrics", "checkpoints"):
        (folder / part).mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    with trusting(["my_package"]):
        found = commands_in(next_commands(folder, ["/data/my audio", "s3://bucket/x y"]))
    assert found["report"] == ["jepa-audio", "report", str(folder), "--trust", "my_package"]
    assert found["embeddings"][3:5] == ["/data/my audio", "s3://bucket/x y"]
    monkeypatch.chdir(tmp_path)
    assert commands_in(next_commands(folder, []))["report"][2] == "my runs/a'b"
    assert next_commands(tmp_path / "empty", []) == ""
