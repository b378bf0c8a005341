"""HookTheory (Donahue et al., 2022, arXiv:2212.01884): key and section of clips of pop songs.

The annotated clips are called hooks. Each hook is scored separately, also if several are from one
song (`ori_uid`). MARBLE averages the outputs of its key heads over a song and uses the label of the
first hook. The audio files of MARBLE's records are hooks: the position of a hook in its song
(`segment_start`, `segment_end`) is not read.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import KEYS, TONICS, Accuracy, KeyScore
from jepa_audio.probing.tasks.base import Protocol, Task, Windows, protocols_of_v2
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import Item, Split

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
"""MARBLE's seven classes, and the labels that it maps to each (words of a list joined by `_`)."""

_SECTION_OF = {label: section for section, labels in SECTIONS.items() for label in labels}
_KEY = re.compile(f"({'|'.join(TONICS)}) [A-Za-z]+")


def _label_classes(split: Split, class_of: Callable[[Item], str | None]) -> Split:
    """Replace every label by its class. Items without a class are left out, with a warning."""
    uid, count = Counter(item.uid for item in split.items).most_common(1)[0]
    if count > 1:
        first, second = [item.where for item in split.items if item.uid == uid][:2]
        raise UserError(
            f"{second}: `{uid}` is also in {first}, but each hook is scored on its own: give each "
            "its own file, or a unique `uid` with its `start` and `end` in the file"
        )
    labelled = (replace(item, label=class_of(item)) for item in split.items)
    items = tuple(item for item in labelled if item.label is not None)
    file = split.items[0].where.rpartition(",")[0]
    if not items:
        raise UserError(f"{file}: no record has a label that is a class of the task")
    if num_left_out := len(split) - len(items):
        share = f"{num_left_out} of {len(split)} records"
        log.warning("%s: %s are left out, their labels are not classes of the task", file, share)
    return Split(items)


def _key_class(item: Item) -> str | None:
    if not isinstance(item.label, str) or not _KEY.fullmatch(item.label):
        raise item.error(f"a tonic ({' '.join(TONICS)}) and a mode, such as 'Eb minor'")
    return item.label if item.label in KEYS else None


def _section_class(item: Item) -> str:
    words = item.label if isinstance(item.label, list) else [item.label]
    section = _SECTION_OF.get("_".join(map(str, words)))
    if section is None:
        raise item.error(f"a list of the words of one of {', '.join(_SECTION_OF)}")
    return section


_KEY_V2 = Protocol(
    Windows(15.0, min_ratio=0.8),
    max_epochs=50,
    stop_patience=10,
    plateau_factor=0.1,
    learning_rates=(1e-3,),
)

HOOKTHEORY_KEY = Task(
    "hooktheory_key",
    "HookTheory/HookTheoryKey",
    Multiclass(KEYS),
    (KeyScore(), Accuracy(), KeyScore(symmetric=True)),
    protocols_of_v2(_KEY_V2),
    relabel=partial(_label_classes, class_of=_key_class),
)
HOOKTHEORY_STRUCTURE = Task(
    "hooktheory_structure",
    "HookTheory/HookTheoryStructure",
    Multiclass(tuple(SECTIONS)),
    (Accuracy(),),
    protocols_of_v2(replace(_KEY_V2, windows=Windows(15.0, min_ratio=0.1))),
    relabel=partial(_label_classes, class_of=_section_class),
)
