"""One sentence for an error of jsonargparse, which lists all types and attempts."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

_TYPE_NAMES = {"NoneType": "null", "str": "text", "bool": "true or false", "int": "an integer"}
_TYPE_NAMES |= {"float": "a number", "list": "a list", "dict": "a mapping", "Iterable": "a list"}
_TYPE_NAMES |= {"Sequence": "a list"}


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
    expected = list(dict.fromkeys(_expected(body)))
    value = re.search(r"(?:Given|Got) value: (.*)", body) or re.search(r"path string: (.*)", body)
    if not expected or value is None:
        return " ".join(message.split())
    choices = " or ".join([", ".join(expected[:-1]), expected[-1]] if expected[1:] else expected)
    return f"{prefix} is {value[1].strip()}, but must be {choices}"


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
    return f"{class_path}: {reason.strip()}"


def _abstract_class(class_path: str) -> str:
    methods = sorted(getattr(pkgutil.resolve_name(class_path), "__abstractmethods__", ()))
    return f"{class_path} is abstract: it does not implement {', '.join(methods)}"
