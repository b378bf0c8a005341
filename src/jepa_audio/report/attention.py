"""Attention maps drawn on the spectrogram of a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.report import style
from jepa_audio.report.spectrogram import ClipSpectrogram, clip_spectrogram, label_bands
from jepa_audio.steps.encoder.attention import attention_weights
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.steps.grid import Grid

Kind = Literal["query", "received", "both"]
"""Attention of one query token, the mean attention that each token receives, or both."""
MAX_LAYERS = 4
# Darkest grey of the spectrogram, and largest opacity of the attention on it.
_DARKEST, _OPAQUE = 0.45, 0.92
_ATTENTION = LinearSegmentedColormap.from_list(
    "attention", [to_rgba(style.BLUE, 0.0), to_rgba(style.BLUE, _OPAQUE)]
)
_ON_PAPER = LinearSegmentedColormap.from_list("attention on paper", ["white", style.BLUE])


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention to every token of a clip.

    Attributes:
        title: layer, head and kind.
        relative: attention / attention of a uniform distribution over all tokens and registers.
        query: row and column of the query token; `None` for the mean over all queries.
    """

    title: str
    relative: Float[np.ndarray, "F T"]
    query: tuple[int, int] | None


def attention_maps(
    front_end: FrontEnd,
    encoder: Transformer,
    waveform: Float[Tensor, "C S"],
    *,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    kind: Kind = "both",
    query: tuple[int, int] = (0, 0),
) -> list[AttentionMap]:
    """The attention maps of one clip: for each layer, first all heads of one kind, then the other.

    Args:
        front_end: waveform → tokens, in evaluation mode, as the encoder.
        encoder: tokens → latents.
        waveform: a clip of at most the length of a training crop.
        layers: 1 is the first block, -1 the last; empty for up to 4, evenly spaced.
        heads: 1 is the first head; empty for the mean over all heads.
        kind: see `Kind`.
        query: row and column of the query token, 0 the first.

    Raises:
        UserError: if a layer or a head does not exist.
    """
    depth = encoder.depth
    if wrong := [layer for layer in layers if not 1 <= abs(layer) <= depth]:
        raise UserError(f"`layers` ({wrong[0]}): the encoder has the layers 1 to {depth}")
    chosen = [layer if layer > 0 else layer + depth + 1 for layer in layers]
    chosen = chosen or sorted({round(i) for i in np.linspace(1, depth, min(MAX_LAYERS, depth))})
    if wrong := [head for head in heads if not 1 <= head <= encoder.num_heads]:
        raise UserError(f"`heads` ({wrong[0]}): the encoder has the heads 1 to {encoder.num_heads}")
    grid = front_end.grid(waveform.shape[-1])
    with torch.no_grad():
        tokens = front_end(waveform[None])
    kinds = ("query", "received") if kind == "both" else (kind,)
    maps: dict[int, list[AttentionMap]] = {}
    for layer, weights in attention_weights(encoder, tokens, grid, chosen):
        maps[layer] = [
            _map(weights[0], grid, layer, head, what, query)
            for what in kinds
            for head in heads or [0]
        ]
    return [found for layer in chosen for found in maps[layer]]


def _map(
    weights: Float[Tensor, "heads P P"],
    grid: Grid,
    layer: int,
    head: int,
    kind: str,
    query: tuple[int, int],
) -> AttentionMap:
    """The map of one head, or of the mean over all heads if `head` is 0."""
    num_registers = weights.shape[-1] - grid.num_tokens
    of_head = weights.mean(dim=0) if head == 0 else weights[head - 1]
    from_tokens = of_head[num_registers:]  # [N, P]
    row, column = query
    if kind == "query":
        attention = from_tokens[column * grid.num_freq + row]
        name = "from the query"
    else:
        attention, name = from_tokens.mean(dim=0), "received"
    share = float(attention[:num_registers].sum())
    relative = (attention[num_registers:] * len(attention)).cpu().numpy()
    plane = relative.reshape(grid.num_time, grid.num_freq).T
    who = "mean of heads" if head == 0 else f"head {head}"
    title = f"layer {layer}, {who}: {name}"
    title += f" ({share:.0%} to registers)" if num_registers else ""
    return AttentionMap(title, plane, query if kind == "query" else None)


