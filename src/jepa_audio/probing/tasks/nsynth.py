"""NSynth (Engel et al., 2017, arXiv:1704.01279): pitch and instrument family of single notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks.base import Conversion, DataSet, Protocol, Task
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import Record
from jepa_audio.probing.tasks.windows import Windows

FOLDERS = {"train": "nsynth-train", "val": "nsynth-valid", "test": "nsynth-test"}
_KEYS = {"NSynth/NSynthP": "pitch", "NSynth/NSynthI": "instrument_family_str"}
_DOWNLOAD = (
    "give the folder that holds nsynth-train, nsynth-valid and nsynth-test, each unpacked from NSynth's json/wav "
    "archives with its examples.json and audio/"
)


def convert(raw: Path) -> Conversion:
    """Records of both tasks, see `DataSet`; the splits are NSynth's own."""
    notes = {split: _read_examples(raw / folder) for split, folder in FOLDERS.items()}
    return {
        stem: {
            split: [_record(raw, split, name, note, key) for name, note in notes[split].items()]
            for split in notes
        }
        for stem, key in _KEYS.items()
    }


def _record(raw: Path, split: str, name: str, note: dict[str, Any], key: str) -> Record:
    label, folder = note.get(key), FOLDERS[split]
    if label is None:
        raise UserError(
            f"{raw / folder / 'examples.json'}: note {name} has no `{key}`; use NSynth's own file"
        )
    return {"audio_path": f"{folder}/audio/{name}.wav", "label": label}


def _read_examples(folder: Path) -> dict[str, dict[str, Any]]:
    """The notes of one split, in the order of their names."""
    examples, audio = folder / "examples.json", folder / "audio"
    for path in (folder, examples, audio):
        if not path.exists():
            raise MissingFileError(f"{path} is missing: {_DOWNLOAD}")
    try:
        notes = json.loads(examples.read_bytes())
    except ValueError as error:
        raise UserError(f"{examples} is not JSON ({error}): unpack the archive anew") from error
    if (
        not isinstance(notes, dict)
        or not notes
        or not all(isinstance(note, dict) for note in notes.values())
    ):
        raise UserError(
            f"{examples} must hold one object for each note, by name: unpack the archive anew"
        )
    return dict(sorted(notes.items()))


NSYNTH = DataSet("nsynth", convert)

_V1 = Protocol(Windows(), max_epochs=50, stop_patience=10, plateau_patience=3)

NSYNTH_PITCH = Task(
    "nsynth_pitch",
    "NSynth/NSynthP",
    Multiclass(),
    (Accuracy(),),
    {"marble-v1": _V1},
    num_units=(289_205, 12_678, 4_096),
    data_set=NSYNTH,
)
NSYNTH_INSTRUMENT = Task(
    "nsynth_instrument",
    "NSynth/NSynthI",
    Multiclass(),
    (Accuracy(),),
    {"marble-v1": _V1},
    num_units=(289_205, 12_678, 4_096),
    data_set=NSYNTH,
)
