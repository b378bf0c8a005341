"""Pictures of probing: what heads read off, where in the network, under which conditions, and where they err."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, product
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.rows import (
    STATISTICS,
    ProbeRow,
    latest,
    load_evidence,
    mean_over_seeds,
    read_jsonl,
)
from jepa_audio.report.close_ups import COMBINED, draw_classes, draw_confusion, draw_grid, kind_of
from jepa_audio.report.plots import (
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    INK,
    NORMAL,
    ORANGE,
    PALETTE,
    PURPLE,
    SOLID,
    line_key,
    note_figure,
    shorten,
    small_multiples,
    title_figure,
    title_panel,
)

VARIANTS = {
    "statistics": ("log-mel statistics", PURPLE),
    "random": ("random twin", GREY),
    "context": ("context encoder", BLUE),
    "target": ("target encoder", ORANGE),
    "function": ("function", GREEN),
}
"""Label and colour of what is probed, in the order of the pictures."""
HEADS = {
    "mlp": ("MLP", "o", SOLID),
    "logistic": ("logistic regression", "D", SOLID),
    "ridge": ("ridge regression", "^", SOLID),
    "knn": ("k nearest neighbours", "s", DASHED),
}


def draw_probe(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Test scores with their 95 % intervals: a panel for each task, a line for each encoder and variant."""
    if not rows:
        return note_figure("nothing was probed", title)
    lines = list(_probe_lines(rows))
    places = {line: float(y) for y, (_, line) in enumerate(lines)}
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = small_multiples(
        len(tasks), 3, height=0.65 + 0.27 * len(lines), extra=0.6, share="y"
    )
    for ax, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        for row in of_task:
            _draw_interval(ax, row, places[row.encoder, row.pooling, row.variant])
        if (chance := of_task[0].chance) is not None:
            ax.axvline(chance, color=INK, linewidth=1, linestyle=DOTTED)
        ax.tick_params(axis="y", length=0, grid_alpha=0)
        title_panel(ax, shorten(task, 40))
        ax.set_xlabel(f"test {of_task[0].metric}, 95 % interval", fontsize=NORMAL)
    for ax in axes[::3]:
        ax.set(yticks=range(len(lines)), yticklabels=[label for label, _ in lines])
        ax.set_ylim(len(lines) - 0.3, -0.7)
        for text, (_, line) in zip(ax.get_yticklabels(), lines, strict=True):
            text.set_fontweight("normal" if line else "bold")
    title_figure(figure, title, [*_head_keys(rows), line_key("chance", INK, DOTTED)])
    return figure