def find_query(
    front_end: FrontEnd,
    waveform: Float[Tensor, "C S"],
    seconds: float | None = None,
    hz: float | None = None,
) -> tuple[int, int]:
    """Row and column of the token at a time and a frequency; without them, of the loudest token.

    Raises:
        UserError: if the time is outside the clip, or the frequency above half the sample rate or
            negative, or a frequency is given and the rows of the grid have none.
    """
    num_samples = waveform.shape[-1]
    grid, times = front_end.grid(num_samples), front_end.times(num_samples)
    shown = clip_spectrogram(front_end, waveform)
    energy = np.exp(2 * shown.log_magnitude)
    if isinstance(front_end, SpectrogramFrontEnd):
        cells = {"f": grid.num_freq, "t": grid.num_time}
        levels = reduce(energy, "(f b) (t p) -> f t", "mean", **cells)
    else:  # the rows of the grid are audio channels
        frames = (np.arange(energy.shape[1]) + 0.5) / energy.shape[1] * shown.seconds
        level = np.interp(times.numpy(), frames, energy.mean(axis=0))
        levels = np.tile(level, (grid.num_freq, 1))
    length = num_samples / front_end.sample_rate
    if seconds is not None and not 0 <= seconds <= length:
        raise UserError(f"`query_seconds` ({seconds:g}) must be in the clip of {length:.3g} s")
    if hz is not None and (shown.band_hz is None or grid.num_freq == 1):
        raise UserError(
            f"`query_hz` ({hz:g}): the tokens of this front end have no known frequency; leave it "
            "out"
        )
    if hz is not None and not 0 <= hz <= front_end.sample_rate / 2:
        raise UserError(
            f"`query_hz` ({hz:g}) must be in [0, {front_end.sample_rate / 2:g}], up to half the "
            "sample rate of the encoder"
        )
    if hz is not None and shown.band_hz is not None:
        band = int(np.abs(shown.band_hz - hz).argmin())
        only = band * grid.num_freq // len(shown.band_hz)
        levels = np.where(np.arange(grid.num_freq)[:, None] == only, levels, -np.inf)
    if seconds is not None:
        only = int((times - seconds).abs().argmin())
        levels = np.where(np.arange(grid.num_time) == only, levels, -np.inf)
    row, column = np.unravel_index(int(levels.argmax()), levels.shape)
    return int(row), int(column)


def draw_attention(
    front_end: FrontEnd,
    waveform: Float[Tensor, "C S"],
    maps: Sequence[AttentionMap],
    title: str = "",
    columns: int = 2,
) -> Figure:
    """Draw attention maps on the spectrogram of their clip.

    On a spectrogram grid, the colour of a token shows its attention from 1 × uniform on, on one
    logarithmic scale for all panels; an outline surrounds the fewest tokens that have half of the
    attention together. On a waveform grid, a curve for each row of tokens shows the attention.
    """
    shown = clip_spectrogram(front_end, waveform)
    has_bands = isinstance(front_end, SpectrogramFrontEnd)
    columns = min(columns, len(maps))
    height = 1.55 if columns > 1 else 1.8
    figure, axes = style.small_multiples(len(maps), columns, height, extra=0.8, share="x")
    norm = LogNorm(1.0, max(2.0, *(float(found.relative.max()) for found in maps)))
    for ax, found in zip(axes, maps, strict=True):
        _draw_spectrogram(ax, shown)
        if has_bands:
            _paint_tokens(ax, found, norm, shown.seconds, len(shown.log_magnitude))
        else:
            times = front_end.times(waveform.shape[-1]).numpy()
            _draw_curves(ax, found, times, last=ax in axes[columns - 1 :: columns])
        style.title_panel(ax, found.title)
    for ax in axes[-columns:]:
        ax.set_xlabel("time (s)")
    for number, ax in enumerate(axes):
        if number % columns:
            ax.set_ylabel("")
    handles = _handles(maps, has_bands)
    if has_bands:
        bar = figure.colorbar(
            ScalarMappable(norm, _ON_PAPER), ax=axes, shrink=0.6, aspect=28, pad=0.012
        )
        bar.set_label("attention / uniform attention", fontsize=style.NORMAL)
        ticks = [2.0**i for i in range(math.floor(math.log2(norm.vmax or 1.0)) + 1)]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
        bar.ax.tick_params(labelsize=style.SMALL)
        bar.outline.set_edgecolor(style.GREY)
    style.title_figure(figure, title, handles)
    return figure


def _draw_spectrogram(ax: Axes, shown: ClipSpectrogram) -> None:
    """In light grey: the darkest grey is lighter than strong attention."""
    low, high = np.percentile(shown.log_magnitude, (2, 99.8))
    high = low + max(high - low, 1e-6) / _DARKEST
    extent = (0.0, shown.seconds, 0.0, float(len(shown.log_magnitude)))
    look = {"cmap": "Greys", "vmin": low, "vmax": high, "origin": "lower", "aspect": "auto"}
    ax.imshow(shown.log_magnitude, extent=extent, **look)
    ax.set(xlim=extent[:2], ylim=extent[2:])
    ax.grid(visible=False)
    label_bands(ax, shown.band_hz, "frequency (kHz)")


