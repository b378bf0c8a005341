"""A corpus of sounds among which every kind of damage lies, for tests and for `benchmarks/faults.py`."""

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
    """A tone in a little noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
    return (tone + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "FLAC", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def claiming_hours(content: bytes, hours: float) -> bytes:
    """A flac whose header promises so many hours: 36 bits, 21 bytes into the file and a half."""
    promised = round(hours * 3600 * RATE)
    changed = bytearray(content)
    changed[21] = (changed[21] & 0xF0) | (promised >> 32)
    changed[22:26] = (promised & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(changed)


def spoilt(rng: np.random.Generator, value: float) -> bytes:
    samples = sound(rng)
    samples[rng.integers(len(samples))] = value
    return encoded(samples, "WAV", "FLOAT")


def cut(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


# kind of damage → suffix and content of the file, and what its reason says
LOOSE: dict[str, tuple[str, Callable[[np.random.Generator], bytes], str]] = {
    "truncated-flac": (
        ".flac",
        lambda rng: cut(encoded(sound(rng))),
        "cannot be decoded|truncated",
    ),
    "truncated-wav": (".wav", lambda rng: cut(encoded(sound(rng), "WAV")), "truncated"),
    "zero": (".mp3", lambda rng: b"", "the file is empty"),
    "junk": (".ogg", lambda rng: rng.bytes(3000), "cannot be decoded"),
    "wrong-extension": (
        ".wav",
        lambda rng: b"\x89PNG\r\n\x1a\n" + rng.bytes(900),
        "cannot be decoded",
    ),
    "nan": (".wav", lambda rng: spoilt(rng, np.nan), "non-finite"),
    "implausible": (".wav", lambda rng: spoilt(rng, 1e29), "implausible samples"),
    "one-sample": (".wav", lambda rng: encoded(sound(rng)[:1], "WAV"), "too short"),
    "200-hours": (".flac", lambda rng: claiming_hours(encoded(sound(rng)), 200), "200 hours"),
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
    """Files of which half lie by themselves and half in tars.

    Returns:
        Names of the good files as a table calls them, and the kind of damage of each bad one.
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
    return lambda rng: encoded(sound(rng), ("WAV", "FLAC")[number % 2])


def _write_tar(
    path: Path,
    name: str,
    kinds: list[str],
    rng: np.random.Generator,
    good: set[str],
    bad: dict[str, str],
) -> None:
    broken: list[int] = []
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate(kinds):
            content, facts = encoded(sound(rng)), json.dumps({"group": f"g{number}"}).encode()
            if kind == "corrupted-member":
                middle = len(content) // 2
                content = content[:middle] + bytes(200) + content[middle + 200 :]
            key = f"{kind}-{number:05}"
            named = {
                "missing-member": f"{key}.json",
                "broken-header": f"byte {archive.offset}",
            }.get(kind, f"{key}.flac")
            if kind == "good":
                good.add(f"{name}:{named}")
            else:
                bad[f"{name}:{named}"] = kind
            if kind == "broken-header":
                broken.append(archive.offset)
            for suffix, what in (
                (".flac", content),
                (".json", b'{"group": ' if kind == "bad-json" else facts),
            ):
                if not (kind == "missing-member" and suffix == ".flac"):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(what)
                    archive.addfile(info, io.BytesIO(what))
    changed = bytearray(path.read_bytes())
    for offset in broken:
        changed[offset + 20] ^= 0xFF
    path.write_bytes(changed)
