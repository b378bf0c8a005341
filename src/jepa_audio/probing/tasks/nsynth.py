"""NSynth (Engel et al., 2017, arXiv:1704.01279): pitch and instrument family of single notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jepa_audio.data.corpus.sources import read_nsynth_examples
from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import Accuracy
from jepa_audio.probing.tasks.base import Protocol, Task, Windows
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.raw_data import DataSet, Example, find_path

FOLDERS = {"train": "nsynth-train", "val": "nsynth-valid", "test": "nsynth-test"}

_KEYS = {"NSynth/NSynthP": "pitch", "NSynth/NSynthI": "instrument_family_str"}
_REMEDY = (
    "give the folder that holds nsynth-train, nsynth-valid and nsynth-test, each unpacked from "
    "NSynth's json/wav archives with its examples.json and audio/"
)


def read(raw: Path) -> dict[str, list[Example]]:
    """Read pitches and instrument families. The splits are NSynth's."""
    examples: dict[str, list[Example]] = {stem: [] for stem in _KEYS}
    for split, folder in FOLDERS.items():
        audio = find_path(raw, (f"{folder}/audio",), _REMEDY)
        table = find_path(raw, (f"{folder}/examples.json",), _REMEDY)
        for name, note in sorted(read_nsynth_examples(table).items()):
            for stem, key in _KEYS.items():
                if note.get(key) is None:
                    raise UserError(f"{table}: note {name} has no `{key}`; use NSynth's own file")
                examples[stem].append(Example(split, audio / f"{name}.wav", note[key]))
    return examples


NSYNTH = DataSet("nsynth", read)

NSYNTH_PITCH = Task(
    "nsynth_pitch",
    "NSynth/NSynthP",
    Multiclass(),
    (Accuracy(),),
    {"marble-v1": Protocol(Windows(), max_epochs=50, stop_patience=10, plateau_patience=3)},
    num_units=(289_205, 12_678, 4_096),
    data_set=NSYNTH,
)
NSYNTH_INSTRUMENT = replace(NSYNTH_PITCH, name="nsynth_instrument", stem="NSynth/NSynthI")
