"""Pictures: masks on a spectrogram, curves of runs, probe results; arrays in, `Figure` out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle, product

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from jepa_audio.grid import Grid, Masks
from jepa_audio.probing.results import ProbeRow

Curve = tuple[np.ndarray, np.ndarray]  # optimizer steps, values
Run = Mapping[str, Curve]  # by metric key

# The colours of Okabe and Ito, which colour-blind readers tell apart too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = PALETTE
INK, GREY, PALE, VEIL = "#222222", "#767676", "#EBEBEB", "#CFCFCF"
Dash = tuple[float, tuple[float, ...]]
SOLID, DASHED, DOTTED, MIXED = (0.0, ()), (0.0, (4.0, 1.5)), (0.0, (1.2, 1.2)), (0.0, (6.0, 1.5, 1.2, 1.5))
DASHES: tuple[Dash, ...] = (SOLID, DASHED, DOTTED, MIXED)
SMALL, NORMAL, WIDTH = 8.0, 9.0, 10.5  # points, points, inches
TINT, VEILED = 0.6, 0.85  # opacity of a target group on the spectrogram, of the veil
STRIPES = 12  # of a token's cell: 2, 3, 4 or 6 groups share it evenly
MANY_POINTS = 200  # longer series get a running mean

VARIANTS = {
    "statistics": ("log-mel statistics", PURPLE),
    "random": ("random twin", GREY),
    "context": ("context encoder", BLUE),
    "target": ("target encoder", ORANGE),
}
"""Label and colour of what is probed, in the order of the pictures."""
HEADS = {"linear": ("linear", "o", SOLID), "knn": ("k nearest neighbours", "s", DASHED)}


@dataclass(frozen=True)
class Panel:
    """One small picture of `draw_curves`.

    Args:
        series: label by metric key, in drawing order; `*` in a key stands for anything.
        references: labels drawn in grey, as something to compare with.
        alarms: mark the steps at which `collapse/alarm` was raised.
    """

    title: str
    series: dict[str, str]
    references: tuple[str, ...] = ()
    log_scale: bool = False
    from_zero: bool = False
    alarms: bool = False


def standard_panels(runs: Mapping[str, Run]) -> list[Panel]:
    """The panels of a report, one of them for each task of the online probes."""
    keys = {key for run in runs.values() for key in run}
    tasks = sorted(key.split("/")[1] for key in keys if fnmatchcase(key, "probe/*/accuracy"))
    probes = {t: {f"probe/{t}/accuracy": "accuracy", f"probe/{t}/twin": "random twin"} for t in tasks}
    loss = {"train/loss": "train", "valid/loss": "valid"}
    loss |= {"collapse/loss_mean_target": "mean target", "collapse/loss_nearest_context": "nearest context"}
    latents = ("context", "target", "prediction")
    rank, std = ({f"collapse/{name}_{what}": name for name in latents} for what in ("rank", "std"))
    return [
        Panel("Loss, beside two trivial predictors", loss, ("mean target", "nearest context")),
        *(Panel(f"Online probe: {_short(t, 28)}", two, ("random twin",)) for t, two in probes.items()),
        Panel("RankMe (effective rank)", rank, alarms=True),
        Panel("Standard deviation", std, alarms=True),
        Panel("Mean cosine between clips", {"collapse/clip_cosine": ""}, alarms=True),
        Panel("Distance of target encoder to encoder", {"collapse/ema_distance": ""}),
        Panel("Gradient norm", {"train/gradient_norm": ""}, log_scale=True),
        Panel("Learning rate", {"lr-*": ""}),
        Panel("Momentum of the target encoder", {"train/momentum": ""}),
        Panel("Seconds of audio per second", {"speed/audio_seconds_per_second": ""}, from_zero=True),
        Panel("Share of time waiting for data", {"speed/data_wait": ""}, from_zero=True),
    ]


def draw_masks(
    log_spectrogram: Float[np.ndarray, "bands frames"],
    grid: Grid,
    masks: Sequence[Masks],
    *,
    clip: int,
    seconds: float,
    title: str,
    band_hz: Float[np.ndarray, " bands"] | None = None,
) -> Figure:
    """Draws of masks over one clip: context clear, target groups tinted, the rest veiled.

    A token that several groups share is striped in their colours. On a grid with one frequency row every
    group has a lane of its own instead.

    Args:
        log_spectrogram: of the stretch of the clip that the grid covers, lowest band first.
        grid: of the tokens.
        masks: the draws.
        clip: row of the masks' batch.
        seconds: duration of the stretch.
        title: of the figure.
        band_hz: rising centre frequencies of the bands; bands are numbered if `None`.
    """
    figure, axes = _subplots(len(masks), 1, height=1.75, extra=0.75, share="x")
    extent = (0.0, seconds, 0.0, float(len(log_spectrogram)))
    low, high = np.percentile(log_spectrogram, (2, 99.8))
    planes = [_planes(grid, draw, clip) for draw in masks]
    overlays = [_paint(*plane) for plane in planes]
    for ax, (context, targets), overlay in zip(axes, planes, overlays, strict=True):
        ax.imshow(log_spectrogram, cmap="Greys", vmin=low, vmax=high, origin="lower", extent=extent)
        ax.imshow(overlay, interpolation="nearest", origin="lower", extent=extent)
        ax.set_aspect("auto")
        _draw_cells(ax, grid, extent)
        _title(ax, f"context {context.mean():.0%} of the tokens, targets {targets.any(0).mean():.0%}")
        _label_bands(ax, band_hz)
    axes[-1].set_xlabel("seconds", fontsize=NORMAL)
    keys = [Patch(facecolor="white", edgecolor=GREY, label="context")]
    for group, color in zip(range(max(len(targets) for _, targets in planes)), cycle(PALETTE), strict=False):
        keys.append(Patch(facecolor=color, alpha=TINT, label=f"target group {group + 1}"))
    if any((overlay[..., 3] == VEILED).any() for overlay in overlays):
        keys.append(Patch(facecolor=VEIL, label="hidden from the context"))
    _head(figure, title, keys)
    return figure


def _planes(grid: Grid, masks: Masks, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """Context `[F, T]` and target groups `[M, F, T]` of one clip, bool."""
    row = masks.rows(slice(clip, clip + 1))
    context, targets = (part.to_mask(grid.num_tokens).cpu().numpy() for part in (row.context, row.targets))
    shape = (-1, grid.num_time, grid.num_freq)
    return context.reshape(shape)[0].T, targets.reshape(shape).swapaxes(1, 2)


def _paint(context: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The overlay, RGBA `[F * stripes, T, 4]`, lowest row first."""
    colors = np.array([[*to_rgb(color), TINT] for _, color in zip(targets, cycle(PALETTE), strict=False)])
    veiled = np.where(context[..., None], 0.0, [*to_rgb(VEIL), VEILED])  # [F, T, 4]
    if len(context) == 1:
        return np.where(targets[::-1, 0, :, None], colors[::-1, None], veiled)
    count = targets.sum(axis=0)  # [F, T]
    rank = np.where(targets, targets.cumsum(axis=0), 0)  # [M, F, T], of a group among those of its token
    stripe = np.arange(STRIPES)[:, None, None]
    group = (rank[:, None] == stripe * count // STRIPES + 1).argmax(axis=0)  # [STRIPES, F, T]
    painted = np.where(count[..., None] > 0, colors[group], veiled)
    return painted.swapaxes(0, 1).reshape(-1, context.shape[1], 4)


def _draw_cells(ax: Axes, grid: Grid, extent: tuple[float, float, float, float]) -> None:
    if grid.num_time <= 128:
        ax.xaxis.set_minor_locator(FixedLocator(np.linspace(0, extent[1], grid.num_time + 1).tolist()))
    if grid.num_freq <= 32:
        ax.yaxis.set_minor_locator(FixedLocator(np.linspace(0, extent[3], grid.num_freq + 1).tolist()))
    ax.grid(visible=False)
    ax.grid(which="minor", color=GREY, linewidth=0.5, alpha=0.35)
    ax.tick_params(which="minor", length=0)
    ax.set_axisbelow(False)


def _label_bands(ax: Axes, band_hz: np.ndarray | None) -> None:
    ax.set_ylabel("band" if band_hz is None else "kHz", fontsize=NORMAL)
    if band_hz is not None:
        wanted = [hz for hz in (125, 500, 1000, 2000, 4000, 8000, 16000) if band_hz[0] <= hz <= band_hz[-1]]
        places = np.interp(wanted, band_hz, np.arange(len(band_hz)) + 0.5)
        ax.set_yticks(places, [f"{hz / 1000:g}" for hz in wanted])


def draw_curves(runs: Mapping[str, Run], panels: Sequence[Panel], title: str = "") -> Figure:
    """Curves over optimizer steps. One run: a colour for each series; several: a colour for each run.

    Panels without a finite value are left out. Long series are drawn pale, with their running mean on top.
    """
    panels = [panel for panel in panels if any(_has_curves(run, panel) for run in runs.values())]
    if not panels:
        return _note("nothing was logged", title)
    figure, axes = _subplots(len(panels), 3, height=2.2, extra=0.5)
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, runs)
    for ax in axes[-3:]:
        ax.set_xlabel("optimizer step", fontsize=NORMAL)
    colors = zip(runs, cycle(PALETTE), strict=False)
    keys: list[Artist] = [_key(_short(name, 40), color, SOLID) for name, color in colors if len(runs) > 1]
    if any(len(_alarms(run)) for run in runs.values()):
        keys.append(Patch(facecolor=RED, alpha=0.2, label="collapse alarm"))
    _head(figure, title, keys)
    return figure


