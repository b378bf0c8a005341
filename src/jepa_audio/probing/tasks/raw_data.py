"""Raw data sets as downloaded, and what their converters share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks.records import SPLITS, Record

Conversion = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by stem and split; `audio_path` is relative to the folder of the raw data set."""


class Example(NamedTuple):
    """A labelled audio file of a raw data set; `ori_uid` is the key of that name in its record."""

    split: str
    path: Path
    label: Any
    ori_uid: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set as downloaded.

    Args:
        name: name for `jepa-audio data convert`.
        read: maps the folder of the data set to the examples of each stem. Raises
            `MissingFileError` for a missing file or folder, `UserError` for a wrong line.
    """

    name: str
    read: Callable[[Path], Mapping[str, Iterable[Example]]]

    def convert(self, raw: Path) -> Conversion:
        """Make the records of every task on the data set; raises the errors of `read`."""
        conversion: dict[str, dict[str, list[Record]]] = {}
        for stem, examples in self.read(raw).items():
            conversion[stem] = {split: [] for split in SPLITS}
            for split, path, label, ori_uid in examples:
                record = {"audio_path": path.relative_to(raw).as_posix(), "label": label}
                song = {} if ori_uid is None else {"ori_uid": ori_uid}
                conversion[stem][split].append(record | song)
        return conversion


def find_path(root: Path, patterns: Sequence[str], remedy: str) -> Path:
    """Return the first path below `root` that matches a glob pattern; patterns in their order.

    Raises:
        MissingFileError: if no pattern matches.
    """
    for pattern in patterns:
        if paths := sorted(root.glob(pattern)):
            return paths[0]
    others = f"; also tried: {', '.join(patterns[1:])}" if len(patterns) > 1 else ""
    raise MissingFileError(f"{root / patterns[0]} is missing: {remedy}{others}")


def audio_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the audio files of a folder by stem; of one stem the earliest suffix wins."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    paths.sort(key=lambda path: suffixes.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in paths}


def hash_modulo(text: str, modulus: int, algorithm: str = "sha256") -> int:
    """Map a text to a number below `modulus` by its checksum: the same on every machine."""
    digest = hashlib.new(algorithm, text.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % modulus
