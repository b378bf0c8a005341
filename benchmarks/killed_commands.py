"""Commands that are killed at random times, and a disk that fills during a probe.

Each command is killed (SIGKILL, with all processes that it has started), then repeated until its
end. Its files must equal those of a command that was not interrupted. Used by `faults`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

Content = dict[str, str]
"""Name of an output → its content, or a hash of it."""


def start(args: Sequence[str | Path], log: Path, max_bytes: int = 0) -> subprocess.Popen[bytes]:
    """Start a command; with `max_bytes`, a longer file fails as on a full disk."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jepa_audio", *map(str, args)],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if max_bytes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    return process


def complete(args: Sequence[str | Path], log: Path) -> float:
    """Run a command to its end; return the seconds that it took."""
    started = time.monotonic()
    if code := start(args, log).wait(600):
        raise SystemExit(f"{args} ended with code {code}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - started


def table_content(folder: Path) -> Content:
    """All columns of a corpus table, without where it lies."""
    return {"table": str(pq.read_table(folder / "table.parquet").to_pydict())}


def file_hashes(folder: Path) -> Content:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_hashes(folder: Path) -> Content:
    """SHA-256 of the shards."""
    return {name: value for name, value in file_hashes(folder).items() if name.endswith(".tar")}


def scores(folder: Path) -> Content:
    """The rows of results, the last ones if a killed command had written some before."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    last = {f"{row['encoder']} {row['variant']} {row['head']} {row['seed']}": row for row in rows}
    return {name: json.dumps(row, sort_keys=True) for name, row in last.items()}


def report_names(folder: Path) -> Content:
    """Names of the files of a report; the page has the time at which it was written."""
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    # A temporary file of a killed command remains.
    return {name: "" for name in file_hashes(folder) if not name.endswith(".part")}


def commands(
    corpus: Path, labels: Path, run: Path
) -> dict[str, tuple[Callable[[Path], list[str | Path]], Callable[[Path], Content]]]:
    """Name → (arguments for an output folder, content of that folder)."""
    last = run / "checkpoints" / "last.ckpt"
    probe = ["probe", "--encoder", last, "--tasks", labels, "--preset", "linear"]
    return {
        "index": (
            lambda out: ["data", "index", corpus, "-o", out / "table.parquet"],
            table_content,
        ),
        "pack": (lambda out: ["data", "pack", corpus, out, "--shard_mb", "1"], shard_hashes),
        "probe": (lambda out: [*probe, "--output", out], scores),
        "export": (lambda out: ["export", "wavjepa", last, "-o", out], file_hashes),
        "report": (lambda out: ["report", out], report_names),
    }


def check_commands(
    folder: Path, corpus: Path, labels: Path, run: Path, number: int, seed: int
) -> bool:
    """Return whether each command gives equal files after `number` kills."""
    rng, log, is_equal = random.Random(seed), folder / "log.txt", True
    for name, (arguments, content) in commands(corpus, labels, run).items():
        reference, killed = folder / f"{name}-reference", folder / f"{name}-killed"
        for copy in (reference, killed):
            if name == "report":  # it is written into the folder of the runs
                shutil.copytree(run, copy / "small")
            copy.mkdir(exist_ok=True)
        seconds = complete(arguments(reference), log)
        times = [rng.uniform(0.3, 0.95) * seconds for _ in range(number)]
        num_killed = 0
        for delay in times:
            process = start(arguments(killed), log)
            time.sleep(delay)
            if process.poll() is None:  # else the command was faster than the uninterrupted one
                os.killpg(process.pid, signal.SIGKILL)
                num_killed += 1
            process.wait()
        complete(arguments(killed), log)
        equal = content(killed) == content(reference)
        print(
            f"{name}: {seconds:.1f} s, killed {num_killed} times after "
            f"{', '.join(f'{delay:.1f}' for delay in times)} s; equal to the uninterrupted command "
            f"{equal}"
        )
        is_equal &= equal
    return is_equal


def check_full_disk(folder: Path, labels: Path, run: Path) -> bool:
    """Return whether a probe on a full disk ends in one sentence and can be repeated."""
    log, name = folder / "log.txt", "probe"
    arguments, content = commands(folder, labels, run)[name]
    reference, full = folder / "disk-reference", folder / "disk-full"
    complete(arguments(reference), log)
    largest = max(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    is_valid = True
    for share in (0.02, 0.3, 0.9):
        code = start(arguments(full), log, int(share * largest)).wait(600)
        text = log.read_text()
        sentences = [line for line in text.splitlines() if line.startswith("jepa-audio: ")]
        print(f"full disk at {share:g} of the largest file: code {code}, {' '.join(sentences)}")
        is_valid &= code == 1 and len(sentences) == 1 and "Traceback" not in text
    complete(arguments(full), log)
    equal = content(full) == content(reference)
    print(f"the same command with free disk space gives equal rows: {equal}")
    return is_valid and equal
