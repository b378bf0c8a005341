"""The folder of a run: no other run writes into it, and a damaged checkpoint is never the end."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from jepa_audio.errors import MissingFileError
from jepa_audio.training.run.folder import (
    CONFIG_HEADER,
    RunFolder,
    RunFolderError,
    open_checkpoint,
)


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {}, "hyper_parameters": {}, "global_step": step}
    torch.save({**content, "weights": torch.zeros(5000)}, path)
    return path


RUN = (
    "checkpoints/last.ckpt",
    "checkpoints/previous.ckpt",
    "checkpoints/step=00000002.ckpt",
    "checkpoints/.last.ckpt.part",
    "metrics/version_0/metrics.csv",
    "metrics/version_0/hparams.yaml",
    "metrics/version_11/metrics.csv",
    "tensorboard/version_0/events.out.tfevents.17.host.1.0",
    "tensorboard/version_0/hparams.yaml",
)
OTHERS = (
    "notes.txt",
    "checkpoints/best.ckpt",
    "checkpoints/last_good.ckpt",
    "metrics/version_0/plot.png",
    "probe/results.jsonl",
    "config.mine.yaml",
)


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics/version_0/metrics.csv",
        "metrics.csv",
    ],
)
def test_a_folder_with_results_is_refused_with_the_ways_out(file: str, tmp_path: Path):
    write(tmp_path / file)
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path).admit(None, overwrite=False)
    for word in (str(tmp_path), file, "--ckpt_path last", "--run_dir", "--overwrite"):
        assert word in str(error.value)
    RunFolder(tmp_path).admit(tmp_path / "checkpoints" / "last.ckpt", overwrite=False)


def test_a_folder_without_results_is_not_refused(tmp_path: Path):
    RunFolder(tmp_path / "new").admit(None, overwrite=False)
    for file in ("config.yaml", "notes.txt", "tensorboard/version_0/hparams.yaml", "sounds/a.wav"):
        write(tmp_path / file)
    RunFolder(tmp_path).admit(None, overwrite=False)


def test_a_checkpoint_of_another_run_does_not_open_the_folder(tmp_path: Path):
    other = save(tmp_path / "other" / "checkpoints" / "last.ckpt", 3)
    save(tmp_path / "run" / "checkpoints" / "last.ckpt", 5)
    with pytest.raises(RunFolderError, match="holds a run"):
        RunFolder(tmp_path / "run").admit(other, overwrite=False)
    RunFolder(tmp_path / "run").admit(other, overwrite=True)
    with pytest.raises(RunFolderError, match="give one of them"):
        RunFolder(tmp_path / "other").admit(other, overwrite=True)


def test_overwrite_removes_the_files_of_the_run_when_training_begins_and_no_others(tmp_path: Path):
    for file in (*RUN, *OTHERS):
        write(tmp_path / file)
    saved = [
        write(tmp_path / name, f"{CONFIG_HEADER}2") for name in ("config.yaml", "config.1.yaml")
    ]
    folder = RunFolder(tmp_path)
    folder.admit(None, overwrite=True)
    assert all((tmp_path / file).exists() for file in RUN), "nothing is removed before"
    folder.begin("new")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*OTHERS, "config.yaml"}
    assert saved[0].read_text() == "new"
    assert not (tmp_path / "tensorboard").exists()


def test_a_configuration_of_the_user_is_kept_under_a_number(tmp_path: Path):
    write(tmp_path / "config.yaml", "# my recipe")
    folder = RunFolder(tmp_path)
    folder.admit(None, overwrite=True)
    folder.begin("first start")
    folder.begin("second start")
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert texts == {
        "config.1.yaml": "# my recipe",
        "config.2.yaml": "first start",
        "config.yaml": "second start",
    }


def hold(folder: Path, is_held: Event) -> None:
    with RunFolder(folder).lock():
        is_held.set()
        signal.pause()


def test_the_lock_names_the_process_of_the_other_run_and_ends_with_a_kill(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, is_held))
    holder.start()
    assert is_held.wait(30)
    with pytest.raises(RunFolderError) as error, RunFolder(tmp_path).lock():
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
    assert "--run_dir" in str(error.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    assert (tmp_path / ".lock").exists(), "a killed process leaves its file"
    with RunFolder(tmp_path).lock():
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists()


def test_a_requeued_job_waits_until_the_other_process_has_ended(tmp_path: Path):
    is_held, ended = threading.Event(), threading.Event()

    def first() -> None:
        with RunFolder(tmp_path).lock():
            is_held.set()
            ended.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert is_held.wait(30)
    threading.Timer(0.2, ended.set).start()
    with RunFolder(tmp_path).lock(wait_seconds=30.0):
        assert ended.is_set()
        with pytest.raises(RunFolderError), RunFolder(tmp_path).lock():
            pass
    thread.join(30)


def test_a_file_system_without_locks_is_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(tmp_path).lock():
        pass
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(tmp_path: Path):
    write(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(RunFolderError, match=r"`--run_dir`: .* cannot be written"),
            RunFolder(path).lock(),
        ):
            pass


def test_last_is_the_last_checkpoint_or_none_in_a_new_folder(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.find_checkpoint(None) is folder.find_checkpoint("last") is None
    previous = save(tmp_path / "checkpoints" / "previous.ckpt", 7)
    with pytest.raises(RunFolderError, match=rf"of step 7: `--ckpt_path {previous}`"):
        folder.find_checkpoint("last")
    last = save(tmp_path / "checkpoints" / "last.ckpt", 9)
    assert folder.find_checkpoint("last") == last
    assert folder.find_checkpoint(str(previous)) == previous
    for wrong in ("best", str(tmp_path / "nowhere.ckpt")):
        with pytest.raises(MissingFileError, match=rf"no checkpoint at {wrong}"):
            folder.find_checkpoint(wrong)
    with pytest.raises(MissingFileError, match="copy it to this machine first"):
        folder.find_checkpoint("s3://bucket/last.ckpt")


@pytest.mark.parametrize("damaged", [b"", b"<html>", b"\x80\x02garbage", None])
def test_a_damaged_checkpoint_names_the_newest_whole_one(damaged: bytes | None, tmp_path: Path):
    last = save(tmp_path / "last.ckpt", 9)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    last.write_bytes(bytes(content) if damaged is None else damaged)
    with pytest.raises(RunFolderError, match="has no complete checkpoint: start a new run"):
        open_checkpoint(last)
    save(tmp_path / "step=4.ckpt", 4)
    save(tmp_path / "previous.ckpt", 8)
    with pytest.raises(RunFolderError) as error:
        open_checkpoint(last)
    assert str(error.value).startswith(f"{last} is damaged")
    assert f"of step 8: `--ckpt_path {tmp_path / 'previous.ckpt'}`" in str(error.value)
    assert "weights_only" not in str(error.value)
    assert open_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 8
