"""Labelled tasks by name. The data sets are in files by family."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from pathlib import Path

from jepa_audio.errors import MissingFileError, UserError, did_you_mean
from jepa_audio.probing.tasks import (
    beats,
    chords,
    emomusic,
    giantsteps,
    gtzan,
    hooktheory,
    nsynth,
    tags,
    vocalset,
)
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.raw_data import DataSet
from jepa_audio.probing.tasks.table import LabelKind, table_task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gtzan.GTZAN_GENRE,
        giantsteps.GIANTSTEPS_KEY,
        emomusic.EMOMUSIC_EMOTION,
        tags.MTT_TAGS,
        nsynth.NSYNTH_PITCH,
        nsynth.NSYNTH_INSTRUMENT,
        vocalset.VOCALSET_SINGER,
        vocalset.VOCALSET_TECHNIQUE,
        *tags.MTG_TAGS,
        beats.GTZAN_BEAT,
        chords.CHORDS1217,
        hooktheory.HOOKTHEORY_KEY,
        hooktheory.HOOKTHEORY_STRUCTURE,
    )
}
"""Every task by name."""

DATA_SETS: dict[str, DataSet] = {
    task.data_set.name: task.data_set for task in TASKS.values() if task.data_set is not None
}
"""Every data set that can be converted, by name."""


def load_task(
    name: str,
    roots: Sequence[Path],
    table_kind: LabelKind = "multiclass",
    *,
    for_folds: bool = False,
) -> ProbeData:
    """Load a task by name from the first folder that holds it, or from the user's own table.

    Args:
        name: name of the task, a `.csv` or `.tsv`, or `module:function` for a function without
            arguments, or an object, that gives a `Task` or a `ProbeData`.
        roots: folders of records or raw data sets.
        table_kind: label type of a table.
        for_folds: see `table_task`.

    Raises:
        MissingFileError: if no folder holds the task; names what is missing in each.
        UserError: if there is no such task, no folder is given, or a record is wrong.
    """
    if Path(name).suffix in (".csv", ".tsv"):
        return table_task(Path(name), table_kind, for_folds=for_folds)
    task = _own_task(name) if ":" in name else TASKS.get(name)
    if isinstance(task, ProbeData):
        return task
    if task is None:
        raise UserError(
            f"there is no task {name!r}; there are {', '.join(TASKS)}, tables (.csv, .tsv) and "
            f"tasks of your own (my_package:function){did_you_mean(name, TASKS)}"
        )
    if not roots:
        raise UserError(
            f"`data` is needed for {name}: the folder of its records, or of the data set as "
            "downloaded"
        )
    missing = []
    for root in roots:
        try:
            return ProbeData.load(task, root)
        except MissingFileError as error:
            missing.append(str(error))
    raise MissingFileError("; ".join(missing))


def _own_task(name: str) -> Task | ProbeData:
    """The task of the user's own module."""
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the task {name}: {error}; give my_package:function") from error
    task = found() if callable(found) else found
    if not isinstance(task, Task | ProbeData):
        kind = type(task).__name__
        raise UserError(f"the task {name} gives {kind}, not a `Task` or a `ProbeData`")
    return task


__all__ = ["DATA_SETS", "TASKS", "ProbeData", "Task", "load_task"]
