"""The files, commands, options, recipes and make targets that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(path.read_text() for path in DOCUMENTS)


def test_files_exist(text: str):
    named = set(re.findall(r"(?<![\w/.])((?:configs|docs|benchmarks|tests|src)/[\w./*-]*\w)", text))
    assert len(named) > 8
    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_rooms_of_the_architecture_exist():
    layout = (ROOT / "docs" / "architecture.md").read_text().partition("src/jepa_audio/")[2]
    rooms = re.findall(r"^  (\w+(?:/|\.py))", layout.partition("configs/")[0], re.MULTILINE)
    package = ROOT / "src" / "jepa_audio"
    exist = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    exist |= {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert set(rooms) - {"__init__.py"} == exist


def test_commands_exist(text: str):
    from jepa_audio.cli.main import COMMANDS

    first = {name.split()[0] for name in COMMANDS}
    named = set(re.findall(r"jepa-audio ([a-z]+)", text))
    assert len(named) > 3
    assert named - first == set()


def test_options_exist(text: str, capsys: pytest.CaptureFixture[str]):
    from lightning.pytorch.callbacks import Callback  # noqa: F401 (its subclasses get short names)

    from jepa_audio.cli.finetune import finetune
    from jepa_audio.cli.trainer import JEPACLI

    with pytest.raises(SystemExit):
        JEPACLI(["fit", "--help"])
    with pytest.raises(SystemExit):
        finetune(["finetune", "--help"])
    accepted = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    named = {option for option in re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", text) if "." in option}
    classes = (
        "model.distance.",
        "model.encoder.",
        "trainer.callbacks",
        "model.front_end.",
        "model.masker.",
        "model.target_front_end.",
        "model.lr_schedule.",
        "model.regularizers.",
        "data.scenes.",
    )
    assert len(named) > 6
    assert {option for option in named if not option.startswith(classes)} - accepted == set()


def test_recipes_exist(text: str):
    from jepa_audio.recipes import recipes

    named = set(re.findall(r"--config[ =]([a-z_/]+)(?![\w/.-])", text))
    assert len(named) > 3
    assert named - recipes().keys() == set()
    front_ends = set(re.findall(r"--model.front_end ([a-z_]+)", text))
    assert {f"front_ends/{name}" for name in front_ends} - recipes().keys() == set()
    targets = set(re.findall(r"--model.target_front_end ([a-z_/]+)", text))
    named = {name if "/" in name else f"target_front_ends/{name}" for name in targets}
    assert len(named) > 1
    assert named - recipes().keys() == set()


def test_make_help_lists_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        "help",
        "install",
        "demo",
        "test",
        "test-slow",
        "lint",
        "type",
        "check",
        "bench",
        "docs",
    }
    assert targets <= set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
