"""The style of all figures: colours, panels, titles, legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = PALETTE
INK, GREY, PALE, VEIL = "#222222", "#767676", "#EBEBEB", "#CFCFCF"
DASHES = SOLID, DASHED, DOTTED, DASH_DOTTED = ("-", "--", ":", "-.")
# Colours of categories: the palette, then five others (four are of Paul Tol's "muted" and "light").
# Their order gives categories with the same marker, which are 7 or 14 apart, unlike colours.
CATEGORY_COLORS = (*PALETTE, "#332288", "#AAAA00", "#222222", "#882255", "#7F4F24")
# Two categories of a figure never share both colour and marker: 11 and 7 have no common divisor.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_CATEGORIES = 18
# Font sizes in points, width of a figure in inches.
SMALL, NORMAL, WIDTH = 8.0, 9.0, 10.5


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, sizes in inches."""
    return Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")


def small_multiples(
    count: int, columns: int, height: float, extra: float, share: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels.

    Args:
        count: number of panels.
        columns: largest number of panels in a row.
        height: of a panel, in inches.
        extra: height of title and axis label, in inches.
        share: axis with one scale for all panels, "x" or "y".
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(WIDTH, rows * height + extra)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share == "x", sharey=share == "y")
    axes = list(grid.flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        plain_axes(ax)
    return figure, axes[:count]


def plain_axes(ax: Axes) -> None:
    """Pale grid, two spines, small tick labels."""
    ax.set_axisbelow(True)
    ax.xaxis.label.set_fontsize(NORMAL)
    ax.yaxis.label.set_fontsize(NORMAL)
    ax.grid(visible=True, color=PALE, linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=GREY, linewidth=0.7)
    ax.tick_params(labelsize=SMALL, labelcolor=INK, color=GREY, width=0.7, length=3)


def title_panel(ax: Axes, text: str, handles: Sequence[Line2D] = ()) -> None:
    """Set the title and, on a line of its own below it, the legend: it covers no curve."""
    ax.set_title(text, loc="left", fontsize=NORMAL, color=INK, pad=17 if handles else 6)
    if handles:
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(handles),
            fontsize=SMALL - 0.5,
            handlelength=1.6,
            handletextpad=0.4,
            columnspacing=0.9,
            borderpad=0.2,
            borderaxespad=0,
            frameon=False,
        )


def title_figure(figure: Figure, title: str, handles: Sequence[Artist] = ()) -> None:
    """Set the title at the left and the legend below it; long legends make the figure higher."""
    widths = [0.58 + 0.062 * len(str(handle.get_label())) for handle in handles]
    width = figure.get_figwidth()
    columns = max(1, len(handles) if sum(widths) <= width else int(width / max(widths)))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, rows - 1))
    figure.legend(
        handles=list(handles),
        loc="outside upper left",
        title=title or None,
        title_fontproperties={"size": NORMAL + 2, "weight": "bold"},
        fontsize=SMALL + 0.5,
        ncols=columns,
        alignment="left",
        borderpad=0.1,
        frameon=False,
    )


def category_style(number: int) -> dict[str, Any]:
    """Colour and marker of a category; markers distinguish it also without colours."""
    color = CATEGORY_COLORS[number % len(CATEGORY_COLORS)]
    return {"color": color, "marker": MARKERS[number % len(MARKERS)]}


def line_handle(
    label: str, color: str, dash: str = SOLID, marker: str = "", filled: bool = False
) -> Line2D:
    """A line for a legend; squares are empty if markers are not `filled`."""
    face = "white" if marker == "s" and not filled else color
    return Line2D([], [], color=color, ls=dash, lw=1.4, marker=marker, ms=5, mfc=face, label=label)


def note_figure(text: str, title: str) -> Figure:
    """A figure with a sentence, for missing data."""
    figure = new_figure(WIDTH, 0.8)
    figure.text(0.008, 0.2, text, fontsize=NORMAL, color=GREY)
    title_figure(figure, title)
    return figure


def shorten(name: str, length: int) -> str:
    """The name without its middle if it is too long (both ends identify runs); `$` is escaped."""
    if len(name) > length:
        name = f"{name[: length // 2]}…{name[length // 2 + 1 - length :]}"
    return name.replace("$", r"\$")
