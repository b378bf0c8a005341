"""Folds for cross-validation, in which every group of clips is in one fold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Int64
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import SPLITS, Item, Split, split_checksum

log = logging.getLogger(__name__)

FoldBy = Literal["group", "fold"]
"""The column that divides the clips: groups that stay together, or the number of the fold."""


def all_items(data: ProbeData) -> Split:
    """The items of all splits, in one."""
    return Split(tuple(item for split in data.splits.values() for item in split.items))


def assign_folds(data: ProbeData, by: FoldBy, num_folds: int) -> Int64[np.ndarray, " items"]:
    """The fold of each of `all_items`.

    With "group", all clips of a group (of a unit, if it has no group) are in one of `num_folds`
    folds of nearly equal size; folds have similar shares of the classes. With "fold", the records
    give the fold.

    Raises:
        UserError: if there are fewer than three folds, or fewer groups than folds, if no clip has a
            group or one has no fold, or if the clips of one unit are in several groups or folds.
    """
    split = all_items(data)
    if by == "group":
        _check_groups(split)
    keys = [getattr(item, by) or ("" if by == "fold" else item.uid) for item in split.items]
    _check_units(split, keys, by)
    if by == "fold":
        if "" in keys:
            raise UserError(f"{split.items[keys.index('')].where}: no `fold`, but `folds` is fold")
        names = sorted(set(keys), key=lambda name: (len(name), name))
        if len(names) < len(SPLITS):
            raise UserError(f"`folds` is fold: {len(SPLITS)} folds are needed, there are {names}")
        return np.array([names.index(key) for key in keys])
    num_groups = len(set(keys))
    if not len(SPLITS) <= num_folds <= num_groups:
        raise UserError(
            f"`num_folds` ({num_folds}) must be at least {len(SPLITS)} and at most the number of "
            f"groups, {num_groups}"
        )
    # A few items can have the same uid: they have the same group.
    classes = [str(item.label) for item in split.items]
    kind = StratifiedGroupKFold if isinstance(data.task.labels, Multiclass) else GroupKFold
    folds = np.empty(len(keys), dtype=np.int64)
    for fold, (_, test) in enumerate(kind(num_folds).split(keys, classes, keys)):
        folds[test] = fold
    return folds


def _check_groups(split: Split) -> None:
    """Refuse a split without groups; warn if some clips have none."""
    alone = [item for item in split.items if not item.group]
    if not alone:
        return
    file = alone[0].where.partition(", line ")[0]
    if len(alone) == len(split):
        raise UserError(
            f"{file} has no column `group`, or the column is empty, but `folds` is group: add it, "
            "or choose another value of `folds`"
        )
    rank_zero_only(log.warning)(
        f"{file}: {len(alone)} of {len(split)} clips have no `group`, the first one in "
        f"{alone[0].where}: each of them is its own group"
    )


def _check_units(split: Split, keys: Sequence[str], by: str) -> None:
    first: dict[str, tuple[str, Item]] = {}
    for item, key in zip(split.items, keys, strict=True):
        other, where = first.setdefault(item.uid, (key, item))
        if key != other:
            raise UserError(
                f"{item.where}: {item.uid} has the {by} {key}, but {other} in {where.where}"
            )


def fold_data(data: ProbeData, folds: Int64[np.ndarray, " items"], fold: int) -> ProbeData:
    """The splits in which `fold` is the test split, the next fold validates, and the rest trains.

    The labels are fitted on all items: every fold has the same classes, in the same order.
    """
    split, number = all_items(data), int(folds.max()) + 1
    is_test, is_valid = folds == fold, folds == (fold + 1) % number
    chosen = (~is_test & ~is_valid, is_valid, is_test)
    parts = [Split(tuple(np.array(split.items, dtype=object)[which])) for which in chosen]
    labels = data.task.labels.fitted(split)
    splits = dict(zip(SPLITS, parts, strict=True))
    return replace(data, labels=labels, splits=splits, checksum=split_checksum(parts))
