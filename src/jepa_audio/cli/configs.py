"""The commands `configs` and `configs copy`; their docstrings are their `--help`."""

from __future__ import annotations

from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.files import write_text
from jepa_audio.recipes import description, find_recipe, recipes


def list_recipes() -> None:
    """List the recipes for the options `config`, `model.front_end` and `model.target_front_end`."""
    known = recipes()
    width = max(map(len, known)) + 2
    for name, path in known.items():
        print(f"{name:{width}}{description(path)}")


def copy(name: str, output: Path | None = None) -> None:
    """Copy a recipe to a file that you can edit and give to `--config`.

    Args:
        name: name of the recipe; `jepa-audio configs` lists all names.
        output: output file (-o). The default is `NAME.yaml` in the working directory.

    Raises:
        UserError: if the recipe does not exist, or the output file exists.
    """
    recipe = find_recipe(name)
    output = output or Path(f"{Path(name).name.removesuffix('.yaml')}.yaml")
    if output.exists():
        raise UserError(f"{output} exists and is not overwritten: give another file with `-o`")
    write_text(output, recipe.read_text(encoding="utf-8"))
    print(output)
