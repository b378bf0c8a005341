"""A run survives its own death and a rotten corpus; `benchmarks/faults.py` does the same at full size."""

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


def test_a_run_killed_at_random_moments_and_resumed_is_the_run_that_was_left_alone(tmp_path: Path):
    corpus = faults.write_corpus(tmp_path / "corpus", 30)
    assert faults.kills(tmp_path, corpus, number=2, seed=1)


def test_a_rotten_corpus_costs_a_list_of_names(
    tmp_path: Path, tiny_cli: Callable, fit: Callable, caplog
):
    good, bad = write_damaged_corpus(tmp_path / "rotten", num_good=120, num_bad=39)
    settings = (
        f"--data.root={tmp_path / 'rotten'}",
        f"--model.front_end.sample_rate={RATE}",
        "--data.crop_seconds=0.1",
    )
    with caplog.at_level(logging.WARNING):
        losses = fit(tiny_cli("wave", *settings))
    assert len(losses) == 6
    corpus = load_corpus(tmp_path / "rotten").mark_unfit(min_seconds=0.1)
    reasons = dict(zip(corpus.names.to_pylist(), corpus.table["reason"].to_pylist(), strict=True))
    assert len(corpus) == len(reasons), "every file is listed once"
    assert {name for name, reason in reasons.items() if not reason} == good
    assert {name for name, reason in reasons.items() if reason} == bad.keys()
    for name, kind in bad.items():
        assert re.search(REASONS[kind], reasons[name]), (name, reasons[name])
        assert [name in message for message in caplog.messages].count(True) == 1
    assert not any(name in message for message in caplog.messages for name in good)


def test_a_reading_process_killed_by_the_system_ends_the_run_with_what_happened(tmp_path: Path):
    run = faults.Run(tmp_path / "run", faults.write_corpus(tmp_path / "corpus", 10))
    process = run.start("run", "--data.num_workers=1", "--trainer.max_steps=100000", pause=0.05)
    faults.wait_for_line(tmp_path / "run" / "run.0", process)
    os.kill(reading_process(process.pid), signal.SIGKILL)
    assert process.wait(60) == 1
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "a reading process was killed, as the system does when memory runs out" in said
    assert "lower `--data.num_workers`; then go on with `--ckpt_path last`" in said
    assert "Traceback" not in said


def reading_process(run: int) -> int:
    """The child of the fork server of a run."""
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout
    processes = [line.split(None, 2) for line in listed.splitlines()[1:]]
    children = [int(pid) for pid, parent, _ in processes if int(parent) == run]
    grandchildren = [int(pid) for pid, parent, _ in processes if int(parent) in children]
    if len(grandchildren) != 1:
        pytest.fail(f"one reading process was expected: {grandchildren}")
    return grandchildren[0]
