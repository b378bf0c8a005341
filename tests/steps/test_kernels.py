"""The compiled loops: where they are stored, and when numba is imported."""

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of functions that `compiled_function` compiles."""
    monkeypatch.setattr(kernels, "_problems", [])
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    (tmp_path / "loops.py").write_text("def add(a, b): return a + b")
    return tmp_path


def compiled_function(file: Path) -> Callable[[int, int], int]:
    # Without a name of a module, pickle would search all modules for the function.
    namespace: dict = {"__name__": "loops"}
    exec(compile("def add(a, b): return a + b", file, "exec"), namespace)
    return kernels.compiled(namespace["add"])


def test_without_a_folder_for_the_cache_loops_are_compiled_in_each_process(
    cache: Path, caplog: pytest.LogCaptureFixture
):
    # Functions whose file does not exist have no cache folder.
    for _ in range(2):
        assert compiled_function(Path("/nowhere/loops.py"))(1, 2) == 3
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1


def test_on_a_full_disk_loops_are_compiled_with_one_line(
    cache: Path, caplog: pytest.LogCaptureFixture
):
    functions = [compiled_function(cache / "loops.py") for _ in range(2)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        results = [function(1, 2) for function in functions]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results == [3, 3]
    assert [text.count("File too large") for text in caplog.messages] == [1]


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04damaged"])
def test_a_damaged_cache_is_written_again_with_one_line(
    cache: Path, caplog: pytest.LogCaptureFixture, suffix: str, content: bytes
):
    compiled_function(cache / "loops.py")(1, 2)
    (file,) = cache.rglob(f"*.{suffix}")
    file.write_bytes(content)
    assert compiled_function(cache / "loops.py")(1, 2) == 3
    assert [str(file.parent) in text for text in caplog.messages] == [True]
    third = compiled_function(cache / "loops.py")
    assert third(1, 2) == 3
    assert sum(third.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("process", ["worker", "second rank"])
def test_other_processes_of_a_run_log_nothing_about_the_cache(
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    process: str,
):
    if process == "worker":
        monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    else:
        monkeypatch.setenv("LOCAL_RANK", "1")
    assert compiled_function(Path("/nowhere/loops.py"))(1, 2) == 3
    assert caplog.messages == []
