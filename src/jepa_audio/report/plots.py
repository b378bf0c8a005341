"""Pictures: masks on a spectrogram, curves of runs, and what every picture looks like; arrays in, `Figure` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from jepa_audio.steps.grid import Grid, Masks

Curve = tuple[np.ndarray, np.ndarray]  # optimizer steps, values
Run = Mapping[str, Curve]  # by metric key

# The colours of Okabe and Ito, which colour-blind readers tell apart too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = PALETTE
INK, GREY, PALE, VEIL = "#222222", "#767676", "#EBEBEB", "#CFCFCF"
Dash = tuple[float, tuple[float, ...]]
SOLID, DASHED, DOTTED, MIXED = (
    (0.0, ()),
    (0.0, (4.0, 1.5)),
    (0.0, (1.2, 1.2)),
    (0.0, (6.0, 1.5, 1.2, 1.5)),
)
DASHES: tuple[Dash, ...] = (SOLID, DASHED, DOTTED, MIXED)
SMALL, NORMAL, WIDTH = 8.0, 9.0, 10.5  # points, points, inches
TINT, VEILED = 0.6, 0.85  # opacity of a target group on the spectrogram, of the veil
STRIPES = 12  # of a token's cell: 2, 3, 4 or 6 groups share it evenly
MANY_POINTS = 200  # longer series get a running mean


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
    watched = sorted(tuple(key.split("/")[1:]) for key in keys if is_online_score(key))
    probes = {
        task: {f"probe/{task}/{m}": m, f"probe/{task}/twin": "random twin"} for task, m in watched
    }
    loss = {"train/loss": "train", "valid/loss": "valid"}
    loss |= {
        "collapse/loss_mean_target": "mean target",
        "collapse/loss_nearest_context": "nearest context",
    }
    latents = ("context", "target", "prediction")
    rank, std = ({f"collapse/{name}_{what}": name for name in latents} for what in ("rank", "std"))
    return [
        Panel("Loss, beside two trivial predictors", loss, ("mean target", "nearest context")),
        *(
            Panel(f"Online probe: {shorten(t, 28)}", two, ("random twin",))
            for t, two in probes.items()
        ),
        Panel("RankMe (effective rank)", rank, alarms=True),
        Panel("Standard deviation", std, alarms=True),
        Panel("Mean cosine between clips", {"collapse/clip_cosine": ""}, alarms=True),
        Panel("Distance of target encoder to encoder", {"collapse/ema_distance": ""}),
        Panel("Gradient norm", {"train/gradient_norm": ""}, log_scale=True),
        Panel("Learning rate", {"lr-*": ""}),
        Panel("Momentum of the target encoder", {"train/momentum": ""}),
        Panel(
            "Seconds of audio per second", {"speed/audio_seconds_per_second": ""}, from_zero=True
        ),
        Panel("Share of time waiting for data", {"speed/data_wait": ""}, from_zero=True),
    ]


def is_online_score(key: str) -> bool:
    """Whether a logged key is the metric of an online probe, not its twin's or their difference."""
    first, *rest = key.split("/")
    return first == "probe" and len(rest) == 2 and rest[1] not in {"twin", "difference"}


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

    A token that several groups share is striped in their colours. On a grid with one frequency row
    every group has a lane of its own instead.

    Args:
        log_spectrogram: of the stretch of the clip that the grid covers, lowest band first.
        grid: of the tokens.
        masks: the draws.
        clip: row of the masks' batch.
        seconds: duration of the stretch.
        title: of the figure.
        band_hz: rising centre frequencies of the bands; bands are numbered if `None`.
    """
    figure, axes = small_multiples(len(masks), 1, height=1.75, extra=0.75, share="x")
    extent = (0.0, seconds, 0.0, float(len(log_spectrogram)))
    low, high = np.percentile(log_spectrogram, (2, 99.8))
    planes = [_planes(grid, draw, clip) for draw in masks]
    overlays = [_paint(*plane) for plane in planes]
    for ax, (context, targets), overlay in zip(axes, planes, overlays, strict=True):
        ax.imshow(log_spectrogram, cmap="Greys", vmin=low, vmax=high, origin="lower", extent=extent)
        ax.imshow(overlay, interpolation="nearest", origin="lower", extent=extent)
        ax.set_aspect("auto")
        _draw_cells(ax, grid, extent)
        title_panel(
            ax, f"context {context.mean():.0%} of the tokens, targets {targets.any(0).mean():.0%}"
        )
        _label_bands(ax, band_hz)
    axes[-1].set_xlabel("seconds", fontsize=NORMAL)
    keys = [Patch(facecolor="white", edgecolor=GREY, label="context")]
    for group, color in zip(
        range(max(len(targets) for _, targets in planes)), cycle(PALETTE), strict=False
    ):
        keys.append(Patch(facecolor=color, alpha=TINT, label=f"target group {group + 1}"))
    if any((overlay[..., 3] == VEILED).any() for overlay in overlays):
        keys.append(Patch(facecolor=VEIL, label="hidden from the context"))
    title_figure(figure, title, keys)
    return figure


def _planes(grid: Grid, masks: Masks, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """Context `[F, T]` and target groups `[M, F, T]` of one clip, bool."""
    row = masks.rows(slice(clip, clip + 1))
    context, targets = (
        part.to_mask(grid.num_tokens).cpu().numpy() for part in (row.context, row.targets)
    )
    shape = (-1, grid.num_time, grid.num_freq)
    return context.reshape(shape)[0].T, targets.reshape(shape).swapaxes(1, 2)


def _paint(context: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The overlay, RGBA `[F * stripes, T, 4]`, lowest row first."""
    colors = np.array(
        [[*to_rgb(color), TINT] for _, color in zip(targets, cycle(PALETTE), strict=False)]
    )
    veiled = np.where(context[..., None], 0.0, [*to_rgb(VEIL), VEILED])  # [F, T, 4]
    if len(context) == 1:
        return np.where(targets[::-1, 0, :, None], colors[::-1, None], veiled)
    count = targets.sum(axis=0)  # [F, T]
    rank = np.where(
        targets, targets.cumsum(axis=0), 0
    )  # [M, F, T], of a group among those of its token
    stripe = np.arange(STRIPES)[:, None, None]
    group = (rank[:, None] == stripe * count // STRIPES + 1).argmax(axis=0)  # [STRIPES, F, T]
    painted = np.where(count[..., None] > 0, colors[group], veiled)
    return painted.swapaxes(0, 1).reshape(-1, context.shape[1], 4)


def _draw_cells(ax: Axes, grid: Grid, extent: tuple[float, float, float, float]) -> None:
    if grid.num_time <= 128:
        ax.xaxis.set_minor_locator(
            FixedLocator(np.linspace(0, extent[1], grid.num_time + 1).tolist())
        )
    if grid.num_freq <= 32:
        ax.yaxis.set_minor_locator(
            FixedLocator(np.linspace(0, extent[3], grid.num_freq + 1).tolist())
        )
    ax.grid(visible=False)
    ax.grid(which="minor", color=GREY, linewidth=0.5, alpha=0.35)
    ax.tick_params(which="minor", length=0)
    ax.set_axisbelow(False)


def _label_bands(ax: Axes, band_hz: np.ndarray | None) -> None:
    ax.set_ylabel("band" if band_hz is None else "kHz", fontsize=NORMAL)
    if band_hz is not None:
        wanted = [
            hz
            for hz in (125, 500, 1000, 2000, 4000, 8000, 16000)
            if band_hz[0] <= hz <= band_hz[-1]
        ]
        places = np.interp(wanted, band_hz, np.arange(len(band_hz)) + 0.5)
        ax.set_yticks(places, [f"{hz / 1000:g}" for hz in wanted])


def draw_curves(runs: Mapping[str, Run], panels: Sequence[Panel], title: str = "") -> Figure:
    """Curves over optimizer steps. One run: a colour for each series; several: a colour for each run.

    Panels without a finite value are left out. Long series are drawn pale, with their running mean
    on top.
    """
    panels = [panel for panel in panels if any(_has_curves(run, panel) for run in runs.values())]
    if not panels:
        return note_figure("nothing was logged", title)
    figure, axes = small_multiples(len(panels), 3, height=2.2, extra=0.5)
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel, runs)
    for ax in axes[-3:]:
        ax.set_xlabel("optimizer step", fontsize=NORMAL)
    colors = zip(runs, cycle(PALETTE), strict=False)
    keys: list[Artist] = [
        line_key(shorten(name, 40), color, SOLID) for name, color in colors if len(runs) > 1
    ]
    if any(len(_alarms(run)) for run in runs.values()):
        keys.append(Patch(facecolor=RED, alpha=0.2, label="collapse alarm"))
    title_figure(figure, title, keys)
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
                keys[label] = line_key(label, INK if several else color, dash)
        for step in _alarms(run) if panel.alarms else ():
            ax.axvline(step, color=RED, linewidth=3, alpha=0.15, zorder=0)
    title_panel(ax, panel.title, [key for label, key in keys.items() if label])
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
    return any(
        _curve(run, key) for key, label in panel.series.items() if label not in panel.references
    )


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


