"""HookTheory (Donahue et al., 2022, arXiv:2212.01884): key and section of clips of pop songs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import KEYS, Accuracy, KeyScore
from jepa_audio.probing.tasks.base import MARBLE_LEARNING_RATES, ProbeData, Protocol, Task
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import Item, Split
from jepa_audio.probing.tasks.windows import Windows

log = logging.getLogger(__name__)

SECTIONS = {
    "intro": ("intro",),
    "verse": ("verse", "intro_verse", "verse_pre-chorus"),
    "pre-chorus": ("pre-chorus",),
    "chorus": ("chorus", "intro_chorus", "pre-chorus_chorus"),
    "bridge": ("bridge",),
    "outro": ("outro",),
    "inst": ("instrumental", "solo"),
}
"""MARBLE's seven classes, and the labels that it counts among each (the words of a list are joined by `_`)."""

_SECTION_OF = {label: section for section, labels in SECTIONS.items() for label in labels}
_KEY = re.compile(r"(C|Db|D|Eb|E|F|Gb|G|Ab|A|Bb|B) [A-Za-z]+")


@dataclass(frozen=True)
class HookTask(Task):
    """A task on hooks, as the annotated clips are called, of which every one is scored by itself.

    Several hooks may be of one song, which `ori_uid` names, and may differ in what they are: MARBLE
    averages its key heads over a song and takes the first hook's label for all, here nothing is
    averaged over a song. The files in MARBLE's records are cut already; `segment_start` and
    `segment_end` say where in the song, and are not read.

    Args:
        class_of: what an item's label means, `None` for an item that is left out; `ValueError`
            naming its record if it is no label of this data set.
    """

    class_of: Callable[[Item], str | None] = field(kw_only=True)

    def _data(self, splits: Sequence[Split]) -> ProbeData:
        return super()._data([self._in_classes(split) for split in splits])

    def _in_classes(self, split: Split) -> Split:
        """The items that have a class, labelled with it."""
        _check_apart(split)
        classes = [self.class_of(item) for item in split.items]
        kept = [
            replace(item, label=name)
            for item, name in zip(split.items, classes, strict=True)
            if name is not None
        ]
        where = split.items[0].where.rpartition(",")[0]
        if not kept:
            raise UserError(
                f"{where}: no record has a label that is one of the classes of {self.name}"
            )
        if len(kept) < len(split):
            log.warning(
                "%s: %d of the %d records of %s are left out, their labels are no classes of the task",
                self.name,
                len(split) - len(kept),
                len(split),
                where,
            )
        return Split(tuple(kept))


def _check_apart(split: Split) -> None:
    uid, count = Counter(item.uid for item in split.items).most_common(1)[0]
    if count > 1:
        first, second = [item.where for item in split.items if item.uid == uid][:2]
        raise UserError(
            f"{second}: `{uid}` is in {first} already, and hooks are scored apart: give each its own clip, or its "
            "own `uid` with its `start` and `end` in the file"
        )


def _key_of(item: Item) -> str | None:
    """The key, if it is major or minor."""
    if not isinstance(item.label, str) or not _KEY.fullmatch(item.label):
        raise UserError(
            f"{item.where}: `label` is {item.label!r}, must be a tonic (C Db D Eb E F Gb G Ab A Bb B) and a mode, such "
            "as 'Eb minor'"
        )
    return item.label if item.label in KEYS else None


def _section_of(item: Item) -> str:
    """The class of a section, from its words."""
    words = item.label if isinstance(item.label, list) else [item.label]
    section = _SECTION_OF.get("_".join(map(str, words)))
    if section is None:
        raise UserError(
            f"{item.where}: `label` is {item.label!r}, must be a list such as {list(_SECTION_OF)} gives"
        )
    return section


_KEY_V2 = Protocol(
    Windows(15.0, min_ratio=0.8),
    max_epochs=50,
    stop_patience=10,
    plateau_patience=5,
    plateau_factor=0.1,
    learning_rates=(1e-3,),
)
_STRUCTURE_V2 = replace(_KEY_V2, windows=Windows(15.0, min_ratio=0.1))


def _protocols(v2: Protocol) -> dict[str, Protocol]:
    """The first MARBLE has no such tasks: its preset is the second's settings, with its own search."""
    return {"marble-v1": replace(v2, learning_rates=MARBLE_LEARNING_RATES), "marble-v2": v2}


HOOKTHEORY_KEY = HookTask(
    "hooktheory_key",
    "HookTheory/HookTheoryKey",
    Multiclass(KEYS),
    (KeyScore(), Accuracy(), KeyScore(symmetric=True)),
    _protocols(_KEY_V2),
    class_of=_key_of,
)
HOOKTHEORY_STRUCTURE = HookTask(
    "hooktheory_structure",
    "HookTheory/HookTheoryStructure",
    Multiclass(tuple(SECTIONS)),
    (Accuracy(),),
    _protocols(_STRUCTURE_V2),
    class_of=_section_of,
)
