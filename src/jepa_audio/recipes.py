"""Find recipes by name: `pupujepa/large` is the file `configs/pupujepa/large.yaml`."""

from __future__ import annotations

from pathlib import Path

from jepa_audio.errors import MissingFileError, did_you_mean

# The recipes are inside the package in a wheel (see `setup.py`), and at the top level of a clone.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")


def recipes() -> dict[str, Path]:
    """The file of every recipe by its name: the path below `configs/` without `.yaml`; sorted."""
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
    """The file at the path `name`; if no such file exists, the recipe of this name.

    A folder never matches. `make demo` writes a folder `demo/wavjepa`, and there is a recipe of the
    same name.

    Raises:
        MissingFileError: if neither a file nor a recipe exists.
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
