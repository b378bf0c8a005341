"""The shape of the house: imports run one way, and no file grows into a drawer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jepa_audio

SOURCE = Path(jepa_audio.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import rooms of lower rank and itself; rooms of one rank do not know each other.
RANKS = {
    "__init__": 0,
    "grid": 0,
    "schedules": 0,
    "front_ends": 1,
    "masking": 1,
    "positions": 1,
    "losses": 1,
    "ema": 1,
    "optimizer": 1,
    "finite": 1,
    "data": 1,
    "transformer": 2,
    "predictor": 3,
    "targets": 3,
    "sharding": 3,
    "jepa": 4,
    "monitor": 5,
    "checkpointing": 5,
    "encode": 5,
    "interop": 6,
    "probing": 7,
    "plots": 6,
    "report": 9,
    "suggest": 1,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}
ONLY = {"data": {"data", "grid"}}
WITHOUT_DATA = {room for room, rank in RANKS.items() if rank < RANKS["probing"]} - {"data"}


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
    if imported == "data" and room in WITHOUT_DATA:
        return False
    return imported in ONLY.get(room, RANKS) and RANKS[imported] < RANKS[room]


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
    file = tmp_path / "grid.py"
    file.write_text("def f():\n    from jepa_audio import jepa\n    import jepa_audio.data.read\n")
    assert list(imported_rooms(file)) == [("jepa", 2), ("data", 3)]
    assert not is_allowed("grid", "jepa")
    assert not is_allowed("encode", "data")
    assert not is_allowed("monitor", "encode")
    assert is_allowed("probing", "data")


def test_no_file_is_longer_than_400_lines_and_the_module_no_longer_than_200():
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    too_long = {name: length for name, length in lengths.items() if length > (200 if name == "jepa.py" else 400)}
    assert not too_long


def test_there_is_no_drawer():
    drawers = ("util", "helper", "misc", "common", "registry", "factory")
    assert not [path for path in FILES if any(word in path.stem for word in drawers)]
