"""A run does not depend on the number of processes."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.conftest import LOG_MEL_TARGETS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")

SGD = (
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.3",
    "--model.lr_schedule=Constant",
)


def on(num_processes: int, rows: int = 4) -> list[str]:
    """Settings that divide the same global batch over some processes."""
    strategy = "auto" if num_processes == 1 else "ddp_fork"
    sizes = f"--trainer.devices={num_processes}", f"--data.batch_size={rows // num_processes}"
    return [f"--trainer.strategy={strategy}", *sizes]


@pytest.mark.parametrize(
    ("more", "numbers"),
    [((), (1, 2, 4)), (("--model.masks_per_clip=2", *LOG_MEL_TARGETS), (1, 2))],
    ids=["one mask", "two masks, log-mel targets"],
)
def test_several_processes_learn_the_same_weights_as_one(
    tiny_cli: Callable, more: tuple[str, ...], numbers: tuple[int, ...]
):
    steps = "--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2", "--data.valid_share=0.3"
    often = "--monitor.every_n_steps=1", "--trainer.val_check_interval=2"
    runs = {}
    for num_processes in numbers:
        cli = tiny_cli("wave", *SGD, *steps, *often, *more, *on(num_processes))
        start = {name: value.clone() for name, value in cli.model.state_dict().items()}
        cli.trainer.fit(cli.model, cli.datamodule)
        runs[num_processes] = {
            name: value.clone() for name, value in cli.model.state_dict().items()
        }
    moved = max(float((runs[1][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for num_processes in numbers[1:]:
        for name, value in runs[1].items():
            torch.testing.assert_close(
                runs[num_processes][name], value, rtol=1e-5, atol=1e-5, msg=name
            )


def test_two_processes_learn_the_weights_of_one_with_statistics_of_the_global_batch(
    tiny_cli: Callable,
):
    """The processes have other numbers of context tokens, and of batches in a validation."""
    regularizers = (
        "--model.regularizers+=VICReg",
        "--model.regularizers+=SIGReg",
        "--model.regularizers.latents=clip_mean",
        "--model.regularizers+=SIGReg",
        "--model.regularizers.latents=prediction",
        "--model.target_gradient=true",
    )
    steps = "--trainer.max_steps=3", "--data.valid_share=0.3", "--trainer.val_check_interval=1"
    runs, values = {}, {}
    for num_processes in (1, 2):
        cli = tiny_cli(
            "wave", *SGD, *regularizers, *steps, *on(num_processes), "--trainer.log_every_n_steps=1"
        )
        start = {name: value.clone() for name, value in cli.model.state_dict().items()}
        cli.trainer.fit(cli.model, cli.datamodule)
        runs[num_processes] = {
            name: value.clone() for name, value in cli.model.state_dict().items()
        }
        values[num_processes] = {
            name: float(cli.trainer.callback_metrics[f"train/{name}"])
            for name in ("loss", "vicreg_context", "sigreg_clip_mean", "sigreg_prediction")
        }
    assert values[2] == pytest.approx(values[1], rel=1e-4)
    assert max(float((runs[1][name] - start[name]).abs().max()) for name in start) > 1e-3
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-4, atol=1e-5, msg=name)


class Record(Callback):
    """Writes the rows and losses of a process into a folder; stops the run after some steps."""

    def __init__(self, folder: Path, stop_after: int) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.rows: list[int] = []
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows += batch.row.tolist()
        self.losses[trainer.global_step] = float(outputs["loss"])
        trainer.should_stop = trainer.global_step >= self.stop_after

    def on_train_end(self, trainer, pl_module) -> None:
        torch.save(
            (self.rows, self.losses), self.folder / f"{trainer.global_step}-{trainer.global_rank}"
        )


def recorded(folder: Path) -> tuple[list[int], dict[int, float]]:
    """The rows of all processes, and the mean of their losses by optimizer step."""
    parts = [torch.load(path) for path in folder.iterdir()]
    rows = [row for seen, _ in parts for row in seen]
    by_step: dict[int, list[float]] = {}
    for _, losses in parts:
        for step, loss in losses.items():
            by_step.setdefault(step, []).append(loss)
    return rows, {step: sum(losses) / len(losses) for step, losses in sorted(by_step.items())}


def train(cli: object, folder: Path, stop_after: int, checkpoint: Path | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    cli.trainer.callbacks.insert(0, Record(folder, stop_after))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
    return Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt"


def test_a_run_resumed_on_other_numbers_of_processes_equals_the_run_on_one(
    tiny_cli: Callable, tmp_path: Path
):
    horizon = "--trainer.max_steps=8"
    train(tiny_cli("wave", horizon, *on(1)), tmp_path / "one", stop_after=8)
    checkpoint = None
    for stop_after, num_processes in ((2, 1), (4, 2), (6, 4), (8, 1)):
        cli = tiny_cli("wave", horizon, *on(num_processes))
        checkpoint = train(cli, tmp_path / "moved", stop_after, checkpoint)
    rows, losses = recorded(tmp_path / "moved")
    assert sorted(rows) == list(range(32)), "every row once"
    assert losses == pytest.approx(recorded(tmp_path / "one")[1], rel=1e-5)


class CallAt(Callback):
    """Calls a function with the waveform on one process at the start of an optimizer step."""

    def __init__(self, rank: int, step: int, function: Callable[[torch.Tensor], object]) -> None:
        self.rank, self.step, self.function = rank, step, function

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step - 1):
            self.function(batch.waveform)


def test_a_signal_to_one_process_stops_all_processes_after_the_same_step(
    tiny_cli: Callable, tmp_path: Path
):
    cli = tiny_cli("wave", *on(2))
    cli.trainer.callbacks.append(CallAt(1, 3, lambda _: os.kill(os.getpid(), signal.SIGUSR1)))
    last = train(cli, tmp_path / "stopped", stop_after=6)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"3-0", "3-1"}
    assert torch.load(last, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_of_one_process_that_is_not_finite_ends_all_processes(
    tiny_cli: Callable, tmp_path: Path, rank: int
):
    cli = tiny_cli(
        "wave", *on(2), "--checkpoint.every_n_train_steps=1", "--trainer.log_every_n_steps=1000"
    )
    cli.trainer.callbacks.append(CallAt(rank, 3, lambda waveform: waveform.fill_(torch.nan)))
    rows = "8 to 9" if rank == 0 else "10 to 11"
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException,
        match=rf"is nan in optimizer step 3, rows {rows}\b",
    ):
        train(cli, tmp_path / "broken", stop_after=6)
    last = torch.load(
        Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt", weights_only=True
    )
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_write_error_of_rank_zero_ends_all_processes(tiny_cli: Callable, tmp_path: Path):
    cli = tiny_cli("wave", *on(2), "--checkpoint.every_n_train_steps=1")
    full = CallAt(0, 3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    cli.trainer.callbacks.append(full)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="could not be written"):
        train(cli, tmp_path / "full", stop_after=6)
    last = torch.load(
        Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt", weights_only=True
    )
    assert last["global_step"] == 2
