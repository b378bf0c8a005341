"""Figures of many results: scores by task, validation scores by layer, scores by degradation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, product

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.rows import STATISTICS, ProbeRow
from jepa_audio.report import style

VARIANTS = {
    "statistics": ("log-mel statistics", style.PURPLE),
    "random": ("random-init baseline", style.GREY),
    "context": ("context encoder", style.BLUE),
    "target": ("target encoder", style.ORANGE),
    "function": ("function", style.GREEN),
}
"""Label and colour by variant, in drawing order."""
HEADS = {
    "mlp": ("MLP", "o", style.SOLID),
    "logistic": ("logistic regression", "D", style.SOLID),
    "ridge": ("ridge regression", "^", style.SOLID),
    "knn": ("k nearest neighbours", "s", style.DASHED),
}
"""Label, marker and dash by kind of head."""
CHANCE = style.line_handle("chance", style.INK, style.DOTTED)
COMBINED = {"weighted sum": "sum", "all layers": "all"}
"""Inputs of a head other than single layers, with their labels."""


def variant_style(variant: str) -> tuple[int, str, str]:
    """Position in the order, label and colour; `random-3` is a random-init baseline with seed 3."""
    kind, _, seed = variant.partition("-")
    known = kind if kind in VARIANTS else "function"
    label, color = VARIANTS[known]
    return list(VARIANTS).index(known), label + (f", seed {seed}" if seed else ""), color


def _has_layers(row: ProbeRow) -> bool:
    return row.variant != STATISTICS


def draw_probe(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Test scores with 95 % intervals: a panel for each task, a line for each variant."""
    if not rows:
        return style.note_figure("nothing was probed", title)
    lines = list(_probe_lines(rows))
    heights = {key: float(y) for y, (_, key) in enumerate(lines)}
    tasks = list(dict.fromkeys(row.task for row in rows))
    height = 0.65 + 0.27 * len(lines)
    figure, axes = style.small_multiples(len(tasks), 3, height, extra=0.6, share="y")
    for ax, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        for row in of_task:
            y = heights[row.encoder, row.pooling, row.variant] + 0.27 * (row.head == "knn")
            color = variant_style(row.variant)[2]
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
        keys = {(row.pooling, variant_style(row.variant), row.variant) for row in of_encoder}
        for pooling, (_, label, _), variant in sorted(keys):
            suffix = f", {pooling}" if several_poolings else ""
            yield label + suffix, (encoder, pooling, variant)


def _draw_marker(ax: Axes, row: ProbeRow, x: float, y: float) -> None:
    color, marker = variant_style(row.variant)[2], HEADS[row.head][1]
    face = "white" if marker == "s" else color
    ax.plot([x], [y], marker=marker, ls="", color=color, ms=5, mfc=face, zorder=3)


def _head_handles(rows: Iterable[ProbeRow]) -> list[Line2D]:
    shown = {row.head for row in rows}
    return [
        style.line_handle(label, style.INK, dash, marker)
        for head, (label, marker, dash) in HEADS.items()
        if head in shown
    ]


