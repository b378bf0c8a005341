"""A parser whose refusals name the right word."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from jepa_audio.errors import did_you_mean


class HelpfulParser(LightningArgumentParser):
    """Says what is wrong and what was probably meant, without the pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one message."""
        print(f"jepa-audio: {message}{suggestion(message, set(_options(self)))}", file=sys.stderr)
        raise SystemExit(2)


def suggestion(message: str, options: set[str]) -> str:
    """What was probably meant, if the message refuses a word that looks like one of ours.

    Args:
        message: of jsonargparse.
        options: the command's options, dotted.
    """
    if found := re.search(
        r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message
    ):
        wrong, words = (
            found[1] or found[2],
            {option for option in options if not option.endswith(".help")},
        )
    elif found := re.search(r"Option '(\w+)' is not accepted", message):
        wrong, words = found[1], {name for cls in _classes() for name in _parameters(cls)}
    elif found := re.search(r"import path string: (\w+)", message):
        wrong, words = found[1], {cls.__name__ for cls in _classes()}
    else:
        return ""
    return f"\n'{wrong}' is unknown{did_you_mean(wrong, words) or '.'}"


def _options(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        if isinstance(action.choices, dict):  # the parsers of subcommands
            for child in action.choices.values():
                yield from _options(child)


def _classes() -> Iterator[type]:
    """Everything that a YAML of ours can name, as far as it is imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "jepa_audio":
            yield from (
                cls
                for _, cls in inspect.getmembers(module, inspect.isclass)
                if cls.__module__ == name
            )


def _parameters(cls: type) -> Iterator[str]:
    yield from getattr(vars(cls).get("__init__"), "__annotations__", ())
