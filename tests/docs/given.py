"""What exists before the first block of a page: small audio, labels, runs. Made once a session."""

from __future__ import annotations

import csv
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import soundfile

from tests.docs.commands import run_command
from tests.docs.pages import ROOT
from tests.interop.marble_task import MARBLE_TASK

Kinds = dict[str, Callable[[Path], None]]


class Given:
    """Makes the files of the kinds that pages name; audio and runs are made once.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, name: str, kind: str, page: Path) -> None:
        """Make the file or folder `name` of a kind in the folder of a page.

        Kinds: `corpus` (synthetic notes in NSynth's layout), `audio` (a folder of 24 of them),
        `tars` (the same as four tars), `wav`, `mp3`, `flac` (one file), `labels` (a table of 48
        notes, and their folder `notes/`), `run:RECIPE` (a run of two steps on the notes),
        `wavjepa_hub` (a small model in the published layout), `layer` (a YAML file that changes
        nothing), `marble` (a task of MARBLE v2).
        """
        target = page / name
        target.parent.mkdir(parents=True, exist_ok=True)
        what, _, recipe = kind.partition(":")
        if what == "corpus":
            shutil.copytree(self.corpus(), target)
        elif what == "audio":
            target.mkdir()
            for path in self.notes()[:24]:
                shutil.copy(path, target)
        elif what in ("wav", "mp3", "flac"):
            number = sum(path.is_file() for path in page.iterdir())
            samples, rate = soundfile.read(self.notes()[number])
            soundfile.write(target, samples, rate)
        elif what == "tars":
            self.tars(target)
        elif what == "layer":
            target.write_text("seed_everything: 0\n")
        elif what == "marble":
            target.write_text(MARBLE_TASK)
        elif what == "wavjepa_hub":
            shutil.copytree(ROOT / "tests" / "data" / "wavjepa_hub", target)
        elif what == "labels":
            self.labels(target)
        elif what == "run":
            shutil.copytree(self.run(recipe), target)
        else:
            raise AssertionError(f"`given: {name}={kind}`: no such kind")

    def corpus(self) -> Path:
        corpus = self.folder / "corpus"
        if not corpus.exists():
            run_command(f"jepa-audio data synth {corpus}", self.folder)
        return corpus

    def notes(self) -> list[Path]:
        return sorted((self.corpus() / "nsynth-train").rglob("*.wav"))

    def run(self, recipe: str) -> Path:
        run_dir = self.folder / "runs" / recipe
        if not run_dir.exists():
            root = self.corpus() / "nsynth-train"
            settings = f"--config {recipe} --data.root {root} --run_dir {run_dir}"
            run_command(f"jepa-audio fit {settings}", self.folder)
        return run_dir

    def tars(self, folder: Path) -> None:
        """Four tars of six notes each, 0000.tar to 0003.tar."""
        folder.mkdir()
        for number in range(4):
            with tarfile.open(folder / f"{number:04}.tar", "w") as tar:
                for path in self.notes()[number * 6 : number * 6 + 6]:
                    tar.add(path, path.name)

    def labels(self, table: Path) -> None:
        """A table of 48 notes in the folder `notes/`: the label is the family of the instrument.

        The columns are path, label, split and group (the instrument).
        """
        folder = table.parent / "notes"
        folder.mkdir(exist_ok=True)
        splits = {"train": ("train", 24), "valid": ("valid", 12), "test": ("test", 12)}
        rows = []
        for split, (name, count) in splits.items():
            paths = sorted((self.corpus() / f"nsynth-{split}").rglob("*.wav"))
            # Files in the order of their numbers in all families, so that each has all families.
            paths = sorted(paths, key=lambda path: path.stem.split("_", 1)[1])[:count]
            for path in paths:
                shutil.copy(path, folder)
                label = path.stem.partition("_")[0]
                group = path.stem.partition("-")[0]
                rows.append((f"notes/{path.name}", label, name, group))
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split", "group"), *rows])
