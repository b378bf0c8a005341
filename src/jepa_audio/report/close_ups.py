"""Pictures of one row: which heads were tried, and on which classes the chosen one errs."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, confusion_matrix, r2_score

from jepa_audio.probing.rows import Evidence, ProbeRow
from jepa_audio.report.plots import (
    BLUE,
    DASHED,
    GREY,
    INK,
    NORMAL,
    ORANGE,
    PALE,
    RED,
    SKY,
    SMALL,
    SOLID,
    VEIL,
    line_key,
    note_figure,
    shorten,
    small_multiples,
    title_figure,
    title_panel,
)

COMBINED = {"weighted sum": "sum", "all layers": "all"}
"""What a head can read beside single layers, and its label."""
MANY_CLASSES = 30
LINES, FEW_CLASSES = 32, 12  # bars in a column of `draw_classes`; bars that stand in one


def draw_grid(row: ProbeRow) -> Figure:
    """Validation scores of every layer (from the first, at the bottom) and setting; the chosen head is framed."""
    values = np.array(row.valid_grid, dtype=float)
    values[~np.isfinite(values)] = np.nan
    single = [place for place, name in enumerate(row.layers) if name not in COMBINED]
    parts = [
        part for part in ([i for i in range(len(values)) if i not in single], single[::-1]) if part
    ]
    size = (max(6.5, 1.9 + 0.85 * len(row.settings)), 1.5 + 0.27 * len(values))
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    heights = [len(part) for part in parts]
    axes = figure.subplots(
        len(parts), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    ).flat
    for ax, part in zip(axes, parts, strict=True):
        _draw_heat(ax, values[part], _limits(values))
        ax.set_yticks(range(len(part)), [shorten(row.layers[place], 24) for place in part])
        if (
            row.layer in row.layers
            and row.layers.index(row.layer) in part
            and row.setting in row.settings
        ):
            corner = (
                row.settings.index(row.setting) - 0.5,
                part.index(row.layers.index(row.layer)) - 0.5,
            )
            ax.add_patch(
                Rectangle(
                    corner, 1, 1, fill=False, edgecolor=RED, linewidth=2.2, zorder=5, clip_on=False
                )
            )
    axes[-1].set_xticks(range(len(row.settings)), [_number(setting) for setting in row.settings])
    axes[-1].set_xlabel(f"{row.setting_name}; validation {row.metric}", fontsize=NORMAL)
    chosen = Patch(
        facecolor="white",
        edgecolor=RED,
        linewidth=2,
        label=f"chosen; test {row.scores[row.metric]}",
    )
    title_figure(figure, _title(row), [chosen])
    return figure


def _draw_heat(
    ax: Axes, values: Float[np.ndarray, "rows columns"], limits: tuple[float, float]
) -> None:
    norm = Normalize(*limits, clip=True)
    ax.imshow(norm(values), cmap="Blues", vmin=0, vmax=1.1, aspect="auto")
    ax.set_facecolor(VEIL)
    for (y, x), value in np.ndenumerate(values):
        text = f"{value:.3f}" if np.isfinite(value) else "not finite"
        color = "white" if norm(value) > 0.6 else INK
        ax.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=color)
    ax.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
    ax.spines[:].set_visible(False)


def _limits(values: Float[np.ndarray, "rows columns"]) -> tuple[float, float]:
    """Of the colours; heads that have diverged shall not make all others look alike."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    high, low = finite.max(), finite.min()
    kept = max(low, high - 4 * (high - np.median(finite)))
    return float(kept if kept < high else low), float(high if high > low else low + 1)


def kind_of(
    row: ProbeRow, evidence: Evidence
) -> Literal["multiclass", "multilabel", "regression", "other"]:
    """What sort of answers these are; "other" are annotations in time, which have no class of their own."""
    answers, truth = evidence.answers, evidence.truth
    if answers.shape[1] != len(row.class_names):
        return "other"
    if truth.ndim == 1 and np.issubdtype(truth.dtype, np.integer):
        return "multiclass"
    if truth.shape != answers.shape:
        return "other"
    if any(metric.startswith("r2") for metric in row.scores):
        return "regression"
    return "multilabel" if np.isin(truth, (0, 1)).all() else "other"


def draw_confusion(row: ProbeRow, evidence: Evidence) -> Figure:
    """Which class is taken for which, in percent of the units of each class.

    Of more than 30 classes, those with the most errors are drawn.
    """
    if kind_of(row, evidence) != "multiclass":
        return note_figure("no classes that could be confused", _title(row))
    known = evidence.truth >= 0
    size = len(row.class_names)
    counts = confusion_matrix(
        evidence.truth[known], evidence.answers[known].argmax(axis=1), labels=range(size)
    )
    shown = _most_confused(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = share[np.ix_(shown, shown)]
    side = 2.6 + 0.27 * len(shown)
    figure = Figure(
        figsize=(max(side, 6.0), side), dpi=110, facecolor="white", layout="constrained"
    )
    ax = figure.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1.1)
    for (y, x), value in np.ndenumerate(share):
        if round(100 * value):
            color = "white" if value > 0.6 else INK
            ax.text(
                x,
                y,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=SMALL - 1,
                color=color,
            )
    names = [_class_name(row.class_names[place], 22) for place in shown]
    ax.set_yticks(
        range(len(shown)), [f"{n} ({counts[p].sum()})" for n, p in zip(names, shown, strict=True)]
    )
    ax.set_xticks(range(len(shown)), names, rotation=90)
    ax.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
    ax.spines[:].set_color(PALE)
    ax.set_xlabel("taken for, in percent", fontsize=NORMAL)
    ax.set_ylabel("class (test units)", fontsize=NORMAL)
    title_figure(figure, _title(row), [])
    if len(shown) < size:
        ax.set_title(
            f"the {len(shown)} of {size} classes with most errors",
            fontsize=NORMAL,
            loc="left",
            color=INK,
        )
    return figure


