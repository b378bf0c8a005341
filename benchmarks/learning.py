"""Does an encoder learn more than log-mel statistics and its random-init baseline have?

Trains recipes on the sets of `benchmarks/corpora.py`, probes the frozen encoders, and compares each
with two baselines on the same test clips:

- speedrun: seconds of training until an encoder is ahead of both baselines, each with a paired
  bootstrap interval above zero, and stays ahead at all later checkpoints
- table: the rows of an output folder as Markdown

    python -m benchmarks.learning speedrun --recipe small/waveform --corpora DIR --output DIR
    python -m benchmarks.learning table DIR

A second call continues where the first one stopped. `benchmarks/ablations.py` compares settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from jepa_audio.errors import UserError
from jepa_audio.files import read_jsonl
from jepa_audio.probing.encoders import LogMelStatistics, ProbeEncoder, run_name
from jepa_audio.probing.intervals import Difference, difference
from jepa_audio.probing.rows import STATISTICS, ProbeRow, load_evidence, read_rows

log = logging.getLogger(__name__)
COMMAND = [sys.executable, "-m", "jepa_audio"]
TASKS = ("fsdd_digit", "klettres_language", "gm_family", "gm_pitch")
# The pooling and the layer of each task, chosen on the `_select` sets: the validation splits of the
# tasks have one speaker, or one instrument of each family, too few for it. `fsdd_speaker` has no
# such set.
POOLINGS = {
    "fsdd_digit": "thirds_std",
    "fsdd_speaker": "mean_std_change",
    "klettres_language": "mean_std_change",
    "gm_family": "mean_std_change",
    "gm_pitch": "mean_std_change",
}
POOLINGS_OF_RECIPE = {"small/waveform": {"gm_family": "thirds_std_change"}}
LAYERS = {"fsdd_digit": 1, "fsdd_speaker": 0, "klettres_language": 0, "gm_family": 4, "gm_pitch": 0}


def pooling_of(recipe: str, task: str) -> str:
    """The pooling of a task with the encoders of a recipe."""
    task = Path(task).stem.removesuffix("_select")
    return (POOLINGS | POOLINGS_OF_RECIPE.get(recipe, {}))[task]


@dataclass(frozen=True)
class Trial:
    """One training run and what it is probed on.

    Attributes:
        recipe: name or path of a recipe.
        options: more options of `jepa-audio fit`.
        corpus: pretraining set of `benchmarks/corpora.py`: speech, music or mixed.
        tasks: labelled sets of `benchmarks/corpora.py`.
        poolings: of log-mel statistics, which are reported with the pooling of the encoder and with
            the best one on the test split.
        seed: of the model and of the order of the clips.
        minutes: of training, with start and index; later checkpoints are not probed.
        save_every: optimizer steps between the probed checkpoints; 0 probes the last one alone.
        variants: encoders of a checkpoint that are probed.
    """

    name: str
    recipe: str
    options: tuple[str, ...] = ()
    corpus: str = "speech"
    tasks: tuple[str, ...] = TASKS
    poolings: tuple[str, ...] = ("mean_std_change", "thirds_std", "thirds_std_change")
    seed: int = 0
    minutes: float = 30.0
    save_every: int = 0
    variants: tuple[str, ...] = ("target",)

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        words = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        return f"{words}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """The head with the best validation score on one task, with the pooling of this task.

    Attributes:
        against: differences to "random-init", to "log-mel, equal pooling" and to "log-mel", the
            best pooling of log-mel statistics on the test split.
    """

    task: str
    seconds: float
    step: int
    variant: str
    pooling: str
    layer: str
    value: float
    low: float
    high: float
    against: dict[str, Difference]

    @property
    def is_ahead(self) -> bool:
        """Whether the encoder is ahead of all baselines."""
        return all(found.verdict == "ahead" for found in self.against.values())


def train(trial: Trial, corpora: Path, output: Path) -> list[tuple[float, Path]]:
    """Run `jepa-audio fit`; (seconds since the start of the command, checkpoint), in order.

    With `save_every`, the index of the pretraining set is made again: the seconds include it.

    Raises:
        UserError: if no checkpoint was saved within `trial.minutes`.
    """
    for index in corpora.rglob(".jepa_audio") if trial.save_every else ():
        shutil.rmtree(index)
    run, pretraining = output / trial.folder, corpora / f"{trial.corpus}.yaml"
    minutes, seconds = divmod(round(trial.minutes * 60), 60)
    limit = f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:{seconds:02d}"
    command = [
        *COMMAND, "fit", "--config", trial.recipe, "--config", str(pretraining),
        "--run_dir", str(run), "--overwrite", f"--model.seed={trial.seed}",
        f"--data.seed={trial.seed}", f"--trainer.max_time={limit}",
        *trial.options,
    ]  # fmt: skip
    if trial.save_every:
        command += [
            "--checkpoint.keep_all=true",
            f"--checkpoint.every_n_train_steps={trial.save_every}",
        ]
    start = time.time()
    with (output / f"{trial.folder}.log").open("w") as printed:
        subprocess.run(command, check=True, stdout=printed, stderr=subprocess.STDOUT)
    pattern = "step=*.ckpt" if trial.save_every else "last.ckpt"
    saved = [(path.stat().st_mtime - start, path) for path in run.glob(f"checkpoints/{pattern}")]
    # A run that `max_time` ended needs seconds more: it ends its step, and saves a checkpoint.
    within = sorted(pair for pair in saved if pair[0] <= trial.minutes * 60 + 60)
    if not within:
        raise UserError(f"{run}: no checkpoint was saved within {trial.minutes} minutes")
    return within


def probe(
    trial: Trial, checkpoints: Sequence[Path], corpora: Path, output: Path
) -> list[list[ProbeRow]]:
    """Run `jepa-audio probe` on the tasks of a trial; the rows of each checkpoint.

    Each task is probed with its own pooling and layer. The rows of log-mel statistics, which have
    no checkpoint, are among the rows of all, with all poolings; trials share them.

    Raises:
        UserError: if the pooling of a task is not in `trial.poolings`.
    """
    poolings = {task: pooling_of(trial.recipe, task) for task in trial.tasks}
    if missing := sorted(set(poolings.values()) - set(trial.poolings)):
        raise UserError(f"{trial.name}: `poolings` has no {missing[0]}, the pooling of a task")
    shutil.rmtree(output / "probes" / trial.folder, ignore_errors=True)
    rows: list[ProbeRow] = []
    encoders = ",".join(map(str, checkpoints))
    log_file = output / f"{trial.folder}.log"
    for task, pooling in poolings.items():
        layer = LAYERS[task.removesuffix("_select")]
        options = ["--pooling", pooling, f"--layers=[{layer}]"]
        options += [f"--variants={json.dumps(trial.variants)}"]
        folder = output / "probes" / trial.folder / task
        rows += _run_probe(encoders, task, folder, options, corpora, log_file)
    rows = [row for row in rows if row.variant != STATISTICS]
    for task in trial.tasks:
        folder = output / "probes" / "log-mel" / task / "-".join(trial.poolings)
        options = ["--pooling", ",".join(trial.poolings)]
        found = _run_probe("benchmarks.learning:log_mel", task, folder, options, corpora, log_file)
        rows += [row for row in found if row.variant == STATISTICS]
    runs = [run_name(checkpoint) for checkpoint in checkpoints]
    return [[row for row in rows if row.encoder in (name, "log-mel")] for name in runs]


def _run_probe(
    encoder: str,
    task: str,
    folder: Path,
    options: Sequence[str],
    corpora: Path,
    log_file: Path,
) -> list[ProbeRow]:
    """The rows of one call of `jepa-audio probe`, or of the results that exist."""
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            *COMMAND, "probe", "--encoder", encoder, "--output", str(folder), "--preset", "linear",
            "--tasks", str(corpora / f"{task}.csv"), "--frequency", "concat", *options,
        ]  # fmt: skip
        with log_file.open("a") as printed:
            subprocess.run(command, check=True, stdout=printed, stderr=subprocess.STDOUT)
        shutil.rmtree(folder / "features", ignore_errors=True)
        done.touch()
    return [
        replace(row, evidence=str(folder / row.evidence))
        for row in read_rows(folder / "results.jsonl")
    ]


def log_mel() -> ProbeEncoder:
    """Log-mel statistics of 16 kHz, as an encoder of `jepa-audio probe`."""
    return LogMelStatistics(16_000)


def compare(rows: Sequence[ProbeRow], seconds: float, step: int, recipe: str = "") -> list[Result]:
    """For each task, the head with the best validation score against the baselines.

    Raises:
        UserError: if the pooling of a task was not probed.
    """
    results = []
    for task in dict.fromkeys(row.task for row in rows):
        # One kind of head: logistic regression.
        own = [row for row in rows if row.task == task and row.head != "knn"]
        time_pooling = pooling_of(recipe, task)
        pooled = [row for row in own if row.pooling.partition("/")[0] == time_pooling]
        if not pooled:
            raise UserError(f"{task}: `poolings` has no {time_pooling}, the pooling of this task")
        best = max((row for row in pooled if not row.is_baseline), key=lambda row: row.valid)
        statistics = [row for row in own if row.variant == STATISTICS]
        against = {
            "log-mel, equal pooling": difference_of(
                best, next(r for r in statistics if r.pooling.partition("/")[0] == time_pooling)
            ),
            "log-mel": difference_of(best, max(statistics, key=lambda row: row.value)),
        }
        if best.against_random is not None:
            against = {"random-init": best.against_random} | against
        score = best.scores[best.metric]
        results.append(
            Result(
                Path(task).stem, seconds, step, best.variant, best.pooling, best.layer,
                score.value, score.low, score.high, against,
            )
        )  # fmt: skip
    return results


def difference_of(row: ProbeRow, other: ProbeRow) -> Difference:
    """The difference of two rows on the same test units, with its paired interval."""
    draws = [load_evidence(Path(one.evidence)).draws[one.metric] for one in (row, other)]
    return difference(row.value, other.value, *draws)


def run_trial(trial: Trial, corpora: Path, output: Path) -> None:
    """Train, probe every kept checkpoint, and append a line to `results.jsonl` in `output`."""
    begun = time.strftime("%Y-%m-%d %H:%M")
    checkpoints = train(trial, corpora, output)
    results: list[Result] = []
    by_checkpoint = probe(trial, [path for _, path in checkpoints], corpora, output)
    for (seconds, checkpoint), rows in zip(checkpoints, by_checkpoint, strict=True):
        step = torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
        results += compare(rows, seconds, step, trial.recipe)
        log.info("%s, seed %d, %.0f s, %d steps", trial.name, trial.seed, seconds, step)
        for result in results[-len(trial.tasks) :]:
            log.info("  %s", result)
    line = {
        "date": begun, "commit": commit(), "hardware": hardware(), "trial": asdict(trial),
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    with (output / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for _, checkpoint in checkpoints[:-1]:  # `last.ckpt` equals the last one
        checkpoint.unlink()


def seconds_until_ahead(results: Sequence[Result], task: str) -> float | None:
    """Seconds at the first checkpoint from which on all are ahead of all baselines, or `None`."""
    first = None
    for result in sorted((r for r in results if r.task == task), key=lambda r: r.seconds):
        if not result.is_ahead:
            first = None
        elif first is None:
            first = result.seconds
    return first


def read_results(output: Path) -> list[tuple[Trial, list[Result], str]]:
    """(trial, results, date and commit) of every line of `results.jsonl`, if it exists."""
    path = output / "results.jsonl"
    found = []
    for _, line in read_jsonl(path) if path.exists() else ():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in line["trial"].items()}
        results = [
            Result(**{**r, "against": {k: Difference(**d) for k, d in r["against"].items()}})
            for r in line["results"]
        ]
        found.append((Trial(**values), results, f"{line['date']}, {line['commit']}"))
    return found


def table(output: Path) -> str:
    """All results as a Markdown table: the last checkpoint of each run, and the seconds."""
    lines = [
        "| trial | seed | task | encoder, pooling, layer | score | random-init | "
        "log-mel, equal pooling | log-mel, best | steps | ahead after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trial, results, _ in read_results(output):
        for task in trial.tasks:
            last = max((r for r in results if r.task == task), key=lambda r: r.seconds)
            ahead = seconds_until_ahead(results, task)
            baselines = ("random-init", "log-mel, equal pooling", "log-mel")
            against = [last.against.get(name) for name in baselines]
            cells = [
                trial.name, str(trial.seed), task, f"{last.variant}, {last.pooling}, {last.layer}",
                f"{last.value:.3f} [{last.low:.3f}, {last.high:.3f}]",
                *(f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" if d else "" for d in against),
                f"{last.step} ({last.seconds:.0f} s)",
                "not reached" if ahead is None else f"{ahead:.0f} s",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def commit() -> str:
    """The commit of the working tree, with -dirty if it was changed."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"


