"""Errors that a user can correct, and the nearest known name for a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can correct: the command ends with its message, without a traceback.

    The message names the file, the key, the value and the remedy. Every other exception is a
    fault of this package and is shown with its traceback.
    """


class MissingFileError(UserError):
    """A file or folder that the user named, or that a data set should hold, does not exist."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests the most similar known word; empty if none is."""
    close = get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
