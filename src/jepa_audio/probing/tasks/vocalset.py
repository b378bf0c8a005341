"""VocalSet (Wilkins et al., 2018, ISMIR): who sings, and with which technique."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multiclass, Unit
from jepa_audio.probing.tasks.records import SPLITS, Record
from jepa_audio.probing.tasks.windows import Windows

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
"""Those that are told apart."""
DYNAMICS = ("fast_forte", "fast_piano", "forte", "messa", "pp", "slow_forte", "slow_piano")
"""Folders beside those of the techniques; their takes are heard for the singer alone."""
TEST_SINGERS = ("f2", "f8", "m3", "m5", "m10")
"""Of the technique task: nobody who is heard in its test is heard in training."""

_MISSPELT = {"vibrado": "vibrato"}
_TREES = ("FULL", "data_by_singer")
_SINGER = re.compile(r"(f|m)(?:emale|ale)?(\d+)(?![^_\s])")
_COPY = re.compile(r"\(\d+\)$")
_DOWNLOAD = "give the folder that VocalSet's archive (1.1 or 1.2) was unpacked in"


@dataclass(frozen=True)
class _Take:
    """One recording: a technique, a vowel, an exercise are sung by themselves.

    Attributes:
        audio_path: from the data set's folder.
        singer: such as f1.
        context: scales, arpeggios, long_tones or excerpts.
        technique: or dynamics.
    """

    audio_path: str
    singer: str
    context: str
    technique: str

    @property
    def percent(self) -> int:
        """0 to 99, by the names alone: whatever other takes there are and whatever the tree is called."""
        name = "/".join((self.singer, self.context, self.technique, Path(self.audio_path).stem))
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100


def convert(raw: Path) -> Conversion:
    """Records of both tasks, see `DataSet`.

    MARBLE's lists hang on a random generator and on where silence is heard, so the splits here have
    its rules and its shares, but not its lists. Each take goes where a number between 0 and 99
    sends it, sha256 modulo 100 of `singer/context/technique/stem` such as
    `f1/scales/belt/f1_scales_belt_a`:

    - singer: below 48 train, below 80 val, else test; nearly 180 takes each put everybody in all
    splits;
    - technique: all takes of `TEST_SINGERS` test; of the others below 60 train, else val.

    Other differences: MARBLE gives the takes of all techniques that have the same place in their
    folders to one split. It cuts silence off the start of each take, and drops a take that is too
    short for a window. Of the copies, named such as `f2_scales_vibrato_a(1).wav`, it leaves out
    one, here all are left out. It leaves out four takes that the paper does not list, and where
    name and folder of a take are of two singers it believes the name: here the four are kept, and
    such a take is left out.
    """
    takes = _read_takes(raw)
    sung = [take for take in takes if take.technique in TECHNIQUES]
    return {
        "VocalSet/VocalSetS": _records(takes, _split_by_take, lambda take: take.singer),
        "VocalSet/VocalSetT": _records(sung, _split_by_singer, lambda take: take.technique),
    }


def _split_by_take(take: _Take) -> str:
    if take.percent < 48:
        return "train"
    return "val" if take.percent < 80 else "test"


def _split_by_singer(take: _Take) -> str:
    if take.singer in TEST_SINGERS:
        return "test"
    return "train" if take.percent < 60 else "val"


def _records(
    takes: Sequence[_Take], split_of: Callable[[_Take], str], label_of: Callable[[_Take], str]
) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for take in takes:
        records[split_of(take)].append({"audio_path": take.audio_path, "label": label_of(take)})
    return records


def _read_takes(raw: Path) -> list[_Take]:
    """Those whose singer is certain, in the order of their paths."""
    tree = next((raw / name for name in _TREES if (raw / name).is_dir()), None)
    if tree is None:
        raise MissingFileError(f"{raw} holds neither {' nor '.join(_TREES)}: {_DOWNLOAD}")
    files = sorted(path for path in tree.glob("*/*/*/*.wav") if not path.name.startswith("."))
    if not files:
        raise MissingFileError(f"{tree} holds no singer/context/technique/*.wav: {_DOWNLOAD}")
    takes = {path: _take(raw, path) for path in files}
    doubtful = [
        path
        for path, take in takes.items()
        if _COPY.search(path.stem) or _singer(path.stem) not in (take.singer, None)
    ]
    if doubtful:
        log.warning(
            "%d of the %d takes in %s are left out, as copies or as named for another singer than their folder: %s",
            len(doubtful),
            len(files),
            tree,
            ", ".join(path.name for path in doubtful),
        )
    return [take for path, take in takes.items() if path not in doubtful]


def _take(raw: Path, path: Path) -> _Take:
    """What the folders of a file say; the names of some files do not say all of it, or misspell it."""
    singer_folder, context, folder = path.parts[-4:-1]
    singer, technique = _singer(singer_folder), _MISSPELT.get(folder, folder)
    if singer not in SINGERS:
        raise UserError(
            f"{path}: `{singer_folder}` is none of the singers female1 to female9 and male1 to male11"
        )
    if technique not in (*TECHNIQUES, *DYNAMICS):
        known = ", ".join((*TECHNIQUES, *DYNAMICS))
        raise UserError(
            f"{path}: `{folder}` is no technique; rename it to one of {known}, or move it away"
        )
    return _Take(path.relative_to(raw).as_posix(), singer, context, technique)


def _singer(name: str) -> str | None:
    """Such as f1, of the name of a folder or of a file; not every file names its singer."""
    named = _SINGER.match(name)
    return "".join(named.groups()) if named else None


VOCALSET = DataSet("vocalset", convert)

# Each window counts, as every one is a file of its own in MARBLE, where it is brought to mean 0 and
# deviation 1: here that is the encoder's own matter. A rest of at least a second at the end of a
# take is kept for the singer and dropped for the technique: what MARBLE found best for each.
_UNITS: tuple[Unit, ...] = ("window", "file")
_SINGER_V1 = Protocol(
    Windows(3.0, min_ratio=1 / 3), max_epochs=100, stop_patience=20, plateau_patience=5
)
_TECHNIQUE_V1 = Protocol(Windows(3.0), max_epochs=100, stop_patience=10, plateau_patience=5)

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
