"""Processes that end with their parent."""

from __future__ import annotations

import subprocess
import sys
import time

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
