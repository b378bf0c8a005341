"""Recipes by name: `pupujepa/large` is `configs/pupujepa/large.yaml` of this package."""

from __future__ import annotations

from pathlib import Path

from jepa_audio.errors import MissingFileError, did_you_mean

# A wheel holds the recipes inside the package (see `setup.py`), a clone at its top level.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")


def recipes() -> dict[str, Path]:
    """The files of all recipes by name, sorted; a name is the path without `configs/` and `.yaml`."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise MissingFileError(
            f"this installation of jepa-audio has no recipes: neither {_FOLDERS[0]} nor "
            f"{_FOLDERS[1]} exists; install jepa-audio again"
        )
    names = sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )
    return {name: folder / f"{name}.yaml" for name in names}


def find_recipe(name: str) -> Path:
    """The file that a user names: a file of that path, else the recipe of that name.

    A folder never matches: `make demo` writes the folder `demo/wavjepa`, which is a recipe's name.

    Raises:
        MissingFileError: if there is neither a file nor a recipe.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        bare = name.removeprefix("configs/").removesuffix(".yaml")
        raise MissingFileError(
            f"'{name}' is neither a file nor one of the recipes that `jepa-audio configs` lists"
            f"{did_you_mean(bare, known)}"
        )
    return known[name]


def description(recipe: Path) -> str:
    """The first comment line of a recipe."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
