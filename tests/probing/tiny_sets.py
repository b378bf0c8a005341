"""A tiny copy of every labelled data set as downloaded; the label can be computed from the audio.

Sounds are notes (MIDI numbers) that stand for classes and tags, levels, clicks and triads; see
`oracle_encoders`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.probing.raw_sets import GENRES
from tests.probing.tiny_frame_sets import JAMS, chords1217, gtzan_rhythm
from tests.probing.tiny_sounds import (
    RATE,
    SHARPS,
    TONICS,
    key_notes,
    note,
    write,
    write_json_lines,
    write_lines,
    write_notes,
)

if TYPE_CHECKING:
    from jepa_audio.probing.rows import ProbeRow

LONG_TAKES = ("straight", "vibrato")


def gtzan(raw: Path) -> Path:
    """Nine files for each genre: four train, two val and three test."""
    for index, genre in enumerate(GENRES):
        for number in range(9):
            write_notes(raw / "genres" / genre / f"{genre}.{number:05}.wav", [60 + 3 * index])
    for name, numbers in {"train": range(4), "valid": range(4, 6), "test": range(6, 9)}.items():
        files = [f"{genre}/{genre}.{number:05}.wav" for genre in GENRES for number in numbers]
        write_lines(raw / f"{name}_filtered.txt", files)
    return raw


def names_where(wanted: Callable[[int], bool], prefix: str = "artist") -> list[str]:
    """Names of artists that the hash assigns to a split."""
    names = (f"{prefix} {''.join(chr(97 + int(digit)) for digit in str(i))}" for i in count())
    return list(
        islice((n for n in names if wanted(int(hashlib.sha1(n.encode()).hexdigest(), 16))), 6)
    )


def giantsteps(raw: Path) -> Path:
    """Each key is in 3 train, 1 val and 2 test songs; the first two test songs are long."""
    test, mtg = raw / "giantsteps-key-dataset", raw / "giantsteps-mtg-key-dataset"
    artists = {
        "train": names_where(lambda n: n % 116 < 100),
        "val": names_where(lambda n: n % 116 >= 100),
    }
    metadata, keys = ["ID\tARTIST\tSONG TITLE\tMIX\tLABEL\tGENRE"], ["ID\tMANUAL KEY\tC\tAUTO KEY"]
    for index, (tonic, mode) in enumerate(
        (tonic, mode) for mode in ("major", "minor") for tonic in range(12)
    ):
        name, notes = f"{SHARPS.get(TONICS[tonic], TONICS[tonic])} {mode}", key_notes(tonic, mode)
        for take in range(2):
            song = 1000 + 24 * take + index
            seconds = 61.0 if song < 1002 else 0.6
            write_notes(test / "audio" / f"{song}.LOFI.mp3", notes, seconds)
            (test / "annotations" / "key").mkdir(parents=True, exist_ok=True)
            (test / "annotations" / "key" / f"{song}.LOFI.key").write_text(
                f"{TONICS[tonic]} {mode}"
            )
        for take in range(4):
            song = 5000 + 24 * take + index
            write_notes(mtg / "audio" / f"{song}.LOFI.mp3", notes)
            metadata.append(f"{song}\t{artists['val' if take == 3 else 'train'][index % 6]}\tTitle")
            keys.append(f"{song}\t{name}\t2\t-")
    write_lines(mtg / "annotations" / "beatport_metadata.txt", metadata)
    write_lines(mtg / "annotations" / "annotations.txt", keys)
    return raw


def emomusic(raw: Path) -> Path:
    """Arousal is the level, valence the pitch of a tone; some songs have several windows."""
    rng = random.Random(1)
    artists = {
        "train": names_where(lambda n: n % 10 < 8),
        "val": names_where(lambda n: n % 10 >= 8),
    }
    info = [["song_id", "file_name", "Artist", "Song title", "Mediaeval 2013 set"]]
    values = [["song_id", "mean_arousal", "std_arousal", "mean_valence", "std_valence"]]
    for song in range(1, 73):
        split = "train" if song <= 36 else "val" if song <= 52 else "test"
        arousal, valence = rng.uniform(1, 9), rng.uniform(1, 9)
        artist = artists["val" if split == "val" else "train"][song % 6]
        seconds = 32.0 if song == 72 else 6.2 if song % 8 == 0 else 1.2
        info.append(
            [
                str(song),
                f"{song}.mp3",
                artist,
                "Title",
                "evaluation" if split == "test" else "development",
            ]
        )
        values.append([str(song), str(arousal), "1.0", str(valence), "1.0"])
        write(
            raw / "clips_45seconds" / f"{song}.mp3",
            10 ** (arousal / 8 - 1.4) * note(60 + 3 * valence, seconds),
        )
    for name, rows in {"songs_info.csv": info, "static_annotations.csv": values}.items():
        with (raw / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return raw


def random_tags(rng: random.Random, number: int, most: int = 3) -> list[int]:
    """Indices of random tags, in order."""
    return sorted(rng.sample(range(number), rng.randint(0, most)))


def mtt(raw: Path) -> Path:
    """Eight tags; six clips in each of sixteen folders."""
    rng = random.Random(2)
    names = [f"tag {i}" for i in range(8)]
    lines = ["\t".join(f'"{name}"' for name in ("clip_id", *names, "mp3_path"))]
    for clip in range(96):
        tags, path = random_tags(rng, 8), f"{clip % 16:x}/clip-{clip}.mp3"
        cells = (clip, *(int(i in tags) for i in range(8)), path)
        lines.append("\t".join(f'"{cell}"' for cell in cells))
        write_notes(raw / "mp3" / path, [60 + 4 * tag for tag in tags])
    write_lines(raw / "annotations_final.csv", lines)
    return raw


def nsynth(raw: Path) -> Path:
    """Twelve pitches by six families."""
    families = ("bass", "flute", "guitar", "reed", "string", "vocal")
    for split, takes in {"train": 2, "valid": 1, "test": 1}.items():
        notes = {}
        for i in range(72 * takes):
            pitch, family = 60 + i % 12, i // 12 % 6
            name = f"{families[family]}_synthetic_{i:03}-{pitch:03}-100"
            notes[name] = {
                "pitch": pitch,
                "instrument_family_str": families[family],
                "instrument_family": family,
            }
            write_notes(raw / f"nsynth-{split}" / "audio" / f"{name}.wav", [pitch, 76 + 3 * family])
        write_lines(raw / f"nsynth-{split}" / "examples.json", [json.dumps(notes)])
    return raw


def vocalset(raw: Path) -> Path:
    """20 singers by 10 techniques; long recordings have a second, short window."""
    techniques = (
        *LONG_TAKES,
        "belt",
        "breathy",
        "inhaled",
        "lip_trill",
        "spoken",
        "trill",
        "trillo",
        "vocal_fry",
    )
    singers = [*(("female", i) for i in range(1, 10)), *(("male", i) for i in range(1, 12))]
    voices = product(
        range(58, 68, 2), range(70, 78, 2)
    )  # two notes each, none of which is one singer's alone
    for (sex, number), voice in zip(singers, voices, strict=True):
        for (other, technique), vowel in product(enumerate(techniques), "ae"):
            path = raw / "FULL" / f"{sex}{number}" / "scales" / technique
            seconds = 4.1 if technique in LONG_TAKES and vowel == "a" else 0.6
            write_notes(
                path / f"{sex[0]}{number}_scales_{technique}_{vowel}.wav",
                [*voice, 80 + other],
                seconds,
            )
    return raw


def mtg(raw: Path) -> Path:
    """Tags of three kinds, the first two of each in the top 50; the first test track has 62 s."""
    rng = random.Random(3)
    kinds = {"genre": "genre", "instrument": "instrument", "moodtheme": "mood/theme"}
    lowest = {"genre": 58, "instrument": 68, "moodtheme": 78}
    head = "\t".join(("TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"))
    number = 0
    for split, size in {"train": 64, "validation": 24, "test": 36}.items():
        tables: dict[str, list[str]] = {name: [head] for name in ("top50tags", *kinds)}
        for take in range(size):
            number += 1
            path, notes, top = f"{number % 100:02}/{number}.mp3", [], []
            for kind, prefix in kinds.items():
                tags = random_tags(rng, 4, most=2)
                notes += [lowest[kind] + 2 * tag for tag in tags]
                names = [f"{prefix}---{kind}{tag}" for tag in tags]
                top += [name for name, tag in zip(names, tags, strict=True) if tag < 2]
                add_track(tables[kind], number, path, names)
            add_track(tables["top50tags"], number, path, top)
            long = split == "test" and not take
            write_notes(
                raw / "audio-low" / path.replace(".mp3", ".low.mp3"), notes, 62.0 if long else 0.6
            )
        for name, lines in tables.items():
            write_lines(
                raw / "data" / "splits" / "split-0" / f"autotagging_{name}-{split}.tsv", lines
            )
    return raw


def add_track(table: list[str], number: int, path: str, tags: Sequence[str]) -> None:
    """Add a line to a table if the track has a tag: the real tables have no other tracks."""
    if tags:
        cells = (
            f"track_{number:07}",
            f"artist_{number:06}",
            f"album_{number:06}",
            path,
            "100.0",
            *tags,
        )
        table.append("\t".join(cells))


def hooktheory(raw: Path) -> Path:
    """Hooks of 24 keys and seven sections; two hooks of each song are of different keys."""
    sections = (["intro"], ["verse"], ["pre-chorus"], ["chorus"], ["bridge"], ["outro"], ["solo"])
    keys = [(tonic, mode) for mode in ("major", "minor") for tonic in range(12)]
    folder = raw / "data" / "HookTheory"
    for split, takes in {"train": 3, "val": 1, "test": 2}.items():
        of_key, of_section = [], []
        for i in range(24 * takes):
            tonic, mode = keys[i % 24]
            section, name = i % 7, f"{split}{i:03}"
            path = f"data/HookTheory/hooktheory_clips/{name}.mp3"
            write_notes(raw / path, [*key_notes(tonic, mode), 88 + section])
            record = {
                "audio_path": path,
                "ori_uid": f"song-{split}-{i // 2}",
                "sample_rate": RATE,
                "channels": 1,
            }
            of_key.append({**record, "label": f"{TONICS[tonic]} {mode}"})
            of_section.append(
                {**record, "label": sections[section], "segment_start": 40.0, "segment_end": 40.6}
            )
        write_json_lines(folder / f"HookTheoryKey.{split}.jsonl", of_key)
        write_json_lines(folder / f"HookTheoryStructure.{split}.jsonl", of_section)
    return raw


@dataclass(frozen=True)
class TinySet:
    """A data set, and the expected results of a probe on it.

    Attributes:
        build: function that writes the data set below a folder.
        oracle: function of `oracle_encoders` that encodes its labels.
        num_test: scored units of the test split, by task.
        annotations: a file or folder that the probe needs; `{stem}` is that of the task.
        audio: a sound of the test split; "" if the files in the folders define the data set.
        root: folder that a user gives, relative to the folder of the data set.
    """

    build: Callable[[Path], Path]
    oracle: str
    num_test: dict[str, int]
    annotations: str
    audio: str
    root: str = "."


SETS = (
    TinySet(
        gtzan, "spectrum", {"gtzan_genre": 30}, "test_filtered.txt", "genres/pop/pop.00007.wav"
    ),
    TinySet(
        giantsteps,
        "spectrum",
        {"giantsteps_key": 48},
        "giantsteps-mtg-key-dataset/annotations/annotations.txt",
        "giantsteps-key-dataset/audio/1005.LOFI.mp3",
    ),
    TinySet(
        emomusic, "loudness", {"emomusic": 20}, "static_annotations.csv", "clips_45seconds/60.mp3"
    ),
    TinySet(mtt, "spectrum", {"mtt": 18}, "annotations_final.csv", "mp3/e/clip-14.mp3"),
    TinySet(
        nsynth,
        "spectrum",
        {"nsynth_pitch": 72, "nsynth_instrument": 72},
        "nsynth-valid/examples.json",
        "nsynth-test/audio/bass_synthetic_000-060-100.wav",
    ),
    # The hash assigns 87 recordings to the test split of the singers; 10 of them have two windows.
    TinySet(vocalset, "spectrum", {"vocalset_singer": 97, "vocalset_technique": 100}, "FULL", ""),
    TinySet(
        mtg,
        "spectrum",
        {"mtg_top50": 32, "mtg_genre": 25, "mtg_instrument": 24, "mtg_mood": 30},
        "data/splits/split-0/autotagging_genre-test.tsv",
        "audio-low/02/102.low.mp3",
    ),
    TinySet(
        hooktheory,
        "spectrum",
        {"hooktheory_key": 48, "hooktheory_structure": 48},
        "data/{stem}.val.jsonl",
        "data/HookTheory/hooktheory_clips/test007.mp3",
        root="data",
    ),
    TinySet(
        gtzan_rhythm,
        "onsets",
        {"gtzan_beat": 3},
        f"{JAMS}/pop.00007.wav.jams",
        "genres/pop/pop.00007.wav",
    ),
    TinySet(
        chords1217,
        "triads",
        {"chords1217": 3},
        "data/{stem}.test.jsonl",
        "data/Chords1217/audio/8.flac",
        root="data",
    ),
)
"""Every data set."""

SET_OF = {task: tiny for tiny in SETS for task in tiny.num_test}
"""Data sets by task."""


class Probed(NamedTuple):
    """The results of encoders on a data set.

    Attributes:
        root: folder of the data.
        output: folder of the results.
        rows: as `probe` returns them.
    """

    root: Path
    output: Path
    rows: list[ProbeRow]


def rows_of(rows: Sequence[ProbeRow], task: str, encoder: str) -> list[ProbeRow]:
    """Results of one encoder on one task."""
    return [row for row in rows if (row.task, row.encoder) == (task, encoder)]
