"""VocalSet (Wilkins et al., 2018, ISMIR): singer and singing technique."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass, Unit
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path, hash_modulo

log = logging.getLogger(__name__)

SINGERS = (*(f"f{number}" for number in range(1, 10)), *(f"m{number}" for number in range(1, 12)))
TECHNIQUES = (
    "belt",
    "breathy",
    "inhaled",
    "lip_trill",
    "spoken",
    "straight",
    "trill",
    "trillo",
    "vibrato",
    "vocal_fry",
)
"""Classes of the technique task."""
DYNAMICS = ("fast_forte", "fast_piano", "forte", "messa", "pp", "slow_forte", "slow_piano")
"""Other folders of recordings, which are used in the singer task only."""
TEST_SINGERS = ("f2", "f8", "m3", "m5", "m10")
"""Test singers of the technique task; they are not in its training or validation split."""

_MISSPELT = {"vibrado": "vibrato"}
_RECORDINGS = ("FULL/*/*/*/*.wav", "data_by_singer/*/*/*/*.wav")
_SINGER = re.compile(r"(f|m)(?:emale|ale)?(\d+)(?![^_\s])")
_COPY = re.compile(r"\(\d+\)$")
_REMEDY = "give the folder in which VocalSet's archive (1.1 or 1.2) was unpacked"


@dataclass(frozen=True)
class _Recording:
    """One file: a technique, a vowel and an exercise of one singer.

    Attributes:
        path: path of the file.
        singer: such as f1.
        context: scales, arpeggios, long_tones or excerpts.
        technique: technique or dynamics.
    """

    path: Path
    singer: str
    context: str
    technique: str

    @property
    def percent(self) -> int:
        """0 to 99, a function of the names alone and not of other recordings or the folder."""
        name = f"{self.singer}/{self.context}/{self.technique}/{self.path.stem}"
        return hash_modulo(name, 100)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read singers and techniques.

    MARBLE's lists depend on a random generator and on silence detection. So the splits here have
    its rules and its shares, but not its lists. The split of a recording depends on a number from 0
    to 99, sha256 modulo 100 of `singer/context/technique/stem` such as
    `f1/scales/belt/f1_scales_belt_a`:

    - singer: below 48 train, below 80 val, else test; with nearly 180 recordings each, every singer
      is in all splits;
    - technique: all recordings of `TEST_SINGERS` test; of the others below 60 train, else val.

    Other differences: MARBLE puts the recordings of all techniques with the same index in their
    folders into one split. It cuts silence off the start of each recording, and leaves out those
    that are too short for a window. Of the copies, with names such as `f2_scales_vibrato_a(1).wav`,
    it leaves out one, here all are left out. It leaves out four recordings that are not in the
    paper; here they are kept. Where file name and folder name two singers it uses the file name;
    here such a recording is left out.
    """
    recordings = _read_recordings(raw)
    return {
        "VocalSet/VocalSetS": [Example(_singer_split(r), r.path, r.singer) for r in recordings],
        "VocalSet/VocalSetT": [
            Example(_technique_split(r), r.path, r.technique)
            for r in recordings
            if r.technique in TECHNIQUES
        ],
    }


def _singer_split(recording: _Recording) -> str:
    if recording.percent < 48:
        return "train"
    return "val" if recording.percent < 80 else "test"


def _technique_split(recording: _Recording) -> str:
    if recording.singer in TEST_SINGERS:
        return "test"
    return "train" if recording.percent < 60 else "val"


def _read_recordings(raw: Path) -> Sequence[_Recording]:
    """The recordings with a certain singer, in the order of their paths."""
    folder = find_path(raw, _RECORDINGS, _REMEDY).parents[3]
    paths = sorted(path for path in folder.glob("*/*/*/*.wav") if not path.name.startswith("."))
    recordings = [_recording(path) for path in paths]
    uncertain = [
        recording
        for recording in recordings
        if _COPY.search(recording.path.stem)
        or _singer(recording.path.stem) not in (recording.singer, None)
    ]
    if uncertain:
        log.warning(
            "%d of the %d recordings in %s are left out, as copies or because file name and folder "
            "name different singers: %s",
            len(uncertain),
            len(recordings),
            folder,
            ", ".join(recording.path.name for recording in uncertain),
        )
    return [r for r in recordings if r not in uncertain]


def _recording(path: Path) -> _Recording:
    """Read the names of the folders: some file names lack the technique or misspell it."""
    singer_folder, context, folder = path.parts[-4:-1]
    singer, technique = _singer(singer_folder), _MISSPELT.get(folder, folder)
    if singer not in SINGERS:
        raise UserError(
            f"{path}: `{singer_folder}` is not one of the singers female1 to female9 and male1 to "
            "male11"
        )
    known = (*TECHNIQUES, *DYNAMICS)
    if technique not in known:
        raise UserError(
            f"{path}: `{folder}` is not a technique; rename it to one of {', '.join(known)}, or "
            "move it away"
        )
    return _Recording(path, singer, context, technique)


def _singer(name: str) -> str | None:
    """The singer, such as f1, in the name of a folder or file; some files have none."""
    match = _SINGER.match(name)
    return "".join(match.groups()) if match else None


VOCALSET = DataSet("vocalset", read)

# Windows are scored: each is a file of its own in MARBLE. It scales each to mean 0 and deviation 1,
# which is left to the encoder here. A last window of at least 1 s is kept for the singer and
# dropped for the technique: the better choice in MARBLE for each.
_UNITS: tuple[Unit, ...] = ("window", "file")
_SINGER_V1 = Protocol(Windows(3.0, min_ratio=1 / 3))
_TECHNIQUE_V1 = Protocol(Windows(3.0), stop_patience=10)

VOCALSET_SINGER = Task(
    "vocalset_singer",
    "VocalSet/VocalSetS",
    Multiclass(SINGERS),
    (Accuracy(),),
    {"marble-v1": _SINGER_V1},
    units=_UNITS,
    data_set=VOCALSET,
)
VOCALSET_TECHNIQUE = Task(
    "vocalset_technique",
    "VocalSet/VocalSetT",
    Multiclass(TECHNIQUES),
    (Accuracy(),),
    {"marble-v1": _TECHNIQUE_V1},
    units=_UNITS,
    data_set=VOCALSET,
)
