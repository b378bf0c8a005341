"""The command line of a function, and parsers whose errors name the nearest known word."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from jepa_audio.errors import did_you_mean
from jepa_audio.old_paths import with_current_paths
from jepa_audio.recipes import recipes

FRONT_ENDS = "front_ends/"
# The mode of parsers that read YAML, also that of earlier versions: see `old_paths`.
YAML_OF_ALL_VERSIONS = "yaml_of_all_versions"
set_loader(
    YAML_OF_ALL_VERSIONS,
    lambda text: with_current_paths(get_loader("yaml")(text)),
    (yaml.YAMLError,),
)


class HelpfulParser(ArgumentParser):
    """A parser that ends the program with one sentence instead of pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": YAML_OF_ALL_VERSIONS, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and the nearest known word, and end the program."""
        print(f"jepa-audio: {message}{suggestion(message, set(_options(self)))}", file=sys.stderr)
        raise SystemExit(2)


def run_function(
    name: str, function: Callable[..., object], args: Sequence[str], as_positional: bool = True
) -> None:
    """Call a function with arguments from the command line, and print what it returns.

    Args:
        name: of the command.
        function: its docstring is the help; an argument `sources` takes one or more words.
        args: words of the command line after the name; `-o` stands for `--output`.
        as_positional: required arguments may be given by position; all others only by name.
    """
    summary = str(inspect.getdoc(function)).partition("\n\nArgs:")[0]
    parser = HelpfulParser(prog=f"jepa-audio {name}", description=summary)
    has_sources = "sources" in inspect.signature(function).parameters
    if has_sources:
        parser.add_argument("sources", nargs="+", type=str, help="what to index")
    parser.add_function_arguments(
        function,
        as_positional=as_positional,
        skip={"sources"} if has_sources else None,
    )
    args = ["--output" if arg == "-o" else arg for arg in args]
    result = function(**parser.parse_args(args).as_dict())
    if result is not None:
        print(result)


def suggestion(message: str, options: set[str]) -> str:
    """The end of an error message that suggests the nearest known word, if it refuses a word.

    Args:
        message: of jsonargparse.
        options: the command's options, dotted.
    """
    if match := re.search(
        r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message
    ):
        word = match[1] or match[2]
        known = {option for option in options if not option.endswith(".help")}
    elif match := re.search(r"Option '(\w+)' is not accepted", message):
        word, known = match[1], {name for cls in _classes() for name in _parameters(cls)}
    elif match := re.search(r"import path string: (\w+)", message):
        word, known = match[1], {cls.__name__ for cls in _classes()}
        known |= {
            name.removeprefix(FRONT_ENDS) for name in recipes() if name.startswith(FRONT_ENDS)
        }
    else:
        return ""
    return f"\n'{word}' is unknown{did_you_mean(word, known) or '.'}"


def _options(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        # The parsers of subcommands.
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from _options(child)


def _classes() -> Iterator[type]:
    """The imported classes of this package, which a YAML can name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "jepa_audio":
            yield from (
                cls
                for _, cls in inspect.getmembers(module, inspect.isclass)
                if cls.__module__ == name
            )


def _parameters(cls: type) -> Iterator[str]:
    yield from getattr(vars(cls).get("__init__"), "__annotations__", ())
