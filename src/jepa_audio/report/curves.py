"""Training curves of one run, or of several runs in the same panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from jepa_audio.report import style

Curve = tuple[np.ndarray, np.ndarray]
"""Optimizer steps, values."""
Curves = Mapping[str, Curve]
"""By metric key."""
# Longer series are drawn with a running mean.
MANY_POINTS = 200


@dataclass(frozen=True)
class Panel:
    """One panel of `draw_curves`.

    Args:
        title: of the panel.
        series: label by metric key, in drawing order; `*` in a key matches anything.
        references: labels of series to compare with, drawn in grey.
        log_scale: logarithmic axis of values.
        from_zero: start the axis of values at zero.
    """

    title: str
    series: dict[str, str]
    references: tuple[str, ...] = ()
    log_scale: bool = False
    from_zero: bool = False


def standard_panels(runs: Mapping[str, Curves]) -> list[Panel]:
    """The panels of a report, with one for each task of the online probes."""
    keys = {key for curves in runs.values() for key in curves}
    probes = sorted(key.split("/")[1:] for key in keys if is_online_score(key))
    loss = {
        "train/loss": "train",
        "valid/loss": "valid",
        "collapse/loss_mean_target": "mean target",
        "collapse/loss_nearest_context": "nearest context",
    }
    latents = ("context", "target", "prediction")
    rank, std = ({f"collapse/{name}_{what}": name for name in latents} for what in ("rank", "std"))
    speed = {"speed/audio_seconds_per_second": ""}
    return [
        Panel("Loss and two trivial predictors", loss, ("mean target", "nearest context")),
        *(
            Panel(
                f"Online probe: {style.shorten(task, 28)}",
                {f"probe/{task}/{metric}": metric, f"probe/{task}/twin": "random-init"},
                ("random-init",),
            )
            for task, metric in probes
        ),
        Panel("RankMe (effective rank)", rank),
        Panel("Standard deviation", std),
        Panel("Mean cosine between clips", {"collapse/clip_cosine": ""}),
        Panel("Distance of target encoder to encoder", {"collapse/ema_distance": ""}),
        Panel("Gradient norm", {"train/gradient_norm": ""}, log_scale=True),
        Panel("Learning rate", {"lr-*": ""}),
        Panel("Momentum of the target encoder", {"train/momentum": ""}),
        Panel("Seconds of audio per second", speed, from_zero=True),
        Panel("Fraction of time waiting for data", {"speed/data_wait": ""}, from_zero=True),
    ]


def is_online_score(key: str) -> bool:
    """Whether a logged key is the metric of an online probe, not its baseline or the difference."""
    first, *rest = key.split("/")
    return first == "probe" and len(rest) == 2 and rest[1] not in {"twin", "difference"}


def draw_curves(runs: Mapping[str, Curves], panels: Sequence[Panel], title: str = "") -> Figure:
    """Curves over optimizer steps, with a colour for each series of one run or for each run.

    Panels without a finite value are left out. Long series are drawn pale under their running
    mean. Steps with a collapse alarm are marked.
    """
    panels = [panel for panel in panels if any(_has_curves(run, panel) for run in runs.values())]
    if not panels:
        return style.note_figure("nothing was logged", title)
    figure, axes = style.small_multiples(len(panels), 3, height=2.2, extra=0.5)
    many = [to_hex(color) for color in colormaps["tab20"].colors]  # type: ignore[attr-defined]
    # More than 20 runs share colours.
    colors = dict(zip(runs, cycle(style.PALETTE if len(runs) <= len(style.PALETTE) else many)))
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, runs, colors if len(runs) > 1 else {})
    for ax in axes[-3:]:
        ax.set_xlabel("optimizer step")
    handles: list[Artist] = []
    if len(runs) > 1:
        handles += [
            style.line_handle(style.shorten(name, 40), color) for name, color in colors.items()
        ]
    if any(len(_alarm_steps(run)) for run in runs.values()):
        handles.append(Patch(facecolor=style.RED, alpha=0.2, label="collapse alarm"))
    style.title_figure(figure, title, handles)
    return figure


def _draw_panel(
    ax: Axes, panel: Panel, runs: Mapping[str, Curves], run_colors: Mapping[str, str]
) -> None:
    handles: dict[str, Line2D] = {}
    for name, run in runs.items():
        for number, (pattern, label) in enumerate(panel.series.items()):
            is_reference = label in panel.references
            color = style.GREY if is_reference else style.PALETTE[number]
            dash = style.DASHES[number] if run_colors or is_reference else style.SOLID
            if (curve := _find_curve(run, pattern)) is not None:
                _draw_curve(ax, curve, run_colors.get(name, color), dash)
                handles[label] = style.line_handle(label, style.INK if run_colors else color, dash)
        for step in _alarm_steps(run):
            ax.axvline(step, color=style.RED, linewidth=3, alpha=0.15, zorder=0)
    style.title_panel(ax, panel.title, [handle for label, handle in handles.items() if label])
    if panel.log_scale:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(bottom=0 if panel.from_zero else None)


def _find_curve(run: Curves, pattern: str) -> Curve | None:
    """The first series with a finite value whose key matches."""
    keys = sorted(key for key in run if fnmatchcase(key, pattern))
    return next((run[key] for key in keys if np.isfinite(run[key][1]).any()), None)


def _has_curves(run: Curves, panel: Panel) -> bool:
    keys = [key for key, label in panel.series.items() if label not in panel.references]
    return any(_find_curve(run, key) for key in keys)


def _alarm_steps(run: Curves) -> np.ndarray:
    steps, raised = run.get("collapse/alarm", (np.empty(0), np.empty(0)))
    return steps[raised > 0]


def _draw_curve(ax: Axes, curve: Curve, color: str, dash: style.Dash) -> None:
    steps, values = curve
    marker = "o" if np.isfinite(values).sum() == 1 else None
    if len(values) > MANY_POINTS:
        ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        window = pd.Series(values).rolling(len(values) // 40, center=True, min_periods=1)
        values = window.mean().to_numpy()
    ax.plot(steps, values, color=color, linestyle=dash, linewidth=1.4, marker=marker, markersize=4)
