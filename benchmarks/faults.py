"""Does a run that dies again and again come to what an undisturbed run comes to, and does a rotten corpus stop it?

kills   a run is killed (SIGKILL) at random moments and resumed each time: sample ids and losses
beside those of a run
        that was left alone
worlds  the same run with 1, then 2, then 1 process
damage  500 damaged files among 2,000: what is reported, what is lost, and whether the run completes

    python -m benchmarks.faults [--kills 25] [--parts kills worlds damage]
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
    """Writes step, rows and loss of every micro-batch of this process, each to disk before the next begins.

    Args:
        path: file to add to; a process of another rank adds its number.
        stop_after: optimizer steps after which this process sends itself SIGTERM; 0 for never.
        pause: seconds to wait after every micro-batch, that a kill finds the run at work.
    """

    def __init__(self, path: str, stop_after: int = 0, pause: float = 0.0) -> None:
        self.path, self.stop_after, self.pause = path, stop_after, pause

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line."""
        rows = ",".join(map(str, batch.row.tolist()))
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {rows} {float(outputs['loss']).hex()}\n")
        time.sleep(self.pause)
        if self.stop_after and trainer.global_step == self.stop_after and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


class Run:
    """A training run in processes of its own."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(SETTINGS)

    def start(
        self, name: str, *settings: str, world_size: int = 1, pause: float = 0.0
    ) -> subprocess.Popen[bytes]:
        """Train, from the last checkpoint if `settings` say so; `name` is that of the records."""
        recorder = "--trainer.callbacks+=benchmarks.faults.Recorder"
        own = [
            f"--trainer.callbacks.path={self.folder / name}",
            f"--trainer.callbacks.pause={pause}",
        ]
        where = [
            f"--config={self.folder}/settings.yaml",
            f"--data.root={self.corpus}",
            f"--run_dir={self.folder}",
        ]
        world = [f"--data.batch_size={BATCH // world_size}", f"--trainer.devices={world_size}"]
        world += ["--trainer.strategy=ddp"] * (world_size > 1)
        command = [
            sys.executable,
            "-m",
            "jepa_audio",
            "fit",
            *where,
            recorder,
            *own,
            *world,
            *settings,
        ]
        log = (self.folder / "log.txt").open("ab")
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=HERE
        )

    def records(self, name: str) -> dict[int, tuple[tuple[int, ...], float]]:
        """Rows and mean loss of every micro-batch, of all processes together, by its first row."""
        ranks: list[list[tuple[tuple[int, ...], float]]] = []
        for path in sorted(self.folder.glob(f"{name}.[0-9]")):
            lines = [
                line.split()
                for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            ]
            ranks.append(
                [(tuple(map(int, rows.split(","))), float.fromhex(loss)) for _, rows, loss in lines]
            )
        records = {}
        for together in zip(*ranks, strict=False):
            rows = tuple(sorted(row for own, _ in together for row in own))
            records[rows[0]] = rows, float(np.mean([loss for _, loss in together]))
        return records


def write_corpus(folder: Path, num_files: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num_files):
        sf.write(folder / f"{number:04}.wav", sound(rng), RATE)
    return folder


def finish(process: subprocess.Popen[bytes], run: Run, *expected: int) -> None:
    if (code := process.wait(600)) not in (0, *expected):
        raise SystemExit(
            f"the run ended with {code}:\n{(run.folder / 'log.txt').read_text()[-3000:]}"
        )


def compare(
    name: str, whole: dict[int, Any], pieces: list[dict[int, Any]], tolerance: float
) -> bool:
    """Print what was lost, what was trained on twice, and how far the losses are apart; whether all is well."""
    sequence: list[tuple[int, tuple[int, ...], float]] = []
    for number, piece in enumerate(pieces):
        # What was done after the checkpoint that the next piece goes on from is gone with the
        # weights.
        later = [first for after in pieces[number + 1 :] for first in [*after][:1]]
        kept = {first: record for first, record in piece.items() if not later or first < min(later)}
        sequence += [(first, *record) for first, record in kept.items()]
    ids = [row for _, rows, _ in sequence for row in rows]
    expected = [row for rows, _ in whole.values() for row in rows]
    lost, repeated = len(set(expected) - set(ids)), len(ids) - len(set(ids))
    differences = [abs(loss - whole[first][1]) for first, _, loss in sequence if first in whole]
    done_again = sum(len(piece) for piece in pieces) - len(sequence)
    again = [
        abs(loss - whole[first][1])
        for piece in pieces
        for first, (_, loss) in piece.items()
        if first in whole
    ]
    print(
        f"{name}: {len(expected)} samples in {len(whole)} micro-batches, samples lost {lost}, samples repeated "
        f"{repeated}, same order {ids == expected}, largest difference of a loss {max(differences):.3g} "
        f"({max(again):.3g} with the {done_again} micro-batches done again after a kill)"
    )
    return lost == repeated == 0 and ids == expected and max(again) <= tolerance


def kills(folder: Path, corpus: Path, number: int, seed: int) -> bool:
    settings = "--data.num_workers=2", f"--trainer.max_steps={8 * number}"
    whole = Run(folder / "whole", corpus)
    finish(whole.start("whole", *settings), whole)
    run, dice = Run(folder / "killed", corpus), random.Random(seed)
    pieces, moments, too_late = [], [], 0
    for attempt in range(number):
        name = f"attempt{attempt:03}"
        process = run.start(name, *settings, "--ckpt_path=last", pause=0.4)
        started = time.monotonic()
        if dice.random() < 0.8:  # while it trains or saves; else while it starts
            wait_for_line(run.folder / f"{name}.0", process)
        time.sleep(dice.uniform(0, 3.0))
        too_late += process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        moments.append(time.monotonic() - started)
        pieces += [piece] if (piece := run.records(name)) else []
    finish(run.start("last", *settings, "--ckpt_path=last"), run)
    pieces.append(run.records("last"))
    time.sleep(3)
    left = subprocess.run(
        ["pgrep", "-f", str(run.folder)], capture_output=True, text=True, check=False
    ).stdout.split()
    print(
        f"kills: {number}, {min(moments):.1f} to {max(moments):.1f} s after a start, {too_late} of them too late; "
        f"micro-batches done each time {[len(piece) for piece in pieces]}; processes left behind {len(left)}"
    )
    return (
        compare("kills", whole.records("whole"), pieces, tolerance=0.0)
        and not left
        and not too_late
    )


def wait_for_line(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def worlds(folder: Path, corpus: Path) -> bool:
    # Drop path is drawn by each process for its own micro-batch: its noise depends on how many
    # share the rows.
    same = "--data.num_workers=0", "--model.encoder.drop_path=0"
    whole = Run(folder / "one", corpus)
    finish(whole.start("one", *same), whole)
    run, pieces = Run(folder / "changing", corpus), []
    for name, world_size, stop_after in (
        ("a", 1, STEPS // 3),
        ("b", 2, 2 * STEPS // 3),
        ("c", 1, 0),
    ):
        settings = *same, "--ckpt_path=last", f"--trainer.callbacks.stop_after={stop_after}"
        finish(run.start(name, *settings, world_size=world_size), run, 128 + signal.SIGTERM)
        pieces.append(run.records(name))
    print(f"worlds 1 → 2 → 1: micro-batches {[len(piece) for piece in pieces]}")
    return compare("worlds", whole.records("one"), pieces, tolerance=1e-5)


def damage(folder: Path, num_files: int, num_bad: int) -> bool:
    root = folder / "rotten"
    root.mkdir()
    good, bad = write_damaged_corpus(root, num_files - num_bad, num_bad)
    run = Run(folder / "on-rotten", root)
    finish(run.start("run", "--data.num_workers=2"), run)
    with (root / ".jepa_audio" / "index.skipped.csv").open(newline="") as file:
        skipped = [(row["path"], row["reason"]) for row in csv.DictReader(file)]
    names = [name for name, _ in skipped]
    reasons = dict(skipped)
    wrong = [
        name for name, kind in bad.items() if not re.search(REASONS[kind], reasons.get(name, ""))
    ]
    steps = len(run.records("run"))
    kinds = {kind: sum(other == kind for other in bad.values()) for kind in REASONS}
    print(f"damage: {len(bad)} damaged files among {len(good) + len(bad)}: {kinds}")
    print(
        f"reported {len(set(names) & set(bad))}, more than once {len(names) - len(set(names))}, with another reason "
        f"{len(wrong)}, good files lost {len(set(names) & good)}; the run completed {steps} of {STEPS} steps"
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
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["kills", "worlds", "damage"],
        default=["kills", "worlds", "damage"],
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", 60)
        results = {
            "kills": lambda: kills(folder, corpus, args.kills, args.seed),
            "worlds": lambda: worlds(folder, corpus),
            "damage": lambda: damage(folder, args.files, args.damaged),
        }
        failed = [part for part in args.parts if not results[part]()]
    if failed:
        raise SystemExit(f"not as it should be: {', '.join(failed)}")


if __name__ == "__main__":
    main()
