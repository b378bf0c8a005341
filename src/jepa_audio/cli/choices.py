"""The help of an option whose value is a class: the classes to choose from, and their settings."""

from __future__ import annotations

import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

from jepa_audio.cli.parser import HelpfulParser
from jepa_audio.errors import UserError, did_you_mean


def choices_help(words: Sequence[str], roots: Mapping[str, type]) -> str | None:
    """The text for `--OPTION.help` or `--OPTION.help CLASS`; `None` without such an option.

    Args:
        words: the command line.
        roots: class of each first part of an option, such as `JEPA` for `--model`.

    Raises:
        UserError: if the option takes no class, or if the class is none of its choices.
    """
    for i, word in enumerate(words):
        option, equals, value = word.removeprefix("--").partition("=")
        key = option.removesuffix(".help")
        if not word.startswith("--") or key == option or key.partition(".")[0] not in roots:
            continue
        following = [name for name in words[i + 1 : i + 2] if not name.startswith("-")]
        names = [value] if equals else following
        choices = {cls.__name__: cls for cls in _choices(key, roots)}
        if not choices:
            raise UserError(f"`{key}` does not take a class: `--help` lists all options")
        if len(choices) == 1 and not names:
            names = list(choices)
        return _settings(key, names[0], choices) if names else _list(key, choices)
    return None


def _list(key: str, choices: Mapping[str, type]) -> str:
    width = max(map(len, choices))
    lines = [f"  {name:{width}}  {_summary(cls)}" for name, cls in choices.items()]
    end = f"`--{key}.help CLASS` shows the settings of a class."
    return "\n".join([f"classes for --{key}:", "", *lines, "", end])


def _settings(key: str, name: str, choices: Mapping[str, type]) -> str:
    module, _, short = name.rpartition(".")
    if module and short not in choices:
        try:
            choices = {short: pkgutil.resolve_name(name)}
        except (ImportError, AttributeError) as error:
            raise UserError(f"`{name}` cannot be imported: {error}") from error
    if short not in choices:
        hint = did_you_mean(short, choices)
        raise UserError(f"`{name}` is not a class for `{key}`; known: {', '.join(choices)}{hint}")
    parser = HelpfulParser(prog=f"--{key} {short}", add_help=False)
    parser.add_class_arguments(choices[short], key)
    return parser.format_help()


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _choices(key: str, roots: Mapping[str, type]) -> list[type]:
    """The classes that the value of an option may have, without abstract and private ones."""
    first, *parts = key.split(".")
    classes = [roots[first]]
    for part in parts:
        if part != "init_args":
            hints = [typing.get_type_hints(cls.__init__) for cls in classes]  # type: ignore[misc]
            found = [cls for hint in hints if part in hint for cls in _classes_in(hint[part])]
            classes = [cls for base in dict.fromkeys(found) for cls in _concrete(base)]
    by_name = {cls.__name__: cls for cls in classes}
    return [by_name[name] for name in sorted(by_name)]


def _classes_in(hint: object) -> Iterator[type]:
    """The classes in a type; of a callable, the class of its result."""
    if inspect.isclass(hint) and hint.__module__ != "builtins" and not typing.get_args(hint):
        yield hint
    arguments = typing.get_args(hint)
    is_callable = typing.get_origin(hint) is Callable
    for argument in arguments[-1:] if is_callable else arguments:
        yield from _classes_in(argument)


def _concrete(base: type) -> Iterator[type]:
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _concrete(subclass)
