"""`benchmarks/learning.py`: reading experiments, and when an encoder counts as ahead."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.learning import (
    Result,
    Trial,
    compare,
    read_results,
    seconds_until_ahead,
    table,
)

from jepa_audio.errors import UserError
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import read_rows
from tests.probing.rows import add


def result(seconds: float, *lows: float, task: str = "digit") -> Result:
    against = {f"baseline {i}": Difference(low + 0.1, low, 1.0) for i, low in enumerate(lows)}
    return Result(
        task, seconds, int(seconds), "context", "mean/concat", "2", 0.5, 0.4, 0.6, against
    )


@pytest.mark.parametrize(
    ("lows", "seconds"),
    [
        ([(-0.1, 0.1), (0.1, 0.1), (0.1, 0.2)], 200),
        ([(0.1, 0.1), (0.1, -0.1), (0.1, 0.1)], 300),  # ahead, and behind again
        ([(0.1, 0.1), (0.1, 0.1), (0.0, 0.1)], None),  # the interval must be above zero
    ],
)
def test_an_encoder_is_ahead_when_it_stays_ahead_of_all_baselines(
    lows: list[tuple[float, float]], seconds: float | None
):
    results = [result(100.0 * (i + 1), *low) for i, low in enumerate(lows)]
    other = result(50.0, 1.0, 1.0, task="pitch")
    assert seconds_until_ahead([*results[::-1], other], "digit") == seconds


def test_results_are_read_as_they_were_written(tmp_path: Path):
    trial, results = (
        Trial("a", "demo/wavjepa", tasks=("digit",)),
        [result(10, 0.1), result(20, 0.1)],
    )
    values = {"trial": asdict(trial), "results": list(map(asdict, results))}
    line = json.dumps({"date": "2026-01-01", "commit": "abc", **values})
    (tmp_path / "results.jsonl").write_text(line + "\n")
    assert read_results(tmp_path) == [(trial, results, "2026-01-01, abc")]
    (row,) = table(tmp_path).splitlines()[2:]
    assert row.endswith("| 20 (20 s) | 10 s |")
    assert read_results(tmp_path / "none") == []


def test_an_encoder_is_compared_with_the_pooling_of_the_task(tmp_path: Path):
    results, draws = tmp_path / "results.jsonl", np.linspace(-0.01, 0.01, 101)
    task = "sets/fsdd_digit_select.csv"

    def row(value: float, pooling: str, **changes: object) -> None:
        add(results, value, value + draws, task=task, pooling=f"{pooling}/concat", **changes)

    row(0.6, "thirds_std", variant="target", valid=0.4)
    row(0.9, "mean_std_change", variant="target", valid=0.9)
    statistics = {"encoder": "log-mel", "variant": "statistics"}
    row(0.5, "thirds_std", **statistics)
    row(0.7, "mean_std_change", **statistics)
    rows = [replace(r, evidence=str(tmp_path / r.evidence)) for r in read_rows(results)]
    (found,) = compare(rows, 60.0, 100)
    assert (found.pooling, found.value) == ("thirds_std/concat", 0.6)
    differences = {name: gap.value for name, gap in found.against.items()}
    assert differences == pytest.approx({"log-mel, equal pooling": 0.1, "log-mel": -0.1})
    assert not found.is_ahead
    with pytest.raises(UserError, match="`poolings` has no thirds_std, the pooling of this task"):
        compare([r for r in rows if "thirds" not in r.pooling], 60.0, 100)
