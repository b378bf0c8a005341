"""Classes are copied to one file with all that they need, and nothing else."""

import sys
from pathlib import Path

import pytest

from jepa_audio.errors import UserError
from jepa_audio.interop.one_file import OneFile

FILES = {
    "shapes": """
import math
from abc import ABC, abstractmethod

from some_package.sizes import LARGE, unused

# The number of corners.
CORNERS = 4
OTHER = 5


class Shape(ABC):
    \"\"\"A shape.\"\"\"

    @abstractmethod
    def area(self):
        ...

    # Only for drawings.
    @property
    def colour(self):
        return "red"


def unused_function():
    return OTHER


class Square(Shape):
    def area(self):
        return math.sqrt(CORNERS) * LARGE

    def colour(self):
        return unused_function()
""",
    "sizes": "from math import pi as PI\n\nLARGE = 2 * PI\nunused = 3\n",
    "twice": "from some_package.shapes import Square\n\nLARGE, OTHER = 1, 2\n"
    "both = (LARGE, Square().area())\n",
    "inside": "def late():\n    from some_package.sizes import LARGE\n\n    return LARGE\n",
    "users": "from some_package.shapes import Square\n\n\ndef use():\n    return Square().area()\n",
}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("jepa_audio.interop.one_file.PACKAGE", "some_package")
    for name in [name for name in sys.modules if name.startswith("some_package")]:
        monkeypatch.delitem(sys.modules, name)


def file(*roots: tuple[str, str]) -> str:
    made = OneFile(["some_package"])
    for module, name in roots:
        made.add(f"some_package.{module}", name)
    return made.text("One file.")


def test_what_is_needed_is_copied_in_order_and_runs():
    text = file(("users", "use"))
    namespace: dict = {}
    exec(text, namespace)
    assert namespace["use"]() == pytest.approx(4 * 3.14159265)
    assert "# The number of corners.\nCORNERS = 4" in text
    order = [text.index(part) for part in ("LARGE =", "CORNERS =", "class Shape", "class Square")]
    assert order == sorted(order)
    for left_out in ("OTHER", "unused", "colour", "drawings", "some_package"):
        assert left_out not in text


def test_two_objects_of_one_name_are_refused():
    with pytest.raises(UserError, match="two different objects have the name 'LARGE'"):
        file(("twice", "both"))


def test_imports_inside_functions_are_refused():
    with pytest.raises(UserError, match="an import inside a function cannot be copied"):
        file(("inside", "late"))


def test_a_name_that_is_no_definition_is_refused():
    with pytest.raises(UserError, match="no definition of `circle`"):
        file(("shapes", "circle"))
    with pytest.raises(UserError, match="no Python source"):
        OneFile(["math"]).add("math", "sqrt")
