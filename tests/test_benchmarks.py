"""Benchmarks that no other test runs end without an error, in small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "train_step --size small --batch 1 --repeats 1 --recipes wavjepa --profile",
            "time literal / fast",
        ),
        ("data --clips 2 --repeats 1 --crops_per_clip 2", "webdataset, packed shards"),
    ],
)
def test_a_benchmark_ends_and_prints_its_table(command: str, expected: str):
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command}".split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
