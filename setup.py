"""Puts the recipes of `configs/` into the wheel as `jepa_audio/configs`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies `configs/` into the package; an editable install reads the folder of the clone."""

    def run(self) -> None:
        """Build the package, then replace its copy of the recipes."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "jepa_audio" / "configs"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(
                "configs", target, ignore=lambda _, names: [n for n in names if n.startswith(".")]
            )


setup(cmdclass={"build_py": BuildWithRecipes})
