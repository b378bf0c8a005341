"""Figures of one result: its search over layers and settings, and its errors by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy.stats import binomtest
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    average_precision_score,
    confusion_matrix,
    r2_score,
)

from jepa_audio.probing.rows import Evidence, ProbeRow
from jepa_audio.report import style
from jepa_audio.report.probe_figures import COMBINED

# Of more classes, those with the most errors are drawn.
MANY_CLASSES = 30
# Bars in one column; more bars than FEW_BARS have two columns.
MAX_BARS, FEW_BARS = 32, 12


def draw_grid(row: ProbeRow) -> Figure:
    """Validation scores by layer (the first at the bottom) and setting; the selected is framed."""
    values = np.array(row.valid_grid, dtype=float)
    values[~np.isfinite(values)] = np.nan
    combined = [number for number, name in enumerate(row.layers) if name in COMBINED]
    single = [number for number, name in enumerate(row.layers) if name not in COMBINED]
    parts = [part for part in (combined, single[::-1]) if part]
    figure = style.new_figure(max(6.5, 1.9 + 0.85 * len(row.settings)), 1.5 + 0.27 * len(values))
    ratios = {"height_ratios": list(map(len, parts))}
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True, gridspec_kw=ratios).flat
    for ax, part in zip(axes, parts, strict=True):
        _draw_heat_map(ax, values[part], _color_limits(values))
        ax.set_yticks(range(len(part)), [style.shorten(row.layers[number], 24) for number in part])
        _frame_selected(ax, row, [row.layers[number] for number in part])
    axes[-1].set_xticks(range(len(row.settings)), list(map(_format_setting, row.settings)))
    axes[-1].set_xlabel(f"{row.setting_name}; validation {row.metric}", fontsize=style.NORMAL)
    selected = f"selected; test {row.score}"
    style.title_figure(
        figure,
        _title(row),
        [Patch(facecolor="white", edgecolor=style.RED, linewidth=2, label=selected)],
    )
    return figure


def _draw_heat_map(
    ax: Axes, values: Float[np.ndarray, "rows columns"], limits: tuple[float, float]
) -> None:
    norm = Normalize(*limits, clip=True)
    ax.imshow(norm(values), cmap="Blues", vmin=0, vmax=1.1, aspect="auto")
    ax.set_facecolor(style.VEIL)
    for (y, x), value in np.ndenumerate(values):
        text = f"{value:.3f}" if np.isfinite(value) else "not finite"
        color = "white" if norm(value) > 0.6 else style.INK
        ax.text(x, y, text, ha="center", va="center", fontsize=style.SMALL, color=color)
    ax.tick_params(labelsize=style.SMALL, labelcolor=style.INK, length=0)
    ax.spines[:].set_visible(False)


def _frame_selected(ax: Axes, row: ProbeRow, layers: Sequence[str]) -> None:
    if row.layer in layers and row.setting in row.settings:
        corner = (row.settings.index(row.setting) - 0.5, layers.index(row.layer) - 0.5)
        ax.add_patch(
            Rectangle(corner, 1, 1, fill=False, ec=style.RED, lw=2.2, zorder=5, clip_on=False)
        )


def _color_limits(values: Float[np.ndarray, "rows columns"]) -> tuple[float, float]:
    """Ends of the colour scale; heads that diverged must not make all others look alike."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    high, low = finite.max(), finite.min()
    bound = max(low, high - 4 * (high - np.median(finite)))
    return float(bound if bound < high else low), float(high if high > low else low + 1)


def label_kind(
    row: ProbeRow, evidence: Evidence
) -> Literal["multiclass", "multilabel", "regression", "other"]:
    """The kind of the labels; "other" are annotations in time, which are not one label per unit."""
    predictions, labels = evidence.predictions, evidence.labels
    if predictions.shape[1] != len(row.class_names):
        return "other"
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return "multiclass"
    if labels.shape != predictions.shape:
        return "other"
    if any(name.startswith("r2") for name in row.scores):
        return "regression"
    return "multilabel" if np.isin(labels, (0, 1)).all() else "other"


def draw_confusion(row: ProbeRow, evidence: Evidence) -> Figure:
    """Confusion matrix, in percent of the units of each class.

    Of more than 30 classes, those with the most errors are drawn.
    """
    if label_kind(row, evidence) != "multiclass":
        return style.note_figure("no classes to confuse", _title(row))
    counts = _count_confusions(row, evidence)
    shown = _most_confused(counts)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.27 * len(shown)
    figure = style.new_figure(max(side, 6.0), side)
    ax = figure.subplots()
    names = [_class_name(row.class_names[number], 22) for number in shown]
    display = ConfusionMatrixDisplay(percent[np.ix_(shown, shown)], display_labels=names)
    colors = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 110}, "colorbar": False}
    display.plot(ax=ax, values_format=".0f", xticks_rotation=90, **colors)
    for text in display.text_.flat:
        text.set_fontsize(style.SMALL - 1)
        if text.get_text() == "0":
            text.remove()
    ax.set_yticks(
        range(len(shown)),
        [f"{name} ({counts[number].sum()})" for name, number in zip(names, shown, strict=True)],
    )
    ax.tick_params(labelsize=style.SMALL, labelcolor=style.INK, length=0)
    ax.spines[:].set_color(style.PALE)
    ax.set_xlabel("predicted class, in percent of the true class", fontsize=style.NORMAL)
    ax.set_ylabel("true class (test units)", fontsize=style.NORMAL)
    style.title_figure(figure, _title(row), [])
    if len(shown) < len(counts):
        note = f"the {len(shown)} of {len(counts)} classes with most errors"
        ax.set_title(note, fontsize=style.NORMAL, loc="left", color=style.INK)
    return figure


