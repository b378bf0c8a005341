"""What a head has to say of a stretch of audio: a class, tags, numbers; and how far off it is while it learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.records import Item, Split

UNKNOWN = -1
"""Class of a unit whose label has no training example: no head can name it, so it always counts as wrong."""

Unit = Literal["file", "window"]
"""What is scored: files (rather: all items of one `uid`), or every window by itself."""


@dataclass(frozen=True)
class Rows:
    """Where rows of features come from.

    Attributes:
        item: number of each row's item in its split.
        window: number of each row's window, counted over the whole split.
        seconds: centre of each row from the start of its item.
    """

    item: Int64[np.ndarray, " rows"]
    window: Int64[np.ndarray, " rows"]
    seconds: Float[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.item)

    def unit_index(self, split: Split, by: Unit) -> Int64[np.ndarray, " rows"]:
        """Number of each row's unit."""
        return self.window if by == "window" else split.unit_index[self.item]


class Labels(ABC):
    """What a head says of a row of features, and what it is held to.

    A head gives `num_outputs` numbers for every row (called logits whatever they mean). For
    learning, `row_targets` and `losses` hold them to the truth row by row. For scoring, `answers`
    says what is claimed of every unit (for clips the mean of the logits of its rows; for
    annotations in time counts of what was hit), `truth` what is so; metrics compare the two.

    Attributes:
        kind: of a row's target: the number of a class, "tags" (each 0 to 1), or "numbers".
    """

    kind: ClassVar[Literal["class", "tags", "numbers"]]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the outputs."""

    @property
    def num_outputs(self) -> int:
        """Numbers that a head gives for a row."""
        return len(self.names)

    @property
    def decoder(self) -> str | None:
        """What makes events of frames; `None` for clips."""
        return None

    def fitted(self, train: Split) -> Labels:
        """These labels with what they take from the training split, such as the names of the classes."""
        return self

    def for_first_metric(self) -> Labels:
        """These labels, whose answers need hold no more than what the first metric of their task looks at."""
        return self

    @abstractmethod
    def row_targets(self, split: Split, rows: Rows) -> Shaped[Tensor, "rows ..."]:
        """What `losses` compares the rows of some split with.

        Raises:
            UserError: naming the record, if a label is none of this kind.
        """

    @abstractmethod
    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Shaped[Tensor, "n ..."]
    ) -> Float[Tensor, " K"]:
        """Mean over the rows, of K heads."""

    @abstractmethod
    def predictions(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows, by: Unit
    ) -> Float[Tensor, "units K A"]:
        """What K heads claim of every unit."""

    @abstractmethod
    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Shaped[np.ndarray, "units ..."]:
        """What is so of every unit."""


class ClipLabels(Labels):
    """One label for the whole of an item: every row is held to it, the mean of the rows' logits is scored."""

    @abstractmethod
    def encode(self, items: Sequence[Item]) -> Shaped[np.ndarray, "items ..."]:
        """The labels as numbers; `ValueError` naming the record of one that is none."""

    def row_targets(self, split: Split, rows: Rows) -> Shaped[Tensor, "rows ..."]:
        """See `Labels`."""
        return torch.from_numpy(self.encode(split.items)[rows.item])

    def predictions(
        self, logits: Float[Tensor, "rows K C"], split: Split, rows: Rows, by: Unit
    ) -> Float[Tensor, "units K C"]:
        """The mean of the logits of a unit's rows."""
        unit = torch.from_numpy(rows.unit_index(split, by)).to(logits.device)
        total = logits.new_zeros(int(unit.max()) + 1, *logits.shape[1:], dtype=torch.float64)
        total.index_add_(
            0, unit, logits.double()
        )  # in 64 bits the mean of equal numbers is that number
        return (total / unit.bincount()[:, None, None]).to(logits)

    def unit_targets(self, split: Split, rows: Rows, by: Unit) -> Shaped[np.ndarray, "units ..."]:
        """The label of each unit."""
        if by == "file":
            return self.encode(split.unit_items)
        _, first = np.unique(rows.window, return_index=True)
        return self.encode(split.items)[rows.item[first]]


