"""Killed runs and damaged corpora; `benchmarks/faults.py` does the same at full size."""

import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import faults

from jepa_audio.data.corpus.table import load_corpus
from tests.damaged import RATE, REASONS, write_damaged_corpus


@pytest.mark.parametrize("number", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_run_killed_at_random_times_and_resumed_equals_uninterrupted_run(
    number: int, tmp_path: Path
):
    corpus = faults.write_corpus(tmp_path / "corpus", 30)
    assert faults.check_kills(tmp_path, corpus, number, seed=1)


def test_damaged_files_are_each_reported_once_and_training_completes(
    tmp_path: Path, tiny_cli: Callable, fit: Callable, caplog
):
    good, bad = write_damaged_corpus(tmp_path / "damaged", num_good=120, num_bad=39)
    settings = (
        f"--data.root={tmp_path / 'damaged'}",
        f"--model.front_end.sample_rate={RATE}",
        "--data.crop_seconds=0.1",
    )
    with caplog.at_level(logging.WARNING):
        losses = fit(tiny_cli("wave", *settings))
    assert len(losses) == 6
    corpus = load_corpus(tmp_path / "damaged").mark_unfit(min_seconds=0.1)
    reasons = dict(zip(corpus.names.to_pylist(), corpus.table["reason"].to_pylist(), strict=True))
    assert len(corpus) == len(reasons), "every file is output once"
    assert {name for name, reason in reasons.items() if not reason} == good
    assert {name for name, reason in reasons.items() if reason} == bad.keys()
    for name, kind in bad.items():
        assert re.search(REASONS[kind], reasons[name]), (name, reasons[name])
        assert [name in message for message in caplog.messages].count(True) == 1
    assert not any(name in message for message in caplog.messages for name in good)


def test_killed_reading_process_ends_the_run_with_an_explanation(tmp_path: Path):
    run = faults.Run(tmp_path / "run", faults.write_corpus(tmp_path / "corpus", 10))
    process = run.start("run", "--data.num_workers=1", "--trainer.max_steps=100000", pause=0.05)
    faults.wait_for_line(tmp_path / "run" / "run.0", process)
    os.kill(find_reading_process(process.pid), signal.SIGKILL)
    assert process.wait(60) == 1
    log = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "a worker process was killed; the usual reason is that memory is full" in log
    assert "lower `--data.num_workers`; then continue with `--ckpt_path last`" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_training_process_leaves_no_process(world_size: int, tmp_path: Path):
    corpus = faults.write_corpus(tmp_path / "corpus", 20)
    assert faults.check_remaining(tmp_path, corpus, signal.SIGKILL, world_size)


def find_reading_process(run: int) -> int:
    """The id of the only reading process of a run: the child of its fork server."""
    output = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout
    processes = [line.split(None, 2) for line in output.splitlines()[1:]]
    children = [int(pid) for pid, parent, _ in processes if int(parent) == run]
    grandchildren = [int(pid) for pid, parent, _ in processes if int(parent) in children]
    if len(grandchildren) != 1:
        pytest.fail(f"expected one reading process, found {grandchildren}")
    return grandchildren[0]
