"""Tiny copies of the data sets with labels in time: beats and chords."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.probing.raw_sets import GENRES
from tests.probing.tiny_sounds import RATE, TONICS, note, write, write_json_lines, write_lines

JAMS = "GTZAN-Rhythm_v2_ismir2015_lbd/jams"


def gtzan_rhythm(raw: Path) -> Path:
    """5, 2 and 3 tracks of clicks at 80 to 120 BPM; every fourth beat has two tones."""
    rng = random.Random(0)
    sizes = {"train": 5, "valid": 2, "test": 3}
    for genre in GENRES:
        (raw / "genres" / genre).mkdir(parents=True)
    number = 0
    for name, size in sizes.items():
        files = []
        for _ in range(size):
            stem = f"{GENRES[number % 10]}.{number:05}"
            seconds = 10.8 if name == "test" else 6.0  # more or less than one window
            write_rhythm(
                raw,
                stem,
                seconds,
                60 / rng.uniform(80, 120),
                rng.uniform(0.1, 0.5),
                rng.randrange(4),
            )
            files.append(f"{stem.partition('.')[0]}/{stem}.wav")
            number += 1
        write_lines(raw / f"{name}_filtered.txt", files)
    return raw


def write_rhythm(
    raw: Path, stem: str, seconds: float, period: float, first: float, upbeats: int
) -> None:
    """Write one track and its annotation."""
    beats = np.arange(first, seconds - 0.1, period)
    downbeats = beats[upbeats::4]
    wave, click = np.zeros(round(seconds * RATE)), np.hanning(120)
    time = np.arange(120) / RATE
    for hz, events in {1000: beats, 2500: downbeats}.items():
        for event in events:
            start = round(event * RATE)
            wave[start : start + 120] += 0.4 * click * np.sin(2 * np.pi * hz * time)
    write(raw / "genres" / stem.partition(".")[0] / f"{stem}.wav", wave)
    annotations = [
        {
            "namespace": "beat",
            "sandbox": {"annotation_type": kind},
            "data": [
                {"time": float(event), "duration": 0.0, "value": 1, "confidence": None}
                for event in events
            ],
        }
        for kind, events in {"beat": beats, "downbeat": downbeats}.items()
    ]
    write_lines(
        raw / JAMS / f"{stem}.wav.jams",
        [json.dumps({"annotations": annotations, "file_metadata": {}})],
    )


def chords1217(raw: Path) -> Path:
    """Songs of 33 chords of 1.5 s; a fifth of the time has no chord, also at the ends."""
    rng = random.Random(4)
    folder, number = raw / "data" / "Chords1217", 0
    for split, size in {"train": 4, "val": 2, "test": 3}.items():
        records = []
        for _ in range(size):
            number += 1
            path = f"data/Chords1217/audio/{number}.flac"
            records.append(
                {"audio_path": path, "label": write_song(raw / path, rng), "sample_rate": RATE}
            )
        write_json_lines(folder / f"Chords1217.{split}.jsonl", records)
    return raw


def write_song(path: Path, rng: random.Random, seconds: float = 1.5) -> list[dict[str, Any]]:
    """Write a song of all triads, no-chords and a chord of no class; return its annotation."""
    triads = [(root, mode) for root in range(12) for mode in ("maj", "min")]
    chords = [*triads, *[(None, "N")] * 6, (3, "sus4")]
    rng.shuffle(chords)
    chords = [(None, "N"), *chords, (None, "N")]
    parts, label = [], []
    for index, (root, mode) in enumerate(chords):
        third = {"maj": 4, "min": 3, "sus4": 5, "N": 0}[mode]
        notes = [] if root is None else [60 + (root + up) % 12 for up in (0, third, 7)]
        parts.append(
            0.1 * sum((note(number, seconds) for number in notes), np.zeros(round(seconds * RATE)))
        )
        name = (
            "N"
            if root is None
            else f"{TONICS[root]}:{rng.choice(('min', 'min7')) if mode == 'min' else mode}"
        )
        label.append(
            {"start_time": index * seconds, "end_time": (index + 1) * seconds, "chord_str": name}
        )
    write(path, np.concatenate(parts))
    return label
