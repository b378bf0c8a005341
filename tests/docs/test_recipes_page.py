"""The page about recipes has all recipes, with the sizes that `recipe_costs` finds."""

from __future__ import annotations

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "recipes.md"


def test_every_recipe_is_on_the_page():
    from jepa_audio.recipes import recipes

    text = PAGE.read_text()
    assert [name for name in recipes() if f"`{name}`" not in text] == []


@pytest.mark.slow
def test_the_sizes_are_those_of_the_recipes():
    from benchmarks.recipe_costs import replaced

    assert PAGE.read_text() == replaced(PAGE), "run `python -m benchmarks.recipe_costs --write`"


@pytest.mark.parametrize("name", ["small/spectrogram", "demo/wavjepa", "front_ends/log_mel"])
def test_the_sizes_of_small_recipes_are_those_of_the_page(name: str):
    from benchmarks.recipe_costs import options, row

    assert row(name, options(name)) in PAGE.read_text().splitlines()


@pytest.mark.parametrize(("recipe", "millions"), [("wavjepa", 85.1 + 3.7), ("pupujepa", 113.4)])
def test_the_sizes_of_the_papers_are_on_the_page(recipe: str, millions: float):
    """WavJEPA has an encoder of 85.1 M and convolutions of 3.7 M, PupuJEPA base 113.4 M."""
    line = next(ln for ln in PAGE.read_text().splitlines() if ln.startswith(f"| `{recipe}` |"))
    assert float(line.split(" | ")[1].removesuffix(" M")) == pytest.approx(millions, rel=0.01)
