"""Does a run that is killed many times equal an uninterrupted run, and do damaged files stop a run?

- kills: kill a run (SIGKILL) at random times and resume it each time; compare the sample ids and
  losses with those of an uninterrupted run
- worlds: the same comparison for a run with 1, then 2, then 1 process
- damage: train on 2,000 files, 500 of them damaged; check which files are reported, which good
  files are lost, and whether the run completes
- two: start two runs in one folder at once; one trains, the other ends in one sentence
- orphans: kill the first process of a run; no process may remain after 10 s
- commands: kill index, pack, probe, export and report at random times, and repeat them
- disk: fill the disk during a probe, and repeat it

    python -m benchmarks.faults [--kills 25] [--parts kills worlds damage ...]
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from benchmarks.killed_commands import check_commands, check_full_disk
from lightning.pytorch import Callback

from tests.damaged import RATE, REASONS, sound, write_damaged_corpus

HERE = Path(__file__).parent.parent
STEPS = 40
BATCH = 8
SETTINGS = f"""
model:
  front_end:
    class_path: WaveformFrontEnd
    init_args: {{conv_layers: [[16, 10, 5], [16, 8, 4]], sample_rate: {RATE}}}
  masker: {{class_path: SpanMasker, init_args: {{context_length: 5, target_length: 5, num_groups:
      2}}}}
  encoder: {{embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.2, positions: SinCosPositions,
      norm: post}}
  targets: {{top_k: 2, normalization: instance}}
  predictor: {{trunk: {{embed_dim: 16, depth: 1, num_heads: 2, positions: SinCosPositions, norm:
      post}}}}
  distance: MSE
  ema: {{momentum: {{class_path: Linear, init_args: {{start: 0.9, end: 1.0}}}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}
  lr_schedule: {{class_path: WarmupCosine, init_args: {{warmup_steps: 5}}}}
data: {{crop_seconds: 0.5, valid_share: 0.05}}
checkpoint: {{every_n_train_steps: 3}}
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: 20
  enable_progress_bar: false
  enable_model_summary: false
"""


class Recorder(Callback):
    """Writes step, rows and loss of every micro-batch of this process to disk, one line each.

    Args:
        path: file to append to; its suffix is the rank of the process.
        stop_after: optimizer step after which this process sends itself SIGTERM; 0 for never.
        pause: seconds to wait after every micro-batch, so that a kill interrupts the training.
    """

    def __init__(self, path: str, stop_after: int = 0, pause: float = 0.0) -> None:
        self.path, self.stop_after, self.pause = path, stop_after, pause

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append a line and wait."""
        rows = ",".join(map(str, batch.row.tolist()))
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {rows} {float(outputs['loss']).hex()}\n")
        time.sleep(self.pause)
        if self.stop_after and trainer.global_step == self.stop_after and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


class Run:
    """A training run in separate processes."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(SETTINGS)

    def start(
        self, name: str, *settings: str, world_size: int = 1, pause: float = 0.0
    ) -> subprocess.Popen[bytes]:
        """Start the training with further options; `name` is the file name of the records."""
        command = [
            *(sys.executable, "-m", "jepa_audio", "fit"),
            f"--config={self.folder}/settings.yaml",
            f"--data.root={self.corpus}",
            f"--run_dir={self.folder}",
            "--trainer.callbacks+=benchmarks.faults.Recorder",
            f"--trainer.callbacks.path={self.folder / name}",
            f"--trainer.callbacks.pause={pause}",
            f"--data.batch_size={BATCH // world_size}",
            f"--trainer.devices={world_size}",
            *["--trainer.strategy=ddp"] * (world_size > 1),
            *settings,
        ]
        log = (self.folder / "log.txt").open("ab")
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=HERE
        )

    def records(self, name: str) -> dict[int, tuple[tuple[int, ...], float]]:
        """First row → (rows, mean loss) of every micro-batch over all processes."""
        ranks: list[list[tuple[tuple[int, ...], float]]] = []
        for path in sorted(self.folder.glob(f"{name}.[0-9]")):
            lines = path.read_text().splitlines(keepends=True)
            fields = [line.split() for line in lines if line.endswith("\n")]
            ranks.append(
                [
                    (tuple(map(int, rows.split(","))), float.fromhex(loss))
                    for _, rows, loss in fields
                ]
            )
        records = {}
        for parts in zip(*ranks, strict=False):
            rows = tuple(sorted(row for part_rows, _ in parts for row in part_rows))
            records[rows[0]] = rows, float(np.mean([loss for _, loss in parts]))
        return records


def write_corpus(folder: Path, num_files: int) -> Path:
    """Write audio files without damage."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num_files):
        sf.write(folder / f"{number:04}.wav", sound(rng), RATE)
    return folder


def wait_for_end(process: subprocess.Popen[bytes], run: Run, *expected: int) -> None:
    """Wait for the end of a run; exit if its code is neither 0 nor expected."""
    if (code := process.wait(600)) not in (0, *expected):
        log = (run.folder / "log.txt").read_text()
        raise SystemExit(f"the run ended with code {code}:\n{log[-3000:]}")


def compare(
    name: str, reference: dict[int, Any], pieces: list[dict[int, Any]], tolerance: float
) -> bool:
    """Compare the pieces of an interrupted run with an uninterrupted run and print the result.

    Returns:
        Whether the samples are the same, in the same order, and all losses are within `tolerance`.
    """
    sequence: list[tuple[int, tuple[int, ...], float]] = []
    for number, piece in enumerate(pieces):
        # The next piece starts from a checkpoint: later micro-batches of this piece are discarded.
        starts = [first for later in pieces[number + 1 :] for first in [*later][:1]]
        sequence += [
            (first, *record) for first, record in piece.items() if not starts or first < min(starts)
        ]
    ids = [row for _, rows, _ in sequence for row in rows]
    expected = [row for rows, _ in reference.values() for row in rows]
    lost, repeated = len(set(expected) - set(ids)), len(ids) - len(set(ids))
    kept_differences = [
        abs(loss - reference[first][1]) for first, _, loss in sequence if first in reference
    ]
    all_differences = [
        abs(loss - reference[first][1])
        for piece in pieces
        for first, (_, loss) in piece.items()
        if first in reference
    ]
    num_repeated = sum(len(piece) for piece in pieces) - len(sequence)
    print(
        f"{name}: {len(expected)} samples in {len(reference)} micro-batches, samples lost {lost}, "
        f"samples repeated {repeated}, same order {ids == expected}, largest difference of a loss "
        f"{max(kept_differences):.3g} ({max(all_differences):.3g} with the {num_repeated} "
        "micro-batches that were repeated after a kill)"
    )
    return lost == repeated == 0 and ids == expected and max(all_differences) <= tolerance


def check_kills(folder: Path, corpus: Path, number: int, seed: int) -> bool:
    """Return whether a run that is killed at random times equals an uninterrupted run."""
    settings = "--data.num_workers=2", f"--trainer.max_steps={8 * number}"
    reference = Run(folder / "uninterrupted", corpus)
    wait_for_end(reference.start("all", *settings, "--data.num_workers=0"), reference)
    run, rng = Run(folder / "killed", corpus), random.Random(seed)
    pieces, seconds, num_too_late = [], [], 0
    for attempt in range(number):
        name = f"attempt{attempt:03}"
        process = run.start(name, *settings, "--ckpt_path=last", pause=0.4)
        started = time.monotonic()
        if rng.random() < 0.8:  # kill during training or saving; otherwise during the start
            wait_for_line(run.folder / f"{name}.0", process)
        time.sleep(rng.uniform(0, 3.0))
        num_too_late += process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seconds.append(time.monotonic() - started)
        pieces += [piece] if (piece := run.records(name)) else []
    wait_for_end(run.start("last", *settings, "--ckpt_path=last"), run)
    pieces.append(run.records("last"))
    end, find = time.monotonic() + 3, ["pgrep", "-f", str(run.folder)]
    while (
        remaining := subprocess.run(
            find, capture_output=True, text=True, check=False
        ).stdout.split()
    ) and time.monotonic() < end:
        time.sleep(0.2)
    print(
        f"kills: {number}, {min(seconds):.1f} to {max(seconds):.1f} s after a start, "
        f"{num_too_late} after the end of the run; micro-batches of each piece "
        f"{[len(piece) for piece in pieces]}; remaining processes {len(remaining)}"
    )
    is_equal = compare("kills", reference.records("all"), pieces, tolerance=0.0)
    return is_equal and not remaining and not num_too_late


def check_two(folder: Path, corpus: Path) -> bool:
    """Return whether one of two runs that start at once in a folder trains, and one is refused."""
    run = Run(folder / "two", corpus)
    processes = [run.start(name, "--data.num_workers=0") for name in ("first", "second")]
    codes = [process.wait(600) for process in processes]
    steps = [len(run.records(name)) for name in ("first", "second")]
    log = (run.folder / "log.txt").read_text()
    refusals = [line for line in log.splitlines() if line.startswith("jepa-audio: ")]
    print(f"two runs in one folder: codes {codes}, steps {steps}; {' '.join(refusals)}")
    winner = codes.index(0) if 0 in codes else 0
    return (
        sorted(codes) == [0, 1]
        and steps[winner] == STEPS
        and steps[1 - winner] == 0
        and len(refusals) == 1
        and "Traceback" not in log
    )


def check_orphans(folder: Path, corpus: Path) -> bool:
    """Return whether no process remains after a signal to the first process of a run."""
    cases = [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGTERM, 1)]
    return all(check_remaining(folder, corpus, *case) for case in cases)


def small_run(folder: Path, corpus: Path) -> tuple[Path, Path]:
    """A table of two classes for a probe, and the folder of a completed run."""
    names = sorted(path.name for path in corpus.iterdir() if path.suffix == ".wav")
    splits = ("train", "train", "valid", "test")
    lines = [f"{n},{'ab'[i // 4 % 2]},{splits[i % 4]}" for i, n in enumerate(names)]
    labels = corpus / "labels.csv"
    labels.write_text("\n".join(["path,label,split", *lines, ""]))
    run = Run(folder / "small", corpus)
    # The settings that the published layout has.
    eps = [f"--model.{part}.final_norm_eps=1e-5" for part in ("encoder", "predictor.trunk")]
    wait_for_end(run.start("all", "--data.num_workers=0", "--trainer.max_steps=6", *eps), run)
    return labels, run.folder


def check_remaining(
    folder: Path, corpus: Path, number: signal.Signals, world_size: int, seconds: float = 10
) -> bool:
    """Return whether no process remains `seconds` after a signal to the first process of a run."""
    run = Run(folder / f"{number.name}-{world_size}", corpus)
    settings = "--data.num_workers=2", "--trainer.max_steps=1000000"
    process = run.start("run", *settings, world_size=world_size, pause=0.05)
    wait_for_line(run.folder / "run.0", process)
    before = len(session_processes(process.pid))
    process.send_signal(number)
    process.wait(60)
    end, started = time.monotonic() + seconds, time.monotonic()
    while (remaining := session_processes(process.pid)) and time.monotonic() < end:
        time.sleep(0.2)
    print(
        f"{number.name} to the first of {world_size} training processes: {before} processes "
        f"before, {len(remaining)} after {time.monotonic() - started:.1f} s"
    )
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    return before >= 1 + 4 * world_size and not remaining


def session_processes(session: int) -> list[int]:
    """The processes that a command started with `start_new_session` has started, and itself."""
    output = subprocess.run(
        ["ps", "-eo", "pid,sess,stat"], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in output.splitlines()[1:]]
    return [int(pid) for pid, sid, state in lines if int(sid) == session and state[0] != "Z"]


def wait_for_line(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the file exists or the process has ended, but at most `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def check_worlds(folder: Path, corpus: Path) -> bool:
    """Return whether a run with a changing number of processes equals a run with one process."""
    # Drop path depends on the number of processes: each process draws it for its micro-batch.
    settings = "--data.num_workers=0", "--model.encoder.drop_path=0"
    reference = Run(folder / "one", corpus)
    wait_for_end(reference.start("all", *settings), reference)
    run, pieces = Run(folder / "changing", corpus), []
    for name, world_size, stop_after in (
        ("a", 1, STEPS // 3),
        ("b", 2, 2 * STEPS // 3),
        ("c", 1, 0),
    ):
        stop = "--ckpt_path=last", f"--trainer.callbacks.stop_after={stop_after}"
        process = run.start(name, *settings, *stop, world_size=world_size)
        wait_for_end(process, run, 128 + signal.SIGTERM)
        pieces.append(run.records(name))
    print(f"worlds 1 → 2 → 1: micro-batches {[len(piece) for piece in pieces]}")
    return compare("worlds", reference.records("all"), pieces, tolerance=1e-5)


def check_damage(folder: Path, num_files: int, num_bad: int) -> bool:
    """Return whether a run reports all damaged files and completes."""
    root = folder / "damaged"
    root.mkdir()
    good, bad = write_damaged_corpus(root, num_files - num_bad, num_bad)
    run = Run(folder / "run-on-damaged", root)
    wait_for_end(run.start("run", "--data.num_workers=2"), run)
    with (root / ".jepa_audio" / "index.skipped.csv").open(newline="") as file:
        skipped = [(row["path"], row["reason"]) for row in csv.DictReader(file)]
    names, reasons = [name for name, _ in skipped], dict(skipped)
    wrong = [
        name for name, kind in bad.items() if not re.search(REASONS[kind], reasons.get(name, ""))
    ]
    steps = len(run.records("run"))
    kinds = {kind: sum(other == kind for other in bad.values()) for kind in REASONS}
    print(f"damage: {len(bad)} damaged files among {len(good) + len(bad)}: {kinds}")
    print(
        f"reported {len(set(names) & set(bad))}, more than once {len(names) - len(set(names))}, "
        f"with a wrong reason {len(wrong)}, good files lost {len(set(names) & good)}; "
        f"the run completed {steps} of {STEPS} steps"
    )
    return sorted(names) == sorted(bad) and not wrong and steps == STEPS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--damaged", type=int, default=500)
    parser.add_argument("--command_kills", type=int, default=5)
    parts = ["kills", "worlds", "damage", "two", "orphans", "commands", "disk"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", 60)
        checks = {
            "kills": lambda: check_kills(folder, corpus, args.kills, args.seed),
            "worlds": lambda: check_worlds(folder, corpus),
            "damage": lambda: check_damage(folder, args.files, args.damaged),
            "two": lambda: check_two(folder, corpus),
            "orphans": lambda: check_orphans(folder, corpus),
            "commands": lambda: check_commands(
                folder, corpus, *small, args.command_kills, args.seed
            ),
            "disk": lambda: check_full_disk(folder, *small),
        }
        if {"commands", "disk"} & set(args.parts):
            small = small_run(folder, corpus)
        failed = [part for part in args.parts if not checks[part]()]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
