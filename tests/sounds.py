"""Audio files with known samples, single or in tars, for the tests of corpora."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile as sf

from jepa_audio.data.corpus.table import SCHEMA, Corpus

RATE = 8000
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@functools.cache
def noise(number: int) -> np.ndarray:
    """16-bit noise, seeded by `number`, which also determines the length."""
    return np.random.default_rng(number).integers(-9000, 9000, 300 + 20 * number, dtype=np.int16)


@functools.cache
def audio(number: int, kind: str = "WAV") -> bytes:
    """The content of an audio file with `noise(number)`."""
    buffer = io.BytesIO()
    sf.write(buffer, noise(number), RATE, subtype="PCM_16", format=kind)
    return buffer.getvalue()


def write(path: Path, content: bytes | None = None) -> Path:
    """Write a file, by default the audio file number 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(audio(0) if content is None else content)
    return path


def tar(path: Path, files: dict[str, bytes], kind: str = "ustar") -> Path:
    """Write a tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(count: int, prefix: str = "") -> dict[str, bytes]:
    """The files of a WebDataset tar: audio files 0, 1, ..., each one in a separate group."""
    files = {}
    for number in range(count):
        files[f"{prefix}{number}.wav"] = audio(number)
        files[f"{prefix}{number}.json"] = json.dumps(
            {"group": f"g{number}", "split": "val"}
        ).encode()
    return files


def make_corpus(names: list[str], **columns: list[object]) -> Corpus:
    """A corpus of files that do not exist; by default they are readable and 1 s long."""
    defaults: dict[str, object] = {
        "num_bytes": 16_044,
        "num_frames": 8000,
        "sample_rate": 8000,
        "num_channels": 1,
        "status": "ok",
        "rms": 0.1,
        "peak": 0.5,
    }
    rows = [
        {
            field.name: defaults.get(field.name, "" if field.type == pa.string() else 0)
            for field in SCHEMA
        }
        for _ in names
    ]
    for name, values in {"source": names, **columns}.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Corpus(Path("/nowhere"), pa.Table.from_pylist(rows, schema=SCHEMA))