@dataclass(frozen=True)
class Multiclass(ClipLabels):
    """One class of several.

    Args:
        classes: their names; those of the training split if empty. Numbers are taken as words.
        are_given: whether a class that is not among them is a mistake.
    """

    kind = "class"

    classes: tuple[str, ...] = ()
    are_given: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.classes

    def fitted(self, train: Split) -> Multiclass:
        """With the classes of the training split, if none were given."""
        if self.classes:
            return self
        return Multiclass(_in_order({_word(item) for item in train.items}), are_given=False)

    def encode(self, items: Sequence[Item]) -> Int64[np.ndarray, " items"]:
        """Number of each item's class, `UNKNOWN` for one of no training example.

        Raises:
            UserError: naming the record, if its class is not one of those that the task gives.
        """
        number = {name: i for i, name in enumerate(self.classes)}
        if self.are_given and (
            strange := next((item for item in items if _word(item) not in number), None)
        ):
            raise UserError(
                f"{strange.where}: `label` is {strange.label!r}, must be one of {', '.join(self.classes)}"
            )
        return np.array([number.get(_word(item), UNKNOWN) for item in items], dtype=np.int64)

    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Shaped[Tensor, " n"]
    ) -> Float[Tensor, " K"]:
        """Cross-entropy; rows of no known class say nothing."""
        of_rows = F.cross_entropy(
            logits.mT,
            targets[:, None].expand(-1, logits.shape[1]),
            reduction="none",
            ignore_index=UNKNOWN,
        )
        return of_rows.sum(dim=0) / (targets != UNKNOWN).sum().clamp_min(1)


@dataclass(frozen=True)
class Multilabel(ClipLabels):
    """Any number of tags.

    Args:
        tags: their names; those of the training split if empty. Other tags are passed over.
    """

    kind = "tags"

    tags: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tags."""
        return self.tags

    def fitted(self, train: Split) -> Multilabel:
        """With the tags of the training split, if none were given."""
        return (
            self
            if self.tags
            else replace(self, tags=_in_order({tag for i in train.items for tag in _tags(i)}))
        )

    def encode(self, items: Sequence[Item]) -> Float[np.ndarray, "items C"]:
        """1 for every tag an item has, 0 for the others."""
        number = {name: i for i, name in enumerate(self.tags)}
        encoded = np.zeros((len(items), len(self.tags)), dtype=np.float32)
        for row, item in enumerate(items):
            encoded[row, [number[tag] for tag in _tags(item) if tag in number]] = 1
        return encoded

    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Float[Tensor, "n C"]
    ) -> Float[Tensor, " K"]:
        """Binary cross-entropy, mean over tags."""
        expanded = targets[:, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, expanded, reduction="none").mean(
            dim=(0, 2)
        )


@dataclass(frozen=True)
class Regression(ClipLabels):
    """Some numbers, in units of their deviation on the training split: the heads' own scale does not matter.

    Args:
        quantities: names of the numbers; if empty, they are numbered.
        mean: of the training split; taken from it if empty.
        deviation: the same.
    """

    kind = "numbers"

    quantities: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers."""
        return self.quantities

    def fitted(self, train: Split) -> Regression:
        """With mean and deviation of the training split."""
        values = np.array([self._numbers(item) for item in train.items])
        deviation = values.std(axis=0)
        if constant := [number for number, spread in enumerate(deviation) if spread == 0]:
            raise UserError(
                f"number {constant[0]} of the labels is the same in all of the training split"
            )
        names = self.quantities or tuple(f"number {i}" for i in range(values.shape[1]))
        return Regression(
            names, tuple(map(float, values.mean(axis=0))), tuple(map(float, deviation))
        )

    def encode(self, items: Sequence[Item]) -> Float[np.ndarray, "items C"]:
        """Mean 0 and deviation 1 on the training split."""
        values = np.array([self._numbers(item) for item in items])
        return ((values - self.mean) / self.deviation).astype(np.float32)

    def losses(
        self, logits: Float[Tensor, "n K C"], targets: Float[Tensor, "n C"]
    ) -> Float[Tensor, " K"]:
        """Squared error, mean over the numbers."""
        return (logits - targets[:, None]).square().mean(dim=(0, 2))

    def _numbers(self, item: Item) -> list[float]:
        label: Any = item.label if isinstance(item.label, list) else [item.label]
        expected = len(self.quantities) or len(label)
        good = all(isinstance(value, int | float) and np.isfinite(value) for value in label)
        if not good or len(label) != expected:
            raise UserError(
                f"{item.where}: `label` is {item.label!r}, must be {expected} finite numbers"
            )
        return [float(value) for value in label]


def _word(item: Item) -> str:
    if isinstance(item.label, bool) or not isinstance(item.label, str | int):
        raise UserError(
            f"{item.where}: `label` is {item.label!r}, must be the name or the number of one class"
        )
    return str(item.label)


def _tags(item: Item) -> list[str]:
    if not isinstance(item.label, list) or not all(isinstance(tag, str) for tag in item.label):
        raise UserError(f"{item.where}: `label` is {item.label!r}, must be a list of tags")
    return item.label


def _in_order(names: set[str]) -> tuple[str, ...]:
    """By number where all are numbers, else by the alphabet."""
    return tuple(
        sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
    )
