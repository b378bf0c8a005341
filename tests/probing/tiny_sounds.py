"""Sounds from which labels can be computed: notes, and files with noise; and text files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

RATE = 8000
TONICS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
SHARPS = {"Db": "C#", "Eb": "D#", "Gb": "F#", "Ab": "G#", "Bb": "A#"}
CARRIER = 98  # in every sound, so that a sound without tags is not silent


def note(number: float, seconds: float) -> np.ndarray:
    """A sine."""
    return np.sin(
        2 * np.pi * 440 * 2 ** ((number - 69) / 12) * np.arange(round(seconds * RATE)) / RATE
    )


def write(path: Path, wave: np.ndarray) -> Path:
    """Write a sound with noise of random level, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    noise = 10 ** rng.uniform(-4, -1.7) * rng.standard_normal(len(wave))
    sf.write(path, wave + noise, RATE)
    return path


def write_notes(path: Path, notes: Sequence[int], seconds: float = 0.6, level: float = 0.3) -> Path:
    """Write simultaneous notes and the carrier."""
    chord = sum(note(number, seconds) for number in (CARRIER, *notes))
    return write(path, level * chord / (1 + len(notes)))


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write MARBLE's records."""
    return write_lines(path, [json.dumps(record) for record in records])


def key_notes(tonic: int, mode: str) -> list[int]:
    """The tonic, and the third in the octave above."""
    return [60 + tonic, 72 + tonic + (4 if mode == "major" else 3)]
