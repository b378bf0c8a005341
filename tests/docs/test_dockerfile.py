"""The Dockerfile copies files that exist, and its steps are commands that a shell can read.

No image is built here: `tests/wheel.sh` installs the package into a clean environment.
"""

from __future__ import annotations

import re
import subprocess
import tomllib

from tests.docs.pages import ROOT


def instructions() -> list[tuple[str, str]]:
    """Name and text of each instruction; continued lines are joined."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line[:1].isupper()]


def test_all_that_the_installation_needs_is_copied():
    sources = {
        word for name, text in instructions() if name == "COPY" for word in text.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"], "src", "configs", "setup.py"}
    assert needed | {"pyproject.toml", "MANIFEST.in", "requirements.lock"} <= sources
    extras = dict(text.split("=") for name, text in instructions() if name == "ARG")["EXTRAS"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_a_shell_can_read_every_step():
    steps = [text for name, text in instructions() if name == "RUN"]
    assert len(steps) > 1
    for step in steps:
        subprocess.run(["sh", "-nc", step], check=True)
    assert re.search(r'".\[\$EXTRAS\]"', steps[-1])


def test_the_image_has_compilers():
    """`--model.compile true` needs them."""
    steps = " ".join(text for name, text in instructions() if name == "RUN")
    assert re.search(r"apt-get install .* gcc g\+\+ ", steps)
