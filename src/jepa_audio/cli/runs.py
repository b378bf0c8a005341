"""The commands `runs ...` for the folders of training runs; their docstrings are their `--help`."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jepa_audio.errors import UserError, did_you_mean, printable
from jepa_audio.report.run_facts import RunFacts, differing_settings, read_facts

log = logging.getLogger(__name__)

# Metrics that `compare` shows, by their labels.
_COMPARED = {
    "train loss": "train/loss",
    "valid loss": "valid/loss",
    "rank of the context": "collapse/context_rank",
    "variance between clips": "collapse/clip_share",
    "seconds of audio / s": "speed/audio_seconds_per_second",
    "waiting for data": "speed/data_wait",
    "MFU": "speed/mfu",
}
# In the key of a metric that is better if it is low.
_LOW_IS_BETTER = ("loss", "data_wait", "alarm", "ema_distance", "gradient_norm")


def ls(folders: list[str], results: list[Path] | None = None, json: bool = False) -> str | None:
    """List runs, one line for each: recipe, steps, state, last losses and rank, probe score.

    The probe score is the test score of the head with the best validation score, with the
    difference to the random-init baseline.

    Args:
        folders: folders of runs; `run_function` defines the help.
        results: files `results.jsonl` of `jepa-audio probe` outside of these folders.
        json: print JSON instead of a table.
    """
    runs = _read(folders, results)
    if json:
        return _json([_as_dict(run) for run in runs])
    names = ("run", "recipe", "steps", "state", "loss", "valid", "rank", "probe", "when")
    rows = []
    for run in runs:
        score = next((f"{task} {score}" for task, score in run.scores.items()), "-")
        more = f", {len(run.scores) - 1} more" if len(run.scores) > 1 else ""
        rows.append(
            (
                run.label,
                str(run.recipe or "-"),
                _steps(run),
                run.state,
                *(_number(run.metrics.get(key)) for key in list(_COMPARED.values())[:3]),
                f"{score}{more}",
                _time(run),
            )
        )
    _print_table(names, rows)
    return None


def show(folders: list[str], results: list[Path] | None = None, json: bool = False) -> str | None:
    """Show the facts of runs: recipe and changed settings, steps, metrics, probes, files.

    Args:
        folders: folders of runs; `run_function` defines the help.
        results: files `results.jsonl` of `jepa-audio probe` outside of these folders.
        json: print JSON, with all settings.
    """
    runs = _read(folders, results)
    if json:
        return _json([_as_dict(run) | {"settings": run.settings} for run in runs])
    for run in runs:
        rows = [("folder", str(run.folder)), ("recipe", str(run.recipe or "not one of `configs`"))]
        changed = run.recipe.changed if run.recipe else []
        rows += [(f"  {key}", str(run.settings.get(key))) for key in changed]
        state = run.state if run.holder is None else f"{run.state} ({run.holder})"
        rows += [("state", state), ("steps", _steps(run)), ("written", _time(run))]
        rows += [(key, _number(value)) for key, value in sorted(run.metrics.items())]
        rows += [(f"probe {task}", str(score)) for task, score in run.scores.items()]
        rows += [(path.name, _size(path)) for path in sorted(run.folder.glob("checkpoints/*.ckpt"))]
        _print_table((run.label, ""), rows)
        if run.state == "stopped" and (run.folder / "config.yaml").is_file():
            config = str(run.folder / "config.yaml")
            words = ["jepa-audio", "fit", "--config", config, "--ckpt_path", "last"]
            print(f"continue it: {printable(shlex.join(words))}")
    return None


def compare(
    folders: list[str], results: list[Path] | None = None, json: bool = False
) -> str | None:
    """Compare runs: the settings that differ between them, and their last metrics and probes.

    Args:
        folders: folders of runs; `run_function` defines the help.
        results: files `results.jsonl` of `jepa-audio probe` outside of these folders.
        json: print JSON.

    Raises:
        UserError: if there is only one run.
    """
    runs = _read(folders, results)
    if len(runs) < 2:
        raise UserError(f"only one run in {', '.join(folders)}: give several runs to compare")
    with_settings = [run for run in runs if run.settings]
    settings = {
        key: dict(zip([run.label for run in with_settings], values, strict=True))
        for key, values in differing_settings(with_settings)
    }
    if json:
        return _json({"settings": settings, "runs": [_as_dict(run) for run in runs]})
    names = ["", *(run.label for run in runs)]
    rows = [
        (key, *(str(values.get(run.label, "unknown")) for run in runs))
        for key, values in settings.items()
    ]
    _print_table(names, rows or [("no setting differs", *("" for _ in runs))])
    rows = [("steps", *map(_steps, runs)), ("state", *(run.state for run in runs))]
    rows += [
        (label, *(_number(run.metrics.get(key)) for run in runs))
        for label, key in _COMPARED.items()
        if any(key in run.metrics for run in runs)
    ]
    tasks = sorted({task for run in runs for task in run.scores})
    rows += [(f"probe {task}", *(str(run.scores.get(task, "-")) for run in runs)) for task in tasks]
    _print_table(names, rows)
    return None


def best(
    folders: list[str],
    by: str = "valid/loss",
    order: Literal["auto", "lowest", "highest"] = "auto",
    results: list[Path] | None = None,
    json: bool = False,
) -> str | None:
    """Rank runs by the last value of a metric, or by the test score of a probing task.

    The test score is that of the head with the best validation score, with the difference to the
    random-init baseline.

    Args:
        folders: folders of runs; `run_function` defines the help.
        by: key of a metric of the logs, such as `valid/loss`, or name of a probing task.
        order: which value is the best one. "auto": the lowest one of losses, gradient norms,
            waiting times, alarms and EMA distances, the highest one of everything else.
        results: files `results.jsonl` of `jepa-audio probe` outside of these folders.
        json: print JSON.

    Raises:
        UserError: if no run has the metric.
    """
    runs = _read(folders, results)
    scores = {run.label: run.scores[by] for run in runs if by in run.scores}
    values = {run.label: run.metrics.get(by) for run in runs}
    values |= {label: score.value for label, score in scores.items()}
    known = {label: value for label, value in values.items() if value is not None}
    if not known:
        keys = {key for run in runs for key in (*run.metrics, *run.scores)}
        raise UserError(
            f"`by` ({by}) is neither a metric nor a probing task of these runs; known: "
            f"{', '.join(sorted(keys)) or 'none'}{did_you_mean(by, keys)}"
        )
    is_low = not scores and any(word in by for word in _LOW_IS_BETTER)
    is_low = is_low if order == "auto" else order == "lowest"
    ranked = sorted(known.items(), key=lambda item: item[1], reverse=not is_low)
    if missing := sorted(values.keys() - known.keys()):
        log.info("without %s: %s", by, ", ".join(missing))
    by_label = {run.label: run for run in runs}
    if json:
        return _json([_as_dict(by_label[label]) | {"by": by, "value": v} for label, v in ranked])
    rows = [
        (
            *(str(place), label),
            str(scores[label]) if label in scores else _number(value),
            *(_steps(by_label[label]), by_label[label].state),
        )
        for place, (label, value) in enumerate(ranked, start=1)
    ]
    _print_table(("", "run", f"{by} ({'lowest' if is_low else 'highest'})", "steps", "state"), rows)
    return None


def _read(folders: Sequence[str], results: Sequence[Path] | None) -> list[RunFacts]:
    """The runs, with one logged line for each problem."""
    runs, problems = read_facts([Path(folder) for folder in folders], results or ())
    for problem in dict.fromkeys([*problems, *(line for run in runs for line in run.problems)]):
        log.warning("%s", problem)
    return runs


def _as_dict(run: RunFacts) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "run": run.label,
        "folder": str(run.folder),
        "recipe": recipe.name if recipe else None,
        "changed": recipe.changed if recipe else None,
        "state": run.state,
        "step": run.step,
        "max_steps": run.max_steps,
        "written": run.written.isoformat(timespec="seconds") if run.written else None,
        "metrics": dict(run.metrics),
        "scores": {
            task: score.value if math.isfinite(score.value) else None
            for task, score in run.scores.items()
        },
        "against_random": {
            task: asdict(score.against_random) | {"verdict": score.against_random.verdict}
            for task, score in run.scores.items()
            if score.against_random is not None
        },
        "problems": run.problems,
    }


def _json(content: Any) -> str:
    return dumps(content, indent=2, default=str)


def _print_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*(Column(Text(printable(name))) for name in names), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    # In a file or a pipe, lines are not wrapped at the 80 columns that rich assumes.
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def _steps(run: RunFacts) -> str:
    return f"{run.step}/{'?' if run.max_steps is None else run.max_steps}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _time(run: RunFacts) -> str:
    return "-" if run.written is None else f"{run.written:%Y-%m-%d %H:%M}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
