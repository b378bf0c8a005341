"""A probing task: its labels, metrics and protocols, and the data of its three splits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import Metric
from jepa_audio.probing.tasks.labels import Labels, Rows, Unit
from jepa_audio.probing.tasks.raw_data import DataSet
from jepa_audio.probing.tasks.records import SPLITS, Split, read_split, split_checksum, split_of

log = logging.getLogger(__name__)

MARBLE_LEARNING_RATES = (5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
"""Learning rates of the constrained track (Yuan et al., 2023, arXiv:2306.10548, appendix A)."""

Sizes = tuple[int | None, int | None, int | None]
"""Number of scored units in train, val and test; `None` where it is not known."""


@dataclass(frozen=True)
class Windows:
    """How a segment of audio is cut into windows: consecutive, without overlap.

    Args:
        seconds: length of a window; `None` for the whole segment.
        min_ratio: a shorter last window is kept if it has at least this share of `seconds`.
        first_seconds: length of the start of the segment that is used; `None` for all of it.
    """

    seconds: float | None = None
    min_ratio: float = 1.0
    first_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= 1 or min(self.seconds or 1, self.first_seconds or 1) <= 0:
            raise UserError(
                f"`min_ratio` ({self.min_ratio}) must be in (0, 1], `seconds` ({self.seconds}) and "
                f"`first_seconds` ({self.first_seconds}) positive or None"
            )

    def spans(self, num_samples: int, sample_rate: int) -> list[tuple[int, int]]:
        """First sample and end (exclusive) of every window of a segment.

        A segment shorter than the shortest window is one window, so that every unit is scored.
        Windows are not padded: see `LayerFeatures`.
        """
        if self.first_seconds is not None:
            num_samples = min(num_samples, round(self.first_seconds * sample_rate))
        length = num_samples if self.seconds is None else int(self.seconds * sample_rate)
        if length < 1 or num_samples < length:
            return [(0, num_samples)]
        spans = [(start, start + length) for start in range(0, num_samples - length + 1, length)]
        end = spans[-1][1]
        if (num_samples - end) / length >= self.min_ratio:
            spans.append((end, num_samples))
        return spans


@dataclass(frozen=True)
class Protocol:
    """Settings of a task under one preset; the defaults are those of most tasks of MARBLE.

    Args:
        stop_patience: epochs without a better validation score after which a head stops.
        plateau_patience: epochs without a better validation score after which its learning rate is
            multiplied by `plateau_factor`.
        learning_rates: learning rates of the search.
        batch_size: feature rows per step; for annotations in time, windows.
    """

    windows: Windows
    max_epochs: int = 100
    stop_patience: int = 20
    plateau_patience: int = 5
    plateau_factor: float = 0.5
    learning_rates: tuple[float, ...] = MARBLE_LEARNING_RATES
    batch_size: int = 64


@dataclass(frozen=True)
class Task:
    """One labelling task: only data, and the objects and functions that define it.

    Args:
        stem: files of the records are `ROOT/{stem}.{train,val,test}.jsonl`, as in MARBLE's `data/`.
        metrics: all are reported; the first selects epoch, layer and learning rate.
        protocols: settings by preset, "marble-v1" and "marble-v2".
        group_by: key of the records whose value is the scored unit.
        units: units to score; the first is used for selection.
        grid_hz: feature rows per second for annotations in time; `None` for one row per window.
        num_seeds: default number of heads with different seeds; more for small test splits.
        num_units: sizes of the published splits.
        data_set: the raw data set; `None` if the task can only be read from records.
        relabel: function that maps the labels of each split to classes.
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


def protocols_of_v2(v2: Protocol) -> dict[str, Protocol]:
    """Protocols of a task that only MARBLE's second version has; "marble-v1" adds the search."""
    return {"marble-v1": replace(v2, learning_rates=MARBLE_LEARNING_RATES), "marble-v2": v2}


def differ_from_published(sizes: Sequence[int], published: Sizes) -> bool:
    """Whether a size differs by more than 1 % from the published size, if that is known.

    A few files that cannot be decoded may be absent: MARBLE leaves out one file of GTZAN.
    """
    pairs = zip(sizes, published, strict=True)
    return any(known is not None and abs(size - known) > 0.01 * known for size, known in pairs)


@dataclass(frozen=True)
class ProbeData:
    """A task and its data.

    Attributes:
        labels: labels of the task, fitted on the training split.
        splits: train, val and test.
        checksum: see `split_checksum`.
    """

    task: Task
    labels: Labels
    splits: Mapping[str, Split]
    checksum: str

    @classmethod
    def load(cls, task: Task, root: Path) -> ProbeData:
        """Read the splits from the records below `root`, or from the raw data set in `root`.

        Raises:
            MissingFileError: if `root` contains neither, or if an audio file is missing.
            UserError: for a record that is wrong for the task; names the record.
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
        splits = []
        for name in SPLITS:
            by_where = {f"{root}, {name} {i}": record for i, record in enumerate(records[name])}
            splits.append(split_of(by_where, root, task.group_by))
        return cls.of(task, splits)

    @classmethod
    def of(cls, task: Task, splits: Sequence[Split]) -> ProbeData:
        """Combine a task with its three splits; warn if their sizes are not the published ones."""
        if task.relabel is not None:
            splits = [task.relabel(split) for split in splits]
        sizes = tuple(len(split.uids) for split in splits)
        if differ_from_published(sizes, task.num_units):
            log.warning(
                "%s: %s units in train, val and test; published scores are for %s units, so they "
                "are not comparable",
                task.name,
                sizes,
                task.num_units,
            )
        labels = task.labels.fitted(splits[0])
        return cls(task, labels, dict(zip(SPLITS, splits, strict=True)), split_checksum(splits))

    def scores(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows
    ) -> Float[Tensor, " K"]:
        """Score K heads by the first metric of the task, on its first unit."""
        labels, unit = self.labels.for_first_metric(), self.task.units[0]
        return self.task.metrics[0](
            labels.predictions(logits, split, rows, unit), labels.unit_targets(split, rows, unit)
        )

    def with_train(self, size: int | None, seed: int = 0) -> ProbeData:
        """Reduce the training split to `size` random units; see `Split.subset`."""
        train = self.splits["train"].subset(size, seed)
        return replace(self, splits={**self.splits, "train": train})
