"""Build pretraining sets and labelled sets from real audio that Debian packages install.

    python -m benchmarks.corpora OUT [--fsdd PATH] [--only NAME ...] [--seed 0]

Pretraining sets, for `jepa-audio fit --config wavjepa --config OUT/speech.yaml`:

- `speech`: prompts, letters, words and dialogues in 18 languages
- `music`: notes of General-MIDI instruments (70 % of the clips) and tracks (30 %)
- `mixed`: half of the clips are speech, half are music

Labelled sets, for `jepa-audio probe --tasks OUT/NAME.csv`. Settings are chosen on the sets with
`_select`, results are measured on the others:

- `fsdd_digit`: ten digits. Test: the speakers george and jackson; valid: lucas; train: three others
- `fsdd_digit_select`: train: nicolas and theo; valid and test: different takes of yweweler
- `fsdd_speaker`: six speakers, split by take
- `klettres_language`, `klettres_language_select`: 12 and 6 languages, split by recording. Each
  language has one voice, so the label is also that of a voice and a microphone.
- `gm_family`, `gm_family_select`: twelve families of instruments, split by instrument
- `gm_pitch`, `gm_pitch_select`: 40 pitches of the same notes, without percussive instruments

Training and test share no recording, no instrument and, except in `fsdd_speaker` and the languages,
no speaker. Instruments with a common recording in the soundfont are never in different splits. The
pretraining sets have no recording, voice or instrument of a valid or test split of any set.

Files are links to installed files. Only notes are rendered, and FSDD is extracted from its tar.
`OUT/checksums.json` has two checksums of each set: `assignment` of names, labels and splits, and
`audio`, which includes the content of the files. `benchmarks/corpora.json` has the expected
assignments for seed 0. If sources are missing, the sets that need them are skipped, and one line
gives the command to get the sources.

| source | licence |
|---|---|
| FSDD, github.com/Jakobovski/free-spoken-digit-dataset | CC BY-SA 4.0 |
| asterisk-core-sounds-{en,es,fr}-wav | CC BY-SA 3.0 |
| asterisk-core-sounds-{it,ru}-wav | CC BY 3.0 |
| klettres-data, ktuberling-data | GPL 2 or later |
| fillets-ng-data-cs | GPL 2 or later |
| wesnoth-1.16-music | GPL 2 or later |
| asterisk-moh-opsound-wav | CC BY-SA 3.0 |
| fluid-soundfont-gm (FluidR3) | MIT |
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from benchmarks.notes import Note, read_samples, render
from benchmarks.splits import (
    LANGUAGES,
    SELECT_LANGUAGES,
    SELECT_SPLITS,
    SPEAKERS,
    SPLITS,
    Row,
    assignment,
    check_soundfont,
    checksum,
    fsdd_rows,
    gm_rows,
    klettres_rows,
    labelled_notes,
    pretraining_notes,
)

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import inspect
from jepa_audio.errors import UserError
from jepa_audio.files import read_json, write_text

EXPECTED = Path(__file__).with_suffix(".json")
SUFFIXES = (".wav", ".ogg", ".opus")
ASTERISK = tuple(
    f"asterisk-core-sounds-{language}-wav" for language in ["en", "es", "fr", "it", "ru"]
)
SPEECH = (*ASTERISK, "klettres-data", "ktuberling-data", "fillets-ng-data-cs")
TRACKS = ("wesnoth-1.16-music", "asterisk-moh-opsound-wav")
NOTES = ("fluid-soundfont-gm", "fluidsynth")
FSDD = "https://github.com/Jakobovski/free-spoken-digit-dataset"
FSDD_NAME = re.compile(r"[0-9]_[a-z]+_[0-9]+\.wav")

# Pretraining uses languages of klettres and ktuberling that are in no labelled set, also not as a
# variant (nn and nb), because a volunteer may have spoken for both packages.
PRETRAINING_LANGUAGES = {
    "klettres-data": ["ml", "uk"],
    "ktuberling-data": ["ca", "el", "fi", "ga", "gl", "ro", "sl", "sr", "sv", "uk", "wa"],
}


Audio = Mapping[str, Path]
"""The audio of a pretraining set: names in its folder, and the files that they link to."""


class MissingSourceError(UserError):
    """Packages or data that are not on this machine; the message has the command to get them."""


def installed_files(package: str) -> list[Path]:
    """The audio files and soundfonts of an installed Debian package; empty without the package."""
    if shutil.which("dpkg-query") is None:
        return []
    command = ["dpkg-query", "--listfiles", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    paths = map(Path, result.stdout.splitlines())
    return sorted(p for p in paths if p.suffix in (*SUFFIXES, ".sf2") and p.is_file())


def find_packages(packages: Iterable[str]) -> dict[str, list[Path]]:
    """The files of each package; raises `MissingSourceError` that names all missing packages."""
    files = {name: installed_files(name) for name in packages if name != "fluidsynth"}
    missing = [name for name, paths in files.items() if not paths]
    if "fluidsynth" in packages and shutil.which("fluidsynth") is None:
        missing.append("fluidsynth")
    if missing:
        raise MissingSourceError(f"apt install {' '.join(missing)}  (Debian, Ubuntu)")
    return files


def named(package: str, paths: Iterable[Path]) -> dict[str, Path]:
    """Names of the files of a package, without the folders that all of them share."""
    paths = list(paths)
    shared = os.path.commonpath([path.parent for path in paths])
    return {f"{package}/{path.relative_to(shared).as_posix()}": path for path in paths}


def speech() -> Audio:
    """Speech for pretraining; files of silence are left out."""
    audio = {}
    for package, paths in find_packages(SPEECH).items():
        languages = PRETRAINING_LANGUAGES.get(package)
        for name, path in named(package, paths).items():
            # ktuberling has variants such as sr@latin; klettres/ml/alpha/a.ogg
            language = name.split("/")[1].partition("@")[0]
            if "silence" not in name and (languages is None or language in languages):
                audio[name] = path
    return audio


def music_tracks(files: Mapping[str, list[Path]]) -> Audio:
    """Music for pretraining without the notes, from the files of packages."""
    audio = {}
    for package in TRACKS:
        audio |= {n: p for n, p in named(package, files[package]).items() if "silence" not in n}
    return audio


def find_fsdd(source: Path | None, folder: Path) -> list[str]:
    """Link or extract the recordings of FSDD to `folder`; return the names of those in the splits.

    Raises:
        MissingSourceError: without `source`.
        UserError: if it is not FSDD.
    """
    if source is None:
        remedy = f"git clone {FSDD}, then --fsdd {FSDD.rpartition('/')[2]}"
        raise MissingSourceError(remedy)
    if not source.is_dir() and not (source.is_file() and tarfile.is_tarfile(source)):
        raise UserError(f"--fsdd {source} is neither a folder nor a tar; unpack other archives")
    renew(folder)
    names = set()
    if source.is_dir():
        for path in source.rglob("*.wav"):
            if FSDD_NAME.fullmatch(path.name) and path.name not in names:
                (folder / path.name).symlink_to(path.absolute())
                names.add(path.name)
    else:
        try:
            names = _extract_fsdd(source, folder)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"--fsdd {source} is damaged ({error}); download it again") from error
    speakers = Counter(name.split("_")[1] for name in names)
    if absent := sorted(set(SPEAKERS) - set(speakers)):
        raise UserError(
            f"--fsdd {source} has no recordings of {', '.join(absent)}; it needs {FSDD}"
        )
    if others := sorted(set(speakers) - set(SPEAKERS)):
        print(f"recordings of other speakers are not used: {', '.join(others)}")
    usable = [name for name in sorted(names) if name.split("_")[1] in SPEAKERS]
    if bad := [name for name in usable if not is_readable(folder / name)]:
        print(f"{len(bad)} recordings cannot be read and are not used: {', '.join(bad)}")
    return [name for name in usable if name not in bad]


def _extract_fsdd(source: Path, folder: Path) -> set[str]:
    names = set()
    with tarfile.open(source) as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            content = tar.extractfile(member) if FSDD_NAME.fullmatch(name) else None
            if content is not None:
                (folder / name).write_bytes(content.read())
                names.add(name)
    return names


def is_readable(path: Path) -> bool:
    """Whether jepa-audio can decode a file completely."""
    try:
        inspect(path)
    except AudioReadError:
        return False
    return True


def renew(folder: Path) -> None:
    """Make an empty folder."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def file_checksum(path: Path) -> str:
    """SHA-256 of the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link_usable(audio: Audio, folder: Path) -> list[str]:
    """Replace a folder by links to files that jepa-audio can read; return their names in it.

    Copies of another file and files without samples are left out. A file that libsndfile does not
    decode completely is converted to FLAC, with the samples that libsndfile decodes. One line
    states each of these.
    """
    first: dict[str, str] = {}
    names, empty, converted = list[str](), list[str](), list[str]()
    renew(folder)
    for name, path in sorted(audio.items()):
        if first.setdefault(file_checksum(path), name) != name:
            continue
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        flac = str(Path(name).with_suffix(".flac"))
        if is_readable(path):
            link.symlink_to(path.absolute())
            names.append(name)
        elif convert(path, folder / flac):
            names.append(flac)
            converted.append(name)
        else:
            empty.append(name)
    if copies := len(audio) - len(first):
        print(f"{folder}: {copies} of {len(audio)} files are copies and are left out")
    if empty:
        print(f"{folder}: {len(empty)} files without samples are left out: {', '.join(empty)}")
    if converted:
        reason = "are converted, because libsndfile does not decode them completely"
        print(f"{folder}: {len(converted)} files {reason}: {', '.join(converted)}")
    return names


def convert(path: Path, flac: Path) -> bool:
    """Write the samples that libsndfile decodes to a FLAC file; false if there are none."""
    try:
        sf.info(path)
    except sf.LibsndfileError:
        return False
    num_frames = 0
    with (
        sf.SoundFile(path) as source,
        sf.SoundFile(flac, "w", source.samplerate, source.channels, "PCM_16") as target,
    ):
        while len(block := source.read(source.samplerate, dtype="float32")):
            target.write(np.clip(block, -1, 1))
            num_frames += len(block)
    if not num_frames:
        flac.unlink()
    return num_frames > 0


@dataclass
class Builder:
    """Builds the sets in a folder; audio that several labelled sets share is written once."""

    out: Path
    fsdd: Path | None
    seed: int

    def speech(self) -> list[Row]:
        """Links to speech in `speech/`."""
        names = link_usable(speech(), self.out / "speech")
        return [Row(f"speech/{name}", "", "train", "") for name in names]

    def music(self) -> list[Row]:
        """Rendered notes in `music/notes/`, links to tracks in `music/tracks/`."""
        files = find_packages((*NOTES, *TRACKS))
        soundfont = self._soundfont
        links = link_usable(music_tracks(files), self.out / "music" / "tracks")
        notes = self._render(soundfont, pretraining_notes(self.seed), self.out / "music" / "notes")
        names = [f"notes/{note.name}" for note in notes] + [f"tracks/{name}" for name in links]
        return [Row(f"music/{name}", "", "train", "") for name in sorted(names)]

    def labelled(self, name: str) -> list[Row]:
        """The rows of a labelled set, and its table `NAME.csv`."""
        data, _, task = name.partition("_")
        select = task.endswith("_select")
        if data == "fsdd":
            rows = fsdd_rows(self._fsdd_names, task)
        elif data == "klettres":
            languages = SELECT_LANGUAGES if select else LANGUAGES
            rows = klettres_rows(self._klettres_names, languages, self.seed)
        else:
            splits = SELECT_SPLITS if select else SPLITS
            rows = gm_rows(self._labelled_notes, task.removesuffix("_select"), splits)
        text = io.StringIO()
        columns = Row._fields if any(row.group for row in rows) else Row._fields[:-1]
        csv.writer(text, lineterminator="\n").writerows(
            [columns, *(r[: len(columns)] for r in rows)]
        )
        write_text(self.out / f"{name}.csv", text.getvalue())
        return rows

    @cached_property
    def _soundfont(self) -> Path:
        files = find_packages(NOTES)["fluid-soundfont-gm"]
        soundfont = next(path for path in files if path.name == "FluidR3_GM.sf2")
        check_soundfont(read_samples(soundfont))
        return soundfont

    @cached_property
    def _labelled_notes(self) -> list[Note]:
        folder = self.out / "audio" / "notes"
        return self._render(self._soundfont, labelled_notes(self.seed), folder)

    def _render(self, soundfont: Path, notes: list[Note], folder: Path) -> list[Note]:
        print(f"rendering {len(notes)} notes to {folder}", flush=True)
        renew(folder)
        silent = render(soundfont, notes, folder)
        if silent:
            numbers = Counter(note.program for note in silent)
            counts = ", ".join(f"{number} of program {name}" for name, number in numbers.items())
            print(f"{len(silent)} notes are silent and are left out: {counts}")
        return [note for note in notes if note not in silent]

    @cached_property
    def _klettres_names(self) -> list[str]:
        files = named("klettres", find_packages(["klettres-data"])["klettres-data"])
        audio = {name.removeprefix("klettres/"): path for name, path in files.items()}
        return link_usable(audio, self.out / "audio" / "klettres")

    @cached_property
    def _fsdd_names(self) -> list[str]:
        return find_fsdd(self.fsdd, self.out / "audio" / "fsdd")


PRETRAINING = ("speech", "music")
SETS = (
    *("fsdd_digit", "fsdd_digit_select", "fsdd_speaker"),
    *("klettres_language", "klettres_language_select"),
    *("gm_family", "gm_family_select", "gm_pitch", "gm_pitch_select"),
    *PRETRAINING,
)


def describe(name: str, rows: list[Row], out: Path) -> dict[str, object]:
    """The entry of a set in `checksums.json`: files, hours, labels in each split, checksums."""
    seconds, contents = 0.0, []
    for row in rows:
        info = sf.info(out / row.path)
        seconds += info.frames / info.samplerate
        contents.append(file_checksum(out / row.path))
    splits = Counter(row.split for row in rows)
    entry = {
        "files": len(rows),
        "hours": round(seconds / 3600, 3),
        "splits": splits,
        "labels": {split: Counter(r.label for r in rows if r.split == split) for split in splits},
        "assignment": assignment(rows),
        "audio": checksum(f"{row[:3]} {text}" for row, text in zip(rows, contents, strict=True)),
    }
    if name in PRETRAINING:
        del entry["splits"], entry["labels"]
    return entry


def shared_recordings(out: Path, sets: Mapping[str, list[Row]]) -> list[str]:
    """One line for each pair of training data and valid or test split with a common recording."""
    contents: dict[str, set[str]] = {}
    for name, rows in sets.items():
        for row in rows:
            contents.setdefault(f"{name} {row.split}", set()).add(file_checksum(out / row.path))
    lines = []
    earlier = {"train": (), "valid": ("train",), "test": ("train", "valid")}
    for held_out, recordings in contents.items():
        name, split = held_out.split()
        trained = [f"{name} {other}" for other in earlier[split]]
        if split != "train":
            trained += [f"{other} train" for other in PRETRAINING]
        numbers = {other: len(recordings & contents.get(other, set())) for other in trained}
        lines += [
            f"{n} recordings are in {held_out} and {set_}" for set_, n in numbers.items() if n
        ]
    return lines


def write_settings(out: Path, built: Iterable[str]) -> None:
    """Write `data.root` of each pretraining set as a configuration for `fit`."""
    folder = out.absolute()
    notes, music_tracks = f"{folder}/music/notes", f"{folder}/music/tracks"
    roots: dict[str, dict[str, float]] = {}
    if "speech" in built:
        roots["speech"] = {f"{folder}/speech": 1.0}
    if "music" in built:
        roots["music"] = {notes: 0.7, music_tracks: 0.3}
    if len(roots) == 2:
        roots["mixed"] = {f"{folder}/speech": 0.5, notes: 0.35, music_tracks: 0.15}
    for name, root in roots.items():
        lines = [f"    {json.dumps(path)}: {share}" for path, share in root.items()]
        write_text(out / f"{name}.yaml", "\n".join(["data:", "  root:", *lines, ""]))


def open_folder(out: Path, seed: int) -> dict[str, dict]:
    """The entries of an earlier call; raises `UserError` if the folder is of another origin."""
    file = out / "checksums.json"
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not empty and has no checksums.json; choose a new folder")
        write_text(file, json.dumps({"seed": seed, "sets": {}}))
    earlier = read_json(file)
    if not isinstance(earlier, dict) or earlier.keys() != {"seed", "sets"}:
        raise UserError(f"{file} is not a file of this command; choose a new folder")
    if earlier["seed"] != seed:
        raise UserError(f"{out} was built with --seed {earlier['seed']}; choose a new folder")
    return earlier["sets"]


def compare(sets: Mapping[str, dict], seed: int) -> None:
    """Compare the assignments with the expected ones, one line for each difference."""
    expected = read_json(EXPECTED)
    if seed != expected["seed"]:
        print(f"expected checksums exist for --seed {expected['seed']} only; nothing compared")
        return
    wrong = [name for name in sets if sets[name]["assignment"] != expected["assignment"].get(name)]
    for name in wrong:
        print(f"{name}: names, labels or splits are NOT those of {EXPECTED.name}")
    print(f"{len(sets) - len(wrong)} of {len(sets)} assignments are as expected")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the sets")
    parser.add_argument("--fsdd", type=Path, help=f"folder or tar of {FSDD}")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of velocities and of klettres' splits")
    args = parser.parse_args()
    builder = Builder(args.out, args.fsdd, args.seed)
    try:
        entries = open_folder(args.out, args.seed)
        built, skipped = build(builder, args.only)
    except UserError as error:
        print(f"corpora: {error}", file=sys.stderr)
        return 1
    entries |= {name: describe(name, rows, args.out) for name, rows in built.items()}
    write_settings(args.out, entries)
    entries = {name: entries[name] for name in SETS if name in entries}
    write_text(
        args.out / "checksums.json", json.dumps({"seed": args.seed, "sets": entries}, indent=1)
    )
    for name in built:
        print(summary(name, entries[name]))
    for line in skipped + (shared := shared_recordings(args.out, built)):
        print(line)
    compare({name: entries[name] for name in built}, args.seed)
    return int(not built or bool(shared))


def build(builder: Builder, names: Iterable[str]) -> tuple[dict[str, list[Row]], list[str]]:
    """Build sets; return their rows, and one line for each set without its sources."""
    built, skipped = {}, []
    for name in names:
        try:
            if name in PRETRAINING:
                built[name] = getattr(builder, name)()
            else:
                built[name] = builder.labelled(name)
        except MissingSourceError as error:
            skipped.append(f"{name}: skipped; {error}")
    return built, skipped


def summary(name: str, entry: Mapping[str, Any]) -> str:
    """One line on a set."""
    text = f"{name}: {entry['files']} files, {entry['hours']:.2f} h"
    if "splits" in entry:
        labels = entry["labels"]["test"]
        sizes = ", ".join(
            f"{split} {entry['splits'][split]}" for split in ("train", "valid", "test")
        )
        text += f", {len(labels)} labels ({min(labels.values())} to {max(labels.values())} in test)"
        text += f"; {sizes}"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
