"""Pages about runs and probe results, in HTML and Markdown."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from jepa_audio.errors import UserError
from jepa_audio.files import write_text
from jepa_audio.parallel import num_cores
from jepa_audio.report.curves import draw_curves
from jepa_audio.report.embeddings import is_embeddings, read_embeddings
from jepa_audio.report.figures import FigureFile, draw_close_ups, draw_conditions, save_figure
from jepa_audio.report.latents import draw_latents, umap_layout
from jepa_audio.report.leaderboard import (
    build_averages,
    build_overviews,
    build_tasks,
    compute_scores,
)
from jepa_audio.report.probe_figures import draw_layers, draw_probe, variant_style
from jepa_audio.report.published import build_elsewhere
from jepa_audio.report.results import current, read_results
from jepa_audio.report.run_pictures import draw_run, is_damage
from jepa_audio.report.run_scores import RunResults, results_of_runs
from jepa_audio.report.runs import Run, find_several, judge_run

log = logging.getLogger(__name__)

# Largest number of points of a map of latents.
MAX_POINTS = 2000


def write_leaderboard(results: Path) -> Path:
    """Write `leaderboard.html`, `leaderboard.md` and `pictures/` next to a file of results.

    Args:
        results: `results.jsonl` of `jepa-audio probe`, with its evidence.

    Returns:
        The HTML page; it contains its figures and can be opened without other files.

    Raises:
        UserError: if there are no results, a line of the file is not a result, or evidence is
            missing.
    """
    table = read_results([results])
    if table.empty:
        raise UserError(f"{results} contains no results: run `jepa-audio probe` first")
    page = results.with_name("leaderboard.html")
    content = compare_results(table)
    content |= _draw_results(table, content["overviews"], results.with_name("pictures"))
    content["close_ups"] = draw_close_ups(table)
    write_text(page, render("page.html", content))
    write_text(page.with_suffix(".md"), render("leaderboard.md", content))
    log.info("the leaderboard is %s", page)
    return page


def write_report(folders: Sequence[Path | str] | Path, output: Path | None = None) -> Path:
    """Write `report.html` about all runs, probe results and embeddings in folders, with `figures/`.

    Args:
        folders: runs, or folders with runs and with the outputs of `jepa-audio probe` and
            `jepa-audio embed`; `run_function` defines the help.
        output: folder of the page (-o), which is `report.html` in it. The default is the folder
            itself, or the working directory if there are several.

    Returns:
        The page; it contains its figures and can be opened without other files.

    Raises:
        UserError: if a folder is missing, or holds neither a run nor probe results; or if `output`
            is the name of a page.
    """
    if output is not None and output.suffix.lower() in (".html", ".htm"):
        raise UserError(
            f"`output` ({output}) is a folder, in which the page is report.html: give the folder, "
            f"`-o {output.with_suffix('')}`"
        )
    paths = [folders] if isinstance(folders, Path) else list(map(Path, folders))
    found, files = find_several(paths)
    if output is None:
        output = paths[0] if len(paths) == 1 else Path()
    name = ", ".join(path.resolve().name for path in paths)
    table, folder = read_results(files), output / "figures"
    try:
        content = compare_results(table) | {"close_ups": draw_close_ups(table)}
    except UserError as error:
        # Evidence is missing: the page shows the results without comparisons.
        content = compare_results(table, str(error)) | {"close_ups": {}}
    results = results_of_runs(found, table)
    content |= {
        **_draw_results(table, content["overviews"], folder),
        "title": f"jepa-audio report: {name}",
        "runs": [_run_section(run, results[run.folder], folder) for run in found],
        "overlay": _save_curves(found, folder / "curves.png", "All runs")
        if len(found) > 1
        else None,
        "latents": _draw_embeddings(paths, folder),
    }
    page = output / "report.html"
    write_text(page, render("page.html", content))
    log.info("the report is %s", page)
    return page


def _draw_embeddings(folders: Sequence[Path], output: Path) -> list[FigureFile]:
    """The maps of latents of all files of embeddings in folders."""
    drawn = []
    paths = [path for folder in folders for path in sorted(folder.rglob("*.parquet"))]
    for path in dict.fromkeys(path for path in paths if is_embeddings(path)):
        try:
            embeddings = read_embeddings(path).sample(MAX_POINTS)
        except UserError as error:
            log.warning("no map of latents: %s", error)
            continue
        layout = umap_layout(embeddings.vectors)
        figure = draw_latents(embeddings, f"Latents of {path.name}", layout)
        name = path.relative_to(path.parents[1]).with_suffix("").as_posix().replace("/", "-")
        drawn.append(save_figure(figure, output / f"{name}-latents.png", f"latents of {path}"))
    return drawn


def compare_results(table: pd.DataFrame, no_comparisons: str = "") -> dict[str, Any]:
    """The values that the templates show about probe results, without figures.

    Args:
        table: table of results.
        no_comparisons: reason why results are not compared with each other; empty if they are
            compared.

    Raises:
        UserError: if evidence is missing or damaged; the message names it.
    """
    results = current(table)
    scores = compute_scores(table[:0] if no_comparisons else table)
    return {
        "title": "Leaderboard of frozen encoders",
        "written": datetime.now(),
        "runs": [],
        "overlay": None,
        "latents": [],
        "results": results,
        "overviews": build_overviews(results),
        "num_encoders": results[~results["is_baseline"]]["encoder"].nunique(),
        "num_tasks": results["task"].nunique(),
        "no_comparisons": no_comparisons,
        "averages": build_averages(scores),
        "tasks": build_tasks(scores),
        "elsewhere": build_elsewhere(),
    }


def _draw_results(
    table: pd.DataFrame, overviews: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Draw the figures about several results, and add `files` to each overview in place."""
    for overview in overviews:
        protocol, rows = overview["protocol"], overview["rows"]
        suffix = re.sub(r"[^\w.]+", "-", f"-{protocol}") if len(overviews) > 1 else ""
        drawn = {"probe": draw_probe(rows, "Test scores"), "layers": draw_layers(rows, "Layers")}
        overview["files"] = [
            save_figure(figure, folder / f"{name}{suffix}.png", f"{name}, {protocol}")
            for name, figure in drawn.items()
        ]
    return {"conditions": draw_conditions(table, folder)}


