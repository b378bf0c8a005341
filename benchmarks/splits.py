"""Labels and splits of the sets of `benchmarks/corpora.py`: functions of names and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.notes import Note

from jepa_audio.errors import UserError

# Roles of instruments and languages: T test, V valid, t test and v valid of `_select`, p the rest,
# which is also for pretraining. Probes of the result are trained on t, v and p, those of `_select`
# on p. The roles were drawn at random, once, among instruments that share no recording with others.
FAMILIES = {  # of eight programs each: (first program, their roles)
    "piano": (0, "ppVpTTvt"),
    "chromatic_percussion": (8, "TTppVtvp"),
    "organ": (16, "TtTVvppp"),
    "guitar": (24, "pppTtVvT"),
    "bass": (32, "pVtTppvT"),
    "strings": (40, "pTTppvVt"),
    "ensemble": (48, "ppppTVTt"),
    "brass": (56, "pTTVvtpp"),
    "reed": (64, "ptvppTVT"),
    "pipe": (72, "VpTTptvp"),
    "ethnic": (104, "pTvtTVpp"),
    "percussive": (112, "pTtVppTv"),
}
ROLES = {
    first + index: role for first, roles in FAMILIES.values() for index, role in enumerate(roles)
}
# Synthesizers, of which no recording is in an instrument with the role T, V, t or v.
SYNTHESIZERS = (80, 81, 82, 83, 85, *range(87, 98), 99, 100)
SPLITS = {"T": "test", "V": "valid", "t": "train", "v": "train", "p": "train"}
SELECT_SPLITS = {"t": "test", "v": "valid", "p": "train"}
PITCHES, VELOCITIES = range(40, 80), (50, 75, 100, 127)
PRETRAINING_PITCHES, PRETRAINING_VELOCITIES = range(36, 96), range(40, 128)

LANGUAGES = ["ar", "cs", "en_GB", "es", "he", "hu", "it", "nb", "nds", "nl", "pt_BR", "tn"]
SELECT_LANGUAGES = ["da", "de", "en", "fr", "lt", "ru"]
TEST_SPEAKERS, VALID_SPEAKERS = ("george", "jackson"), ("lucas",)
TRAIN_SPEAKERS, SELECT_SPEAKER = ("nicolas", "theo", "yweweler"), "yweweler"
SPEAKERS = (*TEST_SPEAKERS, *VALID_SPEAKERS, *TRAIN_SPEAKERS)


class Row(NamedTuple):
    """A file of a set; `path` is relative to the folder of all sets. A label may be empty."""

    path: str
    label: str
    split: str
    group: str


def hash_number(*parts: object) -> int:
    """A number that is a function of the parts; it replaces random draws."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8])


def pretraining_notes(seed: int) -> list[Note]:
    """60 pitches of all instruments that are in no valid or test split."""
    programs = [program for program, role in ROLES.items() if role == "p"] + [*SYNTHESIZERS]
    return [
        Note(program, pitch, _draw(PRETRAINING_VELOCITIES, seed, "pretraining", program, pitch))
        for program in sorted(programs)
        for pitch in PRETRAINING_PITCHES
    ]


def labelled_notes(seed: int) -> list[Note]:
    """40 pitches of each instrument of the twelve families, each with one of four velocities."""
    return [
        Note(program, pitch, _draw(VELOCITIES, seed, "labelled", program, pitch))
        for program in ROLES
        for pitch in PITCHES
    ]


def _draw(values: range | tuple[int, ...], *parts: object) -> int:
    return values[hash_number(*parts) % len(values)]


def gm_rows(notes: Iterable[Note], task: str, splits: Mapping[str, str]) -> list[Row]:
    """The rows of `gm_family` or `gm_pitch` (without percussive instruments)."""
    families = {
        program: family
        for family, (first, _) in FAMILIES.items()
        for program in range(first, first + 8)
    }
    return [
        Row(
            f"audio/notes/{note.name}",
            families[note.program] if task == "family" else str(note.pitch),
            splits[ROLES[note.program]],
            f"program {note.program}",
        )
        for note in notes
        if ROLES[note.program] in splits
        and (task == "family" or families[note.program] != "percussive")
    ]


def check_soundfont(samples: Mapping[int, set[str]]) -> None:
    """Refuse a soundfont in which instruments of two roles use the same recording."""
    users: dict[str, int] = {}
    for program, role in (ROLES | dict.fromkeys(SYNTHESIZERS, "p")).items():
        for sample in samples.get(program, ()):
            other = users.setdefault(sample, program)
            if ROLES.get(other, "p") != role:
                raise UserError(
                    f"programs {other} and {program} of the soundfont use the same recording, but "
                    "are in different splits; use FluidR3_GM.sf2 of fluid-soundfont-gm 3.1"
                )


def fsdd_rows(names: Iterable[str], task: str) -> list[Row]:
    """The rows of `digit`, `digit_select` or `speaker`, from DIGIT_SPEAKER_TAKE.wav."""
    rows = []
    for name in sorted(names):
        digit, speaker, number = Path(name).stem.split("_")
        take = int(number)
        if task == "speaker":
            split = "test" if take < 10 else "valid" if take < 15 else "train"
            rows.append(Row(f"audio/fsdd/{name}", speaker, split, ""))
            continue
        if task == "digit":
            held_out = dict.fromkeys(TEST_SPEAKERS, "test") | dict.fromkeys(VALID_SPEAKERS, "valid")
            split = held_out.get(speaker, "train")
        elif speaker not in TRAIN_SPEAKERS:
            continue
        elif speaker == SELECT_SPEAKER:
            split = "test" if take % 2 else "valid"
        else:
            split = "train"
        rows.append(Row(f"audio/fsdd/{name}", digit, split, speaker))
    return rows


def klettres_rows(names: Iterable[str], languages: Iterable[str], seed: int) -> list[Row]:
    """45 % of the recordings of each language for the test, 15 % for validation, by a hash."""
    rows = []
    names = sorted(names)
    for language in languages:
        own = [name for name in names if name.startswith(f"{language}/")]
        own.sort(key=lambda name: hash_number(seed, name))
        num_test, num_held = round(0.45 * len(own)), round(0.6 * len(own))
        for index, name in enumerate(own):
            split = "test" if index < num_test else "valid" if index < num_held else "train"
            rows.append(Row(f"audio/klettres/{name}", language, split, ""))
    return sorted(rows)


def assignment(rows: Iterable[Row]) -> str:
    """The checksum of names without suffixes, labels and splits."""
    return checksum("\t".join([row.path.rpartition(".")[0], *row[1:3]]) for row in rows)


def checksum(lines: Iterable[str]) -> str:
    """SHA-256 of sorted lines."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
