"""Checkpoints are complete, never written between two optimizer steps; a stop loses no step."""

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from jepa_audio.training.run.checkpointing import AtomicCheckpointIO, CheckpointWriteError

OLD = {"weights": torch.arange(1000.0)}


class Fatal:
    """An object that fails when it is pickled: with an error, or by killing the process."""

    def __init__(self, deadly: bool) -> None:
        self.deadly = deadly

    def __reduce__(self) -> tuple[type, tuple[()]]:
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("no space left on device")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "new" / "last.ckpt")
    return tmp_path / "new" / "last.ckpt"


def assert_complete(path: Path) -> None:
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["weights"], OLD["weights"])


def test_a_saved_checkpoint_can_be_loaded_and_leaves_no_temporary_file(saved: Path):
    assert_complete(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_failed_write_keeps_the_previous_file_and_leaves_no_temporary_file(saved: Path):
    with pytest.raises(CheckpointWriteError, match="no space left"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(9), "x": Fatal(False)}, saved)
    assert_complete(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_killed_writer_keeps_the_previous_file_and_the_next_write_removes_its_temporary_file(
    saved: Path,
):
    writer = multiprocessing.get_context("fork").Process(
        target=AtomicCheckpointIO().save_checkpoint,
        args=({"weights": torch.zeros(10**6), "x": Fatal(True)}, saved),
    )
    writer.start()
    writer.join(30)
    assert writer.exitcode == -signal.SIGKILL
    assert_complete(saved)
    assert {path.name for path in saved.parent.iterdir()} == {"last.ckpt", ".last.ckpt.part"}
    AtomicCheckpointIO().save_checkpoint(OLD, saved)
    assert_complete(saved)
    assert {path.name for path in saved.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_the_checkpoint_before_the_last_one_is_kept_unless_it_is_damaged(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    io, previous = AtomicCheckpointIO(), saved.with_name("previous.ckpt")
    io.save_checkpoint({"weights": torch.zeros(3)}, saved)
    assert_complete(previous)
    saved.write_bytes(b"damaged")
    io.save_checkpoint({"weights": torch.ones(3)}, saved)
    assert_complete(previous)

    def no_links(*_: object) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    io.save_checkpoint({"weights": torch.zeros(3)}, saved)
    assert io.load_checkpoint(previous)["weights"].tolist() == [1, 1, 1]


def save_with_a_limit(path: Path, num_bytes: int, messages: multiprocessing.SimpleQueue) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    except CheckpointWriteError as error:
        messages.put(str(error))


@pytest.mark.parametrize(
    "num_bytes", [10, 5000, 200_000, 400_500], ids=["header", "entry", "tensor", "directory"]
)
def test_a_full_file_system_keeps_the_previous_file(saved: Path, num_bytes: int):
    """The error of torch's writer depends on where in the file the space ends."""
    context = multiprocessing.get_context("fork")
    messages = context.SimpleQueue()
    writer = context.Process(target=save_with_a_limit, args=(saved, num_bytes, messages))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0
    message = messages.get()
    for word in (str(saved), "File too large", "previous checkpoint is valid", "--ckpt_path last"):
        assert word in message
    assert_complete(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_an_error_in_pickling_is_not_reported_as_a_write_error(saved: Path):
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"weights": lambda: 0}, saved)
    assert_complete(saved)


class Interrupt(Callback):
    """Sends this process a signal in the middle of a micro-batch."""

    def __init__(
        self, at_batch: int, number: signal.Signals = signal.SIGINT, times: int = 1
    ) -> None:
        self.at_batch, self.number, self.times = at_batch, number, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch.row[0] == self.at_batch * len(batch.row):
            for _ in range(self.times):
                signal.raise_signal(self.number)


def folder_of(cli: object) -> Path:
    return Path(cli.trainer.checkpoint_callback.dirpath)


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


ACCUMULATED = "--trainer.accumulate_grad_batches=2", "--data.batch_size=2"


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_finishes_the_optimizer_step_and_saves_it(
    tiny_cli: Callable, fit: Callable, number: signal.Signals
):
    handler = signal.getsignal(number)
    cli = tiny_cli("wave", *ACCUMULATED)
    assert list(fit(cli, None, Interrupt(at_batch=4, number=number))) == [0, 2, 4, 6, 8, 10]
    assert cli.trainer.global_step == step_of(folder_of(cli) / "last.ckpt") == 3
    assert cli.trainer.checkpoint_callback.stopped_by == number
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("at_batch", [5, None], ids=["signal in the last step", "no signal"])
def test_a_signal_in_the_last_step_does_not_count_as_a_stop(
    tiny_cli: Callable, fit: Callable, at_batch: int | None
):
    cli = tiny_cli("wave")
    fit(cli, None, Interrupt(at_batch=-1 if at_batch is None else at_batch))
    assert step_of(folder_of(cli) / "last.ckpt") == 6
    assert cli.trainer.checkpoint_callback.stopped_by is None
    cli.after_fit()


@pytest.mark.parametrize("number", STOPS)
def test_only_rank_zero_exits_with_the_code_of_the_signal(
    tiny_cli: Callable, fit: Callable, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    cli = tiny_cli("wave")
    fit(cli, None, Interrupt(at_batch=2, number=number))
    with pytest.raises(SystemExit) as ended:
        cli.after_fit()
    assert ended.value.code == 128 + number
    monkeypatch.setattr(type(cli.trainer), "is_global_zero", False)
    cli.after_fit()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A SLURM job of one task; returns the arguments of every call of `scontrol`."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    names = {
        "JOB_ID": "123",
        "JOB_NAME": "train",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return lambda: (
        (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    )


@pytest.mark.parametrize(
    ("array", "called"),
    [
        ({}, "requeue 123"),
        ({"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "7"}, "requeue 120_7"),
    ],
    ids=["job", "task of an array"],
)
def test_the_signal_of_slurm_saves_after_the_step_and_requeues_the_job(
    tiny_cli: Callable,
    fit: Callable,
    slurm: Callable,
    array: dict[str, str],
    called: str,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGUSR1)
    cli = tiny_cli("wave", *ACCUMULATED)
    fit(cli, None, Interrupt(at_batch=4, number=signal.SIGUSR1))
    assert slurm() == [called]
    assert step_of(folder_of(cli) / "last.ckpt") == 3
    assert not list(Path(cli.trainer.default_root_dir).rglob("hpc_ckpt*"))
    assert signal.getsignal(signal.SIGUSR1) is handler


@pytest.mark.parametrize(
    ("at_batch", "number"),
    [(4, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGUSR1), (-1, signal.SIGUSR1)],
)
def test_a_finished_job_or_one_stopped_by_another_signal_is_not_requeued(
    tiny_cli: Callable, fit: Callable, slurm: Callable, at_batch: int, number: signal.Signals
):
    fit(tiny_cli("wave"), None, Interrupt(at_batch, number))
    assert slurm() == []


def test_the_signal_handler_of_lightning_is_never_installed(
    tiny_cli: Callable, fit: Callable, slurm: Callable
):
    class Setup(Callback):
        def on_sanity_check_start(self, trainer, pl_module) -> None:
            # Lightning installs its handlers before this.
            self.handler = signal.getsignal(signal.SIGUSR1)

    setup = Setup()
    fit(tiny_cli("wave", "--data.valid_share=0.3", "--trainer.num_sanity_val_steps=1"), None, setup)
    assert setup.handler == signal.SIG_DFL


def test_a_failed_requeue_is_logged(
    tiny_cli: Callable,
    fit: Callable,
    slurm: Callable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 3\n")
    cli = tiny_cli("wave")
    fit(cli, None, Interrupt(at_batch=2, number=signal.SIGUSR1))
    assert "`scontrol requeue 123` failed with code 3: submit the job again" in caplog.text
    assert step_of(folder_of(cli) / "last.ckpt") == 3


def test_without_auto_requeue_the_signal_of_slurm_only_stops_the_run(
    tiny_cli: Callable, fit: Callable, slurm: Callable, tmp_path: Path
):
    class_path = "lightning.fabric.plugins.environments.SLURMEnvironment"
    environment = f"{{class_path: {class_path}, init_args: {{auto_requeue: false}}}}"
    (tmp_path / "plugins.yaml").write_text(f"trainer: {{plugins: [{environment}]}}")
    cli = tiny_cli("wave", f"--config={tmp_path / 'plugins.yaml'}")
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO), (
        "a list of plugins keeps the checkpoint writer"
    )
    fit(cli, None, Interrupt(at_batch=2, number=signal.SIGUSR1))
    assert cli.trainer.global_step == 3
    assert slurm() == []


RARE = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *RARE])
def test_a_signal_to_all_processes_stops_a_run_with_loader_processes(
    wavs: Path, tmp_path: Path, number: signal.Signals
):
    """Ctrl-C in a terminal and schedulers send a signal to all processes."""
    from tests.conftest import FLAVOURS

    (tmp_path / "run.yaml").write_text(FLAVOURS["wave"].replace("num_workers: 0", "num_workers: 2"))
    settings = [
        "--trainer.max_steps=100000",
        "--data.valid_share=0.3",
        "--trainer.val_check_interval=5",
    ]
    command = [
        sys.executable,
        "-m",
        "jepa_audio",
        "fit",
        f"--config={tmp_path}/run.yaml",
        f"--data.root={wavs}",
    ]
    command += [*settings, f"--run_dir={tmp_path}", "--checkpoint.every_n_train_steps=5"]
    with (tmp_path / "log.txt").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        last = tmp_path / "checkpoints" / "last.ckpt"
        wait_for(lambda: last.exists() or run.poll() is not None, 120)
        os.killpg(run.pid, number)
        code = run.wait(120)
    messages = (tmp_path / "log.txt").read_text()
    assert code == 128 + number, messages
    assert "stopping after this step" in messages
    assert f"stopped at step {step_of(last)}" in " ".join(messages.split())
    assert "exited unexpectedly" not in messages


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition was not met in {seconds} s"
        time.sleep(0.1)


def test_a_stopped_run_skips_validation_but_its_trainer_can_validate_later(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("wave", "--data.valid_share=0.3", "--trainer.val_check_interval=1000")
    fit(cli, None, Interrupt(at_batch=2))
    assert "valid/loss" not in cli.trainer.callback_metrics, "a stopped run does not validate"
    cli.trainer.validate(cli.model, cli.datamodule)
    assert "valid/loss" in cli.trainer.callback_metrics


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_run(tiny_cli: Callable, fit: Callable):
    cli = tiny_cli("wave", *ACCUMULATED)
    before = fit(cli, None, Interrupt(at_batch=5))
    after = fit(tiny_cli("wave", *ACCUMULATED), folder_of(cli) / "last.ckpt")
    assert not before.keys() & after.keys()
    assert before | after == fit(tiny_cli("wave", *ACCUMULATED))


def test_the_same_signal_forwarded_by_a_launcher_does_not_count_twice(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("wave")
    fit(cli, None, Interrupt(at_batch=3, times=2))
    assert step_of(folder_of(cli) / "last.ckpt") == 4


def test_the_second_signal_stops_at_once_and_keeps_the_last_checkpoint(
    tiny_cli: Callable, fit: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jepa_audio.training.run.checkpointing.DUPLICATE_SIGNAL_SECONDS", 0.0)
    handler = signal.getsignal(signal.SIGINT)
    cli = tiny_cli("wave", "--checkpoint.every_n_train_steps=2")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(cli, None, Interrupt(at_batch=3, times=2))
    assert step_of(folder_of(cli) / "last.ckpt") == 2
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["--checkpoint.every_n_train_steps=1000"], {"last.ckpt"}),
        (
            ["--checkpoint.every_n_train_steps=2", "--checkpoint.keep_all=true"],
            {"last.ckpt", "previous.ckpt", "step=00000002.ckpt", "step=00000004.ckpt"},
        ),
    ],
)
def test_the_last_step_is_always_saved_and_keep_all_keeps_every_save(
    tiny_cli: Callable, fit: Callable, settings: list[str], names: set[str]
):
    cli = tiny_cli("wave", *settings, "--trainer.max_steps=5")
    fit(cli)
    assert {path.name for path in folder_of(cli).iterdir()} == names
    assert all(step_of(folder_of(cli) / name) == int(name[5:13]) for name in names if "=" in name)
    assert step_of(folder_of(cli) / "last.ckpt") == 5


def test_no_checkpoint_is_written_between_two_optimizer_steps(
    tiny_cli: Callable, fit: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Not right after a resume either, when the step number is a multiple of the interval."""
    settings = (
        "--trainer.accumulate_grad_batches=3",
        "--data.batch_size=2",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.keep_all=true",
    )
    cli = tiny_cli("wave", *settings)
    fit(cli)
    saved: list[tuple[int, int]] = []
    save = AtomicCheckpointIO.save_checkpoint

    def record(self, checkpoint, path, storage_options=None) -> None:
        consumed = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0][
            "samples_consumed"
        ]
        saved.append((checkpoint["global_step"], consumed))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record)
    fit(tiny_cli("wave", *settings), folder_of(cli) / "step=00000002.ckpt")
    assert {step for step, _ in saved} >= {4, 6}
    assert all(samples == 6 * step for step, samples in saved), saved


def test_a_run_outside_the_main_thread_installs_no_signal_handlers(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("wave", "--trainer.max_steps=2")
    thread = threading.Thread(target=fit, args=(cli,))
    thread.start()
    thread.join(60)
    assert step_of(folder_of(cli) / "last.ckpt") == 2