def _draw_panel(ax: Axes, panel: Panel, runs: Mapping[str, Run]) -> None:
    keys: dict[str, Line2D] = {}
    several = len(runs) > 1
    for run, run_color in zip(runs.values(), cycle(PALETTE), strict=False):
        for place, (pattern, label) in enumerate(panel.series.items()):
            is_reference = label in panel.references
            color = run_color if several else GREY if is_reference else PALETTE[place]
            dash = DASHES[place] if several or is_reference else SOLID
            if (curve := _curve(run, pattern)) is not None:
                _draw_curve(ax, curve, color, dash)
                keys[label] = _key(label, INK if several else color, dash)
        for step in _alarms(run) if panel.alarms else ():
            ax.axvline(step, color=RED, linewidth=3, alpha=0.15, zorder=0)
    _title(ax, panel.title, [key for label, key in keys.items() if label])
    if panel.log_scale:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(bottom=0 if panel.from_zero else None)


def _curve(run: Run, pattern: str) -> Curve | None:
    """The first series with a finite value that a key or pattern stands for."""
    keys = sorted(key for key in run if fnmatchcase(key, pattern))
    return next((run[key] for key in keys if np.isfinite(run[key][1]).any()), None)


def _has_curves(run: Run, panel: Panel) -> bool:
    return any(_curve(run, key) for key, label in panel.series.items() if label not in panel.references)


