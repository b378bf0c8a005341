"""Which classes a checkpoint or a converted configuration may name, decided before any import."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import yaml

from jepa_audio.errors import UserError

# Checkpoints of this package name classes of these modules.
_KNOWN = ("jepa_audio", "torch.optim")
# Modules of the option `--trust`.
_TRUSTED: list[str] = []
_NAME = re.compile(r"[\w-]*")  # without a dot: no class of a module
_CLASS_PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+")
TRUST_HELP = (
    "`--trust MODULE`, once or several times: a checkpoint may name classes of this module, too."
)
MAX_VALUES = 100_000
MAX_DEPTH = 50


def split_trusted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into the words without `--trust MODULE`, and these modules."""
    rest: list[str] = []
    modules: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, module = word.partition("=")
        if option == "--trust":
            modules.append(module if equals else next(words, ""))
        else:
            rest.append(word)
    return rest, modules


@contextmanager
def trusting(modules: Sequence[str]) -> Iterator[None]:
    """Let files name objects of these modules inside the block; the option `--trust`.

    Raises:
        UserError: if a text is not the name of a module.
    """
    for module in modules:
        if not re.fullmatch(r"\w+(\.\w+)*", module):
            raise UserError(f"`--trust` ({module!r}) must be the name of a module")
    count = len(_TRUSTED)
    _TRUSTED.extend(modules)
    try:
        yield
    finally:
        del _TRUSTED[count:]


def is_trusted(path: str, modules: Sequence[str] = ()) -> bool:
    """Whether `path` is in one of `modules`, or in a module of the option `--trust`."""
    return _is_inside(path, (*modules, *_TRUSTED))


def trusted_modules() -> list[str]:
    """The modules of the option `--trust`."""
    return list(_TRUSTED)


def other_modules(settings: Any) -> list[str]:
    """Modules of the classes in settings that a file may only name with `--trust`."""
    found, values = set(), [settings]
    while values:
        value = values.pop()
        values += nested_values(value)
        path = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(path, str) and "." in path and not _is_inside(path, _KNOWN):
            found.add(path.rpartition(".")[0])
    return sorted(found)


def check_class_paths(settings: Any, source: str, modules: Sequence[str] = ()) -> None:
    """Check that settings of a file name only classes of jepa-audio, torch.optim and `modules`.

    jsonargparse imports the module of every text that looks like a class path. It also parses
    texts as YAML, and that YAML may contain class paths. Settings may therefore contain only three
    kinds of texts: names without dots, numbers, and paths of classes.

    Args:
        settings: nested settings from a file.
        source: where they come from, for the error message.
        modules: names of further modules, in addition to those of the option `--trust`.

    Raises:
        UserError: for any other text; its module is not imported. Also if the settings are too
            large, see `check_size`.
    """
    check_size(settings, nested_values, source)
    _check(settings, source, "", modules)


def check_size(root: Any, children: Callable[[Any], Iterable[Any]], source: str) -> None:
    """Check that nested values are few, if a value with several aliases is counted for each alias.

    A few lines of YAML with aliases can describe more values than fit into memory.

    Raises:
        UserError: if there are more than `MAX_VALUES` values, or more than `MAX_DEPTH` levels; a
            value that contains itself has infinitely many.
    """
    _size(root, 0, {}, children, source)


def _size(
    value: Any,
    depth: int,
    sizes: dict[int, int],
    children: Callable[[Any], Iterable[Any]],
    source: str,
) -> int:
    """Count the values inside a value; `sizes` has the counts of those already visited."""
    if id(value) not in sizes:
        if depth > MAX_DEPTH:
            raise UserError(f"{source} is nested deeper than {MAX_DEPTH} levels")
        inside = (_size(child, depth + 1, sizes, children, source) for child in children(value))
        total = 1 + sum(inside)
        if total > MAX_VALUES:
            raise UserError(f"{source} has more than {MAX_VALUES:,} values with its aliases")
        sizes[id(value)] = total
    return sizes[id(value)]


def parse_yaml(text: str, source: str, parse: Callable[[str], Any] = yaml.safe_load) -> Any:
    """The content of a YAML text of bounded size, see `check_size`.

    Raises:
        UserError: if the text is not YAML, or too large.
    """
    try:
        # A level needs a character, an alias a star: a short text without stars is small.
        if len(text) > MAX_DEPTH or "*" in text:
            check_size(yaml.compose(text, Loader=yaml.SafeLoader), _node_children, source)
        return parse(text)
    except RecursionError:
        raise UserError(f"{source} is nested deeper than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def _node_children(node: yaml.Node | None) -> Iterable[Any]:
    if isinstance(node, yaml.MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def nested_values(value: Any) -> Iterable[Any]:
    """The values of a dictionary or a list."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _check(value: Any, source: str, key: str, modules: Sequence[str]) -> None:
    if isinstance(value, dict):
        path = value.get("class_path")
        if isinstance(path, str) and is_trusted(path, modules):
            # The user's class may have any texts as arguments.
            return
        for name, child in value.items():
            _check(child, source, f"{key}.{name}" if key else str(name), modules)
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            _check(child, source, f"{key}[{i}]", modules)
    elif isinstance(value, str) and not (_NAME.fullmatch(value) or _is_number(value)):
        if not _CLASS_PATH.fullmatch(value):
            raise UserError(f"{source}: `{key}` ({value!r}) is neither a name nor a class")
        _check_class(value, f"{source}: `{key}`", modules)


def _check_class(path: str, where: str, modules: Sequence[str]) -> None:
    if is_trusted(path, modules):
        return
    module, _, name = path.rpartition(".")
    if not _is_inside(path, _KNOWN):
        raise UserError(
            f"{where} names `{path}`, which is not imported: a file may name classes of "
            f"{' and '.join(_KNOWN)}; if you trust this module, add `--trust {module}`, or "
            f"`trust=[{module!r}]` in Python"
        )
    try:
        found = None if "__" in path else getattr(import_module(module), name)
    except (ImportError, AttributeError):
        found = None
    if not isinstance(found, type) or not _is_inside(found.__module__, _KNOWN):
        raise UserError(f"{where} names `{path}`, which is not a class of this version")


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