def _probe_lines(rows: Sequence[ProbeRow]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels from top to bottom and (encoder, pooling, variant), which is empty for the heading of a run."""
    several = len({row.pooling for row in rows if not _is_baseline(row)}) > 1
    for encoder in dict.fromkeys(
        row.encoder for row in sorted(rows, key=lambda row: not _is_baseline(row))
    ):
        own = [row for row in rows if row.encoder == encoder]
        if not all(map(_is_baseline, own)):
            yield shorten(encoder, 36), ()
        for pooling, look, variant in sorted(
            {(r.pooling, look_of(r.variant), r.variant) for r in own}
        ):
            yield look[1] + (f", {pooling}" if several else ""), (encoder, pooling, variant)


def _is_baseline(row: ProbeRow) -> bool:
    return row.variant == STATISTICS


def look_of(variant: str) -> tuple[int, str, str]:
    """Place in the order, label and colour; `random-3` is the twin of another seed."""
    kind, _, seed = variant.partition("-")
    known = kind if kind in VARIANTS else "function"
    label, color = VARIANTS[known]
    return list(VARIANTS).index(known), label + (f", seed {seed}" if seed else ""), color


def _draw_interval(ax: Axes, row: ProbeRow, y: float) -> None:
    y += 0.27 if row.head == "knn" else 0.0
    ax.plot([row.low, row.high], [y, y], color=look_of(row.variant)[2], linewidth=2, alpha=0.6)
    _draw_mark(ax, row, row.value, y)


def _draw_mark(ax: Axes, row: ProbeRow, x: float, y: float) -> None:
    color, marker = look_of(row.variant)[2], HEADS[row.head][1]
    face = "white" if marker == "s" else color
    ax.plot(
        [x],
        [y],
        marker=marker,
        linestyle="",
        color=color,
        markersize=5,
        markerfacecolor=face,
        zorder=3,
    )


def _head_keys(rows: Iterable[ProbeRow]) -> list[Line2D]:
    shown = {row.head for row in rows}
    return [
        line_key(label, INK, dash, marker)
        for head, (label, marker, dash) in HEADS.items()
        if head in shown
    ]


def draw_layers(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Validation scores by layer: a row of panels for each encoder, a column for each task.

    A mark stands at the layer that was chosen; what has one layer only is a line across every
    panel. Combinations of layers stand apart at the right.
    """
    layered = [row for row in rows if not _is_baseline(row)]
    if not layered:
        return note_figure("nothing with layers was probed", title)
    encoders = list(dict.fromkeys((row.encoder, row.pooling) for row in layered))
    tasks = list(dict.fromkeys(row.task for row in layered))
    columns = -(-len(tasks) // -(-len(tasks) // 4))
    tasks += [""] * (-len(tasks) % columns)  # empty places at the end of each encoder's last row
    figure, axes = small_multiples(len(encoders) * len(tasks), columns, height=2.3, extra=0.6)
    for ax, (encoder, task) in zip(axes, product(encoders, tasks), strict=True):
        if not task:
            ax.remove()
            continue
        shown = [
            r
            for r in rows
            if r.task == task and (_is_baseline(r) or (r.encoder, r.pooling) == encoder)
        ]
        for row in shown:
            _draw_layer_line(ax, row)
        title_panel(ax, shorten(task, 40))
        _label_layers(ax, [row for row in shown if not _is_baseline(row)])
        name = (
            f"{shorten(encoder[0], 24)} ({encoder[1]})\n"
            if len(encoders) > 1 and task == tasks[0]
            else ""
        )
        ax.set_ylabel(f"{name}validation {shown[0].metric}" if shown else name, fontsize=NORMAL)
        ax.set_xlabel("layer", fontsize=NORMAL)
    looks = sorted({look_of(row.variant) for row in rows})
    keys: list[Artist] = [Patch(color=color, label=label) for _, label, color in looks]
    title_figure(figure, title, [*keys, *_head_keys(rows)])
    return figure


def _draw_layer_line(ax: Axes, row: ProbeRow) -> None:
    color, dash = look_of(row.variant)[2], HEADS[row.head][2]
    if _is_baseline(row):
        ax.axhline(row.valid, color=color, linestyle=dash, linewidth=1.4)
        return
    values = dict(zip(row.layers, row.valid_by_layer, strict=True))
    places = _places(row.layers)
    single = [name for name in values if name not in COMBINED]
    line = [places[name] for name in single], [values[name] for name in single]
    ax.plot(*line, color=color, linestyle=dash, linewidth=1.4)
    for name, place in places.items():
        if name in COMBINED:
            ax.plot([place], [values[name]], marker="_", color=color, markersize=9)
        if name in row.layer.split(", "):
            _draw_mark(ax, row, place, values[name])


def _places(layers: Sequence[str]) -> dict[str, float]:
    """Where the layers stand, in their order; combinations of them stand apart, behind."""
    single, combined = (
        [name for name in layers if (name in COMBINED) == wanted] for wanted in (False, True)
    )
    apart = {name: len(single) + 0.5 + 1.5 * number for number, name in enumerate(combined)}
    return {name: float(number) for number, name in enumerate(single)} | apart


def _label_layers(ax: Axes, rows: Sequence[ProbeRow]) -> None:
    """Every so many layers by name, and every combination."""
    places = _places(max((row.layers for row in rows), key=len, default=()))
    single = [name for name in places if name not in COMBINED]
    shown = single[:: -(-len(single) // 5) or 1]
    shown = [name for name in shown if places[name] < len(single) - 1 or len(places) == len(single)]
    shown += [name for name in places if name in COMBINED]
    labels = [
        COMBINED.get(name, "in" if name == "input" else name.removeprefix("block "))
        for name in shown
    ]
    ax.set_xticks([places[name] for name in shown], [shorten(label, 8) for label in labels])


def draw_robustness(rows: Sequence[ProbeRow], title: str = "") -> Figure:
    """Scores on degraded clips of one task: a panel for each condition, a curve for each encoder.

    All panels have one scale. Levels go from mild to hard at equal distances; the dashed line is
    the score on the clips as they are.
    """
    rows = [row for row in rows if row.robustness]
    if not rows:
        return note_figure("nothing was probed on degraded clips", title)
    conditions = list(
        dict.fromkeys(condition for row in rows for condition in row.robustness or ())
    )
    figure, axes = small_multiples(len(conditions), 3, height=2.5, extra=0.7, share="y")
    looks = _robustness_looks(rows)
    for ax, condition in zip(axes, conditions, strict=True):
        for row in rows:
            if row.robustness and condition in row.robustness:
                _draw_sweep(ax, row, condition, *looks[_who(row)])
        if (chance := rows[0].chance) is not None:
            ax.axhline(chance, color=INK, linewidth=1, linestyle=DOTTED)
        title_panel(ax, condition)
        ax.set_xlabel(_level_label(condition), fontsize=NORMAL)
    for ax in axes[::3]:
        ax.set_ylabel(f"test {rows[0].metric}", fontsize=NORMAL)
    keys = [line_key(who, color, SOLID, marker) for who, (color, marker) in looks.items()]
    title_figure(
        figure, title, [*keys, line_key("clean", INK, DASHED), line_key("chance", INK, DOTTED)]
    )
    return figure


def _draw_sweep(ax: Axes, row: ProbeRow, condition: str, color: str, marker: str) -> None:
    levels, scores = zip(*(row.robustness or {})[condition], strict=True)
    places = range(len(levels))
    ax.plot(places, scores, color=color, linewidth=1.4, marker=marker, markersize=4)
    ax.plot(
        [0, len(levels) - 1],
        [row.value, row.value],
        color=color,
        linewidth=1,
        linestyle=DASHED,
        alpha=0.8,
    )
    ax.set_xticks(places, [f"{level:g}" for level in levels])


def _level_label(condition: str) -> str:
    return (
        f"level in {SWEEPS[condition][0].unit}, from mild to hard"
        if condition in SWEEPS
        else "from mild to hard"
    )


def _who(row: ProbeRow) -> str:
    return f"{shorten(row.encoder, 28)}, {look_of(row.variant)[1]}"


def _robustness_looks(rows: Iterable[ProbeRow]) -> dict[str, tuple[str, str]]:
    """Colour and mark of every encoder; all twins are grey."""
    trained = cycle(product("o^Dv", PALETTE))
    looks: dict[str, tuple[str, str]] = {}
    for row in rows:
        if (who := _who(row)) not in looks:
            marker, color = ("o", GREY) if row.is_twin else next(trained)
            looks[who] = color, marker
    return looks


def draw_all(results: Path) -> list[Path]:
    """Draw what a file of results holds into `pictures/` beside it.

    Of every encoder and task: validation scores by layer and setting, scores by class, and which
    classes are taken for which, all of the head of the first seed; not of random-init twins,
    log-mel statistics and nearest neighbours, and not again while the evidence is the same. Of
    every task that was probed under conditions, one picture of them.

    Args:
        results: `results.jsonl`, with the evidence beside it.

    Returns:
        The pictures that were drawn now.

    Raises:
        UserError: if there are no results, or naming the evidence that is missing.
        UserError: naming the line that is no row.
    """
    if not results.is_file():
        raise MissingFileError(f"there is no {results}: `jepa-audio probe` writes it")
    rows = latest(read_jsonl(results))
    folder = results.with_name("pictures")
    folder.mkdir(exist_ok=True)
    first: dict[str, ProbeRow] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if not row.is_twin and row.variant != STATISTICS and row.head != "knn":
            first.setdefault(_file_name(row), row)
    new = [row for row in first.values() if not _is_drawn(row, results.parent)]
    drawn = [
        _save(figure, folder / name)
        for row in new
        for name, figure in _close_ups(row, results.parent)
    ]
    under: dict[tuple[str, ...], list[ProbeRow]] = {}
    for row, _ in mean_over_seeds(row for row in rows if row.robustness):
        under.setdefault(
            (row.task, row.preset, row.select, row.head, row.split_checksum[:8]), []
        ).append(row)
    for words, of_task in under.items():
        figure = draw_robustness(of_task, f"{words[0]} under conditions")
        drawn.append(_save(figure, folder / f"{_slug(*words)}-robustness.png"))
    return drawn


def _is_drawn(row: ProbeRow, folder: Path) -> bool:
    picture, evidence = folder / "pictures" / f"{_file_name(row)}-grid.png", folder / row.evidence
    return (
        picture.is_file()
        and evidence.is_file()
        and picture.stat().st_mtime_ns > evidence.stat().st_mtime_ns
    )


def _close_ups(row: ProbeRow, folder: Path) -> Iterator[tuple[str, Figure]]:
    evidence = load_evidence(folder / row.evidence)
    name = _file_name(row)
    yield f"{name}-grid.png", draw_grid(row)
    kind = kind_of(row, evidence)
    if kind != "other":
        yield f"{name}-classes.png", draw_classes(row, evidence)
    if kind == "multiclass":
        yield f"{name}-confusion.png", draw_confusion(row, evidence)


def _file_name(row: ProbeRow) -> str:
    who = (row.encoder, row.variant, row.pooling, row.encoder_hash[:8])
    return _slug(row.task, *who, row.preset, row.select, row.head)


def _slug(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=144)
    return path
