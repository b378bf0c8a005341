"""One Python file with some classes of this package, and with all that they need from it.

The parts are copied from the sources as text, so that the file always has the code of the package.
Methods whose names occur nowhere in the file are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from jepa_audio.errors import UserError

PACKAGE = __name__.partition(".")[0]
# Annotations of shapes; without jaxtyping, `Annotated` has the same form.
_SHAPES = "jaxtyping"
_LINE_LENGTH = 100
# torch and transformers call these methods.
_CALLED_BY_OTHERS = {"forward", "_apply", "_init_weights"}


class _Module:
    """The source of a module: its lines, its definitions and its imports by name."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise UserError(f"the module `{name}` has no Python source that can be copied")
        self.name = name
        text = Path(spec.origin).read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = [part for target in targets for part in ast.walk(target)]
                self.definitions |= {part.id: node for part in parts if isinstance(part, ast.Name)}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (alias.name, None)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (str(node.module), alias.name)

    def first_line(self, node: ast.stmt) -> int:
        """Index of the first line of a statement, with its decorators and comments above it."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        while first and self.lines[first - 1].strip().startswith("#"):
            first -= 1
        return first


class OneFile:
    """Collects classes and functions, and what they need.

    Args:
        packages: packages whose code is copied; all others are imported.
    """

    def __init__(self, packages: Iterable[str] = (PACKAGE,)) -> None:
        self._packages = frozenset(packages)
        self._modules: dict[str, _Module] = {}
        # (module, name) → the statement; in the order in which they were found.
        self._kept: dict[tuple[str, str], ast.stmt] = {}
        self._external: set[tuple[str, str | None, str]] = set()
        self._needed_by: dict[str, set[str]] = defaultdict(set)
        self._attributes = set(_CALLED_BY_OTHERS)
        self._copied: set[ast.stmt] = set()

    def add(self, module: str, name: str) -> None:
        """Add a class, a function or a constant, and all that it needs.

        Raises:
            UserError: if its code cannot be copied.
        """
        self._add(module, name)
        # A name that was found last can be the name of a method of a class that was found first.
        while methods := [
            (module, method)
            for (module, _), node in list(self._kept.items())
            for method in self._methods(module, node)
            if method not in self._copied
        ]:
            for module_name, method in methods:
                self._copied.add(method)
                self._scan(module_name, method)

    def text(self, docstring: str) -> str:
        """The file, with its docstring and sorted imports."""
        names = [name for _, name in self._kept] + [name for *_, name in self._external]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UserError(f"two different objects have the name {min(twice)!r}: rename one")
        parts = [part for module in self._order for part in self._parts(module)]
        return "\n".join([f'"""{docstring}"""', "", *_imports(self._external), *parts, ""])

    @cached_property
    def _order(self) -> list[str]:
        """The modules, each one after those that it needs."""
        done: dict[str, None] = {}

        def visit(module: str) -> None:
            if module not in done:
                for other in sorted(self._needed_by[module] - {module}):
                    visit(other)
                done[module] = None

        for module, _ in self._kept:
            visit(module)
        return list(done)

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module(name)
        return self._modules[name]

    def _is_copied(self, module: str) -> bool:
        return module.partition(".")[0] in self._packages

    def _add(self, module_name: str, name: str) -> None:
        module = self._module(module_name)
        if name in module.imports:
            source, attribute = module.imports[name]
            if not self._is_copied(source):
                self._external.add((source, attribute, name))
            elif attribute is None or attribute != name:
                raise UserError(f"{module_name} imports `{source}` as `{name}`: import its parts")
            else:
                self._add(source, name)
        elif name in module.definitions and (module_name, name) not in self._kept:
            node = module.definitions[name]
            self._kept[module_name, name] = node
            self._scan(module_name, node)
        elif name not in module.definitions:
            raise UserError(f"{module_name} has no definition of `{name}` that can be copied")

    def _scan(self, module_name: str, node: ast.stmt) -> None:
        """Add what a statement needs; the methods of a class are scanned when they are kept."""
        module = self._module(module_name)
        skipped = {id(method) for method in _all_methods(node)}
        for part in _walk(node, skipped):
            if isinstance(part, ast.Attribute):
                self._attributes.add(part.attr)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                source = part.module if isinstance(part, ast.ImportFrom) else part.names[0].name
                if self._is_copied(str(source)):
                    raise UserError(
                        f"{module_name}, line {part.lineno}: an import inside a function cannot be "
                        "copied"
                    )
            elif isinstance(part, ast.Name) and (
                part.id in module.definitions or part.id in module.imports
            ):
                source = module_name
                while self._is_copied(source) and part.id in self._module(source).imports:
                    source = str(self._module(source).imports[part.id][0])
                if self._is_copied(source):
                    self._needed_by[module_name].add(source)
                self._add(module_name, part.id)

    def _methods(self, module: str, node: ast.stmt) -> list[ast.FunctionDef]:
        """The methods of a class that the file has."""
        # The code of others may call methods by names that are computed.
        every = module.partition(".")[0] != PACKAGE
        return [
            method
            for method in _all_methods(node)
            if every or method.name in self._attributes or re.fullmatch(r"__\w+__", method.name)
        ]

    def _parts(self, module_name: str) -> Iterator[str]:
        module = self._module(module_name)
        nodes = {
            id(node): node for (source, _), node in self._kept.items() if source == module_name
        }
        after_constant = False
        for node in sorted(nodes.values(), key=lambda node: node.lineno):
            is_constant = isinstance(node, ast.Assign | ast.AnnAssign)
            yield from [] if is_constant and after_constant else ["", ""]
            after_constant = is_constant
            yield from self._lines(module, node)

    def _lines(self, module: _Module, node: ast.stmt) -> Iterator[str]:
        kept = {id(method) for method in self._methods(module.name, node)}
        left_out: set[int] = set()
        for method in _all_methods(node):
            if id(method) not in kept:
                first = module.first_line(method)
                # And the empty line above.
                first -= not module.lines[first - 1].strip()
                left_out |= set(range(first, method.end_lineno or 0))
        for index in range(module.first_line(node), node.end_lineno or 0):
            if index not in left_out:
                yield module.lines[index]


def _all_methods(node: ast.stmt) -> list[ast.FunctionDef]:
    if not isinstance(node, ast.ClassDef):
        return []
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]


def _walk(node: ast.AST, skipped: set[int]) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if id(child) not in skipped:
            yield from _walk(child, skipped)


def _imports(external: set[tuple[str, str | None, str]]) -> Iterator[str]:
    """Import lines, the standard library first, and names for annotations of shapes."""
    shapes = sorted(name for module, _, name in external if module == _SHAPES)
    entries = {entry for entry in external if entry[0] != _SHAPES}
    if shapes:
        entries.add(("typing", "Annotated", "Annotated"))
    yield "from __future__ import annotations"
    for is_standard in (True, False):
        chosen = [
            entry
            for entry in entries
            if (entry[0].partition(".")[0] in sys.stdlib_module_names) is is_standard
        ]
        if chosen:
            yield from ["", *_import_lines(chosen)]
    if shapes:
        yield from [
            "",
            "# Annotations of tensors with their shapes.",
            " = ".join(shapes) + " = Annotated",
        ]


def _import_lines(entries: list[tuple[str, str | None, str]]) -> Iterator[str]:
    for module, _, name in sorted(entry for entry in entries if entry[1] is None):
        yield f"import {module}" + (f" as {name}" if name != module else "")
    by_module: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for module, attribute, name in entries:
        if attribute is not None:
            by_module[module].append((attribute, name))
    for module, names in sorted(by_module.items(), key=lambda item: _natural(item[0])):
        # As ruff sorts: constants, classes, functions.
        plain = sorted((n for n, other in names if n == other), key=_by_kind)
        if plain:
            line = f"from {module} import {', '.join(plain)}"
            wrapped = [f"from {module} import (", *(f"    {name}," for name in plain), ")"]
            yield from [line] if len(line) <= _LINE_LENGTH else wrapped
        for attribute, name in sorted(names):
            if attribute != name:
                yield f"from {module} import {attribute} as {name}"


_natural: Callable[[str], str] = str.lower


def _by_kind(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name