def _count_confusions(row: ProbeRow, evidence: Evidence) -> Int[np.ndarray, "C C"]:
    """Units by true and predicted class, without those of an unknown class (label -1)."""
    known = evidence.labels >= 0
    predicted = evidence.predictions[known].argmax(axis=1)
    return confusion_matrix(evidence.labels[known], predicted, labels=range(len(row.class_names)))


def _most_confused(counts: Int[np.ndarray, "C C"]) -> list[int]:
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")
    return sorted(order[:MANY_CLASSES].tolist())


def draw_classes(row: ProbeRow, evidence: Evidence) -> Figure:
    """Recall of classes, average precision of tags, or predicted against true numbers."""
    match label_kind(row, evidence):
        case "multiclass":
            return _draw_recall(row, evidence)
        case "multilabel":
            return _draw_tags(row, evidence)
        case "regression":
            return _draw_scatter(row, evidence)
    return style.note_figure("no classes", _title(row))


def _draw_recall(row: ProbeRow, evidence: Evidence) -> Figure:
    confusions = _count_confusions(row, evidence)
    counts, hits = confusions.sum(axis=1), np.diag(confusions)
    scores = np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)
    figure, axes = _draw_bars(row, "recall", scores, counts)
    for (ax, y), number in axes.items():
        if counts[number]:
            test = binomtest(int(hits[number]), int(counts[number]))
            ends = test.proportion_ci(method="wilson")
            ax.plot([ends.low, ends.high], [y, y], color=style.INK, linewidth=1)
    interval = style.line_handle("95 % interval (Wilson)", style.INK, style.SOLID)
    style.title_figure(figure, _title(row), [Patch(color=style.SKY, label="recall"), interval])
    return figure


def _draw_tags(row: ProbeRow, evidence: Evidence) -> Figure:
    labels = evidence.labels.astype(int)
    counts = labels.sum(axis=0)
    scores = np.full(len(counts), np.nan)
    for number in np.flatnonzero(counts).tolist():
        scores[number] = average_precision_score(labels[:, number], evidence.predictions[:, number])
    figure, axes = _draw_bars(row, "average precision", scores, counts)
    for (ax, y), number in axes.items():
        chance = counts[number] / len(labels)
        ax.plot([chance, chance], [y - 0.42, y + 0.42], color=style.ORANGE, linewidth=1.8)
    chance_handle = style.line_handle(
        "share of units with the tag: chance", style.ORANGE, style.SOLID
    )
    style.title_figure(
        figure, _title(row), [Patch(color=style.SKY, label="average precision"), chance_handle]
    )
    return figure


def _draw_bars(
    row: ProbeRow, score_name: str, scores: Float[np.ndarray, " C"], counts: Int[np.ndarray, " C"]
) -> tuple[Figure, dict[tuple[Axes, int], int]]:
    """Bars in columns, from the best class to the worst, then classes without a unit.

    Returns:
        The figure, and the class of each (panel, height of the bar).
    """
    order = np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable").tolist()
    num_columns = max(-(-len(order) // MAX_BARS), 2 if len(order) > FEW_BARS else 1)
    num_bars = -(-len(order) // num_columns)
    columns = [order[start : start + num_bars] for start in range(0, len(order), num_bars)]
    figure, axes = style.small_multiples(
        len(columns), len(columns), height=0.6 + 0.2 * num_bars, extra=0.7
    )
    length = 26 if num_columns < 4 else 14
    for ax, column in zip(axes, columns, strict=True):
        ax.barh(range(len(column)), np.nan_to_num(scores[column]), color=style.SKY, height=0.78)
        names = [f"{_class_name(row.class_names[n], length)} ({counts[n]})" for n in column]
        ax.set_yticks(range(len(column)), names)
        ax.set_ylim(num_bars - 0.4, -0.6)
        ax.set_xlim(0, 1)
        ax.tick_params(axis="y", length=0, grid_alpha=0)
        ax.set_xlabel(score_name)
        style.title_panel(ax, "class (test units)")
    pairs = zip(axes, columns, strict=True)
    return figure, {(ax, y): number for ax, column in pairs for y, number in enumerate(column)}


def _draw_scatter(row: ProbeRow, evidence: Evidence) -> Figure:
    figure, axes = style.small_multiples(len(row.class_names), 3, height=3.3, extra=0.6)
    for number, (ax, name) in enumerate(zip(axes, row.class_names, strict=True)):
        labels, predictions = evidence.labels[:, number], evidence.predictions[:, number]
        ax.axline((0, 0), slope=1, color=style.GREY, linestyle=style.DASHED, linewidth=1)
        ax.scatter(labels, predictions, s=12, color=style.BLUE, alpha=0.55, linewidth=0)
        score = r2_score(labels, predictions)
        style.title_panel(ax, f"{_class_name(name, 30)}: R² {score:.3f}, {len(labels)} test units")
        ax.set_xlabel("label, in deviations of the training split")
        ax.set_ylabel("prediction")
    style.title_figure(
        figure,
        _title(row),
        [style.line_handle("prediction equals label", style.GREY, style.DASHED)],
    )
    return figure


def _class_name(name: str, length: int) -> str:
    """Without the group that MTG-Jamendo writes before a tag."""
    return style.shorten(name.rpartition("---")[2], length)


def _title(row: ProbeRow) -> str:
    return f"{row.task}: {style.shorten(row.encoder, 36)}, {row.variant}"


def _format_setting(setting: float) -> str:
    """The shortest form: 5e-5, not 5e-05."""
    mantissa, _, exponent = f"{setting:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
