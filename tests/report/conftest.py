"""Fixtures of the tests of pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but rendered as one pixel, for tests of the texts of a page."""

    def save_pixel(figure: Figure, path: Path, **_: object) -> None:
        Image.new("RGB", (1, 1)).save(path, format="png")

    monkeypatch.setattr(Figure, "savefig", save_pixel)
