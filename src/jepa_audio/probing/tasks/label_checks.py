"""What the labels of the splits cannot teach or score, found before any audio is encoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.probing.tasks.labels import ClipLabels, Multiclass, Multilabel
from jepa_audio.probing.tasks.records import SPLITS, Split

log = logging.getLogger(__name__)

_MAX_LISTED = 5


def check_labels(data: ProbeData) -> None:
    """Compare the labels of the splits; one line for each kind of label that is missing in one.

    Raises:
        UserError: if a label is not of the type of the task, if all labels of the training split
            are the same, or if no label of another split can be scored.
    """
    if isinstance(data.labels, ClipLabels):
        for split in data.splits.values():
            data.labels.encode(split.items)
    if isinstance(data.labels, Multiclass):
        _check_classes(data)
    elif isinstance(data.labels, Multilabel):
        _check_tags(data)
    else:
        _check_values(data)


def _check_classes(data: ProbeData) -> None:
    names = {split: _class_names(data.splits[split]) for split in SPLITS}
    train = set(names["train"])
    if len(train) == 1:
        raise _error(data, "train", f"all units have the class {train.pop()!r}: a probe needs two")
    if unused := sorted(set(data.labels.names) - train):
        log.warning("%s: no training unit has %s", data.task.name, _listed("the class", unused))
    for split in SPLITS[1:]:
        unknown = [name for name in names[split] if name not in train]
        if len(unknown) == len(names[split]):
            raise _error(data, split, "no unit has a class of the training split")
        if unknown:
            log.warning(
                "%s: %d of %d units in %s have %s, which no training unit has: they count as wrong",
                *(data.task.name, len(unknown), len(names[split]), split),
                _listed("the class", sorted(set(unknown))),
            )
        if absent := sorted(train - set(names[split])):
            what = _listed("the class", absent)
            log.warning("%s: no unit in %s has %s", data.task.name, split, what)


def _check_tags(data: ProbeData) -> None:
    assert isinstance(data.labels, Multilabel)
    if not data.labels.names:
        raise _error(data, "train", "no unit has a tag")
    tags = np.array(data.labels.names)
    for split in SPLITS:
        items = data.splits[split].unit_items
        share = data.labels.encode(items).mean(axis=0)
        useless = sorted(tags[(share == 0) | (share == 1)].tolist())
        effect = "nothing can be learned about" if split == "train" else "no score counts"
        if len(useless) == len(tags):
            raise _error(data, split, "every tag has all units or none: nothing can be compared")
        if useless:
            log.warning(
                "%s: all units in %s or none have %s: %s them",
                *(data.task.name, split, _listed("the tag", useless), effect),
            )
        known = set(data.labels.names)
        if unknown := sorted({tag for item in items for tag in item.label} - known):
            log.warning(
                "%s: %s in %s are not predicted: no training unit has them, or the task has not",
                *(data.task.name, _listed("the tag", unknown), split),
            )


def _check_values(data: ProbeData) -> None:
    """Numbers and annotations in time: more than one value in each split."""
    is_clip = isinstance(data.labels, ClipLabels)
    for split in SPLITS:
        values = [item.label for item in data.splits[split].unit_items]
        # The annotation of one song has several values: its chords, or its beats.
        if any(value != values[0] for value in values) or (not is_clip and len(values[0]) > 1):
            continue
        if split == "train" or (is_clip and len(values) > 1):
            raise _error(data, split, f"all units have the same label {values[0]!r}")
        log.warning("%s: all units in %s have the same label", data.task.name, split)


def _class_names(split: Split) -> list[str]:
    return [str(item.label) for item in split.unit_items]


def _listed(noun: str, names: Sequence[str]) -> str:
    plural = {"the class": "the classes", "the tag": "the tags"}[noun] if len(names) > 1 else noun
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{plural} {', '.join(names[:_MAX_LISTED])}{more}"


def _error(data: ProbeData, split: str, problem: str) -> UserError:
    first = data.splits[split].items[0].where
    return UserError(f"{data.task.name}: {split} (from {first} on): {problem}")
