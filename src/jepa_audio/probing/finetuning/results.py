"""Results of fine-tuning: rows as those of probes, and predictions for each clip."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_audio.files import write_text
from jepa_audio.probing.intervals import difference
from jepa_audio.probing.rows import (
    RANDOM_INIT,
    Evidence,
    ProbeRow,
    append_rows,
    save_evidence,
)
from jepa_audio.probing.scores import chance_score, score_head
from jepa_audio.probing.tasks import ProbeData
from jepa_audio.probing.tasks.labels import ClipLabels, Regression, Rows
from jepa_audio.probing.tasks.records import Split

PRESET = "finetune"


@dataclass(frozen=True)
class Tested:
    """A fine-tuned network on the test split of one fold, or of the task.

    Attributes:
        data: the splits.
        train_rows: rows of the training split, without logits.
        rows: rows of the test split, with `logits`.
        valid: best validation score.
        num_padded: windows that are too short for one token and were padded.
    """

    data: ProbeData
    train_rows: Rows
    rows: Rows
    logits: Tensor
    valid: float
    num_padded: int


@dataclass(frozen=True)
class Description:
    """What was fine-tuned, and how: the columns of a row; see `ProbeRow`.

    Args:
        mode: see `Tuning`.
        folds: text such as "5 folds by group"; empty without folds.
    """

    encoder: str
    variant: str
    encoder_hash: str
    mode: str
    pooling: str
    layer: str
    lr: float
    seed: int
    folds: str


def pooled(tests: Sequence[Tested]) -> Tested:
    """One result of several folds: each unit is predicted by the network that did not train on it.

    The validation score is the mean over the folds.
    """
    if len(tests) == 1:
        return tests[0]
    items = tuple(item for each in tests for item in each.data.splits["test"].items)
    first_item = np.cumsum([0, *(len(each.data.splits["test"]) for each in tests)])
    first_window = np.cumsum([0, *(int(each.rows.window.max()) + 1 for each in tests)])
    starts = list(zip(tests, first_item, first_window, strict=False))
    rows = Rows(
        np.concatenate([each.rows.item + item for each, item, _ in starts]),
        np.concatenate([each.rows.window + window for each, _, window in starts]),
        np.concatenate([each.rows.seconds for each in tests]),
    )
    digest = hashlib.sha256("".join(each.data.checksum for each in tests).encode()).hexdigest()
    splits = {**tests[0].data.splits, "test": Split(items)}
    return replace(
        tests[0],
        data=replace(tests[0].data, splits=splits, checksum=digest),
        rows=rows,
        logits=torch.cat([each.logits for each in tests]),
        valid=float(np.mean([each.valid for each in tests])),
    )


def append_result(
    output: Path, of: Description, tested: Tested, baseline: tuple[float, Evidence] | None
) -> tuple[ProbeRow, Evidence]:
    """Score a network, and add its row and evidence to a folder of results.

    Args:
        output: the folder, which may also contain results of probes.
        of: what was fine-tuned.
        tested: its predictions.
        baseline: score and evidence of the random-init baseline; `None` if there is none.
    """
    data, labels, task = tested.data, tested.data.labels, tested.data.task
    scores, evidence = score_head(tested.logits[:, None], data, data.splits["test"], tested.rows)
    name = f"{task.name} ({of.folds})" if of.folds else task.name
    key = (of, name, data.checksum, task.units)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    metric = task.metrics[0].name
    gap = None
    if baseline is not None and of.variant != RANDOM_INIT:
        value, other = baseline
        gap = difference(scores[metric].value, value, evidence.draws[metric], other.draws[metric])
    sizes = _num_units(tested)
    row = ProbeRow(
        encoder=of.encoder,
        variant=of.variant,
        encoder_hash=of.encoder_hash,
        pooling=of.pooling,
        task=name,
        preset=PRESET,
        select="best",
        head=f"finetune-{of.mode}",
        layer=of.layer,
        setting=of.lr,
        setting_name="learning rate",
        seed=of.seed,
        decoder=labels.decoder,
        unit=task.units[0],
        metric=metric,
        scores=scores,
        chance=chance_score(data, tested.train_rows, tested.rows),
        valid=tested.valid,
        layers=(of.layer,),
        settings=(of.lr,),
        valid_grid=((tested.valid,),),
        num_train=sizes[0],
        num_valid=sizes[1],
        num_test=sizes[2],
        class_names=labels.names,
        evidence=f"evidence/{task.name}-{digest}.npz",
        against_random=gap,
        robustness=None,
        robustness_area=None,
        split_checksum=data.checksum,
        versions={name: version(name) for name in ("jepa-audio", "torch", "torchmetrics")},
        num_padded=tested.num_padded,
    )
    save_evidence(output / row.evidence, evidence)
    append_rows(output / "results.jsonl", [row])
    return row, evidence


def _num_units(tested: Tested) -> list[int]:
    """Scored units of train, valid and test."""
    splits = tested.data.splits
    sizes = [len(splits[split].uids) for split in ("train", "val", "test")]
    if tested.data.task.units[0] == "window":
        sizes[0] = tested.train_rows.num_units(splits["train"], "window")
        sizes[2] = tested.rows.num_units(splits["test"], "window")
    return sizes


def write_predictions(path: Path, tested: Tested) -> None:
    """Write a table with a line for each test file: label, prediction, and a number per output.

    The numbers are the probabilities `p_NAME` of classes or tags, or the values `predicted_NAME`.
    Labels in time are written as `.npz`: item, seconds and logits of every row.
    """
    data, split = tested.data, tested.data.splits["test"]
    labels = data.labels
    if not isinstance(labels, ClipLabels):
        arrays: dict[str, Any] = {"item": tested.rows.item, "seconds": tested.rows.seconds}
        uids = np.array([item.uid for item in split.items])
        np.savez_compressed(
            path.with_suffix(".npz"), **arrays, logits=tested.logits.numpy(), uids=uids
        )
        return
    logits = labels.predictions(tested.logits[:, None], split, tested.rows, "file")[:, 0]
    if labels.kind == "class":
        values = logits.softmax(dim=-1)
        answers = [labels.names[i] for i in logits.argmax(dim=-1).tolist()]
    elif labels.kind == "tags":
        values = logits.sigmoid()
        chosen = (logits > 0).tolist()
        answers = [
            "|".join(name for name, on in zip(labels.names, each, strict=True) if on)
            for each in chosen
        ]
    else:
        assert isinstance(labels, Regression)
        values = logits * torch.tensor(labels.deviation) + torch.tensor(labels.mean)
        answers = ["|".join(f"{value:.6g}" for value in each) for each in values.tolist()]
    prefix = "predicted" if labels.kind == "numbers" else "p"
    columns = [f"{prefix}_{name}" for name in labels.names]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["uid", "path", "label", "prediction", *columns])
    for item, answer, each in zip(split.unit_items, answers, values.tolist(), strict=True):
        label = item.label if isinstance(item.label, list) else [item.label]
        cells = item.uid, item.path, "|".join(map(str, label)), answer
        table.writerow([*cells, *(f"{value:.6g}" for value in each)])
    write_text(path, text.getvalue())
