"""The compiled loops: where they are stored, and when numba is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_audio.steps import kernels


def run_python(code: str, cache: Path) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return result.stdout.strip()


def test_a_new_process_reads_the_compiled_loops(tmp_path: Path):
    code = (
        "import numpy as np; from jepa_audio.steps import kernels; "
        "kernels.row_keys(np.uint64(1), np.arange(3)); stats = kernels.row_keys.stats; "
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    assert [run_python(code, tmp_path) for _ in range(2)] == ["0 1", "1 0"]


def test_numba_is_imported_at_the_first_draw(tmp_path: Path):
    code = (
        "import sys, jepa_audio.training.jepa, jepa_audio.steps.masking; "
        "print('torch' in sys.modules, 'numba' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "True False"


def test_without_a_folder_for_the_cache_loops_are_compiled_in_each_process(
    caplog: pytest.LogCaptureFixture,
):
    namespace: dict = {}
    # Functions whose file does not exist have no cache folder.
    exec(compile("def add(a, b): return a + b", "/nowhere/loops.py", "exec"), namespace)
    for _ in range(2):
        assert kernels.compiled(namespace["add"])(1, 2) == 3
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1
