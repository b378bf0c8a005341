"""The pages of notebooks: `python -m tests.docs.notebook` writes them again.

The site and GitHub's readers of text get a page with the cells; the notebook stays the source.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def page_of(notebook: Path) -> str:
    """The cells as Markdown, and after the heading a link to the notebook."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    heading, _, rest = parts[0].partition("\n\n")
    link = (
        f"This page shows the cells of a notebook, without results: [{notebook.name}]"
        f"({notebook.name}).\nLines that begin with `!` are commands of the shell."
    )
    return "\n\n".join([heading, link, rest, *parts[1:]]) + "\n"


if __name__ == "__main__":
    for path in NOTEBOOKS:
        path.with_suffix(".md").write_text(page_of(path))
