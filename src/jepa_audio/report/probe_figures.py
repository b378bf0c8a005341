"""Figures of many results: scores by task, validation scores by layer, scores by degradation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, product
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.rows import RANDOM_INIT, STATISTICS, ProbeRow
from jepa_audio.report import style


class VariantStyle(NamedTuple):
    """How a variant of an encoder is drawn, and its position in the legend."""

    order: int
    label: str
    color: str


VARIANTS = {
    STATISTICS: VariantStyle(0, "log-mel statistics", style.PURPLE),
    RANDOM_INIT: VariantStyle(1, "random-init baseline", style.GREY),
    "context": VariantStyle(2, "context encoder", style.BLUE),
    "target": VariantStyle(3, "target encoder", style.ORANGE),
    "function": VariantStyle(4, "function", style.GREEN),
}
HEADS = {
    "mlp": ("MLP", "o", style.SOLID),
    "logistic": ("logistic regression", "D", style.SOLID),
    "ridge": ("ridge regression", "^", style.SOLID),
    "attentive": ("attentive pooling", "v", style.SOLID),
    "knn": ("k nearest neighbours", "s", style.DASHED),
    "finetune": ("fine-tuned", "P", style.SOLID),
}
"""Label, marker and dash by kind of head."""
CHANCE = style.line_handle("chance", style.INK, style.DOTTED)
COMBINED = {"weighted sum": "sum", "all layers": "all"}
"""Inputs of a head other than single layers, with their labels."""


def variant_style(variant: str) -> VariantStyle:
    """The style of a variant; `random-3` is a random-init baseline with seed 3."""
    kind, _, seed = variant.partition("-")
    found = VARIANTS.get(kind, VARIANTS["function"])
    return found._replace(label=f"{found.label}, seed {seed}") if seed else found


def head_kind(head: str) -> str:
    """The key of a head in `HEADS`; fine-tuned heads of all modes have one style."""
    return head.partition("-")[0]


def split_layers(layers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of single layers and of combinations of layers."""
    single = [name for name in layers if name not in COMBINED]
    return single, [name for name in layers if name in COMBINED]


def _has_layers(row: ProbeRow) -> bool:
    return row.variant != STATISTICS


