"""The fenced blocks and the tables of commands of a page, and what its comments say about them.

A page is Markdown. These comments are not visible on the site:

    <!-- given: audio=audio labels.csv=labels runs/first=run:small/waveform -->
        files that exist before the first block, by their kind (see `given.py`); without this
        comment, they are those of `USUAL`
    <!-- base: demo/wavjepa -->
        the recipe over which the YAML blocks of the page are layered
    <!-- slow -->
        the page is run with `--runslow` only
    <!-- not run: needs a GPU -->
        before a block: it is checked, not run; the reason must begin as one of `REASONS`
    <!-- fails: text -->
        before a block of commands: the last command ends with an error that contains the text

Code in a table that begins as a command (`COMMANDS`) is a block, too. The last two comments can be
in a row, and then concern its commands; before the table, they concern all of its rows.

A block with `title="FILE"` is the content of this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = {"bash", "python", "yaml", "toml", "text"}
# The files that exist on a page without the comment `given`.
USUAL = "audio=audio labels.csv=labels runs/first=run:small/spectrogram"
# How code in a table begins if it is a command.
COMMANDS = re.compile(r"(?:[A-Z_]+=\S+ )?(?:jepa-audio|make|python) ")
REASONS = (
    "needs a GPU",
    "needs several",
    "needs a download",
    "needs an account",
    "installs packages",
    "runs for minutes",
    "is a part of",
)


@dataclass(frozen=True)
class Block:
    """One fenced block, or the commands of one row of a table.

    Attributes:
        place: "docs/data.md:17", the line of its first line of content.
        title: the file that the block is the content of, or an empty text.
        not_run: the reason why it is only checked, or an empty text.
        fails: part of the error of its last command, or an empty text.
    """

    place: str
    language: str
    title: str
    text: str
    not_run: str = ""
    fails: str = ""

    @property
    def line(self) -> int:
        return int(self.place.rpartition(":")[2])

    @property
    def commands(self) -> list[str]:
        """The lines of a block of commands, without comments; continued lines are joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text()

    def setting(self, name: str) -> str | None:
        """The text of a comment that concerns the page."""
        match = re.search(rf"^<!-- {name}(?:: (.*?))? -->$", self.text, re.MULTILINE | re.DOTALL)
        return None if match is None else (match[1] or "")

    @property
    def given(self) -> dict[str, str]:
        """File → kind; `USUAL` if the page does not state it."""
        words = self.setting("given")
        return dict(word.split("=") for word in (USUAL if words is None else words).split())

    def blocks(self) -> list[Block]:
        """All fenced blocks and rows of tables with commands, in order."""
        return sorted([*self.fenced(), *self.rows()], key=lambda block: block.line)

    def rows(self) -> list[Block]:
        """The commands in the rows of tables; those of one row are one block."""
        found, before = [], {}
        text = re.sub(r"^ *```.*?^ *```$", _blank, self.text, flags=re.MULTILINE | re.DOTALL)
        for number, line in enumerate(text.split("\n"), 1):
            if not line.startswith("|"):
                before = _comments(line) if line.strip() else before
                continue
            spans = [span.replace("\\|", "|") for span in re.findall(r"`([^`]+)`", line)]
            commands = [span for span in spans if COMMANDS.match(span)]
            if not commands:
                continue
            comments = {**before, **_comments(line)}
            settings = (comments.get("not run", ""), comments.get("fails", ""))
            content = "\n".join(commands) + "\n"
            found.append(Block(f"{self.name}:{number}", "bash", "", content, *settings))
        return found

    def fenced(self) -> list[Block]:
        """All fenced blocks, in order."""
        found, lines = [], self.text.splitlines()
        start, info, indent = None, "", ""
        for number, line in enumerate(lines):
            fence = re.match(r"(\s*)```(.*)$", line)
            if fence is None:
                continue
            if start is None:
                start, indent, info = number, fence[1], fence[2].strip()
                continue
            content = [text.removeprefix(indent) for text in lines[start + 1 : number]]
            before = next((text for text in reversed(lines[:start]) if text.strip()), "")
            comments = _comments(before)
            title = re.search(r'title="(.*?)"', info)
            found.append(
                Block(
                    f"{self.name}:{start + 2}",
                    info.partition(" ")[0],
                    title[1] if title else "",
                    "\n".join(content) + "\n",
                    comments.get("not run", ""),
                    comments.get("fails", ""),
                )
            )
            start = None
        assert start is None, f"{self.name}: the block at line {start} has no end"
        return found


def _comments(line: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- (not run|fails): (.*?) -->", line))


def _blank(match: re.Match[str]) -> str:
    """As many empty lines."""
    return "\n" * match[0].count("\n")


def pages() -> list[Page]:
    """README and all pages of the site. The page of a notebook is left out: the notebook runs."""
    paths = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [Page(path) for path in paths if not path.with_suffix(".ipynb").exists()]
