"""Figure files: drawn once, embedded into pages."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from jepa_audio.files import atomic_path
from jepa_audio.probing.rows import ProbeRow, load_evidence
from jepa_audio.report.comparisons import is_baseline
from jepa_audio.report.head_figures import draw_classes, draw_confusion, draw_grid, label_kind
from jepa_audio.report.probe_figures import draw_robustness, variant_style
from jepa_audio.report.results import latest, mean_over_seeds

DPI = 144
KINDS = ("grid", "classes", "confusion")
"""Figures of one result, in the order in which they are shown."""


@dataclass(frozen=True)
class FigureFile:
    """A PNG file.

    Attributes:
        path: of the file.
        title: what it shows.
    """

    path: Path
    title: str

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels, 96 for an inch."""
        header = self.path.read_bytes()[:24]
        return int.from_bytes(header[16:20]) * 96 // DPI

    @property
    def data(self) -> str:
        """The content in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()


def save_figure(figure: Figure, path: Path, title: str) -> FigureFile:
    """Write a PNG file."""
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=DPI)
    return FigureFile(path, title)


def draw_close_ups(table: pd.DataFrame) -> dict[str, list[list[FigureFile]]]:
    """Draw each result into `pictures/` next to its file of results.

    The figures are the search over layers and settings, the scores of classes, and the confusion
    matrix. They show the first seed of a head. Random-init baselines, log-mel statistics and
    nearest neighbours are not drawn. Figures that are newer than the evidence are not drawn again.

    Returns:
        By task, the files of each result, best result first.

    Raises:
        UserError: naming the evidence that is missing.
    """
    lines = latest(table)
    lines = lines.assign(
        name=[close_up_name(row) for row in lines["row"]],
        value=[row.value for row in lines["row"]],
    )
    chosen = lines[lines["row"].map(_has_close_ups).astype(bool)].sort_values("seed", kind="stable")
    chosen = chosen.drop_duplicates(["folder", "name"])
    files: dict[str, list[list[FigureFile]]] = {}
    for line in chosen.sort_values("value", ascending=False, kind="stable").itertuples():
        files.setdefault(line.task, []).append(_close_ups(line.row, line.folder))
    return files


def _has_close_ups(row: ProbeRow) -> bool:
    return not is_baseline(row.variant) and row.head != "knn"


def close_up_name(row: ProbeRow) -> str:
    """Start of the names of the files of one result."""
    encoder = (row.encoder, row.variant, row.pooling, row.encoder_hash[:8])
    return _slug(row.task, *encoder, row.preset, row.select, row.head)


def _close_ups(row: ProbeRow, folder: Path) -> list[FigureFile]:
    name, title = close_up_name(row), f"{row.encoder}, {variant_style(row.variant)[1]}"
    paths = {kind: folder / "pictures" / f"{name}-{kind}.png" for kind in KINDS}
    evidence = folder / row.evidence
    grid = paths["grid"]
    is_fresh = (
        grid.is_file()
        and evidence.is_file()
        and grid.stat().st_mtime_ns > evidence.stat().st_mtime_ns
    )
    if not is_fresh:
        # The grid is written last: it marks the others as drawn.
        for kind, figure in reversed(list(_draw_close_ups(row, evidence))):
            save_figure(figure, paths[kind], title)
    return [FigureFile(path, title) for path in paths.values() if path.is_file()]


def _draw_close_ups(row: ProbeRow, path: Path) -> Iterator[tuple[str, Figure]]:
    evidence = load_evidence(path)
    yield "grid", draw_grid(row)
    kind = label_kind(row, evidence)
    if kind != "other":
        yield "classes", draw_classes(row, evidence)
    if kind == "multiclass":
        yield "confusion", draw_confusion(row, evidence)


def draw_conditions(table: pd.DataFrame, folder: Path) -> dict[str, list[FigureFile]]:
    """Draw scores on degraded clips into a folder: a file for each protocol, by task."""
    lines = latest(table)
    is_degraded = lines["row"].map(lambda row: bool(row.robustness)).astype(bool)
    lines = mean_over_seeds(lines[is_degraded])
    keys = ["task", "preset", "select", "head", "split_checksum"]
    files: dict[str, list[FigureFile]] = {}
    for (task, *protocol, checksum), group in lines.groupby(keys, sort=False):
        figure = draw_robustness(group["row"].tolist(), f"{task} on degraded clips")
        path = folder / f"{_slug(task, *protocol, checksum[:8])}-robustness.png"
        file = save_figure(figure, path, f"{task} on degraded clips, {', '.join(protocol)}")
        files.setdefault(task, []).append(file)
    return files


def _slug(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
