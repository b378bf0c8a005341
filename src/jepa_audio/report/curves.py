"""Curves of training runs over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from jepa_audio.errors import UserError
from jepa_audio.probing.rows import Score
from jepa_audio.report import style
from jepa_audio.report.runs import Curve, Curves, Run, is_online_score

REFERENCES = {"mean target", "nearest context", "random-init"}
"""Labels of the curves that are shown only for comparison; they are drawn in grey."""
# Curves with more points are drawn with a running mean.
MANY_POINTS = 200
OVERLAY = ("train/loss", "valid/loss", "collapse/context_rank", "probe/*")
"""Patterns of the metrics that `plot runs` shows."""
MAX_TASKS = 6


@dataclass(frozen=True)
class Panel:
    """One panel of `draw_curves`.

    Args:
        series: metric key → label, in drawing order; `*` in a key matches any text.
        log_scale: logarithmic axis of values.
        from_zero: start the axis of values at zero.
        is_share: values are at most 1, and so is the axis; it starts at zero.
    """

    title: str
    series: dict[str, Any]
    log_scale: bool = False
    from_zero: bool = False
    is_share: bool = False


def _list_panels(keys: set[str]) -> list[Panel]:
    """The panels of a report, with one for each task of the online probes."""
    probes = sorted(key.split("/")[1:] for key in keys if is_online_score(key))
    loss = {
        "train/loss": "train",
        "valid/loss": "valid",
        "train/loss_mean_target": "mean target",
        "train/loss_nearest_context": "nearest context",
    }
    simple = any(key.startswith("train/loss_") for key in keys)
    online = [
        Panel(
            f"Online probe: {style.shorten(task, 28)}",
            {f"probe/{task}/{metric}": metric, f"probe/{task}/twin": "random-init"},
        )
        for task, metric in probes
    ]
    ends = ("_context", "_prediction", "_clip_mean")
    terms = [key for key in sorted(keys - loss.keys()) if key.startswith("train/")]
    terms = [key for key in terms if key.endswith(ends)]
    latents = ("context", "target", "prediction")
    rank, std = ({f"collapse/{name}_{what}": name for name in latents} for what in ("rank", "std"))
    speed = {"speed/audio_seconds_per_second": ""}
    return [
        Panel("Loss and two trivial predictors" if simple else "Loss", loss),
        *(Panel(f"Regularizer {key.removeprefix('train/')}", {key: ""}) for key in terms),
        *online,
        Panel("RankMe (effective rank)", rank),
        Panel("Standard deviation", std),
        Panel("Mean cosine between clips", {"collapse/clip_cosine": ""}),
        Panel("Share of variance between clips", {"collapse/clip_share": ""}, is_share=True),
        Panel("Classes that targets distinguish", {"collapse/class_perplexity": ""}),
        Panel("Distance of target encoder to encoder", {"collapse/ema_distance": ""}),
        Panel("Gradient norm", {"train/gradient_norm": ""}, log_scale=True),
        Panel("Learning rate", {"lr-*": ""}),
        Panel("Momentum of the target encoder", {"train/momentum": ""}),
        Panel("Seconds of audio per second", speed, from_zero=True),
        Panel("Fraction of time waiting for data", {"speed/data_wait": ""}, is_share=True),
        Panel("MFU: share of the devices' peak", {"speed/mfu": ""}, is_share=True),
    ]


def draw_curves(
    runs: Mapping[str, Curves], title: str = "", scores: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Curves over optimizer steps, with a colour for each series of one run or for each run.

    Panels without a finite value are left out. Long series are drawn pale under their running
    mean. Steps with a collapse alarm are marked. `scores` are panels of `probe_scores`, after the
    curves.
    """
    panels = [
        panel
        for panel in _list_panels({key for curves in runs.values() for key in curves})
        if any(
            _find_curve(run, key)
            for run in runs.values()
            for key, label in panel.series.items()
            if label not in REFERENCES
        )
    ]
    if not panels and not scores:
        return style.note_figure("nothing was logged", title)
    num_panels = len(panels) + len(scores)
    columns = 2 if num_panels == 4 else 3
    figure, axes = style.small_multiples(num_panels, columns, height=2.2, extra=0.5)
    # From the 78th run on, runs share colour and marker.
    looks = {name: style.category_style(number) for number, name in enumerate(runs)}
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, runs, looks if len(runs) > 1 else {})
    for ax in axes[: len(panels)][-columns:]:
        ax.set_xlabel("optimizer step")
    for ax, found in zip(axes[len(panels) :], scores, strict=True):
        _draw_scores(ax, found, looks)
    handles: list[Artist] = []
    if len(runs) > 1:
        handles += [
            style.line_handle(style.shorten(name, 40), **look, filled=True)
            for name, look in looks.items()
        ]
    if any(len(_alarm_steps(run)) for run in runs.values()):
        handles.append(Patch(facecolor=style.RED, alpha=0.2, label="collapse alarm"))
    style.title_figure(figure, title, handles)
    return figure


