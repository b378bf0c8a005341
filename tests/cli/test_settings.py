"""Short runs, and paths that are valid in every folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from jepa_audio.cli.settings import (
    absolute,
    check_options,
    fit_short_run,
    make_paths_absolute,
)
from jepa_audio.errors import UserError
from jepa_audio.recipes import recipes
from jepa_audio.training.schedules import Schedule

RUNS = [name for name in recipes() if "/" not in name and name != "fsdp"]
RUNS += [name for name in recipes() if name.startswith("demo/")]


def settings(**trainer: object) -> Namespace:
    """The settings of a run of 40 steps, of two micro-batches each."""
    defaults = {
        "fast_dev_run": False,
        "max_steps": 40,
        "accumulate_grad_batches": 2,
        "val_check_interval": 1000,
        "check_val_every_n_epoch": None,
        "limit_train_batches": None,
    }
    schedule = Namespace(class_path="WarmupCosine", init_args=Namespace(warmup_steps=50, end=0.0))
    momentum = Namespace(class_path="Linear", init_args=Namespace(num_steps=100))
    masker = Namespace(class_path="M", init_args=Namespace(warmup_start=60, warmup_end=90))
    model = Namespace(
        lr_schedule=schedule,
        masker=masker,
        ema=Namespace(class_path="E", init_args=Namespace(momentum=momentum)),
    )
    return Namespace(model=model, trainer=Namespace(**{**defaults, **trainer}))


def test_warm_ups_and_validation_end_within_a_short_run_with_one_line_each():
    config = settings()
    lines = list(fit_short_run(config))
    assert config.model.lr_schedule.init_args.warmup_steps == 39
    assert vars(config.model.masker.init_args) == {"warmup_start": 40, "warmup_end": 40}
    assert config.model.ema.init_args.momentum.init_args.num_steps == 100
    assert config.trainer.val_check_interval == 80
    keys = ("model.lr_schedule.warmup_steps", "model.masker.warmup_end")
    keys += ("model.ema.momentum.num_steps", "trainer.val_check_interval")
    assert [line.split("`")[1] for line in lines] == list(keys)
    assert list(fit_short_run(config)) == lines[2:3], "only the momentum schedule is still longer"


def test_a_long_run_is_not_changed():
    config = settings(max_steps=1000)
    before = config.clone()
    assert list(fit_short_run(config)) == []
    assert config == before


@pytest.mark.parametrize(("value", "expected"), [(True, 0), (3, 2)])
def test_fast_dev_run_counts_its_own_steps(value: int, expected: int):
    config = settings(fast_dev_run=value)
    assert list(fit_short_run(config))
    assert config.model.lr_schedule.init_args.warmup_steps == expected
    assert config.trainer.val_check_interval == 1000


@pytest.mark.parametrize(("share", "expected"), [(0.5, 40), (1.0, 80), (None, 80), (0.001, 1)])
def test_a_share_as_validation_interval_is_a_share_of_the_run(share: float | None, expected: int):
    config = settings(val_check_interval=share)
    assert any("`trainer.val_check_interval`" in line for line in fit_short_run(config))
    assert config.trainer.val_check_interval == expected


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_another_number_as_validation_interval_is_refused(share: float):
    with pytest.raises(UserError, match=rf"`trainer.val_check_interval` \({share}\)"):
        list(fit_short_run(settings(val_check_interval=share)))


@pytest.mark.parametrize("option", ["--trainer.max_steps=40", "--trainer.fast_dev_run=true"])
@pytest.mark.parametrize("recipe", RUNS)
def test_every_recipe_can_be_a_short_run(recipe: str, option: str, monkeypatch: pytest.MonkeyPatch):
    from jepa_audio.cli.trainer import JEPACLI

    built: list[Namespace] = []
    monkeypatch.setattr(JEPACLI, "instantiate_classes", lambda cli: built.append(cli.config))
    JEPACLI([f"--config={recipe}", "--data.root=nowhere", option], run=False)
    schedule = built[0].model.lr_schedule
    num_steps = 40 if "max_steps" in option else 1
    made = {cls.__name__: cls for cls in Schedule.__subclasses__()}
    factor = made[schedule.class_path.rpartition(".")[2]](**vars(schedule.init_args))
    factors = [factor(step, num_steps) for step in range(num_steps)]
    assert max(factors) == 1.0


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sounds", "/here/sounds"),
        ("../sounds/", "/sounds"),
        ("/data/sounds", "/data/sounds"),
        ("shards/a-{000..127}.tar", "/here/shards/a-{000..127}.tar"),
        ("shards/*.tar", "/here/shards/*.tar"),
        ("s3://bucket/shards", "s3://bucket/shards"),
        ("", ""),
    ],
)
def test_paths_become_absolute(path: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    assert absolute(path) == expected


def test_every_kind_of_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def resolved(root: object) -> object:
        config = Namespace(run_dir="run", data=Namespace(root=root), ckpt_path="last")
        make_paths_absolute(config)
        assert (config.run_dir, config.ckpt_path) == (str(tmp_path / "run"), "last")
        return config.data.root

    assert resolved("a") == str(tmp_path / "a")
    assert resolved(["a", "/b"]) == [str(tmp_path / "a"), "/b"]
    assert resolved({"a": 0.7, "/b": 0.3}) == {str(tmp_path / "a"): 0.7, "/b": 0.3}
    with pytest.raises(UserError, match=r"names a source twice: a, \./a"):
        resolved({"a": 0.7, "./a": 0.3})


def test_a_remote_folder_of_a_run_is_refused():
    with pytest.raises(UserError, match=r"`run_dir` \(s3://bucket/run\) must be a local"):
        make_paths_absolute(Namespace(run_dir="s3://bucket/run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "recipe.yaml has no settings"),
        (b"# only: comments", "recipe.yaml has no settings"),
        (b"wavjepa", "recipe.yaml is not a mapping of settings"),
        (b"- model", "recipe.yaml is not a mapping of settings"),
        (b"model:\n  masker: [\n", "recipe.yaml is not YAML: .*line 3"),
        (b"\xff\xfe", "recipe.yaml is not a text file in UTF-8"),
        (b"trainer:\ndata: {batch_size: 3}", r"recipe.yaml: `trainer` \(None\) must be a mapping"),
        (b"trainer: 3", r"recipe.yaml: `trainer` \(3\) must be a mapping"),
        (b"monitor: yes", r"recipe.yaml: `monitor` \(True\) must be a mapping"),
        (b"data: [1]", r"recipe.yaml: `data` \(\[1\]\) must be a mapping"),
        (b"data: {sample_rate: 8000}", "recipe.yaml: `data.sample_rate` .* is a copy"),
    ],
)
def test_a_file_without_settings_in_sections_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    for options in (["--config", str(file)], [f"-c={file}"]):
        with pytest.raises(UserError, match=message):
            check_options(["fit", *options])


@pytest.mark.parametrize("option", [["--trainer", "3"], ["--data="], ["--monitor=true"]])
def test_an_option_of_a_section_takes_a_mapping_or_a_file(option: list[str]):
    with pytest.raises(UserError, match=r"`--\w+` .* must be a mapping"):
        check_options(["fit", *option])


def test_files_with_sections_and_yaml_text_are_accepted(tmp_path: Path):
    for recipe in recipes().values():
        check_options(["fit", "--config", str(recipe)])
    check_options(["fit", "--config={data: {batch_size: 3}}", "--trainer", "trainer.yaml"])
