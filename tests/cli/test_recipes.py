"""Recipes are found by name: by `--config`, by `--model.front_end` and by `jepa-audio configs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import with_recipe_paths
from jepa_audio.errors import MissingFileError
from jepa_audio.recipes import description, find_recipe, recipes

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_of_configs_is_a_recipe_with_a_description():
    files = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.*")}
    assert set(recipes()) == files
    assert list(recipes()) == sorted(files)
    for name, path in recipes().items():
        assert path.read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()
        assert 20 < len(description(path)) < 130, name
        assert description(path).endswith("."), name


@pytest.mark.parametrize("name", ["wavjepa", "demo/wavjepa", "pupujepa/large"])
def test_a_recipe_is_found_by_name_wherever_the_command_runs(name: str):
    assert find_recipe(name).read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()


def test_a_file_wins_over_a_recipe_and_a_folder_never_matches(empty_folder: Path):
    (empty_folder / "demo" / "wavjepa").mkdir(parents=True)
    assert find_recipe("demo/wavjepa") == recipes()["demo/wavjepa"]
    (empty_folder / "wavjepa").write_text("model: {}")
    assert find_recipe("wavjepa") == Path("wavjepa")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("wavjpea", "wavjepa"),
        ("demo/wavejepa", "demo/wavjepa"),
        ("configs/wavjepa.yaml", "wavjepa"),
        ("pupujepa/larg", "pupujepa/large"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest_one(name: str, nearest: str):
    with pytest.raises(MissingFileError, match=f"jepa-audio configs.*did you mean '{nearest}'"):
        find_recipe(name)


def test_options_take_names(empty_folder: Path):
    cqt = str(recipes()["front_ends/cqt"])
    target_cqt = str(recipes()["target_front_ends/cqt"])
    wave, large = str(recipes()["wavjepa"]), str(recipes()["pupujepa/large"])
    for given, resolved in (
        (["--config", "wavjepa"], ["--config", wave]),
        (["--config=wavjepa", "-c", "pupujepa/large"], [f"--config={wave}", "-c", large]),
        (["--model.front_end", "cqt"], ["--model.front_end", cqt]),
        (["--model.front_end=front_ends/cqt"], [f"--model.front_end={cqt}"]),
        (["--model.target_front_end", "cqt"], ["--model.target_front_end", target_cqt]),
        (["--model.target_front_end=momentum"], ["--model.target_front_end=momentum"]),
        # Classes, text and all other options are not names of recipes.
        (["--model.front_end", "WaveformFrontEnd"], ["--model.front_end", "WaveformFrontEnd"]),
        (["--config", "model: {seed: 1}"], ["--config", "model: {seed: 1}"]),
        (["fit", "--run_dir", "wavjepa"], ["fit", "--run_dir", "wavjepa"]),
        (["--data.root=wavjepa"], ["--data.root=wavjepa"]),
    ):
        assert list(with_recipe_paths(given)) == resolved
    (empty_folder / "cqt").write_text("class_path: SpectrogramFrontEnd")
    assert list(with_recipe_paths(["--model.front_end", "cqt"])) == ["--model.front_end", "cqt"]


def test_a_run_is_configured_by_names(capsys: pytest.CaptureFixture[str]):
    settings = ["--config", "demo/pupujepa", "--model.front_end", "cqt", "--data.root=x"]
    with pytest.raises(SystemExit):
        main(["fit", *settings, "--print_config"])
    out = capsys.readouterr().out
    assert "transforms.CQT" in out
    assert "MixtureMasker" in out


def test_a_misspelt_front_end_is_answered_by_the_nearest_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo/wavjepa", "--model.front_end", "gamatone", "--data.root=x"])
    assert "did you mean 'gammatone'?" in capsys.readouterr().err


def test_an_unknown_recipe_ends_in_one_sentence(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "wavjpa", "--data.root", "x"])
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert "did you mean 'wavjepa'" in err
    assert err.count("\n") == 1


def test_configs_lists_and_copies(empty_folder: Path, capsys: pytest.CaptureFixture[str]):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())

    main(["configs", "copy", "demo/wavjepa"])
    assert (empty_folder / "wavjepa.yaml").read_bytes() == recipes()["demo/wavjepa"].read_bytes()
    main(["configs", "copy", "wavjepa", "-o", "mine/recipe.yaml"])
    assert (empty_folder / "mine" / "recipe.yaml").exists()
    capsys.readouterr()
    for args in (["demo/wavjepa"], ["wavjepa", "-o", "mine/recipe.yaml"]):
        with pytest.raises(SystemExit):
            main(["configs", "copy", *args])
        assert "is not overwritten" in capsys.readouterr().err
