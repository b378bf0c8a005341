"""Figure files: drawn once, embedded into pages."""

from __future__ import annotations

import base64
import io
import logging
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path, write_text
from jepa_audio.probing.rows import load_evidence
from jepa_audio.report.head_figures import draw_head
from jepa_audio.report.probe_figures import draw_robustness, variant_style
from jepa_audio.report.results import ENCODER, latest, mean_over_seeds

log = logging.getLogger(__name__)

DPI = 144
FORMATS = (".png", ".svg", ".pdf", ".html")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin: 2rem; background: white">
<img width="{width}" style="max-width: 100%; height: auto" alt="{title}"
  src="data:image/png;base64,{png}">
</body></html>
"""
KINDS = ("grid", "classes", "confusion")
"""Figures of one result, in the order in which they are shown."""


@dataclass(frozen=True)
class FigureFile:
    """A PNG file; `title` is what it shows."""

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


def check_format(output: Path) -> None:
    """Refuse an output file that `write_picture` cannot write, before anything is computed.

    Raises:
        UserError: if its name has another suffix.
    """
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"`output` ({output}) must end with {', '.join(FORMATS)}")


def write_picture(figure: Figure, output: Path, title: str) -> None:
    """Write a figure as a picture, or as a page that contains it; the suffix decides."""
    suffix = output.suffix.lower()
    if suffix == ".html":
        png = base64.b64encode(render_png(figure)).decode()
        width = round(96 * figure.get_figwidth())
        write_text(output, _PAGE.format(title=escape(title), width=width, png=png))
    else:
        metadata = (
            {"Title": title} if suffix != ".png" else {"Title": title, "Software": "jepa-audio"}
        )
        with atomic_path(output) as unfinished:
            figure.savefig(unfinished, format=suffix[1:], dpi=DPI, metadata=metadata)
    log.info("the picture is %s", output)


def render_png(figure: Figure) -> bytes:
    """The content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def draw_close_ups(table: pd.DataFrame) -> dict[str, list[list[FigureFile]]]:
    """Draw the figures of `draw_head` for each result into `pictures/` next to its results file.

    They show the first seed of a head. Baselines and nearest neighbours are not drawn. Figures that
    are newer than the evidence are not drawn again.

    Returns:
        By task, the files of each result, best result first.

    Raises:
        UserError: naming the evidence that is missing.
    """
    lines = latest(table)
    lines = lines[~lines["is_baseline"] & (lines["head"] != "knn")]
    identity = ["folder", *ENCODER, "task", "preset", "select", "head"]
    lines = lines.sort_values("seed", kind="stable").drop_duplicates(identity)
    files: dict[str, list[list[FigureFile]]] = {}
    lines = lines.sort_values("value", ascending=False, kind="stable")
    for row, folder in zip(lines["row"], lines["folder"], strict=True):
        encoder = (row.encoder, row.variant, row.pooling, row.encoder_hash[:8])
        name = _slug(row.task, *encoder, row.preset, row.select, row.head)
        title = f"{row.encoder}, {variant_style(row.variant).label}, {row.pooling}"
        paths = {kind: folder / "pictures" / f"{name}-{kind}.png" for kind in KINDS}
        evidence = folder / row.evidence
        if not 0 < _written(evidence) < _written(paths["grid"]):
            figures = draw_head(row, load_evidence(evidence))
            # The grid is written last: it marks the others as drawn.
            for kind in reversed(figures):
                save_figure(figures[kind], paths[kind], title)
        drawn = [FigureFile(path, title) for path in paths.values() if path.is_file()]
        files.setdefault(row.task, []).append(drawn)
    return files


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def draw_conditions(table: pd.DataFrame, folder: Path) -> dict[str, list[FigureFile]]:
    """Draw scores on degraded clips into a folder: a file for each protocol, by task."""
    lines = latest(table)
    lines = mean_over_seeds(lines[lines["robustness"].astype(bool)])
    keys = ["task", "preset", "select", "head", "split_checksum"]
    files: dict[str, list[FigureFile]] = {}
    for (task, *protocol, checksum), group in lines.groupby(keys, sort=False):
        title = f"{task} on degraded clips"
        figure = draw_robustness(group["row"].tolist(), title)
        path = folder / f"{_slug(task, *protocol, checksum[:8])}-robustness.png"
        file = save_figure(figure, path, f"{title}, {', '.join(protocol)}")
        files.setdefault(task, []).append(file)
    return files


def _slug(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
