"""Labelled tasks: audio, and what a head has to say of it; one file for each family of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jepa_audio.errors import MissingFileError, UserError, did_you_mean
from jepa_audio.probing.tasks import (
    chords,
    emomusic,
    giantsteps,
    gtzan,
    hooktheory,
    mtg,
    mtt,
    nsynth,
    rhythm,
    vocalset,
)
from jepa_audio.probing.tasks.base import DataSet, ProbeData, Protocol, Task
from jepa_audio.probing.tasks.table import LabelKind, table_task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gtzan.GTZAN_GENRE,
        giantsteps.GIANTSTEPS_KEY,
        emomusic.EMOMUSIC_EMOTION,
        mtt.MTT_TAGS,
        nsynth.NSYNTH_PITCH,
        nsynth.NSYNTH_INSTRUMENT,
        vocalset.VOCALSET_SINGER,
        vocalset.VOCALSET_TECHNIQUE,
        mtg.MTG_TOP50,
        mtg.MTG_GENRE,
        mtg.MTG_INSTRUMENT,
        mtg.MTG_MOOD,
        rhythm.GTZAN_BEAT,
        chords.CHORDS1217,
        hooktheory.HOOKTHEORY_KEY,
        hooktheory.HOOKTHEORY_STRUCTURE,
    )
}
"""Every task by name."""

DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        gtzan.GTZAN,
        rhythm.GTZAN_RHYTHM,
        giantsteps.GIANTSTEPS,
        emomusic.EMOMUSIC,
        mtt.MTT,
        nsynth.NSYNTH,
        vocalset.VOCALSET,
        mtg.MTG,
    )
}
"""Every data set that can be converted, by name."""


def load_task(name: str, roots: Sequence[Path], table_kind: LabelKind = "multiclass") -> ProbeData:
    """A task by name, on the first folder that holds it; or the user's own table.

    Args:
        name: of the task, or a `.csv` or `.tsv`.
        roots: folders of records or raw data sets.
        table_kind: of the labels in a table.

    Raises:
        UserError: if no folder holds it, with what each one lacks.
        UserError: if there is no such task, no folder is given for it, or a record is not what it
            needs.
    """
    if Path(name).suffix in (".csv", ".tsv"):
        return table_task(Path(name), table_kind)
    if name not in TASKS:
        known = ", ".join(TASKS)
        guess = did_you_mean(name, TASKS)
        raise UserError(
            f"there is no task {name!r}; there are {known}, and tables (.csv, .tsv){guess}"
        )
    if not roots:
        raise UserError(
            f"`data` is needed for {name}: the folder of its records, or of the data set as downloaded"
        )
    missing = []
    for root in roots:
        try:
            return ProbeData.load(TASKS[name], root)
        except MissingFileError as error:
            missing.append(str(error))
    raise MissingFileError("; ".join(missing))


__all__ = ["DATA_SETS", "TASKS", "DataSet", "ProbeData", "Protocol", "Task", "load_task"]
