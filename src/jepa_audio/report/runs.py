"""Training runs: the content of their folders, the verdict on each run, and their curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path

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

from jepa_audio.errors import UserError
from jepa_audio.files import read_csv
from jepa_audio.report import style
from jepa_audio.report.probe_figures import variant_style

Curve = tuple[np.ndarray, np.ndarray]
"""Optimizer steps, values."""
Curves = Mapping[str, Curve]
"""The curve of each metric key."""
VERDICTS = {
    "ahead": "Ahead of",
    "behind": "Behind",
    "no significant difference": "No significant difference to",
}
BADGES = {
    (True, False): ("learned", "ahead"),
    (False, True): ("worse than untrained", "behind"),
    (True, True): ("ahead and behind", ""),
}
"""Text and CSS class of a badge.

The keys state whether some result is ahead of its random-init baseline and whether some result is
behind.
"""
OLD_KEYS = {
    f"collapse/{name}": f"train/{name}" for name in ("loss_mean_target", "loss_nearest_context")
}
"""Metric keys of earlier versions → current keys."""
REFERENCES = {"mean target", "nearest context", "random-init"}
"""Labels of the curves that are shown only for comparison; they are drawn in grey."""
# Curves with more points are drawn with a running mean.
MANY_POINTS = 200


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a training run.

    Attributes:
        name: name of the folder; encoders of the run have the same name in probe results.
        label: path relative to the folder of the report.
        metric_files: one file for each start of the run, in the order of the starts.
        damage: what is wrong with these files; empty if they are complete.
    """

    name: str
    label: str
    folder: Path
    curves: Curves
    metric_files: list[Path]
    damage: list[str] = field(default_factory=list)

    def curve(self, key: str) -> Curve:
        """Steps and values of a metric key; empty if nothing was logged."""
        return self.curves.get(key, (np.empty(0), np.empty(0)))

    def last(self, key: str, steps: np.ndarray | None = None) -> float:
        """The last finite value of a metric key, only at `steps` if given; NaN if there is none."""
        at, values = self.curve(key)
        if steps is not None:
            values = values[np.isin(at, steps)]
        return next((float(value) for value in values[::-1] if math.isfinite(value)), math.nan)

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged."""
        return int(max((steps[-1] for steps, _ in self.curves.values()), default=0))

    @property
    def written(self) -> datetime:
        """When metrics were written last."""
        return datetime.fromtimestamp(self.metric_files[-1].stat().st_mtime)

    @property
    def config(self) -> Path | None:
        """The configuration of the run."""
        paths = (self.folder / "config.yaml", self.metric_files[-1].with_name("config.yaml"))
        return next((path for path in paths if path.is_file()), None)


def find_runs(directory: Path) -> list[Run]:
    """The runs in a folder and its subfolders, sorted by path; the folder itself may be a run."""
    folders = {
        path.parent.parent.parent if path.parent.name.startswith("version_") else path.parent
        for path in directory.rglob("metrics.csv")
    }
    return [read_run(folder, directory) for folder in sorted(folders)]


def read_run(folder: Path, directory: Path) -> Run:
    """The run in a folder below `directory`; without metrics, it has no curves."""
    files = folder.glob("metrics/version_*/metrics.csv")
    by_number = sorted(files, key=lambda file: (len(file.parent.name), file.parent.name))
    paths = [path for path in (folder / "metrics.csv", *by_number) if path.is_file()]
    starts: list[pd.DataFrame] = []
    damage: list[str] = []
    for points in (_read_metrics(path, damage) for path in paths):
        # A resumed run continues from its checkpoint. It logs again the steps after the checkpoint,
        # which replace those of the previous start.
        first = points["step"].min() if len(points) else math.inf
        starts = [start[start["step"] < first] for start in starts] + [points]
    logged = pd.concat(starts or [pd.DataFrame(columns=["step", "key", "value"])])
    logged = logged.drop_duplicates(["key", "step"], keep="last").sort_values("step")
    curves = {
        str(key): (group["step"].to_numpy(float), group["value"].to_numpy(float))
        for key, group in logged.groupby("key", sort=False)
    }
    name = folder.resolve().name
    label = name if folder == directory else folder.relative_to(directory).as_posix()
    return Run(name, label, folder, curves, paths, damage)


def _read_metrics(path: Path, damage: list[str]) -> pd.DataFrame:
    """Columns `step`, `key`, `value`; a line of the file has values of some keys only.

    Lines that are not numbers, and the rest of a file that is not CSV, are left out; `damage` then
    gets a sentence.
    """
    points: list[tuple[int, str, float]] = []
    wrong: list[int] = []
    try:
        for number, line in read_csv(path)[1]:
            try:
                points += _points(line)
            except (ValueError, TypeError, OverflowError):
                wrong.append(number)
    except UserError as error:
        damage.append(str(error))
    if wrong:
        lines = f"{len(wrong)} lines (the first is line {wrong[0]})"
        damage.append(f"{path} is damaged: {lines} without numbers are left out")
    return pd.DataFrame(points, columns=["step", "key", "value"])


def _points(line: Mapping[str, str | None]) -> list[tuple[int, str, float]]:
    if not (step := line.get("step")):
        return []
    return [
        (int(float(step)), OLD_KEYS.get(key, key), float(value))
        for key, value in line.items()
        if value and key not in {"step", "epoch"}
    ]


def judge_run(
    run: Run, results: pd.DataFrame, runs: Sequence[Run] = ()
) -> tuple[list[tuple[str, str]], str]:
    """Whether the run learned, collapsed and predicts better than trivial predictors.

    Args:
        run: the run.
        results: lines of `current`.
        runs: all runs; results of runs with the same name cannot be distinguished.

    Returns:
        Badges, each a text and a CSS class ("ahead", "behind" or ""), and sentences on probes, the
        collapse monitor and losses.
    """
    compared = results[(results["encoder"] == run.name) & results["against_random"].notna()]
    # The verdict uses trained heads. It uses nearest neighbours only if there are no trained heads.
    if (compared["head"] != "knn").any():
        compared = compared[compared["head"] != "knn"]
    several_protocols = compared["protocol"].nunique() > 1
    found: dict[str, list[str]] = {}
    for line in compared.itertuples():
        difference = line.against_random
        task = line.task + (f", {line.protocol}" if several_protocols else "")
        size = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        text = f"{variant_style(line.variant).label} on {task} ({size})"
        found.setdefault(difference.verdict, []).append(text)
    sentences = [
        f"{text} its random-init baseline: {'; '.join(found[verdict])}."
        for verdict, text in VERDICTS.items()
        if verdict in found
    ]
    if not found:
        sentences = ["It was not probed; only a probe shows whether it learned.", *_online(run)]
    namesakes = [other.label for other in runs if other.name == run.name and other != run]
    if namesakes and found:
        names = ", ".join(namesakes)
        sentences.append(f"These results may be of a run with the same name: {names}.")
    undecided = "no significant difference to untrained" if found else "not probed"
    badges = [BADGES.get(("ahead" in found, "behind" in found), (undecided, ""))]
    if num_below := sum("below log-mel" in labels for labels in compared["below"]):
        badges.append((f"below log-mel on {num_below} of {len(compared)} results", "behind"))
    return badges, " ".join([*sentences, _collapse(run), *_losses(run)])


def _online(run: Run) -> Iterator[str]:
    for key in sorted(run.curves):
        if is_online_score(key):
            _, task, metric = key.split("/")
            baseline = run.last(f"probe/{task}/twin")
            yield (
                f"The last online probe of {task} had {metric} {run.last(key):.3f}, "
                f"its random-init baseline {baseline:.3f}."
            )


def _collapse(run: Run) -> str:
    steps, raised = run.curve("collapse/alarm")
    if not len(steps):
        return "Collapse was not monitored."
    sentence = f"Not collapsed: no alarm at any of {len(steps)} checks"
    if (raised > 0).any():
        first = steps[raised > 0][0]
        end = "including the last" if raised[-1] > 0 else "but not at the last"
        count = f"{(raised > 0).sum()} of {len(steps)} checks"
        sentence = f"Collapse alarm at {count}, first at step {first:.0f}, {end}"
    ranks = [f"{rank:.1f}" for rank in run.curve("collapse/context_rank")[1]] or ["unknown"]
    return f"{sentence}; RankMe of the context went from {ranks[0]} to {ranks[-1]}."


def _losses(run: Run) -> Iterator[str]:
    _, losses = run.curve("train/loss")
    if len(losses) and not math.isfinite(losses[-1]):
        yield "The last training loss is not a finite number."
    steps, means = run.curve("train/loss_mean_target")
    measured = steps[np.isfinite(means)][-1:]
    # The training loss of the step in which the baselines were measured; of earlier versions, the
    # loss of the monitor.
    loss = run.last("collapse/loss", measured)
    loss = run.last("train/loss", measured) if math.isnan(loss) else loss
    mean = run.last("train/loss_mean_target")
    copied = run.last("train/loss_nearest_context")
    if all(map(math.isfinite, (loss, mean))):
        by_mean, by_copy = ("below" if loss < other else "not below" for other in (mean, copied))
        copy = f" and {by_copy} that of copying the nearest context token ({copied:.3g})"
        yield (
            f"The last loss, {loss:.3g}, is {by_mean} that of predicting the mean target "
            f"({mean:.3g}){copy if math.isfinite(copied) else ''}."
        )
    if math.isfinite(valid := run.last("valid/loss")):
        yield f"The last validation loss is {valid:.3g}."


@dataclass(frozen=True)
class Panel:
    """One panel of `draw_curves`.

    Args:
        series: metric key → label, in drawing order; `*` in a key matches any text.
        log_scale: logarithmic axis of values.
        from_zero: start the axis of values at zero.
    """

    title: str
    series: dict[str, str]
    log_scale: bool = False
    from_zero: bool = False


def _list_panels(keys: set[str]) -> list[Panel]:
    """The panels of a report, with one for each task of the online probes."""
    probes = sorted(key.split("/")[1:] for key in keys if is_online_score(key))
    loss = {
        "train/loss": "train",
        "valid/loss": "valid",
        "train/loss_mean_target": "mean target",
        "train/loss_nearest_context": "nearest context",
    }
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
        Panel("Loss and two trivial predictors", loss),
        *(Panel(f"Regularizer {key.removeprefix('train/')}", {key: ""}) for key in terms),
        *online,
        Panel("RankMe (effective rank)", rank),
        Panel("Standard deviation", std),
        Panel("Mean cosine between clips", {"collapse/clip_cosine": ""}),
        Panel("Share of variance between clips", {"collapse/clip_share": ""}, from_zero=True),
        Panel("Classes that targets distinguish", {"collapse/class_perplexity": ""}),
        Panel("Distance of target encoder to encoder", {"collapse/ema_distance": ""}),
        Panel("Gradient norm", {"train/gradient_norm": ""}, log_scale=True),
        Panel("Learning rate", {"lr-*": ""}),
        Panel("Momentum of the target encoder", {"train/momentum": ""}),
        Panel("Seconds of audio per second", speed, from_zero=True),
        Panel("Fraction of time waiting for data", {"speed/data_wait": ""}, from_zero=True),
        Panel("MFU: share of the devices' peak", {"speed/mfu": ""}, from_zero=True),
    ]


def is_online_score(key: str) -> bool:
    """Whether a logged key is the metric of an online probe, not its baseline or the difference."""
    first, *rest = key.split("/")
    return first == "probe" and len(rest) == 2 and rest[1] not in {"twin", "difference"}


def draw_curves(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """Curves over optimizer steps, with a colour for each series of one run or for each run.

    Panels without a finite value are left out. Long series are drawn pale under their running
    mean. Steps with a collapse alarm are marked.
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
            is_reference = label in REFERENCES
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


def _alarm_steps(run: Curves) -> np.ndarray:
    steps, raised = run.get("collapse/alarm", (np.empty(0), np.empty(0)))
    return steps[raised > 0]


def _draw_curve(ax: Axes, curve: Curve, color: str, dash: str) -> None:
    steps, values = curve
    marker = "o" if np.isfinite(values).sum() == 1 else None
    if len(values) > MANY_POINTS:
        ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        window = pd.Series(values).rolling(len(values) // 40, center=True, min_periods=1)
        values = window.mean().to_numpy()
    ax.plot(steps, values, color=color, linestyle=dash, linewidth=1.4, marker=marker, markersize=4)
