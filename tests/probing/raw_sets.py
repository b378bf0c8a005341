"""Tiny copies of data sets as downloaded and unpacked, for the tests of the converters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import soundfile as sf

RATE = 16_000
GENRES = (
    "blues",
    "classical",
    "country",
    "disco",
    "hiphop",
    "jazz",
    "metal",
    "pop",
    "reggae",
    "rock",
)


def sound(path: Path, seconds: float = 0.2) -> Path:
    """Write a sine in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    sf.write(path, wave, RATE)
    return path


def text(path: Path, *lines: str) -> Path:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def gtzan(raw: Path, folder: str = "genres", suffix: str = ".wav") -> Path:
    """Three files for each genre, one in each split, with the lists of the splits."""
    for genre in GENRES:
        for number in range(3):
            sound(raw / folder / genre / f"{genre}.{number:05}{suffix}")
    for number, name in enumerate(("train", "valid", "test")):
        text(
            raw / f"{name}_filtered.txt", *(f"{genre}/{genre}.{number:05}.wav" for genre in GENRES)
        )
    return raw


def artists(part_of_val: bool) -> Iterator[str]:
    """Names of artists that the hash assigns to train or val."""
    for number in count():
        name = f"Artist {number}"
        if (int(hashlib.sha1(name.lower().encode()).hexdigest(), 16) % 116 >= 100) == part_of_val:
            yield name


def giantsteps(raw: Path) -> Path:
    """Four test songs and ten others; two of these are uncertain, and two have two keys."""
    test, mtg = raw / "giantsteps-key-dataset", raw / "giantsteps-mtg-key-dataset"
    for number, key in {
        10089: "D# minor",
        1234749: "Bb major",
        61415: "f minor",
        877345: "Eb major\n",
    }.items():
        text(test / "annotations" / "key" / f"{number}.LOFI.key").write_text(key)
        sound(test / "audio" / f"{number}.LOFI.mp3")
    one, two, three, four = islice(artists(part_of_val=False), 4)
    valid = next(artists(part_of_val=True))
    songs = {
        5061: (f"{two}, {one}", "D# minor", "2"),  # moved in the second pass only, by 7217
        5881: (three, "A major ", "2"),
        7217: (f"{one},{valid}", "F minor", "2"),
        10359: (four, "C# major", "2"),
        10981: (four, "-", "0"),
        16484: (three, "A minor", "1"),
        61578: (three, "C minor / F# minor", "2"),
        515806: (three, "F / F# minor", "2"),
        6574410: (valid, "B major", "2"),
        20: (two, "G minor", "2"),
    }
    heads = "ID\tARTIST\tSONG TITLE\tMIX\tLABEL"
    text(
        mtg / "annotations" / "beatport_metadata.txt",
        heads,
        *(f"{n}\t{s[0]}\tSong\tMix" for n, s in songs.items()),
    )
    lines = (f"{n}\t{key}\t{sure}" for n, (_, key, sure) in songs.items())
    text(mtg / "annotations" / "annotations.txt", "ID\tMANUAL KEY\tC", *lines)
    for number, (_, _, sure) in songs.items():
        if sure == "2":
            sound(mtg / "audio" / f"{number}.LOFI.mp3")
    return raw


def emomusic(raw: Path, folder: str = "") -> Path:
    """Twelve songs; the last three are in the evaluation set."""
    heads = "song_id,file_name,Artist,Song title,start of the segment (min.sec),Genre,"
    info, annotated = (
        [heads + "Mediaeval 2013 set"],
        ["song_id,mean_arousal,std_arousal,mean_valence,std_valence"],
    )
    for song in range(2, 14):
        name = "evaluation" if song > 10 else "development"
        info.append(
            f'{song},{song}.mp3,"The Käse  Band {chr(64 + song)}\t",A title ,0.05,Blues,{name}'
        )
        annotated.append(f"{song},{3 + song % 5},1.5,{8 - song / 3},1.2")
        sound(raw / "clips_45seconds" / f"{song}.mp3")
    text(raw / folder / "songs_info.csv", *info)
    text(raw / folder / "static_annotations.csv", *annotated)
    return raw


def mtt(raw: Path) -> Path:
    """64 clips; tag n of 60 is on the first 60 - n clips, tag 50 is as frequent as tag 49."""
    rare = {60: 50, 61: 57, 62: 58, 63: 59}
    tags = [f"tag {n}" for n in range(60)]
    lines = ["\t".join(f'"{name}"' for name in ("clip_id", *tags, "mp3_path"))]
    for clip in range(64):
        on = [clip + n < 60 or rare.get(clip) == n for n in range(60)]
        path = f"{clip % 16:x}/song-{clip}.mp3"
        lines.append("\t".join(f'"{cell}"' for cell in (clip + 2, *map(int, on), path)))
        sound(raw / "mp3" / path, 0.1)
    (raw / "mp3" / "6" / "song-22.mp3").write_bytes(b"")
    text(raw / "annotations_final.csv", *lines)
    return raw