def _most_confused(counts: Int[np.ndarray, "C C"]) -> list[int]:
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")
    return sorted(order[:MANY_CLASSES].tolist())


def draw_classes(row: ProbeRow, evidence: Evidence) -> Figure:
    """Scores class by class: recall, average precision of tags; for numbers, the truth against the answers."""
    kind = kind_of(row, evidence)
    if kind == "multiclass":
        return _draw_recall(row, evidence)
    if kind == "multilabel":
        return _draw_tags(row, evidence)
    if kind == "regression":
        return _draw_scatter(row, evidence)
    return note_figure("no classes", _title(row))


def _draw_recall(row: ProbeRow, evidence: Evidence) -> Figure:
    right = evidence.answers.argmax(axis=1) == evidence.truth
    counts = np.array([(evidence.truth == place).sum() for place in range(len(row.class_names))])
    hits = np.array([right[evidence.truth == place].sum() for place in range(len(row.class_names))])
    ends = np.full((len(counts), 2), np.nan)
    for place in np.flatnonzero(counts).tolist():
        ends[place] = binomtest(int(hits[place]), int(counts[place])).proportion_ci(method="wilson")
    scores = np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)
    keys = [Patch(color=SKY, label="recall"), line_key("95 % interval (Wilson)", INK, SOLID)]
    figure, order, axes = _bars(row, "recall", scores, counts)
    for ax, places in zip(axes, order, strict=True):
        for y, place in enumerate(places):
            ax.plot(ends[place], [y, y], color=INK, linewidth=1)
    title_figure(figure, _title(row), keys)
    return figure


def _draw_tags(row: ProbeRow, evidence: Evidence) -> Figure:
    truth = evidence.truth.astype(int)
    counts = truth.sum(axis=0)
    scores = np.full(len(counts), np.nan)
    for place in np.flatnonzero(counts).tolist():
        scores[place] = average_precision_score(truth[:, place], evidence.answers[:, place])
    figure, order, axes = _bars(row, "average precision", scores, counts)
    for ax, places in zip(axes, order, strict=True):
        for y, place in enumerate(places):
            chance = counts[place] / len(truth)
            ax.plot([chance, chance], [y - 0.42, y + 0.42], color=ORANGE, linewidth=1.8)
    bar = Patch(color=SKY, label="average precision")
    title_figure(
        figure, _title(row), [bar, line_key("share of units with the tag: chance", ORANGE, SOLID)]
    )
    return figure


def _bars(
    row: ProbeRow, of_what: str, scores: Float[np.ndarray, " C"], counts: Int[np.ndarray, " C"]
) -> tuple[Figure, list[list[int]], list[Axes]]:
    """Bars from the best class to the worst, in columns; classes without a unit at the end."""
    order = np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable").tolist()
    num_columns = max(-(-len(order) // LINES), 2 if len(order) > FEW_CLASSES else 1)
    num_lines = -(-len(order) // num_columns)
    columns = [order[start : start + num_lines] for start in range(0, len(order), num_lines)]
    figure, axes = small_multiples(
        len(columns), len(columns), height=0.6 + 0.2 * num_lines, extra=0.7
    )
    for ax, places in zip(axes, columns, strict=True):
        ax.barh(range(len(places)), np.nan_to_num(scores[places]), color=SKY, height=0.78)
        names = [
            _class_name(row.class_names[place], 26 if num_columns < 4 else 14) for place in places
        ]
        ax.set_yticks(
            range(len(places)), [f"{n} ({counts[p]})" for n, p in zip(names, places, strict=True)]
        )
        ax.set_ylim(num_lines - 0.4, -0.6)
        ax.set_xlim(0, 1)
        ax.tick_params(axis="y", length=0, grid_alpha=0)
        ax.set_xlabel(of_what, fontsize=NORMAL)
        title_panel(ax, "class (test units)")
    return figure, columns, axes


def _draw_scatter(row: ProbeRow, evidence: Evidence) -> Figure:
    figure, axes = small_multiples(len(row.class_names), 3, height=3.3, extra=0.6)
    for place, (ax, name) in enumerate(zip(axes, row.class_names, strict=True)):
        truth, answers = evidence.truth[:, place], evidence.answers[:, place]
        ax.axline((0, 0), slope=1, color=GREY, linestyle=DASHED, linewidth=1)
        ax.scatter(truth, answers, s=12, color=BLUE, alpha=0.55, linewidth=0)
        score = r2_score(truth, answers)
        title_panel(ax, f"{_class_name(name, 30)}: R² {score:.3f}, {len(truth)} test units")
        ax.set_xlabel("truth, in deviations of the training split", fontsize=NORMAL)
        ax.set_ylabel("answer", fontsize=NORMAL)
    title_figure(figure, _title(row), [line_key("answer equals truth", GREY, DASHED)])
    return figure


def _class_name(name: str, length: int) -> str:
    """Without the group that MTG-Jamendo writes before a tag."""
    return shorten(name.rpartition("---")[2], length)


def _title(row: ProbeRow) -> str:
    return f"{row.task}: {shorten(row.encoder, 36)}, {row.variant}"


def _number(setting: float) -> str:
    """As short as it can be: 5e-5, not 5e-05."""
    mantissa, _, exponent = f"{setting:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