def small_multiples(
    count: int, columns: int, height: float, extra: float, share: str = ""
) -> tuple[Figure, list[Axes]]:
    """Panels `height` inches high, `extra` inches for heading and axis label; `share` is an axis."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(WIDTH, rows * height + extra), dpi=110, facecolor="white", layout="constrained"
    )
    axes = list(
        figure.subplots(rows, columns, squeeze=False, sharex=share == "x", sharey=share == "y").flat
    )
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.set_axisbelow(True)
        ax.grid(visible=True, color=PALE, linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set(color=GREY, linewidth=0.7)
        ax.tick_params(labelsize=SMALL, labelcolor=INK, color=GREY, width=0.7, length=3)
    return figure, axes[:count]


def title_panel(ax: Axes, text: str, keys: Sequence[Line2D] = ()) -> None:
    """Title with the panel's legend on a line of its own below: nothing covers a curve."""
    ax.set_title(text, loc="left", fontsize=NORMAL, color=INK, pad=17 if keys else 6)
    if keys:
        style: dict[str, object] = {"handlelength": 1.6, "handletextpad": 0.4, "columnspacing": 0.9}
        style |= {
            "bbox_to_anchor": (0, 1),
            "fontsize": SMALL - 0.5,
            "borderpad": 0.2,
            "frameon": False,
        }
        ax.legend(handles=keys, loc="lower left", ncols=len(keys), borderaxespad=0, **style)


