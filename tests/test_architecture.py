"""The structure of the package: imports run one way, and files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jepa_audio

SOURCE = Path(jepa_audio.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import itself and rooms of lower rank; rooms of the same rank do not import each other.
RANKS = {
    "errors": 0,
    "class_paths": 1,
    "files": 1,
    "old_paths": 1,
    "parallel": 1,
    "recipes": 1,
    "steps": 2,
    "data": 3,
    "training": 4,
    "inference": 5,
    "__init__": 6,  # the public names, imported lazily; rooms import each other directly
    "interop": 6,
    "probing": 6,
    "report": 7,
    "cli": 8,
    "__main__": 9,
}
# Likewise inside `data`.
DATA_RANKS = {"audio": 0, "corpus": 1, "loading": 2, "scenes": 3, "synthetic": 3, "datamodule": 4}
# `data` needs the tokens of a crop and their masks, and nothing else of the six steps.
STEPS_FOR_DATA = {"grid", "masking"}


def imported_modules(path: Path) -> Iterator[tuple[list[str], int]]:
    """(parts of the name after `jepa_audio`, line) of every import of the package in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "jepa_audio":
                yield (parts if parts and parts[0] in RANKS else ["__init__"]), node.lineno


def is_allowed(importer: list[str], imported: list[str]) -> bool:
    """Whether a module may import another one, each given by the parts of its name."""
    room, other = importer[0], imported[0]
    if room == other == "data":
        first, second = importer[1:2], imported[1:2]
        if not first or not second or first == second:
            return True
        return DATA_RANKS[second[0]] < DATA_RANKS[first[0]]
    if room == "data" and other == "steps":
        return imported[1] in STEPS_FOR_DATA
    if importer == ["training", "jepa"] and other == "data":
        return False
    return room == other or RANKS[other] < RANKS[room]


def module_of(path: Path) -> list[str]:
    return list(path.relative_to(SOURCE).with_suffix("").parts)


def test_every_room_has_a_rank():
    assert {module_of(path)[0] for path in FILES} <= set(RANKS)
    in_data = {module_of(path)[1] for path in FILES if module_of(path)[0] == "data"}
    assert in_data - {"__init__"} == set(DATA_RANKS)


def test_imports_run_one_way():
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {'.'.join(imported)}"
        for path in FILES
        for imported, line in imported_modules(path)
        if module_of(path)[-1] != "__init__" or len(module_of(path)) == 1
        if not is_allowed(module_of(path), imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_are_found(tmp_path: Path):
    file = tmp_path / "steps.py"
    file.write_text(
        "def f():\n    from jepa_audio.training import jepa\n"
        "    import jepa_audio.data.audio.read\n"
    )
    found = [("training", "jepa", 2), ("data", "audio", "read", 3)]
    assert [(*parts, line) for parts, line in imported_modules(file)] == found


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("steps.grid", "training.jepa", False),
        ("data.corpus.index", "data.audio.read", True),
        ("data.audio.read", "data.corpus.index", False),
        ("data.loading.clips", "steps.grid.Grid", True),
        ("data.loading.clips", "steps.losses.MSE", False),
        ("training.jepa", "data.datamodule", False),
        ("training.watching.finite_guard", "data.datamodule", True),
        ("interop.convert", "probing.run", False),
        ("probing.run", "data.audio.read", True),
    ],
)
def test_the_rule_of_imports(importer: str, imported: str, expected: bool):
    assert is_allowed(importer.split("."), imported.split(".")) is expected


def test_no_file_is_longer_than_400_lines_and_the_lightning_module_is_not_longer_than_200():
    lengths = {"/".join(module_of(path)): len(path.read_text().splitlines()) for path in FILES}
    limits = {name: 200 if name == "training/jepa" else 400 for name in lengths}
    assert not {name: length for name, length in lengths.items() if length > limits[name]}


def test_no_function_body_is_longer_than_60_lines():
    """Without signature and docstring, which are the options and the help of a command."""
    too_long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
                first = node.body[1 if has_docstring else 0].lineno
                if node.end_lineno - first >= 60:
                    too_long.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}")
    assert not too_long


def test_no_file_collects_unrelated_code():
    names = ("util", "helper", "misc", "common", "registry", "factory")
    assert not [path for path in FILES if any(name in path.stem for name in names)]
