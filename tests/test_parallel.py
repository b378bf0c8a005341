"""Processes that end with their parent; memory that a process keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time

import pyarrow as pa
import pytest

# The interpreter of the child takes 30 s to end, as one with much memory does.
CHILD = """
import os, time
from jepa_audio.parallel import end_with_parent

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(30)

slow, parent = Slow(), os.getppid()
end_with_parent()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
raise ConnectionError("the first process ended")
"""
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
input()
"""


def test_a_process_whose_parent_was_killed_ends_before_its_interpreter_is_taken_down():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], text=True, **pipes) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.kill()
        start = time.monotonic()
        output, error = parent.communicate(timeout=60)  # until the child closes its output
    assert time.monotonic() - start < 15, error
    assert not output


# Page faults of each of 30 tensors of 64 MiB, which have 16,384 pages, one after the other.
FAULTS = """
import resource, sys, torch
from jepa_audio.parallel import reuse_freed_memory

if sys.argv[1] == "reuse":
    reuse_freed_memory()
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the option is one of glibc")
def test_the_memory_of_a_freed_tensor_is_used_again():
    fresh, reused = (
        list(map(int, subprocess.check_output([sys.executable, "-c", FAULTS, mode]).split()))
        for mode in ("default", "reuse")
    )
    assert min(fresh) > 16_000
    # The first ones can leave gaps that are too small for the next one.
    assert max(reused[-10:]) < 100
    assert sum(reused) < sum(fresh) / 2


@pytest.mark.parametrize("chosen", [None, "system"])
def test_arrow_keeps_freed_memory_in_the_block_only(chosen: str | None):
    code = (
        "import pyarrow as pa\n"
        "from jepa_audio.parallel import reusing_arrow_memory\n"
        "usual = pa.default_memory_pool().backend_name\n"
        "try:\n"
        "    with reusing_arrow_memory():\n"
        "        pool = pa.default_memory_pool()\n"
        "        table = pa.array([0] * 2**20)\n"
        "        used = pool.bytes_allocated()\n"
        "        del table\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    print(pool.backend_name, used >= 2**23, pool.bytes_allocated())\n"
        "print(pa.default_memory_pool().backend_name == usual)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"}
    if chosen:
        environment["ARROW_DEFAULT_MEMORY_POOL"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    backends = pa.supported_memory_backends()
    expected = chosen or ("jemalloc" if "jemalloc" in backends else backends[0])
    assert done.stdout.splitlines() == [f"{expected} True 0", "True"]
