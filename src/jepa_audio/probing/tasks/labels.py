"""Label types, for clips and for frames in time: targets, losses and predictions of heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import Predictions, Targets
from jepa_audio.probing.tasks.records import Item, Split

UNKNOWN = -1
"""Class of a row without a known class. Heads are not trained on it.

A clip whose class has no training example counts as wrong; an unknown frame is not scored.
"""

Unit = Literal["file", "window"]
"""The scored unit: a file (all items of one `uid`), or a single window."""


@dataclass(frozen=True)
class Rows:
    """The origin of each feature row.

    Attributes:
        item: index in the split.
        window: index over all windows of the split.
        seconds: centre of the row from the start of its item.
    """

    item: Int64[np.ndarray, " rows"]
    window: Int64[np.ndarray, " rows"]
    seconds: Float[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.item)

    def unit_index(self, split: Split, by: Unit) -> Int64[np.ndarray, " rows"]:
        """Index of the unit of each row."""
        return self.window if by == "window" else split.unit_index[self.item]

    def num_units(self, split: Split, by: Unit) -> int:
        """Number of units."""
        return int(self.unit_index(split, by).max()) + 1

    @property
    def frame_rate(self) -> float:
        """Rows per second within the windows; 1 if every window has a single row."""
        is_same_window = np.diff(self.window) == 0
        steps = np.diff(self.seconds.astype(np.float64))[is_same_window]
        return 1 / float(steps.mean()) if len(steps) else 1.0


Logits = Float[Tensor, "rows K C"]
"""C outputs of K heads for each feature row, called logits for all label types."""

RowTargets = Shaped[Tensor, "rows ..."]


class Labels(ABC):
    """Targets, losses and predictions for one type of label.

    In training, `losses` compares the logits with `row_targets`. Metrics compare the `predictions`
    for each unit with its `unit_targets`.

    Attributes:
        kind: target of a row: the index of a class, "tags" (each from 0 to 1), or "numbers".
        names: names of the outputs.
        decoder: name of the method that finds events in frames; `None` without events.
    """

    kind: ClassVar[Literal["class", "tags", "numbers"]]
    decoder: ClassVar[str | None] = None
    names: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """Number of outputs of a head for each row."""
        return len(self.names)

    def fitted(self, train: Split) -> Labels:
        """Return labels with the values of the training split, such as class names."""
        return self

    def for_first_metric(self) -> Labels:
        """Return labels that compute only the predictions of the first metric of their task."""
        return self

    @abstractmethod
    def row_targets(self, split: Split, rows: Rows) -> RowTargets:
        """Targets of rows; raises `UserError` if a label is not of this type."""

    def losses(self, logits: Logits, targets: RowTargets) -> Float[Tensor, " K"]:
        """Loss of each head, mean over rows (and tags or numbers).

        The loss is cross-entropy for classes (over the rows that are not `UNKNOWN`), binary
        cross-entropy for tags, and the squared error for numbers.
        """
        if self.kind == "class":
            expanded = targets[:, None].expand(-1, logits.shape[1])
            losses = F.cross_entropy(logits.mT, expanded, reduction="none", ignore_index=UNKNOWN)
            return losses.sum(dim=0) / (targets != UNKNOWN).sum().clamp_min(1)
        expanded = targets[:, None].expand_as(logits)
        if self.kind == "tags":
            losses = F.binary_cross_entropy_with_logits(logits, expanded, reduction="none")
        else:
            losses = (logits - expanded).square()
        return losses.mean(dim=(0, 2))

    @abstractmethod
    def predictions(self, logits: Logits, split: Split, rows: Rows, by: Unit) -> Predictions:
        """Predictions of each head for each unit."""

    @abstractmethod
    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Targets:
        """Label of each unit, encoded for metrics."""


class ClipLabels(Labels):
    """One label for each item: the target of all its rows.

    The prediction for a unit is the mean of the logits of its rows.
    """

    @abstractmethod
    def encode(self, items: Sequence[Item]) -> Shaped[np.ndarray, "items ..."]:
        """Labels as numbers; raises `UserError` if a label is not of this type."""

    @override
    def row_targets(self, split: Split, rows: Rows) -> RowTargets:
        return torch.from_numpy(self.encode(split.items)[rows.item])

    @override
    def predictions(self, logits: Logits, split: Split, rows: Rows, by: Unit) -> Predictions:
        unit = torch.from_numpy(rows.unit_index(split, by)).to(logits.device)
        shape = rows.num_units(split, by), *logits.shape[1:]
        # In 64 bits the mean of equal numbers is exactly that number.
        total = logits.new_zeros(shape, dtype=torch.float64).index_add_(0, unit, logits.double())
        return (total / unit.bincount()[:, None, None]).to(logits)

    @override
    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Targets:
        if by == "file":
            return self.encode(split.unit_items)
        _, first = np.unique(rows.window, return_index=True)
        return self.encode(split.items)[rows.item[first]]


@dataclass(frozen=True)
class Multiclass(ClipLabels):
    """The label is one of several classes; a number is used as the name of a class.

    Args:
        names: names of the classes; if empty, those of the training split.
        are_given: whether a label that is not in `names` is an error.
    """

    kind = "class"

    names: tuple[str, ...] = ()
    are_given: bool = True

    @override
    def fitted(self, train: Split) -> Multiclass:
        if self.names:
            return self
        return Multiclass(_sort_names(set(map(_class_name, train.items))), are_given=False)

    @override
    def encode(self, items: Sequence[Item]) -> Int64[np.ndarray, " items"]:
        """Index of the class of each item; `UNKNOWN` for one that has no training example."""
        index = {name: i for i, name in enumerate(self.names)}
        classes = [index.get(_class_name(item), UNKNOWN) for item in items]
        if self.are_given and UNKNOWN in classes:
            raise items[classes.index(UNKNOWN)].error(f"one of {', '.join(self.names)}")
        return np.array(classes, dtype=np.int64)


@dataclass(frozen=True)
class Multilabel(ClipLabels):
    """The label is a list of tags.

    Only the tags in `names` are predicted; if it is empty, those of the training split.
    """

    kind = "tags"

    names: tuple[str, ...] = ()

    @override
    def fitted(self, train: Split) -> Multilabel:
        if self.names:
            return self
        return Multilabel(_sort_names({tag for item in train.items for tag in _tags(item)}))

    @override
    def encode(self, items: Sequence[Item]) -> Float[np.ndarray, "items C"]:
        """1 for the tags of an item, 0 for the others."""
        index = {name: i for i, name in enumerate(self.names)}
        encoded = np.zeros((len(items), len(self.names)), dtype=np.float32)
        for row, item in enumerate(items):
            encoded[row, [index[tag] for tag in _tags(item) if tag in index]] = 1
        return encoded


@dataclass(frozen=True)
class Regression(ClipLabels):
    """The label is one or more numbers, standardised with mean and deviation of the training split.

    The scale of the numbers therefore has no effect.

    `fitted` sets `mean` and `deviation`, and `names` if they are not given.
    """

    kind = "numbers"

    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @override
    def fitted(self, train: Split) -> Regression:
        values = np.array([self._numbers(item) for item in train.items])
        mean, deviation = values.mean(axis=0).tolist(), values.std(axis=0).tolist()
        if 0 in deviation:
            raise UserError(
                f"number {deviation.index(0)} of the labels is the same in the whole training split"
            )
        names = self.names or tuple(f"number {i}" for i in range(len(mean)))
        return Regression(names, tuple(mean), tuple(deviation))

    @override
    def encode(self, items: Sequence[Item]) -> Float[np.ndarray, "items C"]:
        values = np.array([self._numbers(item) for item in items])
        return ((values - self.mean) / self.deviation).astype(np.float32)

    def _numbers(self, item: Item) -> list[float]:
        label: Any = item.label if isinstance(item.label, list) else [item.label]
        expected = len(self.names) or len(label)
        are_finite = all(isinstance(value, int | float) and np.isfinite(value) for value in label)
        if not are_finite or len(label) != expected:
            raise item.error(f"{expected} finite numbers")
        return [float(value) for value in label]


def _class_name(item: Item) -> str:
    if isinstance(item.label, bool) or not isinstance(item.label, str | int):
        raise item.error("the name or the number of one class")
    return str(item.label)


def _tags(item: Item) -> list[str]:
    if not isinstance(item.label, list) or not all(isinstance(tag, str) for tag in item.label):
        raise item.error("a list of tags")
    return item.label


def _sort_names(names: set[str]) -> tuple[str, ...]:
    """Sort as numbers if all names are numbers, else as text."""
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=int) if are_numbers else sorted(names))


class FrameLabels(Labels):
    """The label is an annotation in time, which gives each frame a target.

    Predictions are counts for each unit, for example of correct events. The times of an annotation
    are measured from the start of the file, also if the item is a segment. Parts of a file without
    frames are not scored, such as an end that is too short for a window.
    """

    @override
    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Targets:
        """Zeros: `predictions` already contain the comparison with the annotation."""
        return np.zeros(rows.num_units(split, by))


@dataclass(frozen=True)
class FrameSequence:
    """Consecutive frames of one item.

    Attributes:
        unit: index of the unit of the item.
        rows: indices of the frames.
        seconds: centres of the frames from the start of the file, as in annotations.
    """

    item: Item
    unit: int
    rows: Int64[np.ndarray, " rows"]
    seconds: Float[np.ndarray, " rows"]


def frame_sequences(split: Split, rows: Rows, by: Unit) -> Iterator[FrameSequence]:
    """Yield the frames of each item, or of each window if the unit is a window."""
    key = rows.window if by == "window" else rows.item
    order = np.argsort(key, kind="stable")
    unit = rows.unit_index(split, by)
    for part in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        item = split.items[rows.item[part[0]]]
        seconds = item.start_seconds + rows.seconds[part].astype(np.float64)
        yield FrameSequence(item, int(unit[part[0]]), part, seconds)
