"""Errors that a user can correct, bounds of settings, and suggestions for misspelt names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from math import inf
from typing import Any

# Upper bounds of settings that would take all memory: a day, and a rate above those of converters.
MAX_SECONDS = 86_400.0
MAX_RATE = 1_000_000


class UserError(ValueError):
    """A mistake that the user can correct: the command ends with its message, without a traceback.

    The message names the file, the key, the value and the remedy. Every other exception is a bug
    of this package, and the command shows its traceback.
    """


class MissingFileError(UserError):
    """A file or folder that the user named, or that a data set must contain, does not exist."""


# Control characters, except tab and line feed; characters that change the direction of text or end
# a line; halves of characters, which file names that are not UTF-8 contain.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: Any, one_line: bool = False) -> str:
    """A text with its control characters escaped, so that it cannot control the terminal.

    Args:
        text: a text, or an object whose `str` is printed.
        one_line: also escape tabs and line feeds, as in a list of file names.
    """
    escaped = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))
    return escaped.replace("\n", r"\n").replace("\t", r"\t") if one_line else escaped


def check_bounds(settings: object, low: int | float, high: int | float, *names: str) -> None:
    """Check that the named attributes of `settings` are in [`low`, `high`] or are `None`.

    Raises:
        UserError: for the first attribute out of bounds, with its name, its value and the bounds.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            bounds = f">= {low}" if high == inf else f"in [{low}, {high}]"
            raise UserError(f"`{name}` ({value}) must be {bounds}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests the most similar known word, or an empty text."""
    close = get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word with the smallest edit distance; the first of several in the alphabet."""
    return min(sorted(known), key=lambda name: _edit_distance(word, name))


def _edit_distance(word: str, other: str) -> int:
    """Smallest number of inserted, deleted, replaced and swapped adjacent letters."""
    before, row = list[int](), list(range(len(other) + 1))
    for i, letter in enumerate(word, start=1):
        last, before, row = before, row, [i]
        for j, known in enumerate(other, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != known))
            if min(i, j) > 1 and (letter, word[i - 2]) == (other[j - 2], known):
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
