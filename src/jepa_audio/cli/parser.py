"""Command-line parsers; the error message for an unknown word suggests the most similar word."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, get_loader, set_loader

from jepa_audio.class_paths import TRUST_HELP, parse_yaml
from jepa_audio.cli.config_errors import config_sentence, place_of
from jepa_audio.errors import UserError, did_you_mean, printable
from jepa_audio.old_paths import with_current_paths
from jepa_audio.recipes import recipes

# Settings of `model` whose value can be the name of a recipe → the folder of these recipes.
RECIPE_FOLDERS = {"front_end": "front_ends/", "target_front_end": "target_front_ends/"}
# A parser mode that also reads the YAML of earlier versions, see `old_paths`, and the names of
# `RECIPE_FOLDERS`.
YAML_OF_ALL_VERSIONS = "yaml_of_all_versions"


def _load(text: str) -> Any:
    settings = with_current_paths(parse_yaml(text, "the configuration", get_loader("yaml")))
    sections = (settings, settings.get("model")) if isinstance(settings, dict) else ()
    for model in (section for section in sections if isinstance(section, dict)):
        for key in RECIPE_FOLDERS.keys() & model:
            if (path := recipe_path(key, str(model[key]))) is not None:
                model[key] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return settings


set_loader(YAML_OF_ALL_VERSIONS, _load, (UserError,))
# The words that are values of a setting that is true or false.
_BOOLS = ("true", "false", "yes", "no")
# Arguments that take one or more words → their help.
_WORDS = {
    "sources": "folders, audio files, tars, patterns of paths ('shards/{000..127}.tar'), manifests "
    "(.csv, .tsv, .jsonl) or NSynth's examples.json",
    "folders": "folders of runs, or folders that contain them at any depth",
}


def recipe_path(key: str, name: str) -> Path | None:
    """The recipe of a front end, by its name with or without the folder of `key`, if it exists."""
    known = recipes()
    return known.get(name) or known.get(RECIPE_FOLDERS[key] + name)


class HelpfulParser(ArgumentParser):
    """A parser that reports an error in one sentence, without the usage of the command."""

    # Parsers of classes in a configuration also report errors, and have no command line.
    _words: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"parser_mode": YAML_OF_ALL_VERSIONS, "epilog": TRUST_HELP}
        super().__init__(*args, **{**defaults, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **settings: Any
    ) -> Any:
        """Parse the command line, and keep it for error messages."""
        HelpfulParser._words = list(args or ())
        return super().parse_args(args, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence with a suggestion, and exit with code 2."""
        options = set(_options(self))
        message = re.sub(
            r"ambiguous option: (\S+) could match .*", r"unrecognized arguments: \1", message
        )
        sentence = _missing(message, options) or config_sentence(message, self._words)
        suggestion = _suggestion(message, options)
        place = place_of(message, self._words)
        print(printable(f"jepa-audio: {place}{sentence}{suggestion}"), file=sys.stderr)
        raise SystemExit(2)


def run_function(
    name: str, function: Callable[..., object], args: Sequence[str], as_positional: bool = True
) -> None:
    """Call the function of the command `name` with command-line arguments, and print the result.

    The docstring of the function is the help. The arguments of `_WORDS` take one or more words,
    `-o` means `--output`, and `--flag` means `--flag true`. See `Command` for `as_positional`.
    """
    summary = str(inspect.getdoc(function)).partition("\n\nArgs:")[0]
    parser = HelpfulParser(prog=f"jepa-audio {name}", description=summary)
    parameters = inspect.signature(function).parameters
    several = [word for word in parameters if word in _WORDS]
    # The words of the command line have the order of the parameters.
    first = [word for word in several if word == next(iter(parameters))]
    for word in first:
        parser.add_argument(word, nargs="+", type=str, help=_WORDS[word])
    parser.add_function_arguments(function, as_positional=as_positional, skip=set(several))
    for word in several[len(first) :]:
        parser.add_argument(word, nargs="+", type=str, help=_WORDS[word])
    flags = {f"--{key}" for key, p in parameters.items() if p.annotation in (bool, "bool")}
    args = ["--output" if arg == "-o" else arg for arg in args]
    pairs = zip(args, [*args, ""][1:], strict=True)
    args = [
        f"{arg}=true" if arg in flags and value.lower() not in _BOOLS else arg
        for arg, value in pairs
    ]
    result = function(**parser.parse_args(args).as_dict())
    if result is not None:
        print(printable(result))


def _missing(message: str, options: set[str]) -> str:
    """The sentence for missing arguments, or an empty text for another message."""
    match = re.fullmatch(r"the following arguments are required: (.*)", message)
    if match is None:
        return ""
    # In a command with a recipe, names begin with the name of the command.
    names = [re.sub(r"^(fit|validate|test)\.", "", name) for name in match[1].split(", ")]
    if any(name.startswith("model.") for name in names):
        return (
            "the settings of a model are missing: give a recipe with `--config`, for example "
            "`--config wavjepa`; `jepa-audio configs` lists the recipes"
        )
    return f"missing: {', '.join(f'`--{n}`' if n in options else f'`{n}`' for n in names)}"


def _suggestion(message: str, options: set[str]) -> str:
    """The sentence that suggests a known word, if the message of jsonargparse is about a word."""
    match = re.match(r"unrecognized arguments: ([^-\s]\S*)", message)
    if match and (match[1] in recipes() or match[1].endswith(".yaml")):
        return f"\nA recipe follows `--config`: `--config {match[1]}`"
    if match := re.search(
        r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message
    ):
        word = match[1] or match[2]
        known = {option for option in options if not option.endswith(".help")}
    elif match := re.search(r"Option '(\w+)' is not accepted", message):
        word, known = match[1], {name for cls in _classes() for name in _parameters(cls)}
    elif match := re.search(r"import path string: (?:jepa_audio[\w.]*\.)?(\w+)", message):
        word, known = match[1], {cls.__name__ for cls in _classes()}
        folders = tuple(RECIPE_FOLDERS.values())
        known |= {name.partition("/")[2] for name in recipes() if name.startswith(folders)}
    else:
        return ""
    return f"\n'{word}' is unknown{did_you_mean(word, known) or '.'}"


def _options(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        # The choices of subcommands are their parsers.
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from _options(child)


def _classes() -> Iterator[type]:
    """All imported classes of this package; a YAML file can name them."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "jepa_audio":
            yield from (
                cls
                for _, cls in inspect.getmembers(module, inspect.isclass)
                if cls.__module__ == name
            )


def _parameters(cls: type) -> Iterator[str]:
    yield from getattr(vars(cls).get("__init__"), "__annotations__", ())