def _draw_panel(
    ax: Axes, panel: Panel, runs: Mapping[str, Curves], looks: Mapping[str, dict[str, Any]]
) -> None:
    handles: dict[str, Line2D] = {}
    for name, run in runs.items():
        for number, (pattern, label) in enumerate(panel.series.items()):
            is_reference = label in REFERENCES
            color = style.GREY if is_reference else style.PALETTE[number]
            dash = style.DASHES[number] if looks or is_reference else style.SOLID
            if (curve := _find_curve(run, pattern)) is not None:
                _draw_curve(ax, curve, dash=dash, **looks.get(name, {"color": color, "marker": ""}))
                handles[label] = style.line_handle(label, style.INK if looks else color, dash)
        for step in _alarm_steps(run):
            ax.axvline(step, color=style.RED, linewidth=3, alpha=0.15, zorder=0)
    style.title_panel(ax, panel.title, [handle for label, handle in handles.items() if label])
    if panel.log_scale:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    ax.set_ylim(bottom=0 if panel.from_zero or panel.is_share else None)
    if panel.is_share and max(ax.dataLim.y1, 0) <= 1 < ax.get_ylim()[1]:
        ax.set_ylim(top=1)


def _find_curve(run: Curves, pattern: str) -> Curve | None:
    """The first series with a finite value whose key matches."""
    keys = sorted(key for key in run if fnmatchcase(key, pattern))
    return next((run[key] for key in keys if np.isfinite(run[key][1]).any()), None)


def _alarm_steps(run: Curves) -> np.ndarray:
    steps, raised = run.get("collapse/alarm", (np.empty(0), np.empty(0)))
    return steps[raised > 0]


def _draw_curve(ax: Axes, curve: Curve, color: str, marker: str, dash: str) -> None:
    """Draw a curve with about six markers, which also distinguish runs without colours."""
    steps, values = curve
    marker = marker or ("o" if np.isfinite(values).sum() == 1 else "")
    every = max(1, len(values) // 6)
    if len(values) > MANY_POINTS:
        ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        window = pd.Series(values).rolling(len(values) // 40, center=True, min_periods=1)
        values = window.mean().to_numpy()
    look: dict[str, Any] = {"color": color, "linestyle": dash, "linewidth": 1.4}
    ax.plot(steps, values, marker=marker, markersize=4.5, markevery=every, **look)


def draw_overlay(
    runs: Sequence[Run],
    results: Mapping[Path, pd.DataFrame],
    keys: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw the curves of several runs over each other, and their probe scores.

    Args:
        runs: the runs; their labels must differ.
        results: lines of `current` of each run, by its folder.
        keys: patterns of metric keys; `None` for `OVERLAY` and the scores of `jepa-audio probe`.
        title: of the figure.

    Raises:
        UserError: if no run has a metric that matches.
    """
    patterns = OVERLAY if keys is None else (*keys, "collapse/alarm")
    curves = {
        run.label: {
            key: curve
            for key, curve in run.curves.items()
            if any(fnmatchcase(key, pattern) for pattern in patterns)
        }
        for run in runs
    }
    if keys is not None and not any(found.keys() - {"collapse/alarm"} for found in curves.values()):
        known = sorted({key for run in runs for key in run.curves})
        raise UserError(
            f"`keys` ({', '.join(keys)}) match no metric; the runs have {', '.join(known)}"
        )
    scores = [] if keys is not None else probe_scores(runs, results)
    return draw_curves(curves, title, scores[:MAX_TASKS])


def probe_scores(runs: Sequence[Run], results: Mapping[Path, pd.DataFrame]) -> list[dict[str, Any]]:
    """For each task, protocol and metric: the scores of the runs and of their baselines.

    Of several results of a run, that with the best validation score is taken, as for heads.
    """
    shown: dict[tuple[str, ...], dict[str, tuple[Score, float | None]]] = {}
    for run in runs:
        lines = results[run.folder]
        lines = lines[~lines["is_baseline"].astype(bool)].astype({"valid": float})
        ranked = lines.sort_values("valid", ascending=False, kind="stable")
        for line in ranked.drop_duplicates(["task", "protocol", "metric"]).itertuples():
            gap = line.against_random
            baseline = None if gap is None else line.row.value - gap.value
            key = line.task, line.protocol, line.metric
            shown.setdefault(key, {})[run.label] = line.row.score, baseline
    return [
        {"title": f"{task}: test {metric}, {protocol}", "scores": scores}
        for (task, protocol, metric), scores in sorted(shown.items())
    ]


def _draw_scores(ax: Axes, panel: Mapping[str, Any], looks: Mapping[str, dict[str, Any]]) -> None:
    scores = panel["scores"]
    for place, (label, (score, baseline)) in enumerate(scores.items()):
        ends = [[score.value - score.low], [score.high - score.value]]
        ax.errorbar(place, score.value, yerr=ends, ls="", ms=5, capsize=2.5, **looks[label])
        if baseline is not None:
            ax.plot(place, baseline, "_", ms=13, mew=1.6, color=style.GREY)
    ax.set_xticks(range(len(scores)), [style.shorten(label, 14) for label in scores])
    ax.tick_params(axis="x", rotation=20 if len(scores) > 3 else 0)
    ax.set_xlim(-0.6, len(scores) - 0.4)
    handles = [style.line_handle("95 % interval", style.INK, style.SOLID, "o")]
    if any(baseline is not None for _, baseline in scores.values()):
        handles.append(style.line_handle("random-init", style.GREY))
    style.title_panel(ax, style.shorten(panel["title"], 46), handles)
