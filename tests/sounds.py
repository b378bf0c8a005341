"""Files of known sound, by themselves and in tars, for the tests of what a corpus is made of."""

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
    """16-bit samples of the sound of this number; each has a length of its own."""
    return np.random.default_rng(number).integers(-9000, 9000, 300 + 20 * number, dtype=np.int16)


@functools.cache
def audio(number: int, kind: str = "WAV") -> bytes:
    """The sound as a file."""
    buffer = io.BytesIO()
    sf.write(buffer, noise(number), RATE, subtype="PCM_16", format=kind)
    return buffer.getvalue()


def write(path: Path, content: bytes | None = None) -> Path:
    """A file, of sound 0 unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(audio(0) if content is None else content)
    return path


def tar(path: Path, files: dict[str, bytes], kind: str = "ustar") -> Path:
    """A tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(count: int, prefix: str = "") -> dict[str, bytes]:
    """Files of a tar in WebDataset's layout: the sounds 0, 1, ..., each with a group of its own."""
    files = {}
    for number in range(count):
        files[f"{prefix}{number}.wav"] = audio(number)
        files[f"{prefix}{number}.json"] = json.dumps(
            {"group": f"g{number}", "split": "val"}
        ).encode()
    return files


def made_up(names: list[str], **columns: list[object]) -> Corpus:
    """A corpus of files that do not exist: usable ones of a second each, unless told otherwise."""
    facts: dict[str, object] = {
        "num_bytes": 16_044,
        "num_frames": 8000,
        "sample_rate": 8000,
        "num_channels": 1,
    }
    facts |= {"status": "ok", "rms": 0.1, "peak": 0.5}
    rows = [
        {
            field.name: facts.get(field.name, "" if field.type == pa.string() else 0)
            for field in SCHEMA
        }
        for _ in names
    ]
    for name, values in {"source": names, **columns}.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Corpus(Path("/nowhere"), pa.Table.from_pylist(rows, schema=SCHEMA))
