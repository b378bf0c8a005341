"""Masks drawn over a spectrogram."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator
from torch import Tensor

from jepa_audio.report import style
from jepa_audio.report.spectrogram import clip_spectrogram, label_bands
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.training.jepa import JEPA

ContextPlane = Bool[np.ndarray, "F T"]
TargetPlanes = Bool[np.ndarray, "M F T"]
NUM_DRAWS = 3
# Opacity of a target group on the spectrogram, and of what is hidden from the context.
TINT, VEILED = 0.6, 0.85
# Stripes in the cell of a token: 2, 3, 4 or 6 groups share it evenly.
STRIPES = 12


def draw_model_masks(jepa: JEPA, waveform: Float[Tensor, "1 S"], step: int) -> Figure:
    """Several draws of a model's masker over a clip at its sample rate."""
    grid = jepa.front_end.grid(waveform.shape[-1])
    masker, row = jepa.masker.at(step), torch.tensor([0])
    draws = [masker(grid, row, jepa.seed, draw) for draw in range(NUM_DRAWS)]
    planes = [split_masks(masks, grid) for masks in draws]
    if not isinstance(jepa.front_end, SpectrogramFrontEnd):
        # The rows of the grid are audio channels, not frequencies: only the first is drawn.
        planes = [(context[:1], targets[:, :1]) for context, targets in planes]
    shown = clip_spectrogram(jepa.front_end, waveform)
    title = f"Context and targets at step {step}"
    return draw_masks(shown.log_magnitude, planes, shown.seconds, title, shown.band_hz)


def split_masks(masks: Masks, grid: Grid) -> tuple[ContextPlane, TargetPlanes]:
    """The context and the target groups of the first clip of a batch."""
    context, targets = (
        part.to_mask(grid.num_tokens).cpu().numpy() for part in (masks.context, masks.targets)
    )
    shape = (-1, grid.num_time, grid.num_freq)
    return context[0].reshape(shape)[0].T, targets[0].reshape(shape).swapaxes(1, 2)


def draw_masks(
    log_spectrogram: Float[np.ndarray, "bands frames"],
    draws: Sequence[tuple[ContextPlane, TargetPlanes]],
    seconds: float,
    title: str = "",
    band_hz: Float[np.ndarray, " bands"] | None = None,
) -> Figure:
    """Several masks of one clip: context clear, target groups tinted, the rest veiled.

    A token of several groups has stripes in their colours. On a grid with one frequency row, each
    group has a lane of its own instead.

    Args:
        log_spectrogram: of the part of the clip that the grid covers, lowest band first.
        draws: see `split_masks`.
        seconds: duration of the spectrogram.
        title: of the figure.
        band_hz: rising centre frequencies of the bands; bands are numbered if `None`.
    """
    figure, axes = style.small_multiples(len(draws), 1, height=1.75, extra=0.75, share="x")
    extent = (0.0, seconds, 0.0, float(len(log_spectrogram)))
    low, high = np.percentile(log_spectrogram, (2, 99.8))
    num_groups = max(len(targets) for _, targets in draws)
    colors = list(islice(cycle(style.PALETTE), num_groups))
    overlays = [_paint_overlay(*planes, colors) for planes in draws]
    for ax, (context, targets), overlay in zip(axes, draws, overlays, strict=True):
        ax.imshow(log_spectrogram, cmap="Greys", vmin=low, vmax=high, origin="lower", extent=extent)
        ax.imshow(overlay, interpolation="nearest", origin="lower", extent=extent)
        ax.set_aspect("auto")
        num_freq, num_time = context.shape
        if num_time <= 128:
            edges = np.linspace(*ax.get_xlim(), num_time + 1)
            ax.xaxis.set_minor_locator(FixedLocator(edges.tolist()))
        if num_freq <= 32:
            edges = np.linspace(*ax.get_ylim(), num_freq + 1)
            ax.yaxis.set_minor_locator(FixedLocator(edges.tolist()))
        ax.grid(visible=False)
        ax.grid(which="minor", color=style.GREY, linewidth=0.5, alpha=0.35)
        ax.tick_params(which="minor", length=0)
        ax.set_axisbelow(False)
        label_bands(ax, band_hz)
        share, target_share = context.mean(), targets.any(axis=0).mean()
        style.title_panel(ax, f"context {share:.0%} of the tokens, targets {target_share:.0%}")
    axes[-1].set_xlabel("seconds")
    handles = [Patch(facecolor="white", edgecolor=style.GREY, label="context")]
    for number, color in enumerate(colors, start=1):
        handles.append(Patch(facecolor=color, alpha=TINT, label=f"target group {number}"))
    if any((overlay[..., 3] == VEILED).any() for overlay in overlays):
        handles.append(Patch(facecolor=style.VEIL, label="hidden from the context"))
    style.title_figure(figure, title, handles)
    return figure


def _paint_overlay(
    context: ContextPlane, targets: TargetPlanes, group_colors: Sequence[str]
) -> np.ndarray:
    """The overlay, RGBA `[F * stripes, T, 4]`, lowest row first."""
    colors = np.array([[*to_rgb(color), TINT] for color in group_colors[: len(targets)]])
    veiled = np.where(context[..., None], 0.0, [*to_rgb(style.VEIL), VEILED])  # [F, T, 4]
    if len(context) == 1:
        return np.where(targets[::-1, 0, :, None], colors[::-1, None], veiled)
    count = targets.sum(axis=0)  # [F, T]
    # Rank of a group among the groups of the token.
    rank = np.where(targets, targets.cumsum(axis=0), 0)  # [M, F, T]
    stripe = np.arange(STRIPES)[:, None, None]
    group = (rank[:, None] == stripe * count // STRIPES + 1).argmax(axis=0)  # [STRIPES, F, T]
    painted = np.where(count[..., None] > 0, colors[group], veiled)
    return painted.swapaxes(0, 1).reshape(-1, context.shape[1], 4)
