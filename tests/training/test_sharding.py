"""A run with `configs/fsdp.yaml` equals an unsharded one: losses, weights, copies, checkpoints."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from jepa_audio.training.sharding import full_tensor, is_sharded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")

FSDP = f"--config={Path(__file__).parents[2] / 'configs' / 'fsdp.yaml'}"
COMMON = (
    "--trainer.max_steps=4",
    "--checkpoint.every_n_train_steps=2",
    "--checkpoint.keep_all=true",
)
COMMON += ("--monitor.every_n_steps=1", "--trainer.gradient_clip_val=0.5")
COMMON += (
    "--model.regularizers+=VICReg",
    "--model.regularizers+=SIGReg",
    "--model.target_gradient=true",
)


def on_processes(count: int, folder: Path, function: Callable[[], Any]) -> list[Any]:
    """The results of a function on forked processes with the environment of `torchrun`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {name: str(value) for name, value in (ranks | address).items()}
        torch.save(function(), folder / str(rank))

    processes = [
        multiprocessing.get_context("fork").Process(target=start, args=(rank,))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(count)]


@dataclass
class Record:
    """Loss and distance of the momentum copy by optimizer step; which parameters are sharded."""

    losses: dict[int, float] = field(default_factory=dict)
    distances: dict[int, float] = field(default_factory=dict)
    sharded: list[bool] = field(default_factory=list)


class Recorder(Callback):
    def __init__(self, record: Record, stop_after: int) -> None:
        self.record, self.stop_after = record, stop_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.record.losses[trainer.global_step] = float(outputs["loss"])
        self.record.distances[trainer.global_step] = float(
            trainer.callback_metrics["collapse/ema_distance"]
        )
        self.record.sharded = [
            isinstance(parameter, DTensor) for parameter in pl_module.parameters()
        ]
        trainer.should_stop = trainer.global_step >= self.stop_after


def train(cli: object, checkpoint: Path | None = None, stop_after: int = 4) -> Record:
    record = Record()
    cli.trainer.callbacks.append(Recorder(record, stop_after))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
    return record


def checkpoints(cli: object) -> Path:
    return Path(cli.trainer.checkpoint_callback.dirpath)


def mean(values: list[dict[int, float]]) -> dict[int, float]:
    return {step: sum(value[step] for value in values) / len(values) for step in values[0]}


@pytest.fixture(scope="module")
def alone(tiny_cli: Callable) -> tuple[Record, Path]:
    """The run on one process, and its checkpoints."""
    cli = tiny_cli("mel", *COMMON)
    return train(cli), checkpoints(cli)


@pytest.fixture(scope="module")
def sharded(
    tiny_cli: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Record], Path]:
    """The run on two processes that share its parameters: two steps, then two steps resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    settings = (*COMMON, FSDP, "--trainer.devices=2", "--data.batch_size=2", f"--run_dir={folder}")

    def run() -> Record:
        before = train(tiny_cli("mel", *settings), stop_after=2)
        after = train(tiny_cli("mel", *settings), folder / "checkpoints" / "last.ckpt")
        assert not before.losses.keys() & after.losses.keys()
        return Record(
            before.losses | after.losses, before.distances | after.distances, after.sharded
        )

    return on_processes(2, folder, run), folder / "checkpoints"


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_every_parameter_is_sharded(sharded: tuple):
    for record in sharded[0]:
        assert len(record.sharded) > 50
        assert all(record.sharded)


def test_losses_and_momentum_copy_equal_those_of_one_process_also_after_a_resume(
    alone: tuple, sharded: tuple
):
    assert mean([record.losses for record in sharded[0]]) == pytest.approx(
        alone[0].losses, rel=1e-5
    )
    assert mean([record.distances for record in sharded[0]]) == pytest.approx(
        alone[0].distances, rel=1e-5
    )
    assert_same_weights(sharded[1] / "last.ckpt", alone[1] / "last.ckpt")


def test_one_process_can_resume_from_the_checkpoint_of_a_sharded_run(
    tiny_cli: Callable, alone: tuple, sharded: tuple
):
    cli = tiny_cli("mel", *COMMON)
    record = train(cli, sharded[1] / "step=00000002.ckpt")
    assert record.losses == pytest.approx(
        {step: alone[0].losses[step] for step in (3, 4)}, rel=1e-5
    )
    assert_same_weights(checkpoints(cli) / "last.ckpt", alone[1] / "last.ckpt")


def test_a_sharded_run_refuses_the_checkpoint_of_an_unsharded_run_and_names_the_remedies(
    tiny_cli: Callable, alone: tuple, tmp_path: Path
):
    def run() -> str:
        settings = FSDP, "--trainer.devices=1", f"--run_dir={tmp_path}"
        with pytest.raises(ValueError, match="without sharding") as refused:
            train(tiny_cli("mel", *COMMON, *settings), alone[1] / "last.ckpt")
        return str(refused.value)

    (message,) = on_processes(1, tmp_path, run)
    assert "--trainer.strategy ddp" in message
    assert f"--weights {alone[1] / 'last.ckpt'}" in message


def test_a_probe_that_would_copy_the_weights_is_refused(tiny_cli: Callable, tmp_path: Path):
    from jepa_audio.probing.online import OnlineProbe

    def run() -> str:
        cli = tiny_cli("mel", *COMMON, FSDP, f"--run_dir={tmp_path}")
        cli.trainer.callbacks.append(OnlineProbe("nowhere"))
        with pytest.raises(ValueError, match="OnlineProbe") as refused:
            train(cli)
        return str(refused.value)

    assert "jepa-audio probe" in on_processes(1, tmp_path, run)[0]


def test_an_unsharded_tensor_is_returned_unchanged(tiny_jepa: Callable):
    assert not is_sharded(tiny_jepa("mel"))
    tensor = torch.ones(3)
    assert full_tensor(tensor) is tensor


def test_a_validation_of_an_odd_number_of_batches_does_not_deadlock(
    tiny_cli: Callable, tmp_path: Path, wavs: Path
):
    settings = (
        f"--data.valid_root={wavs}",
        "--trainer.val_check_interval=1",
        "--data.num_valid_clips=12",
    )

    def validate() -> float:
        # 12 clips in batches of 4 are 3 batches for two processes.
        cli = tiny_cli("mel", FSDP, "--trainer.devices=2", "--trainer.max_steps=2", *settings)
        cli.trainer.fit(cli.model, cli.datamodule)
        return float(cli.trainer.callback_metrics["valid/loss"])

    first, second = on_processes(2, tmp_path, validate)
    assert first == second > 0
