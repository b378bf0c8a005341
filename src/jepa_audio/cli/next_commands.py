"""The commands that continue after a run, printed at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from jepa_audio.class_paths import trusted_modules
from jepa_audio.errors import printable
from jepa_audio.training.run.folder import LAST


def next_commands(run_dir: Path, sources: Sequence[str], modules: Sequence[str] = ()) -> str:
    """Commands for the files that a run has written; an empty text if it has written none.

    Args:
        run_dir: the folder of the run.
        sources: the sources of its corpus, as a first example of audio to encode.
        modules: modules of the user's own classes in the run, which the commands must trust.
    """
    trusted = dict.fromkeys([*trusted_modules(), *modules])
    trust = [word for module in trusted for word in ("--trust", module)]
    commands = _commands(run_dir, sources, trust)
    lines = [f"  {name:11}{printable(shlex.join(words))}" for name, words in commands]
    return "\n".join(["next:", *lines]) if lines else ""


def _commands(
    run_dir: Path, sources: Sequence[str], trust: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    folder = _short(run_dir)
    if (run_dir / "tensorboard").is_dir():
        yield "curves", ["tensorboard", "--logdir", _short(run_dir / "tensorboard")]
    if (run_dir / "metrics").is_dir():
        yield "report", ["jepa-audio", "report", folder, *trust]
    checkpoint = run_dir / "checkpoints" / LAST
    if checkpoint.is_file():
        words = ["--encoder", _short(checkpoint), "--tasks", "TASK", "--data", "DIR"]
        yield "probe", ["jepa-audio", "probe", *words, *trust]
        audio = [_short(Path(source)) if "://" not in source else source for source in sources]
        output = _short(run_dir / "embeddings.parquet")
        yield "embeddings", ["jepa-audio", "embed", folder, *audio, "-o", output, *trust]


def _short(path: Path) -> str:
    """The path from the working directory if it is below it, otherwise the absolute path."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (`Path.resolve` would follow links)
    folder = Path.cwd()
    return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)
