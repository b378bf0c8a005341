"""VocalSet (Wilkins et al., 2018, ISMIR): singer and singing technique."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import Accuracy
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path, hash_modulo

log = logging.getLogger(__name__)

SINGERS = (*(f"f{number}" for number in range(1, 10)), *(f"m{number}" for number in range(1, 12)))
TECHNIQUES = (
    "belt", "breathy", "inhaled", "lip_trill", "spoken",
    "straight", "trill", "trillo", "vibrato", "vocal_fry",
)  # fmt: skip
"""Classes of the technique task."""
DYNAMICS = ("fast_forte", "fast_piano", "forte", "messa", "pp", "slow_forte", "slow_piano")
"""Other folders of recordings, for the singer task only."""
TEST_SINGERS = ("f2", "f8", "m3", "m5", "m10")
"""Test singers of the technique task; they are not in its training or validation split."""

_MISSPELT = {"vibrado": "vibrato"}
_RECORDINGS = ("FULL/*/*/*/*.wav", "data_by_singer/*/*/*/*.wav")
_SINGER = re.compile(r"(f|m)(?:emale|ale)?(\d+)(?![^_\s])")
_COPY = re.compile(r"\(\d+\)$")
_REMEDY = "give the folder in which VocalSet's archive (1.1 or 1.2) was unpacked"


def read(raw: Path) -> dict[str, list[Example]]:
    """Read singers and techniques.

    MARBLE's lists depend on a random generator and on silence detection. The splits here follow its
    rules and shares, but differ from its lists. They depend on the names alone: sha256 modulo 100
    of `singer/context/technique/stem`, such as `f1/scales/belt/f1_scales_belt_a`:

    - singer: below 48 train, below 80 val, else test; with nearly 180 recordings each, every singer
      is in all splits;
    - technique: all recordings of `TEST_SINGERS` test; of the others below 60 train, else val.

    Other differences from MARBLE:

    - MARBLE puts the recordings of all techniques with the same index in their folders into one
      split, cuts silence off the start of each recording, leaves out those that are too short for a
      window, and leaves out four recordings that are not in the paper.
    - All copies are left out here, with names such as `f2_scales_vibrato_a(1).wav`; MARBLE leaves
      out one.
    - If file name and folder name two singers, the recording is left out here; MARBLE uses the file
      name.
    """
    splits: dict[str, list[Example]] = {"VocalSet/VocalSetS": [], "VocalSet/VocalSetT": []}
    for path, singer, technique in _read_recordings(raw):
        context = path.parts[-3]  # scales, arpeggios, long_tones or excerpts
        percent = hash_modulo(f"{singer}/{context}/{technique}/{path.stem}", 100)
        split = "train" if percent < 48 else "val" if percent < 80 else "test"
        splits["VocalSet/VocalSetS"].append(Example(split, path, singer))
        if technique in TECHNIQUES:
            split = "train" if percent < 60 else "val"
            split = "test" if singer in TEST_SINGERS else split
            splits["VocalSet/VocalSetT"].append(Example(split, path, technique))
    return splits


def _read_recordings(raw: Path) -> list[tuple[Path, str, str]]:
    """Path, singer and technique (or dynamics) of each recording, in the order of the paths."""
    folder = find_path(raw, _RECORDINGS, _REMEDY).parents[3]
    paths = sorted(path for path in folder.glob("*/*/*/*.wav") if not path.name.startswith("."))
    recordings = []
    for path in paths:
        # Singer and technique of the folders: some file names lack the technique or misspell it.
        singer_folder, _, technique_folder = path.parts[-4:-1]
        singer = _singer(singer_folder)
        technique = _MISSPELT.get(technique_folder, technique_folder)
        if singer not in SINGERS:
            singers = "female1 to female9 and male1 to male11"
            raise UserError(f"{path}: `{singer_folder}` is not one of the singers {singers}")
        if technique not in (*TECHNIQUES, *DYNAMICS):
            remedy = f"rename it to one of {', '.join((*TECHNIQUES, *DYNAMICS))}, or move it away"
            raise UserError(f"{path}: `{technique_folder}` is not a technique; {remedy}")
        recordings.append((path, singer, technique))
    left_out = [
        path
        for path, singer, _ in recordings
        if _COPY.search(path.stem) or _singer(path.stem) not in (singer, None)
    ]
    if left_out:
        log.warning(
            f"{len(left_out)} of the {len(recordings)} recordings in {folder} are left out, as "
            "copies or because file name and folder name different singers: "
            + ", ".join(path.name for path in left_out)
        )
    return [recording for recording in recordings if recording[0] not in left_out]


def _singer(name: str) -> str | None:
    """The singer in the name of a folder or file, such as f1; `None` if there is none."""
    match = _SINGER.match(name)
    return "".join(match.groups()) if match else None


VOCALSET = DataSet("vocalset", read)

VOCALSET_SINGER = Task(
    "vocalset_singer",
    "VocalSet/VocalSetS",
    Multiclass(SINGERS),
    (Accuracy(),),
    # In MARBLE the better choice for the singer is to keep a last window of at least 1 s, and for
    # the technique to drop it.
    {"marble-v1": Protocol(Windows(3.0, min_ratio=1 / 3))},
    # Windows are scored, because each is a file in MARBLE. MARBLE scales each to mean 0 and
    # deviation 1; here the encoder does so if it needs it.
    units=("window", "file"),
    data_set=VOCALSET,
)
VOCALSET_TECHNIQUE = replace(
    VOCALSET_SINGER,
    name="vocalset_technique",
    stem="VocalSet/VocalSetT",
    labels=Multiclass(TECHNIQUES),
    protocols={"marble-v1": Protocol(Windows(3.0), stop_patience=10)},
)
