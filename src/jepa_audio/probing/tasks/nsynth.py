"""NSynth (Engel et al., 2017, arXiv:1704.01279): pitch and instrument family of single notes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepa_audio.probing.tasks.base import UNKNOWN, LabelledClips, ProbeTask, Task

_DOWNLOAD = (
    "give as corpus the folder that holds nsynth-train, nsynth-valid and nsynth-test, each unpacked from "
    "NSynth's json/wav archives with its examples.json and audio/"
)


@dataclass(frozen=True)
class NSynth(Task):
    """One label of every note; the splits are NSynth's own.

    Args:
        name: of the task.
        label_key: entry of `examples.json` to be told.
    """

    name: str
    label_key: str

    def load(self, root: Path) -> ProbeTask:
        """See `Task`."""
        notes = {split: _read_examples(root / f"nsynth-{split}") for split in ("train", "valid", "test")}
        labels = {split: [self._label(root, split, *note) for note in notes[split].items()] for split in notes}
        classes = sorted(set(labels["train"]))
        number = {label: i for i, label in enumerate(classes)}
        splits = {
            split: LabelledClips(
                tuple(root / f"nsynth-{split}" / "audio" / f"{name}.wav" for name in notes[split]),
                np.array([number.get(label, UNKNOWN) for label in labels[split]], dtype=np.int64),
            )
            for split in notes
        }
        checksum = hashlib.sha256()
        for split in notes:
            checksum.update((root / f"nsynth-{split}" / "examples.json").read_bytes())
        return ProbeTask(self.name, tuple(map(str, classes)), **splits, checksum=checksum.hexdigest())

    def _label(self, root: Path, split: str, name: str, note: dict[str, int | str]) -> int | str:
        label = note.get(self.label_key)
        if label is None:
            raise ValueError(
                f"{root / f'nsynth-{split}' / 'examples.json'}: note {name} has no `{self.label_key}`, "
                f"which {self.name} needs; use NSynth's own file"
            )
        return label


def _read_examples(folder: Path) -> dict[str, dict[str, int | str]]:
    """The notes of one split, in the order of their names; every one has its file."""
    examples, audio = folder / "examples.json", folder / "audio"
    for path in (folder, examples, audio):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {_DOWNLOAD}")
    try:
        notes = json.loads(examples.read_bytes())
    except ValueError as error:
        raise ValueError(f"{examples} is not JSON ({error}): unpack the archive anew") from error
    if not isinstance(notes, dict) or not notes or not all(isinstance(note, dict) for note in notes.values()):
        raise ValueError(f"{examples} must hold one object for each note, by name: unpack the archive anew")
    present = {path.stem for path in audio.glob("*.wav")}
    missing = sorted(notes.keys() - present)
    if missing:
        raise FileNotFoundError(
            f"{audio / missing[0]}.wav is missing, as are {len(missing) - 1} other of the {len(notes)} notes "
            f"in {examples}: unpack the archive anew"
        )
    return dict(sorted(notes.items()))
