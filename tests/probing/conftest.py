"""Tiny data sets, and the results of probing them, shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.probing.tiny_sets import SET_OF, Probed


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny data set of a task, written once."""
    built: dict[str, Path] = {}

    def root_of(task: str) -> Path:
        name = SET_OF[task].build.__name__
        if name not in built:
            built[name] = SET_OF[task].build(tmp_path_factory.mktemp(name))
        return built[name]

    return root_of


@pytest.fixture(scope="session")
def probed(
    roots: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Probed]:
    """Results of the oracle and the constant encoder for a task; each data set is probed once."""
    from jepa_audio.probing.run import probe
    from jepa_audio.probing.tasks import TASKS

    done: dict[str, Probed] = {}

    def of(task: str) -> Probed:
        tiny = SET_OF[task]
        name = tiny.build.__name__
        if name not in done:
            root, output = roots(task) / tiny.root, tmp_path_factory.mktemp(f"{name}-results")
            encoders = [
                f"tests.probing.oracle_encoders:{encoder}" for encoder in (tiny.oracle, "constant")
            ]
            tasks = [one for one in tiny.num_test if one in TASKS]
            done[name] = Probed(root, output, probe(encoders, tasks, root, output, preset="linear"))
        return done[name]

    return of
