"""A file may name classes of this package and of torch.optim; no other module is imported."""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.data import AttributeDict
from torch import nn

from jepa_audio.class_paths import MAX_VALUES, check_class_paths, split_trusted, trusting
from jepa_audio.cli.main import main
from jepa_audio.errors import UserError
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop import export_weights, import_weights
from jepa_audio.training.run.load import read_torch_file
from jepa_audio.training.run.models import load_jepa

DATA = Path(__file__).parent / "data"
WAVE = DATA / "before_rooms" / "wave.ckpt"
EVIL = """
from pathlib import Path
Path("imported").touch()
from jepa_audio.steps.losses import MSE
class X(MSE): pass
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module that writes the file `imported` when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evilmod.py").write_text(EVIL)
    yield tmp_path / "imported"
    sys.modules.pop("evilmod", None)


def changed(path: Path, **settings: Any) -> Path:
    """The checkpoint of a run of the folder of `path`, with other hyper-parameters."""
    content = torch.load(WAVE, weights_only=True)
    content["hyper_parameters"] |= copy.deepcopy(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


WAYS: dict[str, dict[str, Any]] = {
    "class path": {"distance": {"class_path": "evilmod.X"}},
    "short": {"distance": "evilmod.X"},
    "callable": {"optimizer": "evilmod.X"},
    "optimizer": {"optimizer": {"class_path": "evilmod.X", "init_args": {"lr": 0.1}}},
    "YAML": {"distance": "{class_path: evilmod.X}"},
    "JSON": {"distance": '{"class_path": "evilmod.X"}'},
    "nested": {
        "ema": {
            "class_path": "jepa_audio.training.ema.TargetEncoderEMA",
            "init_args": {"momentum": {"class_path": "evilmod.X"}},
        }
    },
    "list": {"seed": [["evilmod.X"]]},
    "colon": {"distance": "evilmod:X"},
    "model": {"_class_path": "evilmod.X"},
    "instantiator": {"_instantiator": "evilmod.X", "distance": "evilmod.X"},
    "relative": {"distance": ".evilmod.X"},
    "newline": {"distance": "MSE\nclass_path: evilmod.X"},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_module_that_a_checkpoint_names_is_not_imported(evil: Path, settings: dict[str, Any]):
    path = changed(evil.parent / "last.ckpt", **settings)
    with pytest.raises(UserError, match=r"last\.ckpt, hyper-parameters: `") as error:
        load_jepa(path)
    assert "evilmod" in str(error.value)
    assert not evil.exists()


def test_an_instantiator_of_a_checkpoint_is_not_called(evil: Path):
    load_jepa(changed(evil.parent / "last.ckpt", _instantiator="evilmod.X"))
    assert not evil.exists()


@pytest.mark.parametrize(
    "path",
    [
        "jepa_audio.cli.main.os.system",
        "jepa_audio.cli.main.os",
        "jepa_audio.files.Path",
        "jepa_audio.files.write_text",
        "jepa_audio.x:eval",
        "jepa_audio:files",
        "jepa_audio.files.__builtins__",
        "jepa_audio.files.__class__",
        "jepa_audio.nothing.X",
        "jepa_audio_evil.X",
        "torch.optim.x.__builtins__",
        "torch.optim.adamw.__builtins__",
        "torch.optim.adamw.adamw",
        "torch.optim.adamw.torch",
        "torch.optim._functional.math",
        "torch.optim",
        "torch.optimizers.X",
        "torch.hub.load",
        "os.system",
        "builtins.eval",
        "a b",
        "../evil.yaml",
        "$(touch imported)",
    ],
)
def test_only_classes_of_the_two_packages_are_accepted(path: str):
    with pytest.raises(UserError, match="SOURCE: `optimizer`"):
        check_class_paths({"optimizer": path}, "SOURCE")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("distance", "jepa_audio.cli.main.Command"),
        ("distance", "jepa_audio.training.schedules.Linear"),
        ("distance", "torch.optim.AdamW"),
        ("optimizer", "torch.optim.lr_scheduler.LambdaLR"),
        ("optimizer", "jepa_audio.steps.losses.MSE"),
        ("front_end", "jepa_audio.training.jepa.JEPA"),
        ("nothing", "pre"),
    ],
)
def test_a_class_of_another_type_ends_in_one_sentence(tmp_path: Path, key: str, path: str):
    checkpoint = changed(tmp_path / "last.ckpt", **{key: {"class_path": path}})
    with pytest.raises(UserError, match=r"last\.ckpt, hyper-parameters: they do not describe a"):
        load_jepa(checkpoint)


def test_a_trusted_module_is_imported(evil: Path):
    path = changed(evil.parent / "last.ckpt", distance={"class_path": "evilmod.X"})
    assert type(load_jepa(path, trust=["evilmod"]).distance).__name__ == "X"
    assert evil.exists()
    load_encoder(path, trust=["evilmod"])
    with pytest.raises(UserError, match=r"add `--trust evilmod`, or `trust=\['evilmod'\]`"):
        load_encoder(path)
    with trusting(["evilmod"]):
        load_encoder(path)
    with pytest.raises(UserError, match="evilmod"):
        load_encoder(path)


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "export": lambda path: ["export", "wavjepa", str(path), "-o", "out"],
    "probe": lambda path: ["probe", f"--encoder={path}", "--tasks=own.csv", "--output=probe"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_and_trust_modules(
    evil: Path, command: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
):
    table = "path,label,split\n"
    (evil.parent / "own.csv").write_text(table)
    path = changed(evil.parent / "run" / "checkpoints" / "last.ckpt", distance="evilmod.X")
    if "export" in command(path):
        with pytest.raises(SystemExit):
            main(command(path))
        assert "--trust evilmod" in capsys.readouterr().err
    assert not evil.exists()
    with pytest.raises(SystemExit):
        main([*command(path), "--trust", "evilmod"])
    assert "--trust evilmod" not in capsys.readouterr().err, "another error, of layout or table"
    if "export" in command(path):
        assert evil.exists()


def test_a_report_of_a_run_that_names_a_module_states_it(evil: Path):
    changed(evil.parent / "run" / "checkpoints" / "last.ckpt", distance="evilmod.X")
    (evil.parent / "run" / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.4\n")
    main(["report", str(evil.parent)])
    assert not evil.exists()


def test_initial_weights_name_no_classes(evil: Path):
    from jepa_audio.interop.convert import load_weights

    path = changed(evil.parent / "last.ckpt", distance="evilmod.X")
    load_weights(load_jepa(WAVE), path)
    assert not evil.exists()


def test_a_recipe_of_an_import_names_only_known_classes(evil: Path):
    recipe = yaml.safe_load((DATA.parents[1] / "configs" / "wavjepa.yaml").read_text())
    recipe["model"]["distance"] = "evilmod.X"
    (evil.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = DATA / "wavjepa_hub"
    with pytest.raises(UserError, match=r"recipe.yaml: `distance` names `evilmod.X`"):
        import_weights("wavjepa", source, evil.parent / "a", recipe=evil.parent / "recipe.yaml")
    assert not evil.exists()
    checkpoint = import_weights(
        "wavjepa",
        source,
        evil.parent / "b",
        recipe=evil.parent / "recipe.yaml",
        trust=["evilmod"],
    )
    export_weights("wavjepa", checkpoint, evil.parent / "out", trust=["evilmod"])
    with pytest.raises(UserError, match="evilmod"):
        export_weights("wavjepa", checkpoint, evil.parent / "out")


def test_the_option_is_read_anywhere_in_a_command_line():
    args = ["probe", "--trust", "a.b", "--encoder", "x", "--trust=c"]
    assert split_trusted(args) == (["probe", "--encoder", "x"], ["a.b", "c"])
    with pytest.raises(UserError, match=r"`--trust` \(''\) must be the name of a module"):
        main_args = split_trusted(["probe", "--trust"])
        with trusting(main_args[1]):
            pass


def test_objects_of_other_programs_are_opened_only_if_their_module_is_trusted(tmp_path: Path):
    shutil.copy(WAVE, tmp_path / "last.ckpt")
    content = torch.load(WAVE, weights_only=True)
    torch.save({**content, "callbacks": {"a": Foreign()}}, tmp_path / "last.ckpt")
    module = Foreign.__module__
    with pytest.raises(UserError, match=rf"would run code \({module}.Foreign\).*--trust {module}`"):
        load_jepa(tmp_path / "last.ckpt")
    assert not Foreign.restored
    load_jepa(tmp_path / "last.ckpt", trust=[module])
    assert not Foreign.restored, "an inert object replaces it"


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(a=1),
        functools.partial(nn.LayerNorm, eps=1e-6),
        np.float64(3),
        np.arange(3),
        Path("a"),
        collections.defaultdict(int),
        torch.optim.AdamW,
        nn.TransformerEncoderLayer(8, 2),
        AttributeDict(a=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_objects_are_accepted(tmp_path: Path, value: object, is_new: bool):
    if not is_new and (isinstance(value, nn.Module | functools.partial)):
        pytest.skip("in this format, torch stores the source code of modules and refuses it")
    content = {"state_dict": {"a": torch.ones(2)}, "x": value}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_new)
    assert read_torch_file(tmp_path / "a.pt")["state_dict"]["a"].tolist() == [1, 1]


class Foreign:
    """An object whose code runs when it is unpickled."""

    restored = False

    def __init__(self) -> None:
        self.a = 1

    def __setstate__(self, state: object) -> None:
        Foreign.restored = True


def test_a_model_larger_than_the_weights_is_refused_before_it_takes_memory(tmp_path: Path):
    settings = torch.load(WAVE, weights_only=True)["hyper_parameters"]
    for changes in ({"embed_dim": 60_000}, {"depth": 1000}, {"mlp_ratio": 64.0}):
        encoder = copy.deepcopy(settings["encoder"])
        encoder["init_args"] |= changes
        front_end = copy.deepcopy(settings["front_end"])
        front_end["init_args"]["embed_dim"] = encoder["init_args"]["embed_dim"]
        path = changed(tmp_path / "last.ckpt", encoder=encoder, front_end=front_end)
        with pytest.raises(UserError, match=r"describe a model with more than the [\d,]+ values"):
            load_jepa(path)


def test_settings_with_shared_values_are_bounded(tmp_path: Path):
    nested: list[Any] = ["MSE"]
    for _ in range(40):
        nested = [nested] * 9
    endless: list[Any] = []
    endless.append(endless)
    for value, message in ((nested, f"more than {MAX_VALUES:,}"), (endless, "nested deeper")):
        with pytest.raises(UserError, match=message):
            load_jepa(changed(tmp_path / "last.ckpt", distance=value))
