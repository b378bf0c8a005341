"""Headings, sentences and tables, written as Markdown and as a page of HTML for light and for dark screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template


@dataclass(frozen=True)
class Heading:
    """Of a section (2) or of a part of it (3)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Sentence:
    """A paragraph; `look` is "" or "quiet"."""

    text: str
    look: str = ""


@dataclass(frozen=True)
class Span:
    """A bar from `low` to `high` with a mark at `value`, on an axis of its own: where an interval lies, at a glance.

    Attributes:
        low: lower end.
        value: of the mark.
        high: upper end.
        axis: ends of the axis.
        chance: where a dotted line is drawn; `None` for none.
    """

    low: float
    value: float
    high: float
    axis: tuple[float, float]
    chance: float | None = None

    def svg(self) -> str:
        """The drawing; its colours are those of the page."""
        start, end = self.axis
        low, value, high = (
            4 + 132 * (x - start) / ((end - start) or 1) for x in (self.low, self.value, self.high)
        )
        parts = [f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8"/>']
        if self.chance is not None:
            x = 4 + 132 * (self.chance - start) / ((end - start) or 1)
            parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="16"/>')
        parts.append(f'<circle class="dot" cx="{value:.1f}" cy="8" r="3.5"/>')
        return f'<svg width="140" height="16" viewBox="0 0 140 16" aria-hidden="true">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Cell:
    """Some text.

    Attributes:
        text: of the first line.
        look: "", "strong", "quiet", "ahead" or "behind".
        note: a quiet second line.
        span: drawn beside the text, in HTML alone.
    """

    text: str
    look: str = ""
    note: str = ""
    span: Span | None = None


@dataclass(frozen=True)
class Line:
    """One line of a table; `look` is "", "best" or "reference"."""

    cells: Sequence[Cell]
    look: str = ""


@dataclass(frozen=True)
class Grid:
    """A table that scrolls inside its own box."""

    columns: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    summary: str
    parts: Sequence[Heading | Sentence | Grid]


Part = Heading | Sentence | Grid | Fold
BAR = r"\|"


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """As a document."""
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, parts)]) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Sentence(text):
            return _plain(text)
        case Fold(summary, parts):
            inner = "\n\n".join(map(_markdown, parts))
            return f"<details>\n<summary>{escape(summary)}</summary>\n\n{inner}\n\n</details>"
        case Grid(columns, lines):
            cells = [
                columns,
                ["---"] * len(columns),
                *(list(map(_shown, line.cells)) for line in lines),
            ]
            return "\n".join(
                f"| {' | '.join(_plain(text).replace('|', BAR) for text in line)} |"
                for line in cells
            )


def _shown(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.look == "strong" and cell.text else cell.text
    return f"{text} {cell.note}".strip()


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def to_html(title: str, subtitle: str, parts: Sequence[Part]) -> str:
    """As a page that needs no other file."""
    sections = [part.text for part in parts if isinstance(part, Heading) and part.level == 2]
    links = "\n".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in sections)
    body = "\n".join(map(_html, parts))
    return _PAGE.substitute(title=escape(title), subtitle=escape(subtitle), links=links, body=body)


def _anchor(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return (
                f'<h{level} id="{_anchor(text)}">{escape(text)}</h{level}>'
                if level == 2
                else f"<h3>{escape(text)}</h3>"
            )
        case Sentence(text, look):
            return f'<p class="{look}">{escape(text)}</p>'
        case Fold(summary, parts):
            inner = "\n".join(map(_html, parts))
            return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"
        case Grid(columns, lines):
            head = "".join(f"<th>{escape(name)}</th>" for name in columns)
            body = "\n".join(map(_line, lines))
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _line(line: Line) -> str:
    return f'<tr class="{line.look}">{"".join(map(_cell, line.cells))}</tr>'


def _cell(cell: Cell) -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    text = f"<div>{escape(cell.text)}{note}</div>"
    return f'<td class="{cell.look}"><div class="beside">{text}{cell.span.svg() if cell.span else ""}</div></td>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1f2328; --quiet: #656d76; --line: #e4e4e1; --head: #f3f3f0;
  --ahead: #00507d; --behind: #9a4300; --best: #e9f3fa; --mark: #0072b2; --bar: #9cc6e0; --chance:
  #a05a00; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15181c; --card: #1c2025; --ink: #e3e6ea; --quiet: #9aa3ad; --line: #30363d; --head:
  #23282e;
  --ahead: #74bdf0; --behind: #f0a062; --best: #1b3346; --mark: #56b4e9; --bar: #35607f; --chance:
  #e69f00; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 2.2rem auto 5rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line);
} h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; } h1, h2, h3 { overflow-wrap: anywhere; }
p { max-width: 78ch; margin: .45rem 0; } .quiet, td.quiet { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1.2rem 0; }
nav a { color: inherit; text-decoration: none; font-size: .85rem; padding: .15rem .65rem;
  border: 1px solid var(--line); border-radius: 1rem; background: var(--card); }
nav a:hover { border-color: var(--mark); }
.scroll { overflow-x: auto; margin: .7rem 0 1.2rem; border: 1px solid var(--line); border-radius:
.5rem;
  background: var(--card); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; min-width:
100%; } th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid var(--line); }
th, td { white-space: nowrap; }
td:nth-child(2) div div { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width:
19rem; } small { display: block; font-size: .78rem; font-weight: 400; color: var(--quiet); }
.beside { display: flex; gap: .9rem; align-items: center; } .beside div:has(+ svg) { min-width:
6.2rem; } th { font-weight: 600; background: var(--head); } tr:last-child td { border-bottom: 0; }
tr.best td { background: var(--best); } tr.reference td { color: var(--quiet); font-style: italic; }
td.strong { font-weight: 600; } td.ahead { color: var(--ahead); } td.behind { color: var(--behind);
} details { margin: .8rem 0; } summary { cursor: pointer; color: var(--quiet); }
svg { display: block; } .bar { stroke: var(--bar); stroke-width: 5; stroke-linecap: round; }
.dot { fill: var(--mark); } .chance { stroke: var(--chance); stroke-dasharray: 2 2; }
tr.reference .dot { fill: var(--quiet); } tr.reference .bar { stroke: var(--line); }
</style>
</head>
<body>
<h1>$title</h1>
<p class="quiet">$subtitle</p>
<nav>
$links
</nav>
$body
</body>
</html>
""")