def title_figure(figure: Figure, title: str, keys: Sequence[Artist]) -> None:
    """Title at the left, the common legend below it."""
    font = {"size": NORMAL + 2, "weight": "bold"}
    style = {
        "title": title or None,
        "title_fontproperties": font,
        "fontsize": SMALL + 0.5,
        "borderpad": 0.1,
    }
    inches = 0.45 + 0.062 * max((len(str(key.get_label())) for key in keys), default=0)
    columns = max(1, min(len(keys), 6, int(figure.get_figwidth() / inches)))
    style |= {"ncols": columns, "alignment": "left", "frameon": False}
    figure.legend(handles=list(keys), loc="outside upper left", **style)


def line_key(label: str, color: str, dash: Dash, marker: str = "") -> Line2D:
    """What a legend shows of a line."""
    face = "white" if marker == "s" else color
    return Line2D([], [], color=color, ls=dash, lw=1.4, marker=marker, ms=5, mfc=face, label=label)


def note_figure(text: str, title: str) -> Figure:
    """A sentence where there is nothing to draw."""
    figure = Figure(figsize=(WIDTH, 0.8), dpi=110, facecolor="white")
    figure.text(0.008, 0.2, text, fontsize=NORMAL, color=GREY)
    title_figure(figure, title, [])
    return figure


def shorten(name: str, length: int) -> str:
    """The name with its middle left out if it is too long: both ends tell runs apart."""
    shown = (
        name if len(name) <= length else f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"
    )
    return shown.replace("$", r"\$")
