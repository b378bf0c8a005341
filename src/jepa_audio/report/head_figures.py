"""Figures of one result: its search over layers and settings, and its errors by class."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
from jepa_audio.report.probe_figures import split_layers

# Of more classes, those with the most errors are drawn.
MANY_CLASSES = 30
# Bars in one column; more bars than FEW_BARS have two columns.
MAX_BARS, FEW_BARS = 32, 12


def draw_head(row: ProbeRow, evidence: Evidence) -> dict[str, Figure]:
    """The figures of a result by name.

    "grid" are the validation scores of the search. "classes" are the recall of classes, the average
    precision of tags, or predicted against true numbers. "confusion" is the confusion matrix.
    """
    grid = draw_grid(row)
    match label_kind(row, evidence):
        case "multiclass":
            known = evidence.labels >= 0  # an unknown class has the label -1
            predicted = evidence.predictions[known].argmax(axis=1)
            numbers = range(len(row.class_names))
            counts = confusion_matrix(evidence.labels[known], predicted, labels=numbers)
            recall, confusion = _draw_recall(row, counts), _draw_confusion(row, counts)
            return {"grid": grid, "classes": recall, "confusion": confusion}
        case "multilabel":
            return {"grid": grid, "classes": _draw_tags(row, evidence)}
        case "regression":
            return {"grid": grid, "classes": _draw_scatter(row, evidence)}
    return {"grid": grid}


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


def draw_grid(row: ProbeRow) -> Figure:
    """Validation scores by layer (the first at the bottom) and setting; the selected is framed."""
    grid = np.where(np.isfinite(row.valid_grid), row.valid_grid, np.nan)
    # Heads that diverged must not make all others look alike, so low scores share one colour.
    finite = grid[np.isfinite(grid)] if np.isfinite(grid).any() else np.array([0.0, 1.0])
    high, low = finite.max(), finite.min()
    bound = max(low, high - 4 * (high - np.median(finite)))
    norm = Normalize(bound if bound < high else low, high if high > low else low + 1, clip=True)
    single, combined = split_layers(row.layers)
    parts = [part for part in (combined, single[::-1]) if part]
    figure = style.new_figure(max(6.5, 1.9 + 0.85 * len(row.settings)), 1.5 + 0.27 * len(grid))
    ratios = {"height_ratios": list(map(len, parts))}
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True, gridspec_kw=ratios).flat
    for ax, layers in zip(axes, parts, strict=True):
        values = grid[[row.layers.index(layer) for layer in layers]]
        ax.imshow(norm(values), cmap="Blues", vmin=0, vmax=1.1, aspect="auto")
        ax.set_facecolor(style.VEIL)
        for (y, x), value in np.ndenumerate(values):
            text = f"{value:.3f}" if np.isfinite(value) else "not finite"
            color = "white" if norm(value) > 0.6 else style.INK
            ax.text(x, y, text, ha="center", va="center", fontsize=style.SMALL, color=color)
            if (layers[y], row.settings[x]) == (row.layer, row.setting):
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, zorder=5, clip_on=False)
                frame.set(edgecolor=style.RED, linewidth=2.2)
                ax.add_patch(frame)
        ax.set_yticks(range(len(layers)), [style.shorten(layer, 24) for layer in layers])
        ax.tick_params(labelsize=style.SMALL, labelcolor=style.INK, length=0)
        ax.spines[:].set_visible(False)
    # 5e-5, not 5e-05.
    settings = [re.sub(r"e\+?(-?)0*", r"e\1", f"{setting:g}") for setting in row.settings]
    axes[-1].set_xticks(range(len(settings)), settings)
    axes[-1].set_xlabel(f"{row.setting_name}; validation {row.metric}", fontsize=style.NORMAL)
    selected = f"selected; test {row.score}"
    frame_handle = Patch(facecolor="white", edgecolor=style.RED, linewidth=2, label=selected)
    style.title_figure(figure, _title(row), [frame_handle])
    return figure


def _draw_confusion(row: ProbeRow, counts: Int[np.ndarray, "C C"]) -> Figure:
    """Confusion matrix, in percent of the units of each class."""
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")
    shown = np.sort(order[:MANY_CLASSES])
    units = counts.sum(axis=1)
    percent = 100 * counts / np.maximum(units, 1)[:, None]
    side = 2.6 + 0.27 * len(shown)
    figure = style.new_figure(max(side, 6.0), side)
    ax = figure.subplots()
    names = [_class_name(row.class_names[number], 22) for number in shown]
    display = ConfusionMatrixDisplay(percent[np.ix_(shown, shown)], display_labels=names)
    colors = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 110}, "colorbar": False}
    fonts = {"text_kw": {"fontsize": style.SMALL - 1}, "xticks_rotation": 90}
    display.plot(ax=ax, values_format=".0f", **fonts, **colors)
    for text in display.text_.flat:
        if text.get_text() == "0":
            text.remove()
    labels = [f"{name} ({count})" for name, count in zip(names, units[shown], strict=True)]
    ax.set_yticks(range(len(shown)), labels)
    ax.tick_params(labelsize=style.SMALL, labelcolor=style.INK, length=0)
    ax.spines[:].set_color(style.PALE)
    ax.set_xlabel("predicted class, in percent of the true class", fontsize=style.NORMAL)
    ax.set_ylabel("true class (test units)", fontsize=style.NORMAL)
    style.title_figure(figure, _title(row))
    if len(shown) < len(counts):
        style.title_panel(ax, f"the {len(shown)} of {len(counts)} classes with most errors")
    return figure


def _draw_recall(row: ProbeRow, confusions: Int[np.ndarray, "C C"]) -> Figure:
    counts, hits = confusions.sum(axis=1), np.diag(confusions)
    scores = np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)

    def mark(ax: Axes, y: int, number: int) -> None:
        if counts[number]:
            test = binomtest(int(hits[number]), int(counts[number]))
            ends = test.proportion_ci(method="wilson")
            ax.plot([ends.low, ends.high], [y, y], color=style.INK, linewidth=1)

    interval = style.line_handle("95 % interval (Wilson)", style.INK)
    return _draw_bars(row, "recall", scores, counts, mark, interval)


def _draw_tags(row: ProbeRow, evidence: Evidence) -> Figure:
    labels = evidence.labels.astype(int)
    counts = labels.sum(axis=0)
    scores = np.full(len(counts), np.nan)
    for number in np.flatnonzero(counts).tolist():
        scores[number] = average_precision_score(labels[:, number], evidence.predictions[:, number])

    def mark(ax: Axes, y: int, number: int) -> None:
        chance = counts[number] / len(labels)
        ax.plot([chance, chance], [y - 0.42, y + 0.42], color=style.ORANGE, linewidth=1.8)

    chance_handle = style.line_handle("share of units with the tag: chance", style.ORANGE)
    return _draw_bars(row, "average precision", scores, counts, mark, chance_handle)


def _draw_bars(
    row: ProbeRow,
    score_name: str,
    scores: Float[np.ndarray, " C"],
    counts: Int[np.ndarray, " C"],
    mark: Callable[[Axes, int, int], None],
    mark_handle: Line2D,
) -> Figure:
    """Bars in columns, from the best class to the worst, then classes without a unit.

    `mark` draws on the bar of a class, given the panel, the position of the bar and the class.
    """
    order = np.argsort(-np.nan_to_num(scores, nan=-1.0), kind="stable").tolist()
    num_columns = max(-(-len(order) // MAX_BARS), 2 if len(order) > FEW_BARS else 1)
    num_bars = -(-len(order) // num_columns)
    columns = [order[start : start + num_bars] for start in range(0, len(order), num_bars)]
    height = 0.6 + 0.2 * num_bars
    figure, axes = style.small_multiples(len(columns), len(columns), height, extra=0.7)
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
        for y, number in enumerate(column):
            mark(ax, y, number)
    style.title_figure(figure, _title(row), [Patch(color=style.SKY, label=score_name), mark_handle])
    return figure


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
    diagonal = style.line_handle("prediction equals label", style.GREY, style.DASHED)
    style.title_figure(figure, _title(row), [diagonal])
    return figure


def _class_name(name: str, length: int) -> str:
    """Without the group that MTG-Jamendo writes before a tag."""
    return style.shorten(name.rpartition("---")[2], length)


def _title(row: ProbeRow) -> str:
    return f"{row.task}: {style.shorten(row.encoder, 36)}, {row.variant}"
