"""A resumed run: each changed setting is in force from the next step on, or refused by name."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

TABLE = Path(__file__).parents[3] / "docs" / "runs.md"
ROWS = re.findall(
    r"^\| `([\w.]+)` \| `([^`]+)` \| (in force|refused) \|", TABLE.read_text(), re.MULTILINE
)
# Where a run shows the value that is in force: (Trainer, model, data, batch) → value.
IN_FORCE: dict[str, Callable[[Trainer, Any, Any, Any], object]] = {
    "model.optimizer.lr": lambda t, m, d, b: t.optimizers[0].param_groups[0]["initial_lr"],
    "model.optimizer.weight_decay": lambda t, m, d, b: t.optimizers[0].param_groups[1][
        "weight_decay"
    ],
    "model.optimizer.betas": lambda t, m, d, b: [*t.optimizers[0].param_groups[0]["betas"]],
    "model.optimizer.eps": lambda t, m, d, b: t.optimizers[0].param_groups[0]["eps"],
    "model.lr_schedule": lambda t, m, d, b: (
        "Constant" if t.optimizers[0].param_groups[0]["lr"] == 0.003 else "changing"
    ),
    "model.lr_schedule.warmup_steps": lambda t, m, d, b: (
        3 / (t.optimizers[0].param_groups[0]["lr"] / 0.003) + (t.global_step - 2)
    ),
    "trainer.max_steps": lambda t, m, d, b: t.max_steps,
    "trainer.max_time": lambda t, m, d, b: f"00:00:{t.checkpoint_callback.max_seconds / 60:.0f}:00",
    "trainer.gradient_clip_val": lambda t, m, d, b: t.gradient_clip_val,
    "trainer.accumulate_grad_batches": lambda t, m, d, b: t.accumulate_grad_batches,
    "trainer.precision": lambda t, m, d, b: t.precision,
    "trainer.val_check_interval": lambda t, m, d, b: t.val_check_batch,
    "data.batch_size": lambda t, m, d, b: len(b.waveform),
    "data.crops_per_clip": lambda t, m, d, b: len(b.waveform) // 4,
    "data.crop_seconds": lambda t, m, d, b: b.waveform.shape[-1] / 1000,
    "data.loudness_dbfs": lambda t, m, d, b: d.clips.loudness_dbfs,
    "data.root": lambda t, m, d, b: d.sources[0],
    "model.ema.momentum.start": lambda t, m, d, b: m.ema.momentum.start,
    "model.masker.num_groups": lambda t, m, d, b: m.masker.num_groups,
    "model.masks_per_clip": lambda t, m, d, b: b.masks.per_clip,
    "model.targets.top_k": lambda t, m, d, b: m.targets.top_k,
    "model.distance": lambda t, m, d, b: type(m.distance).__name__,
    "model.regularizers": lambda t, m, d, b: [type(part).__name__ for part in m.regularizers],
    "model.target_gradient": lambda t, m, d, b: m.target_gradient,
    "model.encoder.drop_path": lambda t, m, d, b: max(
        getattr(part, "drop_prob", 0) for part in m.encoder.modules()
    ),
    "checkpoint.every_n_train_steps": lambda t, m, d, b: t.checkpoint_callback._every_n_train_steps,
    "monitor.every_n_steps": lambda t, m, d, b: next(
        c.every_n_steps for c in t.callbacks if type(c).__name__ == "CollapseMonitor"
    ),
    "seed_everything": lambda t, m, d, b: 5,
}


class Look(Callback):
    """Stores a value of every micro-batch by the optimizer step."""

    def __init__(self, value: Callable[[Trainer, LightningModule, Any, Any], object]) -> None:
        self.value = value
        self.values: list[tuple[int, object]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        found = self.value(trainer, pl_module, trainer.datamodule, batch)
        self.values.append((trainer.global_step + 1, found))


@pytest.fixture(scope="module")
def three_steps(tiny_cli: Callable) -> Path:
    """The folder of a run of six steps, whose `last.ckpt` is that of step 3."""
    cli = tiny_cli("wave", "--checkpoint.every_n_train_steps=3", "--checkpoint.keep_all=true")
    cli.fit(None, model=cli.model, datamodule=cli.datamodule)
    folder = Path(cli.trainer.default_root_dir)
    (folder / "checkpoints" / "previous.ckpt").unlink()
    (folder / "checkpoints" / "step=00000003.ckpt").replace(folder / "checkpoints" / "last.ckpt")
    (folder / "checkpoints" / "step=00000006.ckpt").unlink()
    return folder


@pytest.fixture
def resume(
    tiny_cli: Callable, three_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable]:
    """`resume("--model.seed=1", callback)`: continue the run in a new folder, as `fit` does."""

    def run(*settings: str | Callback) -> Any:
        shutil.copytree(three_steps, tmp_path / "run", dirs_exist_ok=True)
        words = [word for word in settings if isinstance(word, str)]
        cli = tiny_cli("wave", f"--run_dir={tmp_path / 'run'}", *words)
        cli.trainer.callbacks += [part for part in settings if isinstance(part, Callback)]
        cli.fit("last", model=cli.model, datamodule=cli.datamodule)
        return cli

    with caplog.at_level(logging.INFO):
        yield run


def test_the_table_has_settings_of_both_kinds():
    assert {kind for _, _, kind in ROWS} == {"in force", "refused"}
    assert len({key for key, _, _ in ROWS}) == len(ROWS) > 30
    assert {key for key, _, kind in ROWS if kind == "in force"} == IN_FORCE.keys()


@pytest.mark.parametrize(
    ("key", "text"), [(key, text) for key, text, kind in ROWS if kind == "in force"]
)
def test_a_changed_setting_is_in_force_from_the_next_step_and_named_in_one_line(
    key: str, text: str, resume: Callable, wavs: Path, tmp_path: Path, caplog
):
    if text == "DIR":
        text = str(shutil.copytree(wavs, tmp_path / "sounds"))
    look = Look(IN_FORCE[key])
    resume(f"--{key}={text}", look)
    expected = text if key == "trainer.max_time" else yaml.safe_load(text)
    step, value = look.values[0]
    assert step == 4
    assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected
    lines = [line for line in caplog.messages if line.startswith(f"`{key}` is ")]
    assert len(lines) == 1
    assert lines[0].endswith("in force from step 4 on")


@pytest.mark.parametrize(
    ("key", "text"), [(key, text) for key, text, kind in ROWS if kind == "refused"]
)
def test_a_setting_that_cannot_change_is_refused_by_name_before_anything_is_written(
    key: str, text: str, resume: Callable, three_steps: Path, tmp_path: Path
):
    from jepa_audio.training.run.folder import RunFolderError

    extra = ["--model.optimizer.lr=0.003"] if key == "model.optimizer" else []
    with pytest.raises(RunFolderError) as error:
        resume(f"--{key}={text}", *extra)
    message = str(error.value)
    assert message.count("the checkpoint has") == 1, message
    assert re.search(rf"`{key}` is .*, the checkpoint has .* \(.+\)", message)
    assert contents(tmp_path / "run") == contents(three_steps)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_unchanged_resume_names_no_setting(resume: Callable, caplog):
    resume("--checkpoint.every_n_train_steps=3", "--checkpoint.keep_all=true")
    assert not [line for line in caplog.messages if "in force" in line or "learning rate" in line]


def test_the_learning_rate_follows_the_new_settings_at_every_step(resume: Callable, caplog):
    from jepa_audio.training.schedules import WarmupCosine

    look = Look(lambda t, m, d, b: [group["lr"] for group in t.optimizers[0].param_groups])
    resume("--model.optimizer.lr=0.1", "--trainer.max_steps=9", look)
    schedule = WarmupCosine(1)
    expected = [(step, [0.1 * schedule(step - 1, 9)] * 2) for step in range(4, 10)]
    assert [step for step, _ in look.values] == [step for step, _ in expected]
    for (_, rates), (_, exact) in zip(look.values, expected, strict=True):
        assert rates == pytest.approx(exact)
    old = 0.003 * schedule(3, 6)
    assert f"the learning rate of step 4 is {expected[0][1][0]:.6g}, " in caplog.text
    assert f"with the settings of the checkpoint {old:.6g}" in caplog.text


@pytest.mark.parametrize(("accumulated", "batch_size"), [(3, 4), (2, 3), (1, 2)])
def test_every_step_after_a_changed_batch_has_all_its_clips_and_no_clip_comes_twice(
    resume: Callable, accumulated: int, batch_size: int, caplog
):
    look = Look(lambda t, m, d, b: b.row.tolist())
    resume(
        f"--trainer.accumulate_grad_batches={accumulated}", f"--data.batch_size={batch_size}", look
    )
    rows = [row for _, batch in look.values for row in batch]
    assert rows == list(range(12, 12 + 3 * accumulated * batch_size)), "12 clips were used before"
    steps = [step for step, _ in look.values]
    assert steps == [step for step in (4, 5, 6) for _ in range(accumulated)]
    clips = accumulated * batch_size
    assert f"an optimizer step has {clips} clips from step 4 on, before 4" in caplog.text


def test_a_finished_run_continues_with_more_steps_and_another_accumulation(
    resume: Callable, tiny_cli: Callable, tmp_path: Path
):
    resume()
    look = Look(lambda t, m, d, b: None)
    longer = "--trainer.max_steps=8", "--trainer.accumulate_grad_batches=2"
    cli = tiny_cli("wave", f"--run_dir={tmp_path / 'run'}", *longer)
    cli.trainer.callbacks.append(look)
    cli.fit("last", model=cli.model, datamodule=cli.datamodule)
    assert [step for step, _ in look.values] == [7, 7, 8, 8]


def test_the_time_limit_counts_from_each_start(resume: Callable, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("jepa_audio.training.run.checkpointing.time.monotonic", lambda: now[0])

    class Slow(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            now[0] += 0.6

    cli = resume("--trainer.max_time=00:00:00:01", "--trainer.max_steps=99", Slow())
    assert cli.trainer.global_step == 5
    last = Path(cli.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert "stopped at step 5 after `trainer.max_time`" in caplog.text


def test_a_checkpoint_without_these_settings_can_be_resumed(
    resume: Callable, three_steps: Path, tmp_path: Path, tiny_cli: Callable
):
    """Checkpoints of version 0.1.0 have only the settings of model and data."""
    path = three_steps / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["settings"]
    (tmp_path / "old").mkdir()
    torch.save(content, tmp_path / "old" / "last.ckpt")
    look = Look(lambda t, m, d, b: None)
    cli = tiny_cli("wave", "--trainer.accumulate_grad_batches=2")
    cli.trainer.callbacks.append(look)
    cli.fit(str(tmp_path / "old" / "last.ckpt"), model=cli.model, datamodule=cli.datamodule)
    assert [step for step, _ in look.values] == [4, 4, 5, 5, 6, 6]


def test_a_checkpoint_with_weights_alone_is_refused_with_the_option_to_use(
    three_steps: Path, tmp_path: Path, tiny_cli: Callable
):
    from jepa_audio.training.run.folder import RunFolderError

    content = torch.load(three_steps / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("optimizer_states", "lr_schedulers", "loops"):
        del content[name]
    torch.save(content, tmp_path / "imported.ckpt")
    cli = tiny_cli("wave")
    with pytest.raises(RunFolderError, match=rf"only weights.*--weights {tmp_path}/imported.ckpt"):
        cli.fit(str(tmp_path / "imported.ckpt"), model=cli.model, datamodule=cli.datamodule)
