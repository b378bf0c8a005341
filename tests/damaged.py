"""A corpus with every kind of damaged file, for tests and for `benchmarks/faults.py`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile as sf

RATE = 8000
PER_TAR = 50


def sound(rng: np.random.Generator, seconds: float = 0.6) -> np.ndarray:
    """A tone with low noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
    return (tone + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def encode(samples: np.ndarray, kind: str = "FLAC", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def declare_hours(content: bytes, hours: float) -> bytes:
    """Change the header of a flac file so that it declares a duration of `hours`.

    The number of samples has 36 bits and starts in the middle of byte 21.
    """
    num_samples = round(hours * 3600 * RATE)
    changed = bytearray(content)
    changed[21] = (changed[21] & 0xF0) | (num_samples >> 32)
    changed[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(changed)


def encode_with_sample(rng: np.random.Generator, value: float) -> bytes:
    """A wav file in which one sample has this value."""
    samples = sound(rng)
    samples[rng.integers(len(samples))] = value
    return encode(samples, "WAV", "FLOAT")


def truncate(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


# Kind of damage → suffix of the file, its content, and a pattern of the reported reason.
LOOSE: dict[str, tuple[str, Callable[[np.random.Generator], bytes], str]] = {
    "truncated-flac": (
        ".flac",
        lambda rng: truncate(encode(sound(rng))),
        "cannot be decoded|truncated",
    ),
    "truncated-wav": (".wav", lambda rng: truncate(encode(sound(rng), "WAV")), "truncated"),
    "zero": (".mp3", lambda rng: b"", "the file is empty"),
    "junk": (".ogg", lambda rng: rng.bytes(3000), "cannot be decoded"),
    "wrong-extension": (
        ".wav",
        lambda rng: b"\x89PNG\r\n\x1a\n" + rng.bytes(900),
        "cannot be decoded",
    ),
    "nan": (".wav", lambda rng: encode_with_sample(rng, np.nan), "non-finite"),
    "implausible": (".wav", lambda rng: encode_with_sample(rng, 1e29), "implausible samples"),
    "one-sample": (".wav", lambda rng: encode(sound(rng)[:1], "WAV"), "too short"),
    "200-hours": (".flac", lambda rng: declare_hours(encode(sound(rng)), 200), "the header gives"),
}
IN_TAR = {
    "corrupted-member": "cannot be decoded|truncated",
    "missing-member": "no audio file of this name",
    "bad-json": "not JSON",
    "broken-header": "broken header",
}
REASONS = {kind: reason for kind, (_, _, reason) in LOOSE.items()} | IN_TAR


def write_damaged_corpus(
    root: Path, num_good: int, num_bad: int, seed: int = 0
) -> tuple[set[str], dict[str, str]]:
    """Write good and damaged files: half of the good files are single, half are in tars.

    Returns:
        The names of the good files in the corpus table, and name → kind of damage of the others.
    """
    rng = np.random.default_rng(seed)
    kinds = [[*LOOSE, *IN_TAR][number % (len(LOOSE) + len(IN_TAR))] for number in range(num_bad)]
    loose = [kind for kind in kinds if kind in LOOSE] + ["good"] * (num_good // 2)
    in_tar = [kind for kind in kinds if kind in IN_TAR] + ["good"] * (num_good - num_good // 2)
    rng.shuffle(loose)
    rng.shuffle(in_tar)
    good: set[str] = set()
    bad: dict[str, str] = {}
    for number, kind in enumerate(loose):
        suffix, make, _ = LOOSE.get(kind, ((".wav", ".flac")[number % 2], _good_file(number), ""))
        name = f"loose/{number % 7}/{kind}-{number:05}{suffix}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make(rng))
        if kind == "good":
            good.add(name)
        else:
            bad[name] = kind
    (root / "shards").mkdir(parents=True)
    for first in range(0, len(in_tar), PER_TAR):
        name = f"shards/{first // PER_TAR:03}.tar"
        _write_tar(root / name, name, in_tar[first : first + PER_TAR], rng, good, bad)
    return good, bad


def _good_file(number: int) -> Callable[[np.random.Generator], bytes]:
    return lambda rng: encode(sound(rng), ("WAV", "FLAC")[number % 2])


def _write_tar(
    path: Path,
    name: str,
    kinds: list[str],
    rng: np.random.Generator,
    good: set[str],
    bad: dict[str, str],
) -> None:
    broken_headers: list[int] = []
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate(kinds):
            content, labels = encode(sound(rng)), json.dumps({"group": f"g{number}"}).encode()
            if kind == "corrupted-member":
                middle = len(content) // 2
                content = content[:middle] + bytes(200) + content[middle + 200 :]
            key = f"{kind}-{number:05}"
            member = {
                "missing-member": f"{key}.json",
                "broken-header": f"byte {archive.offset}",
            }.get(kind, f"{key}.flac")
            if kind == "good":
                good.add(f"{name}:{member}")
            else:
                bad[f"{name}:{member}"] = kind
            if kind == "broken-header":
                broken_headers.append(archive.offset)
            for suffix, data in (
                (".flac", content),
                (".json", b'{"group": ' if kind == "bad-json" else labels),
            ):
                if not (kind == "missing-member" and suffix == ".flac"):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    changed = bytearray(path.read_bytes())
    for offset in broken_headers:
        changed[offset + 20] ^= 0xFF
    path.write_bytes(changed)
