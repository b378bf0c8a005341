"""Facts about training runs for lists and comparisons, read from the folders of the runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from jepa_audio.class_paths import parse_yaml
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.old_paths import with_current_paths
from jepa_audio.recipes import recipes
from jepa_audio.report.results import read_results
from jepa_audio.report.run_scores import RunResults, RunScore, best_scores, results_of_runs
from jepa_audio.report.runs import Run, read_run
from jepa_audio.training.run.folder import CONFIG_HEADER, LAST, RunFolder
from jepa_audio.training.run.load import read_checkpoint
from jepa_audio.training.run.resume import LINKED, OF_A_START

# A run with fewer equal settings than this share of a recipe's has no recipe.
_MIN_EQUAL_SHARE = 0.6


@dataclass(frozen=True)
class Recipe:
    """The recipe of this version that is most similar to the settings of a run.

    Attributes:
        name: name of the recipe.
        changed: settings of the recipe that the run does not have.
    """

    name: str
    changed: list[str]

    def __str__(self) -> str:
        return f"{self.name}, {len(self.changed)} changed" if self.changed else self.name


@dataclass(frozen=True)
class RunFacts:
    """What the folder of a run contains; missing numbers are NaN or `None`.

    Attributes:
        label: path relative to the folder that was searched; the whole path if two are equal.
        state: "running", "finished", "stopped" (a run that can continue) or "not started".
        holder: the process of a running run.
        step: optimizer steps of the newest checkpoint or, if more, of the logs.
        metrics: the last finite value of each metric key.
        scores: for each probing task, see `RunScore`; tasks in the order of their names.
        settings: see `flatten`.
        problems: what is damaged or missing, each with its file.
    """

    label: str
    folder: Path
    state: str
    holder: str | None
    recipe: Recipe | None
    step: int
    max_steps: int | None
    written: datetime | None
    metrics: Mapping[str, float]
    scores: Mapping[str, RunScore]
    settings: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)


def read_facts(
    directories: Sequence[Path], result_files: Sequence[Path] = ()
) -> tuple[list[RunFacts], list[str]]:
    """The runs in some folders and their subfolders, sorted by path; and problems of other files.

    Args:
        directories: runs, or folders that contain runs.
        result_files: files of probe results outside of these folders.

    Raises:
        UserError: if a folder is missing, or none contains a run.
    """
    runs: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise MissingFileError(f"no folder at {directory}: give a run, or a folder with runs")
        found, results = _search(directory)
        runs |= dict.fromkeys(found, directory)
        result_files = [*result_files, *results]
    if not runs:
        raise UserError(
            f"no run in {', '.join(map(str, directories))}: give the folder above the `--run_dir` "
            "of `jepa-audio fit`"
        )
    table, problems = _read_results(list(dict.fromkeys(result_files)))
    read = [read_run(folder, directory) for folder, directory in sorted(runs.items())]
    own = results_of_runs(read, table)
    facts = [_read(run, own[run.folder]) for run in read]
    if len({run.label for run in facts}) < len(facts):
        facts = [replace(run, label=str(run.folder)) for run in facts]
    return facts, problems


def _search(directory: Path) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and the files of probe results."""
    folders: list[Path] = []
    results: list[Path] = []
    for name, children, files in os.walk(directory):
        folder = Path(name)
        if "results.jsonl" in files:
            results.append(folder / "results.jsonl")
        if _is_run(folder, files):
            folders.append(folder)
            children[:] = [c for c in children if c not in ("checkpoints", "metrics")]
    return folders, results


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    if "metrics.csv" in files or any(folder.glob("metrics/version_*")):
        return True
    if any(folder.glob("checkpoints/*.ckpt")):
        return True
    if "config.yaml" not in files:
        return False
    with (folder / "config.yaml").open("rb") as file:
        return file.read(len(CONFIG_HEADER)) == CONFIG_HEADER.encode()