def _alarms(run: Run) -> np.ndarray:
    steps, raised = run.get("collapse/alarm", (np.empty(0), np.empty(0)))
    return steps[raised > 0]


def _draw_curve(ax: Axes, curve: Curve, color: str, dash: Dash) -> None:
    steps, values = curve
    finite = np.isfinite(values)
    if len(values) > MANY_POINTS:
        ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        kernel = np.ones(len(values) // 40)
        count = np.convolve(finite, kernel, mode="same")
        total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
        values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    marker = "o" if finite.sum() == 1 else None
    ax.plot(steps, values, color=color, linestyle=dash, linewidth=1.4, marker=marker, markersize=4)


def draw_probe(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Test scores with their 95 % intervals: a panel for each task, a line for each encoder and variant."""
    if not rows:
        return _note("nothing was probed", title)
    lines = list(_probe_lines(rows))
    places = {line: float(y) for y, (_, line) in enumerate(lines)}
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = _subplots(len(tasks), 3, height=0.65 + 0.27 * len(lines), extra=0.6, share="y")
    for ax, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        for row in of_task:
            _draw_interval(ax, row, places[row.encoder, row.pooling, row.variant])
        ax.axvline(of_task[0].chance, color=INK, linewidth=1, linestyle=DOTTED)
        ax.tick_params(axis="y", length=0, grid_alpha=0)
        _title(ax, _short(task, 40))
        ax.set_xlabel(f"test {of_task[0].metric}, 95 % interval", fontsize=NORMAL)
    for ax in axes[::3]:
        ax.set(yticks=range(len(lines)), yticklabels=[label for label, _ in lines])
        ax.set_ylim(len(lines) - 0.3, -0.7)
        for text, (_, line) in zip(ax.get_yticklabels(), lines, strict=True):
            text.set_fontweight("normal" if line else "bold")
    _head(figure, title, [*_head_keys(rows), _key("chance", INK, DOTTED)])
    return figure


def _probe_lines(rows: Sequence[ProbeRow]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels from top to bottom and (encoder, pooling, variant), which is empty for the heading of a run."""
    several = len({row.pooling for row in rows if not _is_baseline(row)}) > 1
    for encoder in dict.fromkeys(row.encoder for row in sorted(rows, key=lambda row: not _is_baseline(row))):
        own = [row for row in rows if row.encoder == encoder]
        if not all(map(_is_baseline, own)):
            yield _short(encoder, 36), ()
        for pooling, look, variant in sorted({(r.pooling, _look(r.variant), r.variant) for r in own}):
            yield look[1] + (f", {pooling}" if several else ""), (encoder, pooling, variant)


def _is_baseline(row: ProbeRow) -> bool:
    return len(row.valid_by_layer) == 1


def _look(variant: str) -> tuple[int, str, str]:
    """Place in the order, label and colour; `random-3` is the twin of another seed."""
    kind, _, seed = variant.partition("-")
    label, color = VARIANTS[kind]
    return list(VARIANTS).index(kind), label + (f", seed {seed}" if seed else ""), color


def _draw_interval(ax: Axes, row: ProbeRow, y: float) -> None:
    y += 0.0 if row.head == "linear" else 0.27
    ax.plot([row.low, row.high], [y, y], color=_look(row.variant)[2], linewidth=2, alpha=0.6)
    _draw_mark(ax, row, row.value, y)


def _draw_mark(ax: Axes, row: ProbeRow, x: float, y: float) -> None:
    color, marker = _look(row.variant)[2], HEADS[row.head][1]
    face = "white" if marker == "s" else color
    ax.plot([x], [y], marker=marker, linestyle="", color=color, markersize=5, markerfacecolor=face, zorder=3)


def _head_keys(rows: Iterable[ProbeRow]) -> list[Line2D]:
    shown = {row.head for row in rows}
    return [_key(label, INK, dash, marker) for head, (label, marker, dash) in HEADS.items() if head in shown]


def draw_layers(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Validation scores by layer: a row of panels for each encoder, a column for each task.

    A mark stands at the layer that was chosen; what has one layer only is a line across every panel.
    """
    layered = [row for row in rows if not _is_baseline(row)]
    if not layered:
        return _note("nothing with layers was probed", title)
    encoders = list(dict.fromkeys((row.encoder, row.pooling) for row in layered))
    tasks = list(dict.fromkeys(row.task for row in layered))
    figure, axes = _subplots(len(encoders) * len(tasks), len(tasks), height=2.3, extra=0.6)
    for ax, (encoder, task) in zip(axes, product(encoders, tasks), strict=True):
        for row in rows:
            if row.task == task and (_is_baseline(row) or (row.encoder, row.pooling) == encoder):
                _draw_layer_line(ax, row)
        _title(ax, _short(task, 40))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if task == tasks[0]:
            name = f"{_short(encoder[0], 24)} ({encoder[1]})\n" if len(encoders) > 1 else ""
            ax.set_ylabel(f"{name}validation {layered[0].metric}", fontsize=NORMAL)
    for ax in axes[-len(tasks) :]:
        ax.set_xlabel("layer (0: what enters the first block)", fontsize=NORMAL)
    looks = sorted({_look(row.variant) for row in rows})
    keys: list[Artist] = [Patch(color=color, label=label) for _, label, color in looks]
    _head(figure, title, [*keys, *_head_keys(rows)])
    return figure


def _draw_layer_line(ax: Axes, row: ProbeRow) -> None:
    color, dash = _look(row.variant)[2], HEADS[row.head][2]
    if _is_baseline(row):
        ax.axhline(row.valid_value, color=color, linestyle=dash, linewidth=1.4)
        return
    values = row.valid_by_layer
    ax.plot(range(len(values)), values, color=color, linestyle=dash, linewidth=1.4)
    _draw_mark(ax, row, float(row.layer), values[row.layer])


def _subplots(count: int, columns: int, height: float, extra: float, share: str = "") -> tuple[Figure, list[Axes]]:
    """Panels `height` inches high, `extra` inches for heading and axis label; `share` is an axis."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height + extra), dpi=110, facecolor="white", layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share == "x", sharey=share == "y").flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.set_axisbelow(True)
        ax.grid(visible=True, color=PALE, linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set(color=GREY, linewidth=0.7)
        ax.tick_params(labelsize=SMALL, labelcolor=INK, color=GREY, width=0.7, length=3)
    return figure, axes[:count]


def _title(ax: Axes, text: str, keys: Sequence[Line2D] = ()) -> None:
    """Title with the panel's legend on a line of its own below: nothing covers a curve."""
    ax.set_title(text, loc="left", fontsize=NORMAL, color=INK, pad=17 if keys else 6)
    if keys:
        style: dict[str, object] = {"handlelength": 1.6, "handletextpad": 0.4, "columnspacing": 0.9}
        style |= {"bbox_to_anchor": (0, 1), "fontsize": SMALL - 0.5, "borderpad": 0.2, "frameon": False}
        ax.legend(handles=keys, loc="lower left", ncols=len(keys), borderaxespad=0, **style)


def _head(figure: Figure, title: str, keys: Sequence[Artist]) -> None:
    """Title at the left, the common legend below it."""
    font = {"size": NORMAL + 2, "weight": "bold"}
    style = {"title": title or None, "title_fontproperties": font, "fontsize": SMALL + 0.5, "borderpad": 0.1}
    style |= {"ncols": max(1, min(len(keys), 6)), "alignment": "left", "frameon": False}
    figure.legend(handles=list(keys), loc="outside upper left", **style)


def _key(label: str, color: str, dash: Dash, marker: str = "") -> Line2D:
    face = "white" if marker == "s" else color
    return Line2D([], [], color=color, ls=dash, lw=1.4, marker=marker, ms=5, mfc=face, label=label)


def _note(text: str, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.8), dpi=110, facecolor="white")
    figure.text(0.008, 0.2, text, fontsize=NORMAL, color=GREY)
    _head(figure, title, [])
    return figure


def _short(name: str, length: int) -> str:
    """The name with its middle left out if it is too long: both ends tell runs apart."""
    shown = name if len(name) <= length else f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"
    return shown.replace("$", r"\$")