def _paint_tokens(
    ax: Axes, found: AttentionMap, norm: LogNorm, seconds: float, num_bands: int
) -> None:
    extent = (0.0, seconds, 0.0, float(num_bands))
    painted = _ATTENTION(norm(found.relative.clip(1.0)))
    ax.imshow(painted, interpolation="nearest", origin="lower", extent=extent, aspect="auto")
    rows, columns = found.relative.shape
    scale = np.array([seconds / columns, num_bands / rows])
    mask = half_of(found.relative)
    segments = list(outline(mask) * scale)
    # A band along the outline, cut to the cells, shows which side is inside.
    cells = [
        Path.unit_rectangle().transformed(Affine2D().translate(column, row).scale(*scale))
        for row, column in np.argwhere(mask)
    ]
    band = LineCollection(segments, colors=to_rgba(style.INK, 0.25), linewidths=4.0, zorder=3)
    ax.add_collection(band)
    band.set_clip_path(Path.make_compound_path(*cells), ax.transData)
    # Without clipping, the edges at the border of the panel close the outline.
    lines = LineCollection(segments, colors=style.INK, linewidths=0.9, zorder=4)
    ax.add_collection(lines)
    lines.set_clip_on(False)
    if found.query is not None:
        row, column = found.query
        x, y = (np.array([column, row]) + 0.5) * scale
        ax.add_line(_query_marker(float(x), float(y)))


def _draw_curves(ax: Axes, found: AttentionMap, times: np.ndarray, last: bool) -> None:
    over = ax.twinx()
    for number, row in enumerate(found.relative):
        color, dash = style.PALETTE[number], style.DASHES[number % len(style.DASHES)]
        over.plot(times, row, color=color, linestyle=dash, linewidth=1.3)
        if len(found.relative) == 1:
            over.fill_between(times, 1.0, row, row > 1, interpolate=True, color=color, alpha=0.3)
    over.axhline(1.0, color=style.INK, linewidth=0.7, linestyle=style.DOTTED)
    over.set_ylim(0, 1.08 * max(1.3, float(found.relative.max())))
    over.spines[["top", "left", "right", "bottom"]].set_visible(False)
    over.yaxis.set_major_locator(ticker.MaxNLocator(4))
    over.tick_params(labelsize=style.SMALL, color=style.GREY, width=0.7, length=3)
    if last:
        over.set_ylabel("attention / uniform", fontsize=style.NORMAL)
    if found.query is not None:
        row, column = found.query
        over.axvline(times[column], color=style.INK, linewidth=0.8, linestyle=style.DASHED)
        over.add_line(_query_marker(float(times[column]), float(found.relative[row, column])))


def _query_marker(x: float, y: float) -> Line2D:
    face = {"markerfacecolor": style.ORANGE, "markeredgecolor": style.INK}
    return Line2D([x], [y], linestyle="", marker="D", markersize=5.5, **face)  # type: ignore[arg-type]


def _handles(maps: Sequence[AttentionMap], has_bands: bool) -> list[Artist]:
    handles: list[Artist] = []
    if any(found.query is not None for found in maps):
        marker = _query_marker(0.0, 0.0)
        marker.set_label("query token")
        handles.append(marker)
    if has_bands:
        label = "fewest tokens with half of the attention (inside: shaded)"
        return [*handles, Line2D([], [], color=style.INK, linewidth=0.9, label=label)]
    num_rows = len(maps[0].relative)
    names = ["attention"] if num_rows == 1 else [f"channel {i}" for i in range(1, num_rows + 1)]
    handles += [
        style.line_handle(name, style.PALETTE[i], style.DASHES[i % len(style.DASHES)])
        for i, name in enumerate(names)
    ]
    return [*handles, style.line_handle("uniform attention", style.INK, style.DOTTED)]


def half_of(attention: Float[np.ndarray, "F T"]) -> np.ndarray:
    """Mask of the fewest tokens that have half of the attention to tokens."""
    order = attention.ravel().argsort()[::-1]
    share = attention.ravel()[order].cumsum() / attention.sum()
    mask = np.zeros(attention.size, dtype=bool)
    mask[order[: int((share < 0.5).sum()) + 1]] = True
    return mask.reshape(attention.shape)


def outline(mask: np.ndarray) -> Float[np.ndarray, "segments 2 2"]:
    """The borders (column, row) between cells inside and outside of a mask `[F, T]`."""
    padded = np.pad(mask, 1)
    segments = [
        [(column, row), (column, row + 1)]
        for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    ]
    segments += [
        [(column, row), (column + 1, row)]
        for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    ]
    return np.array(segments, dtype=float).reshape(-1, 2, 2)