def _save_curves(runs: Sequence[Run], path: Path, title: str = "") -> FigureFile:
    curves = {run.label: run.curves for run in runs}
    figure = draw_curves(curves, title)
    return save_figure(figure, path, f"curves of {title.lower() or runs[0].label}")


def _run_section(run: Run, results: RunResults, folder: Path) -> dict[str, Any]:
    """A run with its figures; `missing` has the reasons why pictures are not drawn."""
    badges, verdict = judge_run(run, current(results.table))
    if results.problem:
        log.warning("%s", results.problem)
        verdict = f"{verdict} {results.problem[0].upper()}{results.problem[1:]}."
    damage = list(run.damage)
    name = run.label.replace("/", "-")
    curves = _save_curves([run], folder / f"{name}-curves.png")
    pictures, missing = draw_run(run.folder)
    damage += [str(reason) for reason in missing.values() if is_damage(reason)]
    config_text = ""
    if run.config is not None:
        try:
            config_text = run.config_text
        except UserError as error:
            damage.append(str(error))
    if damage:
        badges = [("damaged", "behind"), *badges]
        for sentence in dict.fromkeys(damage):
            log.warning("%s", sentence)
    return {
        "run": run,
        "badges": badges,
        "verdict": verdict,
        "curves": curves,
        "config_text": config_text,
        "damage": list(dict.fromkeys(damage)),
        "pictures": [
            save_figure(figure, folder / f"{name}-{kind}.png", f"{kind} of {run.label}")
            for kind, figure in pictures.items()
        ],
        "missing": {
            kind: "its checkpoint is damaged" if is_damage(reason) else str(reason)
            for kind, reason in missing.items()
        },
    }


def render(template: str, context: dict[str, Any]) -> str:
    """Fill in a template. All values are escaped; in Markdown also `|`, which separates columns."""

    def escape_bars(value: object) -> object:
        # Macros and blocks return `Markup`, which is already escaped.
        is_escaped = isinstance(value, Markup)
        return value if is_escaped else Markup(escape(value).replace("|", "&#124;"))

    environment = Environment(
        loader=PackageLoader("jepa_audio.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_bars if template.endswith(".md") else None,
    )
    environment.filters["variant"] = lambda name: variant_style(name).label
    environment.globals["environment"] = describe_environment
    return environment.get_template(template).render(context, sections=[])


def describe_environment() -> str:
    """Versions and hardware of this process."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jepa-audio", "torch", "lightning"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{num_cores()} of {os.cpu_count()} CPU cores, {platform.machine()}, {device}"
    python = f"Python {platform.python_version()}"
    return f"{python}, {versions}; {platform.system()}, {machine}."