def hardware() -> str:
    """The name of the GPU, or the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {platform.machine()}"


def main() -> None:
    """Parse the arguments, run recipes or print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speedrun = commands.add_parser("speedrun", help="seconds until ahead of both baselines")
    speedrun.add_argument("--recipe", nargs="+", default=["small/waveform", "small/spectrogram"])
    speedrun.add_argument("--set", default="mixed", help="pretraining set")
    speedrun.add_argument("--tasks", nargs="+", default=TASKS)
    speedrun.add_argument("--minutes", type=float, default=30)
    speedrun.add_argument("--save_every", type=int, default=500)
    speedrun.add_argument("--option", action="append", default=[], help="--option=--model.seed=1")
    speedrun.add_argument("--corpora", type=Path, required=True)
    speedrun.add_argument("--output", type=Path, required=True)
    speedrun.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    commands.add_parser("table", help="print results").add_argument("output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.command == "speedrun":
        trials = [
            Trial(recipe, recipe, tuple(args.option), args.set, tuple(args.tasks), seed=seed,
                  minutes=args.minutes, save_every=args.save_every)
            for recipe in args.recipe for seed in args.seeds
        ]  # fmt: skip
        args.output.mkdir(parents=True, exist_ok=True)
        done = [trial for trial, _, _ in read_results(args.output)]
        for trial in trials:
            if trial not in done:
                run_trial(trial, args.corpora.resolve(), args.output.resolve())
    print(table(args.output))


if __name__ == "__main__":
    main()
