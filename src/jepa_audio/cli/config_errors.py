"""One sentence for an error of jsonargparse, which lists all types and attempts."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType

import yaml

from jepa_audio.class_paths import MAX_VALUES
from jepa_audio.errors import did_you_mean

_TYPE_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false", "int": "an integer"}
_TYPE_NAMES |= {"float": "a number", "list": "a list", "dict": "a mapping", "Iterable": "a list"}
_TYPE_NAMES |= {"Sequence": "a list"}
_VALUE = re.compile(r"(?:(?:Given|Got) value|path string): (.*)")


def config_sentence(message: str, words: Sequence[str] = ()) -> str:
    """The key, the value and what is expected; other messages become one line.

    Args:
        message: of an exception of jsonargparse.
        words: the command line, which has the complete name of a nested key.
    """
    match = re.match(r'Parser key "([^"]+)":?\s*(.*)', message, re.DOTALL)
    key, body = (match[1], match[2]) if match else ("", message)
    option = next((name for name in _options(words) if name.endswith(f".{key}")), key)
    prefix = f"`{option}`" if key else "a setting"
    if problem := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", body):
        return _class_problem(problem[1], problem[2])
    if abstract := re.search(r"but ([\w.]+) is abstract", body):
        return f"{prefix}: {_abstract_class(abstract[1])}"
    if missing := _missing_class(body):
        return f"{prefix}: {missing}"
    value = _VALUE.search(body)
    expected = list(dict.fromkeys(_expected(body)))
    if not expected or value is None:
        return " ".join(message.split())
    choices = " or ".join([", ".join(expected[:-1]), expected[-1]] if expected[1:] else expected)
    return f"{prefix} is {value[1].strip()}, but must be {choices}"


def place_of(message: str, words: Sequence[str]) -> str:
    """File, line and complete key of the setting that a message is about, or an empty text.

    Args:
        message: of an exception of jsonargparse.
        words: the command line; its last `--config` with this setting counts.
    """
    unknown = re.search(r"Option '(\w+)' is not|does not accept option '([\w.]+)'", message)
    named = re.search(r'Parser key "([^"]+)"', message)
    found = re.search(r"given class_path '([^']+)'", message) or _VALUE.search(message)
    value = None if unknown or not found else found[1].strip()
    if value and (class_path := re.match(r"Namespace\(class_path='([^']+)'", value)):
        value = class_path[1]
    key = (unknown[1] or unknown[2]) if unknown else (named[1] if named else "")
    if not (key or value) or any(value == word.rpartition("=")[2] for word in words if value):
        return ""
    files = [word for option, word in pairwise(words) if option == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for file in reversed(files):
        for path, node in _settings_of(file):
            names = (f".{path}", f".{path}".removesuffix(".class_path"))
            is_key = any(name.endswith(f".{key}") for name in names) if key else True
            if is_key and (value is None or node.value == value):
                return f"{file}, line {node.start_mark.line + 1} (`{path}`): "
    return ""


def _settings_of(file: str) -> list[tuple[str, yaml.Node]]:
    """The settings of a file, at most `MAX_VALUES`; none if it cannot be read as YAML."""
    try:
        root = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        return list(islice(_settings(root, ""), MAX_VALUES))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []


def _settings(node: yaml.Node | None, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """(key, value) of all settings of a configuration, nested ones too."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _settings(child, path)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            yield inner, child
            yield from _settings(child, inner)


def attempts(error: BaseException) -> Iterator[BaseException]:
    """The errors of all types of a union; jsonargparse links only the first of them."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "raise_union_unexpected_value":
            yield from trace.tb_frame.f_locals.get("exceptions", ())
        trace = trace.tb_next


def _options(words: Iterable[str]) -> Iterator[str]:
    yield from (word[2:].partition("=")[0] for word in words if word.startswith("--"))


def _expected(body: str) -> Iterator[str]:
    """Names of the types and values that are accepted."""
    for literal, name, class_path in re.findall(
        r"Expected an? (?:typing\.Literal\[(.*)\]|<class '([\w.]+)'>)|(Expected a dot import)", body
    ):
        if literal:
            yield literal
        elif class_path:
            yield "the name or import path of a class"
        else:
            short = name.rpartition(".")[2]
            yield _TYPE_NAMES.get(short, f"a {short}")


def _class_problem(class_path: str, reason: str) -> str:
    if missing := re.search(r"Requirement '([^']+)' not met", reason):
        return f"{class_path} needs another package: run `pip install '{missing[1]}'`"
    return _missing_class(reason) or f"{class_path}: {reason.strip()}"


def _missing_class(reason: str) -> str:
    """The sentence for a class that its module does not have, or an empty text."""
    match = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", reason)
    if match is None:
        return ""
    module, name = match.groups()
    similar = did_you_mean(name, vars(pkgutil.resolve_name(module)))
    return f"`{module}.{name}` does not exist{similar}"


def _abstract_class(class_path: str) -> str:
    methods = sorted(getattr(pkgutil.resolve_name(class_path), "__abstractmethods__", ()))
    return f"{class_path} is abstract: it does not implement {', '.join(methods)}"
