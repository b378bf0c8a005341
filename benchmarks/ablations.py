"""Recipes with one choice changed, compared with the recipe itself.

Trains the trials of a YAML file, and scores the frozen encoders on the `_select` sets of
`benchmarks/corpora.py`, whose speakers and instruments are not those of the records. The score is
the accuracy of ridge regression that never sees the speaker or instrument of a clip: one group is
left out at a time, in closed form, so every clip counts and no fit is repeated. Layer,
pooling and penalty are those with the best score, for all alike; `benchmarks/learning.py` has the
strict protocol of the records.

    python -m benchmarks.ablations run benchmarks/ablations.yaml --corpora DIR --output DIR
    python -m benchmarks.ablations table DIR

A second call continues where the first one stopped. `--part 0/2` and `--part 1/2` are two processes
that share the work. A trial has a recipe (or `recipes`), options of `jepa-audio fit`, a pretraining
set and seeds; its options are added to those of the defaults:

    defaults: {recipes: [small/waveform], corpus: mixed, options: [--trainer.max_steps=750]}
    trials:
      default: {seeds: [0, 1, 2]}
      long spans: {options: [--model.masker.target_length=10]}
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
import yaml
from benchmarks.learning import Trial, commit, hardware, log_mel, pooling_of, train
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError
from jepa_audio.files import read_jsonl
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.load import Which
from jepa_audio.probing.encoders import EncoderOptions, ProbeEncoder, load_jepa_encoder
from jepa_audio.probing.intervals import Difference, difference, draw_counts

log = logging.getLogger(__name__)
LOG_MEL = "log-mel statistics"
TASKS = ("fsdd_digit_select", "gm_family_select")
# Of a kernel matrix with a mean diagonal of 100.
PENALTIES = tuple(10.0 ** np.arange(-0.5, 4.1, 0.75))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_trials(path: Path, seeds: Sequence[int] = ()) -> Iterator[Trial]:
    """The trials of a YAML file, for each of their `recipes` and seeds.

    Raises:
        UserError: if a key is unknown.
    """
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {entry.name for entry in fields(Trial)} - {"name", "seed"} | {"seeds", "recipes"}
    defaults = settings.get("defaults", {})
    for name, own in settings["trials"].items():
        values = {**defaults, **(own or {})}
        values["options"] = [*defaults.get("options", []), *(own or {}).get("options", [])]
        if unknown := set(values) - known:
            raise UserError(f"{path}: unknown key {min(unknown)!r} in the trial {name!r}")
        kept = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key not in ("seeds", "recipes", "recipe")
        }
        recipes = values.get("recipes") or [values["recipe"]]
        for recipe, seed in product(recipes, seeds or values.get("seeds", [0])):
            yield Trial(f"{recipe}, {name}", recipe, seed=seed, **kept)


def held_out_correct(
    vectors: Float[np.ndarray, "n width"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    penalty: float,
) -> Bool[np.ndarray, " n"]:
    """Which clips are classified correctly by ridge regression without the clips of their group.

    Regression of one-hot labels with a free intercept. With P = λ(K + λ1)⁻¹, corrected for the
    intercept, the residuals of a group that is left out are (P_tt)⁻¹ (P y)_t.

    Args:
        vectors: standardised features of all clips.
        labels: from 0.
        groups: speaker or instrument of each clip.
        penalty: λ, for a kernel matrix with a mean diagonal of 100.
    """
    kernel = torch.from_numpy(vectors).to(DEVICE, torch.float64)
    kernel = kernel @ kernel.mT
    kernel *= 100 * len(kernel) / kernel.trace()
    inverse = torch.linalg.inv(kernel + penalty * torch.eye(len(kernel)).to(kernel))
    sums = inverse.sum(1)
    inverse -= sums.outer(sums) / sums.sum()
    targets = torch.eye(int(labels.max()) + 1).to(kernel)[torch.from_numpy(labels).to(DEVICE)]
    residuals = inverse @ targets
    correct = np.empty(len(labels), dtype=bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        held_out = torch.from_numpy(rows).to(DEVICE)
        block = inverse[held_out[:, None], held_out]
        left_out = targets[held_out] - torch.linalg.solve(block, residuals[held_out])
        correct[rows] = left_out.argmax(1).cpu().numpy() == labels[rows]
    return correct


def score(encoder: ProbeEncoder, task: str, corpora: Path) -> tuple[str, Bool[np.ndarray, " n"]]:
    """(layer and pooling, correct clips) with the best layer, pooling and penalty on one task."""
    table = pd.read_csv(corpora / f"{task}.csv")
    labels, groups = (pd.factorize(table[key], sort=True)[0] for key in ("label", "group"))
    clips = [_read(corpora / path, encoder.sample_rate) for path in table["path"]]
    by_length = sorted(range(len(clips)), key=lambda row: clips[row].shape[-1])
    pooled: dict[str, list[np.ndarray]] = {}
    order: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(clips), 64):
            batch = by_length[start : start + 64]
            groups_of_clips = encoder.encode_clips([clips[i] for i in batch], per_frame=False)
            for rows, features in groups_of_clips:
                order += [batch[row] for row in rows]
                for name, vectors in _pool(features, task):
                    pooled.setdefault(name, []).append(vectors.cpu().numpy())
    best: tuple[str, np.ndarray] = ("", np.zeros(len(labels), dtype=bool))
    for name, parts in pooled.items():
        vectors = np.concatenate(parts)
        vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-5)
        for penalty in PENALTIES:
            correct = held_out_correct(vectors, labels[order], groups[order], penalty)
            if correct.sum() > best[1].sum():
                best = (name, correct[np.argsort(order)])
    return best


def _read(path: Path, sample_rate: int) -> Float[Tensor, "1 S"]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(samples.T).mean(0, keepdim=True)
    return mono if rate == sample_rate else resample(mono, rate, sample_rate)


def _pool(features: LayerFeatures, task: str) -> Iterator[tuple[str, Float[Tensor, "B _"]]]:
    pooling = pooling_of("", task)
    regions = 3 if pooling.startswith("thirds") else 1
    change = pooling.endswith("_change")
    layers = features.pool("concat", regions, deviation=True, change=change)
    for layer, vectors in enumerate(layers):
        yield f"layer {layer}, {pooling}", vectors


def run_trial(trial: Trial, corpora: Path, output: Path) -> None:
    """Train, score, and append a line to `scores.jsonl` in `output`."""
    begun = time.strftime("%Y-%m-%d %H:%M")
    seconds, checkpoint = train(trial, corpora, output)[-1]
    kinds: dict[str, Which] = {"encoder": "target"}
    if trial.name.endswith(", default"):
        kinds["random init"] = "random"
    scores = {
        kind: score_all(load_jepa_encoder(checkpoint, variant, EncoderOptions()), corpora)
        for kind, variant in kinds.items()
    }
    _append(output, begun, trial, seconds, scores)


def score_all(encoder: ProbeEncoder, corpora: Path) -> dict[str, dict]:
    """For each task: the layer, and a string with 1 for each correct clip."""
    found = {}
    encoder = encoder.to(DEVICE)
    for task in TASKS:
        layer, correct = score(encoder, task, corpora)
        found[task] = {"layer": layer, "correct": "".join("01"[int(one)] for one in correct)}
        log.info("%s: %.3f (%s)", task, correct.mean(), layer)
    return found


def _append(output: Path, begun: str, trial: Trial, seconds: float, scores: dict) -> None:
    line = {"date": begun, "commit": commit(), "hardware": hardware(), "trial": asdict(trial)}
    with (output / "scores.jsonl").open("a") as file:
        file.write(json.dumps(line | {"seconds": seconds, "scores": scores}) + "\n")


def _read_lines(output: Path) -> list[dict]:
    path = output / "scores.jsonl"
    return [line for _, line in read_jsonl(path)] if path.exists() else []


def compare(correct: str, other: str) -> Difference:
    """The difference of two accuracies on the same clips, with its paired bootstrap interval."""
    counts = draw_counts(len(correct)).astype(np.float32)
    draws = [counts @ np.array(list(text), np.float32) / len(text) for text in (correct, other)]
    shares = [text.count("1") / len(text) for text in (correct, other)]
    return difference(shares[0], shares[1], draws[0], draws[1])


def table(output: Path) -> str:
    """All scores as a Markdown table, each compared with the default of its recipe and seed."""
    lines = _read_lines(output)
    defaults = {
        (line["trial"]["recipe"], line["trial"]["seed"]): line["scores"]["encoder"]
        for line in lines
        if line["trial"]["name"].endswith(", default")
    }
    text = ["| trial | seed | seconds | " + " | ".join(f"{t} | difference" for t in TASKS) + " |"]
    text.append("|---|---|---|" + "---|---|" * len(TASKS))
    for line in lines:
        trial = line["trial"]
        default = defaults.get((trial["recipe"], trial["seed"]))
        for kind, scores in line["scores"].items():
            cells = []
            for task in TASKS:
                correct = scores[task]["correct"]
                cells += [f"{correct.count('1') / len(correct):.3f}", ""]
                if default is not None and scores is not default:
                    found = compare(correct, default[task]["correct"])
                    cells[-1] = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            name = trial["name"] + ("" if kind == "encoder" else f", {kind}")
            text.append(
                f"| {name} | {trial['seed']} | {line['seconds']:.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(text)


def main() -> None:
    """Parse the arguments, run trials or print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score the trials of a YAML file")
    run.add_argument("file", type=Path)
    run.add_argument("--corpora", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--seeds", type=int, nargs="*", default=[])
    run.add_argument("--part", default="0/1", help="for example 0/2: every second trial")
    commands.add_parser("table", help="print scores").add_argument("output", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.command == "run":
        corpora, output = args.corpora.resolve(), args.output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        part, parts = map(int, args.part.split("/"))
        for trial in list(read_trials(args.file, args.seeds))[part::parts]:
            if json.loads(json.dumps(asdict(trial))) not in [
                x["trial"] for x in _read_lines(output)
            ]:
                log.info("%s, seed %d", trial.name, trial.seed)
                run_trial(trial, corpora, output)
        names = [line["trial"]["name"] for line in _read_lines(output)]
        if part == 0 and LOG_MEL not in names:
            scores = {"encoder": score_all(log_mel(), corpora)}
            _append(output, time.strftime("%Y-%m-%d %H:%M"), Trial(LOG_MEL, ""), 0.0, scores)
    print(table(args.output))


if __name__ == "__main__":
    main()