def draw_layers(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Validation scores by layer: rows of panels for each encoder, a panel for each task.

    A marker is at the selected layer. Log-mel statistics have one layer and are a horizontal line
    in every panel. Combinations of layers are at the right, with a gap.
    """
    layered = [row for row in rows if _has_layers(row)]
    if not layered:
        return style.note_figure("nothing with layers was probed", title)
    encoders = list(dict.fromkeys((row.encoder, row.pooling) for row in layered))
    tasks = list(dict.fromkeys(row.task for row in layered))
    columns = -(-len(tasks) // -(-len(tasks) // 4))
    # Empty panels fill the last row of each encoder.
    tasks += [""] * (-len(tasks) % columns)
    figure, axes = style.small_multiples(len(encoders) * len(tasks), columns, height=2.3, extra=0.6)
    for ax, (encoder, task) in zip(axes, product(encoders, tasks), strict=True):
        if not task:
            ax.remove()
            continue
        shown = [
            row
            for row in rows
            if row.task == task and (not _has_layers(row) or (row.encoder, row.pooling) == encoder)
        ]
        for row in shown:
            _draw_layer_scores(ax, row)
        style.title_panel(ax, style.shorten(task, 40))
        _label_layers(ax, [row for row in shown if _has_layers(row)])
        is_first = len(encoders) > 1 and task == tasks[0]
        name = f"{style.shorten(encoder[0], 24)}\n({encoder[1]})\n" if is_first else ""
        ax.set_ylabel(f"{name}validation {shown[0].metric}" if shown else name)
        ax.set_xlabel("layer")
    styles = sorted({variant_style(row.variant) for row in rows})
    handles: list[Artist] = [Patch(color=color, label=label) for _, label, color in styles]
    style.title_figure(figure, title, [*handles, *_head_handles(rows)])
    return figure


def _draw_layer_scores(ax: Axes, row: ProbeRow) -> None:
    color, dash = variant_style(row.variant)[2], HEADS[row.head][2]
    if not _has_layers(row):
        ax.axhline(row.valid, color=color, linestyle=dash, linewidth=1.4)
        return
    values = dict(zip(row.layers, row.valid_by_layer, strict=True))
    positions = _layer_positions(row.layers)
    single = [name for name in values if name not in COMBINED]
    xs, ys = [positions[name] for name in single], [values[name] for name in single]
    ax.plot(xs, ys, color=color, linestyle=dash, linewidth=1.4)
    for name, x in positions.items():
        if name in COMBINED:
            ax.plot([x], [values[name]], marker="_", color=color, markersize=9)
        if name in row.layer.split(", "):
            _draw_marker(ax, row, x, values[name])


def _layer_positions(layers: Sequence[str]) -> dict[str, float]:
    """The x positions of layers in their order; combinations follow after a gap."""
    single = [name for name in layers if name not in COMBINED]
    combined = [name for name in layers if name in COMBINED]
    positions = {name: float(number) for number, name in enumerate(single)}
    return positions | {
        name: len(single) + 0.5 + 1.5 * number for number, name in enumerate(combined)
    }


def _label_layers(ax: Axes, rows: Sequence[ProbeRow]) -> None:
    """Label about five single layers and every combination."""
    positions = _layer_positions(max((row.layers for row in rows), key=len, default=()))
    single = [name for name in positions if name not in COMBINED]
    shown = single[:: -(-len(single) // 5) or 1]
    if len(positions) > len(single):
        # The label of the last layer would touch those of the combinations.
        shown = [name for name in shown if name != single[-1]]
        shown += [name for name in positions if name in COMBINED]
    labels = [
        COMBINED.get(name, "in" if name == "input" else name.removeprefix("block "))
        for name in shown
    ]
    ax.set_xticks(
        [positions[name] for name in shown], [style.shorten(label, 8) for label in labels]
    )


def draw_robustness(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Scores on degraded clips of one task: a panel for each condition, a curve for each encoder.

    All panels have one scale. Levels go from mild to strong at equal distances. A dashed line is
    the score on the clean clips.
    """
    rows = [row for row in rows if row.robustness]
    if not rows:
        return style.note_figure("nothing was probed on degraded clips", title)
    conditions = list(dict.fromkeys(name for row in rows for name in row.robustness or ()))
    figure, axes = style.small_multiples(len(conditions), 3, height=2.5, extra=0.7, share="y")
    styles = _encoder_styles(rows)
    for ax, condition in zip(axes, conditions, strict=True):
        for row in rows:
            if row.robustness and condition in row.robustness:
                _draw_sweep(ax, row, condition, *styles[_encoder_label(row)])
        if (chance := rows[0].chance) is not None:
            ax.axhline(chance, color=style.INK, linewidth=1, linestyle=style.DOTTED)
        style.title_panel(ax, condition)
        unit = f"level in {SWEEPS[condition][0].unit}, " if condition in SWEEPS else ""
        ax.set_xlabel(f"{unit}from mild to strong")
    for ax in axes[::3]:
        ax.set_ylabel(f"test {rows[0].metric}")
    handles = [
        style.line_handle(label, color, style.SOLID, marker)
        for label, (color, marker) in styles.items()
    ]
    handles += [style.line_handle("clean", style.INK, style.DASHED), CHANCE]
    style.title_figure(figure, title, handles)
    return figure


def _draw_sweep(ax: Axes, row: ProbeRow, condition: str, color: str, marker: str) -> None:
    levels, scores = zip(*(row.robustness or {})[condition], strict=True)
    positions = range(len(levels))
    ax.plot(positions, scores, color=color, linewidth=1.4, marker=marker, markersize=4)
    ax.plot([0, len(levels) - 1], [row.value] * 2, color=color, ls=style.DASHED, lw=1, alpha=0.8)
    ax.set_xticks(positions, [f"{level:g}" for level in levels])


def _encoder_label(row: ProbeRow) -> str:
    return f"{style.shorten(row.encoder, 28)}, {variant_style(row.variant)[1]}"


def _encoder_styles(rows: Iterable[ProbeRow]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every encoder; all random-init baselines are grey."""
    trained = cycle(product("o^Dv", style.PALETTE))
    styles: dict[str, tuple[str, str]] = {}
    for row in rows:
        if (label := _encoder_label(row)) not in styles:
            marker, color = ("o", style.GREY) if row.is_random_init else next(trained)
            styles[label] = color, marker
    return styles
