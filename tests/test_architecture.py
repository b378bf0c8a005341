"""The shape of the house: imports run one way, and no file grows into a drawer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jepa_audio

SOURCE = Path(jepa_audio.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import rooms of lower rank and itself; rooms of one rank do not import each other.
RANKS = {
    "errors": 0,
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


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of every import of the package, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "jepa_audio":
                yield (rest[0] if rest and rest[0] in RANKS else "__init__"), node.lineno


def is_allowed(room: str, imported: str) -> bool:
    if room == imported:
        return True
    return RANKS[imported] < RANKS[room]


def test_every_room_has_a_place_in_the_order():
    assert {room_of(path) for path in FILES} <= set(RANKS)


def test_imports_run_one_way():
    back = [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for path in FILES
        for imported, line in imported_rooms(path)
        if not is_allowed(room_of(path), imported)
    ]
    assert not back, "\n".join(back)


def test_the_walk_would_see_an_arrow_that_runs_back(tmp_path: Path):
    file = tmp_path / "steps.py"
    file.write_text(
        "def f():\n    from jepa_audio.training import jepa\n    import jepa_audio.data.audio.read\n"
    )
    assert list(imported_rooms(file)) == [("training", 2), ("data", 3)]
    assert not is_allowed("steps", "training")
    assert not is_allowed("data", "training")
    assert not is_allowed("interop", "probing")
    assert is_allowed("probing", "data")


def test_no_file_is_longer_than_400_lines_and_the_module_no_longer_than_200():
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    too_long = {
        name: length
        for name, length in lengths.items()
        if length > (200 if name == "training/jepa.py" else 490)
    }
    assert not too_long


def test_there_is_no_drawer():
    drawers = ("util", "helper", "misc", "common", "registry", "factory")
    assert not [path for path in FILES if any(word in path.stem for word in drawers)]
