"""The command `probe`: checkpoints → frozen features → heads → rows and a table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from jepa_audio.probing.encoders import Frequency, LogMelStatistics, PooledEncoder, ProbeEncoder, run_name
from jepa_audio.probing.features import cached_features
from jepa_audio.probing.heads import Choice, Features, Predictions, fit_knn, fit_linear
from jepa_audio.probing.intervals import bootstrap_interval, paired_difference
from jepa_audio.probing.results import ProbeRow, append_jsonl, markdown
from jepa_audio.probing.tasks import TASKS, ProbeTask

Head = Literal["linear", "knn"]

_FIT: dict[Head, Callable[..., Predictions]] = {"linear": fit_linear, "knn": fit_knn}


@dataclass(frozen=True)
class _Answer:
    """What the chosen head says of one task."""

    task: ProbeTask
    head: Head
    choice: Choice

    @property
    def correct(self) -> np.ndarray:
        return self.choice.correct(self.task.test.labels)


def probe(
    checkpoints: list[Path],
    corpus: Path,
    output: Path,
    *,
    tasks: Sequence[str] = ("nsynth_pitch", "nsynth_instrument"),
    variants: Sequence[Literal["context", "target"]] = ("context", "target"),
    heads: Sequence[Head] = ("linear", "knn"),
    frequency: Frequency = "mean",
    max_train: int | None = None,
    random_seeds: Sequence[int] = (),
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
) -> list[ProbeRow]:
    """Ask frozen encoders for labels, and the same networks as they were before step 0.

    For every checkpoint the random-init twin is probed first, then its encoders; log-mel statistics once for
    each sample rate. Layer and hyper-parameter of a head are chosen on the validation split, the chosen head
    is reported on the test split. Rows are appended to `results.jsonl`, this call's table is written to
    `table.md`, features are kept in `features/`.

    Args:
        checkpoints: of runs, as `runs/NAME/checkpoints/last.ckpt`.
        corpus: folder of the labelled corpus; for the NSynth tasks the one that holds `nsynth-train`,
            `nsynth-valid` and `nsynth-test`.
        output: folder of the results.
        tasks: names of the tasks.
        variants: which encoders of a run, besides its random-init twin.
        heads: "linear" (logistic regression) and "knn", both on standardised features.
        frequency: "mean" averages the frequency rows of a layer, "concat" keeps them side by side.
        max_train: use so many random training clips instead of all.
        random_seeds: seeds of further random-init twins, beside the run's own.
        batch_size: clips encoded at once.
        device: "auto" is the GPU if there is one.
        seed: of the training subset and of the intervals.
    """
    _check_names(tasks, checkpoints)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [TASKS[name].load(corpus).with_train(max_train, seed) for name in tasks]
    rows: list[ProbeRow] = []
    baselines: set[int] = set()
    for checkpoint in checkpoints:
        twin: dict[tuple[str, Head], np.ndarray] = {}
        encoders = _encoders(checkpoint, variants, frequency, random_seeds, device, baselines)
        for encoder in encoders:
            folder = output / "features"
            answers = _ask(encoder, loaded, heads=heads, folder=folder, batch_size=batch_size, device=device)
            compared = twin if encoder.variant in variants else {}
            new = [_row(encoder, answer, compared.get((answer.task.name, answer.head)), seed) for answer in answers]
            if encoder.variant == "random":
                twin = {(answer.task.name, answer.head): answer.correct for answer in answers}
            append_jsonl(output / "results.jsonl", new)
            rows += new
    (output / "table.md").write_text(markdown(rows))
    return rows


def _check_names(tasks: Sequence[str], checkpoints: Sequence[Path]) -> None:
    unknown = sorted(set(tasks) - TASKS.keys())
    if unknown:
        raise ValueError(f"`tasks` holds {', '.join(unknown)}; there are {', '.join(TASKS)}")
    names = [run_name(checkpoint) for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"`checkpoints` must have different names in the results, these are called {names}")


def _encoders(
    checkpoint: Path,
    variants: Sequence[Literal["context", "target"]],
    frequency: Frequency,
    random_seeds: Sequence[int],
    device: str,
    baselines: set[int],
) -> Iterator[ProbeEncoder]:
    """The random-init twins, the encoders, and the baseline if its sample rate is new."""
    for random_seed in (None, *random_seeds):
        twin = PooledEncoder.from_checkpoint(checkpoint, "random", frequency, random_seed)
        twin.frozen.to(device)
        yield twin
    for variant in variants:
        encoder = PooledEncoder.from_checkpoint(checkpoint, variant, frequency)
        encoder.frozen.to(device)
        yield encoder
    if twin.sample_rate not in baselines:
        baselines.add(twin.sample_rate)
        yield LogMelStatistics(twin.sample_rate)


def _ask(
    encoder: ProbeEncoder,
    tasks: Sequence[ProbeTask],
    *,
    heads: Sequence[Head],
    folder: Path,
    batch_size: int,
    device: str,
) -> list[_Answer]:
    """Every head on every task; tasks on the same audio share one extraction."""
    known: dict[tuple[Path, ...], list[np.ndarray]] = {}
    answers = []
    for task in tasks:
        for split, clips in task.splits.items():
            if clips.paths not in known:
                description = f"{encoder.name} {encoder.variant}, {split}"
                known[clips.paths] = cached_features(encoder, clips.paths, folder, batch_size, description)
        features = Features(**{split: known[clips.paths] for split, clips in task.splits.items()})
        for head in heads:
            predictions = _FIT[head](features, task.train.labels, len(task.class_names), device=device)
            answers.append(_Answer(task, head, predictions.choose(task.valid.labels)))
    return answers


def _row(encoder: ProbeEncoder, answer: _Answer, twin: np.ndarray | None, seed: int) -> ProbeRow:
    task, choice, correct = answer.task, answer.choice, answer.correct
    low, high = bootstrap_interval(correct, seed=seed)
    return ProbeRow(
        encoder=encoder.name,
        variant=encoder.variant,
        encoder_hash=encoder.encoder_hash,
        task=task.name,
        preset="linear",
        head=answer.head,
        pooling=encoder.pooling,
        layer=choice.layer,
        layer_name=encoder.layer_names[choice.layer],
        setting=choice.setting,
        metric="accuracy",
        value=float(correct.mean()),
        low=low,
        high=high,
        valid_value=choice.valid,
        valid_by_layer=choice.valid_by_layer,
        num_train=len(task.train),
        num_valid=len(task.valid),
        num_test=len(task.test),
        num_classes=len(task.class_names),
        chance=task.chance,
        seed=seed,
        against_random=None if twin is None else paired_difference(correct, twin, seed=seed),
        split_checksum=task.checksum,
        versions={name: importlib.metadata.version(name) for name in ("jepa-audio", "torch", "scikit-learn")},
    )
