"""Labelled tasks by name. The data sets are in files by family."""

from __future__ import annotations

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


def load_task(name: str, roots: Sequence[Path], table_kind: LabelKind = "multiclass") -> ProbeData:
    """Load a task by name from the first folder that holds it, or from the user's own table.

    Args:
        name: name of the task, or a `.csv` or `.tsv`.
        roots: folders of records or raw data sets.
        table_kind: label type of a table.

    Raises:
        MissingFileError: if no folder holds the task; names what is missing in each.
        UserError: if there is no such task, no folder is given, or a record is wrong.
    """
    if Path(name).suffix in (".csv", ".tsv"):
        return table_task(Path(name), table_kind)
    if name not in TASKS:
        raise UserError(
            f"there is no task {name!r}; there are {', '.join(TASKS)}, and tables (.csv, .tsv)"
            f"{did_you_mean(name, TASKS)}"
        )
    if not roots:
        raise UserError(
            f"`data` is needed for {name}: the folder of its records, or of the data set as "
            "downloaded"
        )
    missing = []
    for root in roots:
        try:
            return ProbeData.load(TASKS[name], root)
        except MissingFileError as error:
            missing.append(str(error))
    raise MissingFileError("; ".join(missing))


__all__ = ["DATA_SETS", "TASKS", "ProbeData", "Task", "load_task"]
