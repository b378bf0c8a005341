"""The map of latents: embeddings of clips in two dimensions, and their spectrum."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from jepa_audio.report import style
from jepa_audio.report.embeddings import Embeddings
from jepa_audio.report.neighbours import label_agreement

log = logging.getLogger(__name__)

OTHER = "other"
NUM_NEIGHBOURS = 5
# From this number of components on, the axis of their number is logarithmic.
MIN_LOG = 10


def principal_components(
    vectors: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, " R"]]:
    """The first two principal components, and the share of the variance of every component.

    The vectors are centred, not scaled. The sign of a component is that of its largest loading. If
    all vectors are equal, the components and the shares are 0.
    """
    centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    largest = right[np.arange(len(right)), np.abs(right).argmax(axis=1)]
    scores = left * singular * np.where(largest < 0, -1.0, 1.0)
    padded = np.pad(scores, ((0, 0), (0, max(0, 2 - scores.shape[1]))))[:, :2]
    energy = singular**2
    return padded, energy / max(energy.sum(), np.finfo(float).tiny)


def umap_layout(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"] | None:
    """The layout of UMAP (McInnes et al., 2018, arXiv:1802.03426) by cosine distance.

    `None` if `umap-learn` is not installed, or if there are fewer clips than UMAP needs.
    """
    if find_spec("umap") is None:
        log.info("no UMAP: `pip install 'jepa-audio[umap]'` adds it to the map of latents")
        return None
    if len(vectors) < 5:
        log.info("no UMAP: it needs 5 clips, there are %d", len(vectors))
        return None
    from umap import UMAP  # noqa: PLC0415 (an optional package that takes seconds to import)

    neighbours = min(15, len(vectors) - 1)
    layout = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
    return layout.fit_transform(vectors)


def draw_latents(
    embeddings: Embeddings, title: str = "", umap: Float[np.ndarray, "N 2"] | None = None
) -> Figure:
    """Draw the PCA (and the UMAP) of embeddings, coloured by label, and the explained variance.

    Labels that are all numbers, with more different values than there are markers, are shown on a
    colour scale. Of other labels, the most frequent have a colour and a marker; the rest is grey.
    """
    points, shares = principal_components(embeddings.vectors)
    maps = [points] if umap is None else [points, umap]
    figure = style.new_figure(style.WIDTH, 4.6 if umap is None else 3.9)
    axes = figure.subplots(1, len(maps) + 1, width_ratios=[1.0] * len(maps) + [0.62])
    for ax in axes:
        style.plain_axes(ax)
    numbers = _numbers(embeddings.labels)
    names = _frequent(embeddings.labels) if numbers is None else []
    shown: PathCollection | None = None
    for ax, layout in zip(axes, maps, strict=False):
        if numbers is None:
            _scatter_names(ax, layout, embeddings.labels, names)
        else:
            shown = ax.scatter(
                layout[:, 0], layout[:, 1], c=numbers, cmap="cividis", s=_size(len(layout)), lw=0
            )
        _limit_axes(ax, layout)
    label = [f"PC {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares[:2])]
    axes[0].set(xlabel=label[0], ylabel=label[1] if len(label) > 1 else "")
    style.title_panel(axes[0], f"PCA, {len(embeddings):,} clips")
    if umap is not None:
        axes[1].set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)")
        style.title_panel(axes[1], "UMAP, cosine distance")
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[len(maps) - 1], aspect=30, pad=0.02)
        bar.set_label(embeddings.label_name, fontsize=style.NORMAL)
        bar.ax.tick_params(labelsize=style.SMALL)
    _draw_variance(axes[-1], shares)
    handles = _handles(embeddings.labels, names) if numbers is None else []
    style.title_figure(figure, f"{title}{_agreement(embeddings)}", handles)
    return figure


def draw_singular_values(
    spectra: Sequence[Float[np.ndarray, " _"]],
    step: int,
    first: tuple[int, Sequence[Float[np.ndarray, " _"]]],
) -> Figure:
    """Draw the singular values of tokens and of clips at a step, and at an earlier one.

    Args:
        spectra: singular values of tokens and of clips as shares of their sum, largest first.
        step: optimizer step of `spectra`.
        first: an earlier step and its values; not drawn if the step is the same.
    """
    figure, axes = style.small_multiples(len(spectra), 2, height=3.0, extra=0.6)
    for number, (ax, name) in enumerate(zip(axes, ("tokens", "clips"), strict=True)):
        curves = [(step, spectra[number], style.BLUE, style.SOLID)]
        if first[0] != step:
            curves.insert(0, (first[0], first[1][number], style.GREY, style.DASHED))
        handles = []
        for at, values, color, dash in curves:
            shown = np.maximum(values, 1e-7)
            ax.plot(np.arange(1, len(shown) + 1), shown, color=color, linestyle=dash, linewidth=1.4)
            positive = values[values > 0]
            rank = float(np.exp(-(positive * np.log(positive)).sum()))
            handles.append(style.line_handle(f"step {at}, RankMe {rank:.1f}", color, dash))
        ax.set_yscale("log")
        ax.set(xlabel="number of the singular value", ylabel="share of the sum")
        style.title_panel(ax, f"Latents of {name}", handles)
    style.title_figure(figure, f"Singular values at step {step}")
    return figure


def _agreement(embeddings: Embeddings) -> str:
    """How often the nearest neighbours in all dimensions have the label of a clip."""
    if len(set(embeddings.labels)) < 2 or len(embeddings) <= NUM_NEIGHBOURS:
        return ""
    found = label_agreement(embeddings, NUM_NEIGHBOURS)
    if not np.isfinite(found.precision):
        return ""
    return (
        f"\n{NUM_NEIGHBOURS} nearest neighbours with the same {embeddings.label_name}: "
        f"{found.precision:.0%} (chance {found.chance:.0%})"
    )


def _draw_variance(ax: Axes, shares: Float[np.ndarray, " R"]) -> None:
    total = shares.cumsum()
    ax.plot(np.arange(1, len(shares) + 1), 100 * total, color=style.BLUE, linewidth=1.4)
    goals: dict[int, list[float]] = {}
    for goal in (0.5, 0.9):
        goals.setdefault(int(np.searchsorted(total, goal)) + 1, []).append(goal)
    for count, reached in goals.items():
        if count <= len(total):
            height = 100 * total[count - 1]
            marker = "o" if reached == [0.5] else "s"
            ax.plot(count, height, marker, color=style.INK, markersize=4.5)
            ax.annotate(
                f"{', '.join(f'{goal:.0%}' for goal in reached)}: {count}",
                (count, height),
                xytext=(6, -9),
                textcoords="offset points",
                fontsize=style.SMALL,
                color=style.INK,
            )
    if len(shares) < MIN_LOG:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="number of components", ylabel="variance explained (%)", ylim=(0, 103))
    style.title_panel(ax, "Cumulative variance")


def _limit_axes(ax: Axes, layout: Float[np.ndarray, "N 2"]) -> None:
    """Give an axis whose values differ only by rounding the scale of the other axis."""
    ax.ticklabel_format(useOffset=False)
    ranges = np.ptp(layout, axis=0)
    half = 0.5 * float(ranges.max()) or 1.0
    middle = layout.mean(axis=0).round(6)
    is_flat = ranges <= 1e-5 * half
    if is_flat[0]:
        ax.set_xlim(middle[0] - half, middle[0] + half)
    if is_flat[1]:
        ax.set_ylim(middle[1] - half, middle[1] + half)


def _scatter_names(
    ax: Axes, layout: Float[np.ndarray, "N 2"], labels: Sequence[str], names: Sequence[str]
) -> None:
    kept = np.array(labels)
    rest = ~np.isin(kept, names)
    size = _size(len(layout))
    ax.scatter(layout[rest, 0], layout[rest, 1], color=style.VEIL, s=size, lw=0)
    # Drawn in a random order, so that no label covers the others.
    order = np.random.default_rng(0).permutation(np.flatnonzero(~rest))
    number = {name: i for i, name in enumerate(names)}
    for part in np.array_split(order, max(1, min(20, len(order) // 50))):
        for name in dict.fromkeys(kept[part]):
            rows = part[kept[part] == name]
            look = style.category_style(number[name])
            look |= {"alpha": 0.8, "edgecolors": "white", "linewidths": 0.3}
            ax.scatter(layout[rows, 0], layout[rows, 1], s=size, **look)


def _size(count: int) -> float:
    return float(np.clip(12_000 / count, 9, 34))


def _frequent(labels: Sequence[str]) -> list[str]:
    """The labels with a colour, in the order of their names."""
    counts = Counter(labels)
    return sorted(name for name, _ in counts.most_common(style.MAX_CATEGORIES))


def _numbers(labels: Sequence[str]) -> Float[np.ndarray, " N"] | None:
    """The labels as numbers, if all are numbers and there are too many for markers."""
    if len(set(labels)) <= style.MAX_CATEGORIES:
        return None
    try:
        numbers = np.array([float(label) for label in labels])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _handles(labels: Sequence[str], names: Sequence[str]) -> list[Artist]:
    counts = Counter(labels)
    handles: list[Artist] = [
        Line2D([], [], ls="", ms=5.5, label=f"{style.shorten(name, 24)} ({counts[name]})", **look)
        for name, look in zip(names, map(style.category_style, range(len(names))), strict=True)
    ]
    if rest := set(counts) - set(names):
        total = sum(counts[name] for name in rest)
        label = f"{OTHER}, {len(rest)} labels ({total})"
        handles.append(Line2D([], [], ls="", marker="o", ms=5.5, color=style.VEIL, label=label))
    return handles