def draw_probe(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Test scores with 95 % intervals: a panel for each task, a line for each variant."""
    lines = list(_probe_lines(rows))
    heights = {key: float(y) for y, (_, key) in enumerate(lines)}
    tasks = list(dict.fromkeys(row.task for row in rows))
    height = 0.65 + 0.27 * len(lines)
    figure, axes = style.small_multiples(len(tasks), 3, height, extra=0.6, share="y")
    for ax, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        for row in of_task:
            y = heights[row.encoder, row.pooling, row.variant] + 0.27 * (row.head == "knn")
            color = variant_style(row.variant).color
            ax.plot([row.score.low, row.score.high], [y, y], color=color, linewidth=2, alpha=0.6)
            _draw_marker(ax, row, row.value, y)
        if (chance := of_task[0].chance) is not None:
            ax.axvline(chance, color=style.INK, linewidth=1, linestyle=style.DOTTED)
        ax.tick_params(axis="y", length=0, grid_alpha=0)
        style.title_panel(ax, style.shorten(task, 40))
        ax.set_xlabel(f"test {of_task[0].metric}, 95 % interval")
    for ax in axes[::3]:
        ax.set(yticks=range(len(lines)), yticklabels=[label for label, _ in lines])
        ax.set_ylim(len(lines) - 0.3, -0.7)
        for text, (_, key) in zip(ax.get_yticklabels(), lines, strict=True):
            text.set_fontweight("normal" if key else "bold")
    style.title_figure(figure, title, [*_head_handles(rows), CHANCE])
    return figure


def _probe_lines(rows: Sequence[ProbeRow]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Label and (encoder, pooling, variant) from top to bottom; the key of a heading is empty."""
    several_poolings = len({row.pooling for row in rows if _has_layers(row)}) > 1
    for encoder in dict.fromkeys(row.encoder for row in sorted(rows, key=_has_layers)):
        of_encoder = [row for row in rows if row.encoder == encoder]
        if any(map(_has_layers, of_encoder)):
            yield style.shorten(encoder, 36), ()
        several = several_poolings or len({row.pooling for row in of_encoder}) > 1
        keys = {(row.pooling, variant_style(row.variant), row.variant) for row in of_encoder}
        for pooling, found, variant in sorted(keys):
            suffix = f", {pooling}" if several else ""
            yield found.label + suffix, (encoder, pooling, variant)


def _draw_marker(ax: Axes, row: ProbeRow, x: float, y: float) -> None:
    color, marker = variant_style(row.variant).color, HEADS[head_kind(row.head)][1]
    face = "white" if marker == "s" else color
    ax.plot([x], [y], marker=marker, ls="", color=color, ms=5, mfc=face, zorder=3)


def _head_handles(rows: Iterable[ProbeRow]) -> list[Line2D]:
    shown = {head_kind(row.head) for row in rows}
    return [
        style.line_handle(label, style.INK, dash, marker)
        for head, (label, marker, dash) in HEADS.items()
        if head in shown
    ]


def draw_layers(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Validation scores by layer: a panel for each encoder and task.

    A marker is at the selected layer. Log-mel statistics have one layer and are a horizontal line
    in every panel, one for each of their poolings. Combinations of layers are at the right, with a
    gap.
    """
    layered = [row for row in rows if _has_layers(row)]
    if not layered:
        return style.note_figure("nothing with layers was probed", title)
    encoders = dict.fromkeys((row.encoder, row.pooling) for row in layered)
    tasks = dict.fromkeys(row.task for row in layered)
    panels = list(product(encoders, tasks))
    figure, axes = style.small_multiples(len(panels), min(len(tasks), 4), height=2.3, extra=0.6)
    for ax, (encoder, task) in zip(axes, panels, strict=True):
        of_task = [row for row in rows if row.task == task]
        for row in of_task:
            if not _has_layers(row):
                color, dash = variant_style(row.variant).color, HEADS[head_kind(row.head)][2]
                ax.axhline(row.valid, color=color, linestyle=dash, linewidth=1.4)
        _draw_layer_scores(ax, [row for row in of_task if (row.encoder, row.pooling) == encoder])
        name = f": {', '.join(encoder)}" if len(encoders) > 1 else ""
        style.title_panel(ax, style.shorten(task + name, 40))
        ax.set_ylabel(f"validation {of_task[0].metric}")
        ax.set_xlabel("layer")
    styles = sorted({variant_style(row.variant) for row in rows})
    handles: list[Artist] = [Patch(color=found.color, label=found.label) for found in styles]
    style.title_figure(figure, title, [*handles, *_head_handles(rows)])
    return figure


def _draw_layer_scores(ax: Axes, rows: Sequence[ProbeRow]) -> None:
    """Curves over single layers, and dashes at combinations; about five layers are labelled."""
    for row in rows:
        color, dash = variant_style(row.variant).color, HEADS[head_kind(row.head)][2]
        values = dict(zip(row.layers, row.valid_by_layer, strict=True))
        positions = _layer_positions(row.layers)
        curve = [values[name] for name in split_layers(row.layers)[0]]
        ax.plot(range(len(curve)), curve, color=color, linestyle=dash, linewidth=1.4)
        for name, x in positions.items():
            if name in COMBINED:
                ax.plot([x], [values[name]], marker="_", color=color, markersize=9)
            if name in row.layer.split(", "):
                _draw_marker(ax, row, x, values[name])
    positions = _layer_positions(max((row.layers for row in rows), key=len, default=()))
    single, combined = split_layers(list(positions))
    shown = single[:: -(-len(single) // 5) or 1]
    if combined:
        # The label of the last layer would touch those of the combinations.
        shown = [name for name in shown if name != single[-1]] + combined
    names = {"input": "in"} | COMBINED
    labels = [style.shorten(names.get(name, name.removeprefix("block ")), 8) for name in shown]
    ax.set_xticks([positions[name] for name in shown], labels)


def _layer_positions(layers: Sequence[str]) -> dict[str, float]:
    """The x positions of layers in their order; combinations follow after a gap."""
    single, combined = split_layers(layers)
    positions = {name: float(number) for number, name in enumerate(single)}
    return positions | {
        name: len(single) + 0.5 + 1.5 * number for number, name in enumerate(combined)
    }


def draw_robustness(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Scores on degraded clips of one task: a panel for each condition, a curve for each encoder.

    All panels have one scale. Levels go from mild to strong at equal distances. A dashed line is
    the score on the clean clips.
    """
    conditions = list(dict.fromkeys(name for row in rows for name in row.robustness or ()))
    figure, axes = style.small_multiples(len(conditions), 3, height=2.5, extra=0.7, share="y")
    unused_styles = cycle(product("o^Dv", style.PALETTE))
    handles: dict[str, Line2D] = {}
    several_poolings = len({row.pooling for row in rows}) > 1
    for row in rows:
        label = f"{style.shorten(row.encoder, 28)}, {variant_style(row.variant).label}"
        label += f", {row.pooling}" if several_poolings else ""
        if label not in handles:
            # All random-init baselines are grey.
            is_random = row.variant.startswith(RANDOM_INIT)
            marker, color = ("o", style.GREY) if is_random else next(unused_styles)
            handles[label] = style.line_handle(label, color, style.SOLID, marker)
        for ax, condition in zip(axes, conditions, strict=True):
            if row.robustness and condition in row.robustness:
                levels, scores = zip(*row.robustness[condition], strict=True)
                positions, ends = range(len(levels)), [0, len(levels) - 1]
                handle = handles[label]
                curve = ax.plot(positions, scores, lw=1.4, marker=handle.get_marker(), ms=4)
                curve += ax.plot(ends, [row.value] * 2, ls=style.DASHED, lw=1, alpha=0.8)
                for line in curve:
                    line.set_color(handle.get_color())
                ax.set_xticks(positions, [f"{level:g}" for level in levels])
    for ax, condition in zip(axes, conditions, strict=True):
        if (chance := rows[0].chance) is not None:
            ax.axhline(chance, color=style.INK, linewidth=1, linestyle=style.DOTTED)
        style.title_panel(ax, condition)
        unit = f"level in {SWEEPS[condition][0].unit}, " if condition in SWEEPS else ""
        ax.set_xlabel(f"{unit}from mild to strong")
    for ax in axes[::3]:
        ax.set_ylabel(f"test {rows[0].metric}")
    clean = style.line_handle("clean", style.INK, style.DASHED)
    style.title_figure(figure, title, [*handles.values(), clean, CHANCE])
    return figure
