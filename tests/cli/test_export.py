"""The commands `export ...` as they are in docs/export.md."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_audio.cli import export
from jepa_audio.cli.main import main
from jepa_audio.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def run(tiny_cli: Callable) -> Path:
    cli = tiny_cli("wave", "--trainer.max_steps=2", "--data.crop_seconds=0.5")
    cli.trainer.fit(cli.model, cli.datamodule)
    return Path(cli.trainer.checkpoint_callback.dirpath).parent


def command(kind: str) -> list[str]:
    """The words of the first command `export KIND` of the document."""
    (line, *_) = re.findall(
        rf"^jepa-audio (export {kind} .*?)(?: +#.*)?$", DOCUMENT.read_text(), re.MULTILINE
    )
    return shlex.split(line)


def call(kind: str, run: Path) -> None:
    main([str(run) if word == "RUN" else word for word in command(kind)])


def test_a_folder_for_transformers_is_written_and_exported_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    call("hf", run)
    names = {path.name for path in Path("exported/mine").iterdir()}
    code = "modeling_jepa_audio.py"
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        code,
    }
    assert [path.name for path in Path("exported").iterdir()] == ["mine"]
    main(["export", "hf", "exported/mine", "-o", "again"])
    weights = [
        Path(folder, "model.safetensors").read_bytes() for folder in ("exported/mine", "again")
    ]
    assert weights[0] == weights[1]


def test_a_run_without_a_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["export", "hf", str(tmp_path)])
    error = capsys.readouterr().err
    assert "neither the folder of a run" in error
    assert "Traceback" not in error


def test_results_of_other_weights_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "results.jsonl").write_text("")
    results = str(tmp_path / "results.jsonl")
    with pytest.raises(SystemExit):
        main(["export", "hf", str(run), "-o", str(tmp_path / "out"), "--results", results])
    assert "has no result of the weights of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_refused_before_the_folder_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["export", "hf", str(run), "-o", str(tmp_path / "out"), "--push"]
    with pytest.raises(SystemExit):
        main([*command, "badname"])
    assert "must be USER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    def fail(*_: object, **__: object) -> str:
        raise UserError("no network")

    monkeypatch.setattr(export, "push_folder", fail)
    with pytest.raises(SystemExit):
        main([*command, "user/name"])
    error = " ".join(capsys.readouterr().err.split())
    assert f"the folder is written: `jepa-audio export push {tmp_path / 'out'} user/name`" in error


@pytest.mark.parametrize(("kind", "name"), [("onnx", "m.pt2"), ("torch", "m.onnx")])
def test_a_file_of_the_other_format_is_refused(
    run: Path, tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["export", kind, str(run), "-o", str(tmp_path / name)])
    error = " ".join(capsys.readouterr().err.split())
    assert "must be a folder, or a file that ends in" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("symbolic_sizes")
@pytest.mark.parametrize(("kind", "name"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_the_other_formats_are_written(
    run: Path,
    kind: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    call(kind, run)
    assert Path("exported", kind, name).stat().st_size > 1000
    assert "clips of" in capsys.readouterr().out
    file = Path("mine", "encoder").with_suffix(Path(name).suffix)
    main(["export", kind, str(run), "-o", str(file)])
    assert file.is_file()


def test_the_old_command_of_published_layouts_works_and_others_name_it(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        main(["export", "pytorch", "runs/a"])
    assert "did you mean 'export torch'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "wavjepa", "--help"])
    assert "published layout of WavJEPA" in " ".join(capsys.readouterr().out.split())