def _read(run: Run, results: RunResults) -> RunFacts:
    folder, problems = run.folder, list(run.damage)
    if results.problem:
        problems.append(results.problem)
    settings, recipe = _read_settings(folder / "config.yaml", problems)
    saved = _read_step(folder / "checkpoints" / LAST, problems)
    step = max(saved or 0, run.last_step)
    max_steps = settings.get("trainer.max_steps")
    max_steps = max_steps if isinstance(max_steps, int) else None
    holder = RunFolder(folder).holder
    if holder is not None:
        state = "running"
    elif max_steps is not None and step >= max_steps:
        state = "finished"
    else:
        state = "not started" if saved is None and not run.curves else "stopped"
    paths = [*run.metric_files, folder / "config.yaml", folder / "checkpoints" / LAST]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return RunFacts(
        label=run.label,
        folder=folder,
        state=state,
        holder=holder,
        recipe=recipe,
        step=step,
        max_steps=max_steps,
        written=datetime.fromtimestamp(max(times)) if times else None,
        metrics={key: value for key in run.curves if math.isfinite(value := run.last(key))},
        scores=best_scores(results.table),
        settings=settings,
        problems=problems,
    )


def _read_settings(path: Path, problems: list[str]) -> tuple[dict[str, Any], Recipe | None]:
    """The flat settings of a run and its recipe; empty with a problem if they cannot be read."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        problems.append(f"{path} is missing: settings and recipe are unknown")
        return {}, None
    except (UserError, OSError, UnicodeDecodeError) as error:
        problems.append(str(error) if isinstance(error, UserError) else f"{path}: {error}")
        return {}, None
    if not isinstance(content, dict):
        problems.append(f"{path} has no settings")
        return {}, None
    settings = flatten(with_current_paths(content))
    return settings, find_similar_recipe(settings)


def _read_step(path: Path, problems: list[str]) -> int | None:
    """The optimizer step of a checkpoint; `None` if there is none, or with a problem."""
    if not path.exists():
        return None
    try:
        return int(read_checkpoint(path).get("global_step", 0))
    except UserError as error:
        problems.append(str(error))
        return None


def _read_results(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """All probe results; files that cannot be read."""
    tables, problems = [read_results([])], []
    for path in paths:
        try:
            tables.append(read_results([path]))
        except UserError as error:
            problems.append(str(error))
    tables = [table for table in tables if len(table)] or tables[:1]
    return pd.concat(tables, ignore_index=True), problems


def flatten(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as one level, with dots in the keys.

    A class is the value of its own key, by its short name, and its arguments are below this key.
    """
    if isinstance(settings, Mapping) and key != "data.root":
        flat: dict[str, Any] = {}
        if "class_path" in settings:
            flat[key] = str(settings["class_path"]).rpartition(".")[2]
        for name, value in settings.items():
            if name != "class_path":
                flat |= flatten(value, key if name == "init_args" else f"{key}.{name}".strip("."))
        return flat
    if isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        items = enumerate(settings)
        return {k: v for i, item in items for k, v in flatten(item, f"{key}[{i}]").items()}
    return {key: settings}


def find_similar_recipe(settings: Mapping[str, Any]) -> Recipe | None:
    """The recipe with the most settings in common with those of a run, by its share of them."""
    found: tuple[float, Recipe | None] = (_MIN_EQUAL_SHARE, None)
    for name, recipe in _flat_recipes().items():
        changed = [key for key, value in recipe.items() if not _is_equal(settings.get(key), value)]
        share = 1 - len(changed) / len(recipe)
        if share > found[0]:
            found = share, Recipe(name, changed)
    return found[1]


@lru_cache
def _flat_recipes() -> dict[str, dict[str, Any]]:
    """The complete recipes; others only change a few settings of a recipe."""
    contents = {
        name: parse_yaml(path.read_text(encoding="utf-8"), str(path))
        for name, path in recipes().items()
    }
    return {
        name: flatten(content)
        for name, content in contents.items()
        if {"front_end", "masker", "encoder"} <= content.get("model", {}).keys()
    }


def _is_equal(value: Any, stated: Any) -> bool:
    """Whether a setting has the value of a recipe, which may give a class by its short name."""
    if isinstance(value, str) and isinstance(stated, str):
        return value.rpartition(".")[2] == stated.rpartition(".")[2]
    return value == stated


def differing_settings(facts: Sequence[RunFacts]) -> Iterator[tuple[str, list[Any]]]:
    """The settings that are not equal in all runs, with their values; `None` where one is missing.

    Settings that are copies of others, or belong to one start of a run, are left out.
    """
    keys = dict.fromkeys(key for run in facts for key in run.settings)
    for key in keys:
        values = [run.settings.get(key) for run in facts]
        if key not in (*LINKED, *OF_A_START) and any(value != values[0] for value in values):
            yield key, values
