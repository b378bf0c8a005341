"""What a probing task is: records of three splits, what is asked of them, and how published numbers were come by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.metrics import Metric
from jepa_audio.probing.tasks.labels import Labels, Rows, Unit
from jepa_audio.probing.tasks.records import (
    SPLITS,
    Record,
    Split,
    read_split,
    split_checksum,
    split_of,
)
from jepa_audio.probing.tasks.windows import Windows

log = logging.getLogger(__name__)

MARBLE_LEARNING_RATES = (5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
"""Of the constrained track (Yuan et al., 2023, arXiv:2306.10548, appendix A)."""


@dataclass(frozen=True)
class Protocol:
    """How a task is probed under one preset.

    Args:
        windows: what the encoder hears at a time.
        max_epochs: of a head.
        stop_patience: epochs without a better validation score after which a head stops.
        plateau_patience: epochs without a better one after which its learning rate is multiplied by
            `plateau_factor`.
        plateau_factor: see there.
        learning_rates: those tried.
        batch_size: rows of a step; for annotations in time, windows.
    """

    windows: Windows
    max_epochs: int
    stop_patience: int
    plateau_patience: int
    plateau_factor: float = 0.5
    learning_rates: tuple[float, ...] = MARBLE_LEARNING_RATES
    batch_size: int = 64


Sizes = tuple[int | None, int | None, int | None]
"""Scored units of train, val and test; `None` for those that are not known."""

Conversion = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by stem and split; `audio_path` starts from the raw data set's folder."""


@dataclass(frozen=True)
class DataSet:
    """A data set as it is downloaded.

    Args:
        name: what `jepa-audio data convert` calls it.
        convert: folder → records of every task on it. `FileNotFoundError` names the file or folder
            that is missing, `ValueError` the line that is not what the data set's own files hold.
    """

    name: str
    convert: Callable[[Path], Conversion]


@dataclass(frozen=True)
class Task:
    """One question about audio.

    Args:
        name: of the task.
        stem: of its records, `ROOT/{stem}.{train,val,test}.jsonl`; its folder is the one under
            MARBLE's `data/`.
        labels: what a head has to say.
        metrics: the first chooses epoch, layer and learning rate; all are reported.
        protocols: by preset, "marble-v1" and "marble-v2".
        group_by: key of the records whose value is the unit that is scored.
        units: what is scored; the first unit is the one that chooses.
        grid_hz: rows a second for annotations in time; `None` for one row a window.
        num_seeds: of the heads, unless told otherwise: more where the test split is small.
        num_units: scored units of train, val and test in the published split; `None` where they are
            not known.
        data_set: makes records of the raw data set; `None` where only records are known.
        relabel: applied to each split after it is read.
    """

    name: str
    stem: str
    labels: Labels
    metrics: tuple[Metric, ...]
    protocols: Mapping[str, Protocol]
    group_by: str = "audio_path"
    units: tuple[Unit, ...] = ("file",)
    grid_hz: float | None = None
    num_seeds: int = 1
    num_units: Sizes = (None, None, None)
    data_set: DataSet | None = None
    relabel: Callable[[Split], Split] | None = None


def differ_from_published(sizes: Sequence[int], published: Sizes) -> bool:
    """Whether a split is of more than 1 % other size than the published one, as far as that is known.

    A file or two that cannot be decoded do not make another data set: MARBLE itself leaves one out
    of GTZAN.
    """
    pairs = zip(sizes, published, strict=True)
    return any(known is not None and abs(size - known) > 0.01 * known for size, known in pairs)


@dataclass(frozen=True)
class ProbeData:
    """A task on one data set.

    Attributes:
        task: what is asked.
        labels: the task's, with what they take from the training split.
        splits: train, val and test.
        checksum: of what is in which split.
    """

    task: Task
    labels: Labels
    splits: Mapping[str, Split]
    checksum: str

    @classmethod
    def load(cls, task: Task, root: Path) -> ProbeData:
        """Read the splits of a task from the records under `root`, or from the raw data set in `root`.

        Raises:
            MissingFileError: if there are neither, or if an audio file is missing.
            UserError: if a record is not what the task needs; names the record.
        """
        stem = Path(task.stem)
        for folder in (root / stem.parent, root):
            paths = [folder / f"{stem.name}.{split}.jsonl" for split in SPLITS]
            if paths[0].is_file():
                return cls.of(task, [read_split(path, task.group_by) for path in paths])
        if task.data_set is None:
            raise MissingFileError(
                f"{task.name} needs {root / task.stem}.train.jsonl, and .val.jsonl and .test.jsonl "
                "in the same folder"
            )
        records = task.data_set.convert(root)[task.stem]
        wheres = [
            {f"{root}, {split} {i}": record for i, record in enumerate(records[split])}
            for split in SPLITS
        ]
        return cls.of(task, [split_of(split, root, task.group_by) for split in wheres])

    @classmethod
    def of(cls, task: Task, splits: Sequence[Split]) -> ProbeData:
        """A task with its train, val and test split; warns where sizes are not the published ones."""
        splits = [task.relabel(split) for split in splits] if task.relabel else splits
        sizes = tuple(len(split.uids) for split in splits)
        if differ_from_published(sizes, task.num_units):
            log.warning(
                "%s: %s units in train, val and test; published scores are on %s units and are "
                "not comparable",
                task.name,
                sizes,
                task.num_units,
            )
        labels = task.labels.fitted(splits[0])
        return cls(task, labels, dict(zip(SPLITS, splits, strict=True)), split_checksum(splits))

    def scores(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows
    ) -> Float[Tensor, " K"]:
        """What the first metric of the task says of K heads, on the unit that it scores first."""
        labels, unit = self.labels.for_first_metric(), self.task.units[0]
        return self.task.metrics[0](
            labels.predictions(logits, split, rows, unit), labels.unit_targets(split, rows, unit)
        )

    def with_train(self, size: int | None, seed: int = 0) -> ProbeData:
        """With `size` random units of the training split, all if `None` or too few."""
        return replace(
            self, splits={**self.splits, "train": self.splits["train"].subset(size, seed)}
        )
