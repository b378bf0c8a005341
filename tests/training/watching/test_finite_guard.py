"""A run that is not finite ends before it is saved, with a message that names step and rows."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from jepa_audio.training.watching.finite_guard import (
    FindsRowFiles,
    FiniteGuard,
    NonFiniteError,
    all_finite,
)


class Break(Callback):
    """Replaces the loss of one micro-batch, or only its gradient, by NaN."""

    def __init__(self, row: int, what: str = "loss") -> None:
        self.row, self.what, self.here = row, what, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.here = int(batch.row[0]) == self.row
        if self.here and self.what == "loss":
            batch.waveform.fill_(math.nan)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.here and self.what == "gradient":
            pl_module.predictor.proj_out.bias.grad.fill_(math.nan)


class CheckCounter(Callback):
    """Records the step of every check of the losses, which waits for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        counter, original = self, FiniteGuard._check

        def check(self, trainer, module=None) -> None:
            counter.steps.append(trainer.global_step)
            original(self, trainer, module)

        monkeypatch.setattr(FiniteGuard, "_check", check)


def last(cli: object) -> Path:
    return Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt"


def saved_step(path: Path) -> int:
    checkpoint = torch.load(path, weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    return checkpoint["global_step"]


RARE = "--trainer.log_every_n_steps=1000"


@pytest.mark.parametrize("every", [1, 2, 1000], ids=lambda every: f"saves every {every}")
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [3, 6], ids=lambda step: f"breaks in step {step}")
def test_the_last_checkpoint_is_finite_whatever_breaks_and_whenever_it_is_saved(
    tiny_cli: Callable, fit: Callable, every: int, what: str, step: int
):
    cli = tiny_cli("wave", RARE, f"--checkpoint.every_n_train_steps={every}")
    with pytest.raises(NonFiniteError):
        fit(cli, None, Break(4 * (step - 1), what))
    if every < step:
        assert saved_step(last(cli)) == (step - 1) // every * every
    else:
        assert not last(cli).exists()


def test_the_message_names_step_rows_files_last_save_and_remedies(
    tiny_cli: Callable, fit: Callable, monkeypatch: pytest.MonkeyPatch
):
    cli = tiny_cli(
        "wave", RARE, "--checkpoint.every_n_train_steps=2", "--trainer.accumulate_grad_batches=2"
    )
    files = [f"{i}.wav" for i in range(7)]
    monkeypatch.setattr(
        type(cli.datamodule), "find_row_files", lambda self, rows: files, raising=False
    )
    with pytest.raises(NonFiniteError) as ended:
        fit(cli, None, Break(20))
    message = str(ended.value)
    assert "rows 20 to 23 " in message
    assert "(0.wav, 1.wav, 2.wav, 3.wav, 4.wav and 2 more)" in message
    assert "optimizer step 3," in message
    assert "last checkpoint is of step 2;" in message
    for remedy in ("--ckpt_path last", "--model.optimizer.lr", "gradient_clip_val", "precision"):
        assert remedy in message


class UnnamedData(LightningDataModule):
    """The batches of another data module, without its files."""

    def __init__(self, data: LightningDataModule) -> None:
        super().__init__()
        self.train_dataloader = data.train_dataloader
        self.setup = data.setup


def test_the_message_works_without_a_data_module_that_finds_files(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("wave", RARE)
    assert isinstance(cli.datamodule, FindsRowFiles)
    cli.datamodule = UnnamedData(cli.datamodule)
    assert not isinstance(cli.datamodule, FindsRowFiles)
    with pytest.raises(
        NonFiniteError,
        match=r"is nan in optimizer step 3, rows 8 to 11\..*No checkpoint has been saved",
    ):
        fit(cli, None, Break(8))


def test_a_resumed_run_fails_at_the_same_rows(tiny_cli: Callable, fit: Callable):
    cli = tiny_cli("wave", RARE, "--checkpoint.every_n_train_steps=2")
    with pytest.raises(NonFiniteError) as first:
        fit(cli, None, Break(12))
    with pytest.raises(NonFiniteError) as second:
        fit(tiny_cli("wave", RARE, "--checkpoint.every_n_train_steps=2"), last(cli), Break(12))
    assert str(first.value) == str(second.value)


def test_losses_are_checked_only_when_logging_is_due_or_when_saving(
    tiny_cli: Callable, fit: Callable, monkeypatch: pytest.MonkeyPatch
):
    counter = CheckCounter(monkeypatch)
    settings = (
        "--trainer.log_every_n_steps=3",
        "--checkpoint.every_n_train_steps=5",
        "--trainer.max_steps=8",
    )
    fit(tiny_cli("wave", *settings, "--trainer.accumulate_grad_batches=2"))
    assert counter.steps == [3, 5, 6, 8, 8]  # logging, save, logging, the end, its save


def test_a_run_that_saves_nothing_stops_when_logging_is_due(tiny_cli: Callable, fit: Callable):
    cli = tiny_cli("wave", "--trainer.log_every_n_steps=2", "--checkpoint.every_n_train_steps=1000")
    with pytest.raises(NonFiniteError, match="is nan in optimizer step 3,"):
        fit(cli, None, Break(8))
    assert cli.trainer.global_step == 4


def test_no_list_of_callbacks_removes_the_guard_and_it_is_the_first_callback(
    tiny_cli: Callable, tmp_path: Path
):
    (tmp_path / "callbacks.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: train/loss}}]}"
    )
    for settings in (
        [],
        [f"--config={tmp_path / 'callbacks.yaml'}"],
        ["--trainer.callbacks=null"],
    ):
        assert isinstance(tiny_cli("wave", *settings).trainer.callbacks[0], FiniteGuard)


def test_checkpoints_of_other_callbacks_are_checked_too(
    tiny_cli: Callable, fit: Callable, tmp_path: Path
):
    cli = tiny_cli("wave", RARE)
    other = ModelCheckpoint(tmp_path / "other", every_n_train_steps=1, save_top_k=-1)
    cli.trainer.callbacks.insert(1, other)
    with pytest.raises(NonFiniteError):
        fit(cli, None, Break(8, "gradient"))
    assert sorted(saved_step(path) for path in (tmp_path / "other").iterdir()) == [1, 2]


def test_all_finite_finds_one_number_that_is_not_finite():
    module = torch.nn.Linear(100, 100)
    assert all_finite(module)
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            module.weight[50, 50] = bad
        assert not all_finite(module)
    assert all_finite(torch.nn.Identity())


EXPLODES = ["--model.optimizer.lr=1e30", "--trainer.max_steps=20", "--trainer.log_every_n_steps=5"]


def test_a_diverged_run_on_two_processes_ends_with_one_message_and_exit_code_1(
    wavs: Path, tmp_path: Path
):
    from tests.conftest import FLAVOURS

    (tmp_path / "run.yaml").write_text(FLAVOURS["wave"])
    command = [
        sys.executable,
        "-m",
        "jepa_audio",
        "fit",
        f"--config={tmp_path}/run.yaml",
        f"--data.root={wavs}",
    ]
    command += [
        *EXPLODES,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--run_dir={tmp_path}",
        "--monitor.every_n_steps=1",
    ]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    message = " ".join(ended.stderr.split())
    assert ended.returncode == 1, message
    assert message.count("jepa-audio: ") == 1
    assert "Traceback" not in message
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
