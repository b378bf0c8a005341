"""Published scores of frozen encoders, and whether they are comparable with our results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import Sizes, differ_from_published

PROTOCOL_NOISE = (
    "Papers differ by 2 to 4 points on the same model under the same protocol (MERT-330M on "
    "GiantSteps: 61.7 and 65.6), so a smaller difference to a published number means nothing."
)
_DECIBEL = "SDR in dB"


@cache
def load_published() -> pd.DataFrame:
    """Every number of `published.json`, in the order of its tables.

    Columns: `model`; `task` and `metric`, ours or the benchmark's own; `value` and `deviation`
    over repeats (NaN if not given), from 0 to 1 where the source prints percent; `source`;
    `benchmark`, empty for tasks that this package probes; `protocol`; `preset`, ours with the same
    protocol or `None`; `note`, what the protocol is or how it differs.
    """
    text = files("jepa_audio.report").joinpath("published.json").read_text(encoding="utf-8")
    content = json.loads(text)
    numbers = pd.DataFrame(
        number | content["protocols"][table["protocol"]]
        for table in content["tables"]
        for number in _numbers(table)
    )
    return numbers.rename(columns={"name": "protocol"})


def _numbers(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    scale = 100 if table["unit"] == "percent" else 1
    benchmark = table.get("benchmark", "")
    for model, printed in table["models"].items():
        for column, numbers in zip(table["columns"], printed, strict=True):
            if numbers is None:
                continue
            value, deviation = numbers if isinstance(numbers, list) else (numbers, None)
            task, metric = (column, table["unit"]) if benchmark else column.split()
            yield {
                "model": model,
                "task": task,
                "metric": metric,
                "value": round(value / scale, 6),
                "deviation": None if deviation is None else round(deviation / scale, 6),
                "source": table["source"],
                "benchmark": benchmark,
            }


def published_on(task: str) -> pd.DataFrame:
    """The numbers on a task of this package."""
    numbers = load_published()
    return numbers[(numbers["benchmark"] == "") & (numbers["task"] == task)]


def published_elsewhere() -> pd.DataFrame:
    """The numbers on benchmarks that this package does not probe."""
    numbers = load_published()
    return numbers[numbers["benchmark"] != ""]


def position(value: float, low: float, high: float) -> str:
    """Where a published value lies relative to the interval of our result."""
    if low <= value <= high:
        return "inside our interval"
    return "above" if value > high else "below"


def why_not_comparable(
    task: str, preset: str, select: str, sizes: tuple[int, int, int]
) -> str | None:
    """Why results cannot be compared with numbers of MARBLE v1; `None` if they can.

    Args:
        task: name of the task.
        preset: of our results.
        select: epoch that was tested.
        sizes: units in our train, valid and test splits.
    """
    known: Sizes = TASKS[task].num_units if task in TASKS else (None, None, None)
    if preset != "marble-v1":
        return f"the preset of our results is {preset}, the published protocol is that of marble-v1"
    if select != "best":
        return "our results test the last epoch, published ones the best on the validation split"
    if known[2] is None:
        return "the size of the published test split is not known"
    if differ_from_published(sizes, known):
        ours, theirs = (
            "/".join("?" if size is None else str(size) for size in split)
            for split in (sizes, known)
        )
        return (
            f"our results are of {ours} units in train, valid and test, published ones of {theirs}"
        )
    return None


@dataclass(frozen=True)
class PublishedTable:
    """The numbers of one protocol; numbers of different protocols are never in one table.

    Attributes:
        title: protocol, sources and note.
        columns: tasks or metrics.
        lines: by model, best first: for each column the number and its `position` ("" if none).
    """

    title: str
    columns: list[str]
    lines: dict[str, list[tuple[str, str]]]


def published_tables(
    numbers: pd.DataFrame, ours: dict[str, tuple[float, float]] | None = None
) -> list[PublishedTable]:
    """A table for each protocol.

    Args:
        numbers: lines of `load_published`.
        ours: intervals of our best result by metric, if comparable.
    """
    return [_table(group, ours or {}) for _, group in numbers.groupby("protocol", sort=False)]


def _table(numbers: pd.DataFrame, ours: dict[str, tuple[float, float]]) -> PublishedTable:
    column = numbers["task"].where(numbers["benchmark"] != "", numbers["metric"])
    cells = [
        (_format(line), position(line.value, *ours[line.metric]) if line.metric in ours else "")
        for line in numbers.itertuples()
    ]
    numbers = numbers.assign(column=column, cell=pd.Series(cells, numbers.index))
    numbers = numbers.drop_duplicates(["model", "column"], keep="last")
    columns = list(dict.fromkeys(column))
    values, shown = (
        numbers.pivot(index="model", columns="column", values=name) for name in ("value", "cell")
    )
    in_order = values.loc[numbers["model"].unique(), columns[0]]
    lines = {
        model: [cell if isinstance(cell, tuple) else ("", "") for cell in shown.loc[model, columns]]
        for model in in_order.sort_values(ascending=False, kind="stable").index
    }
    first = numbers.iloc[0]
    sources = ", ".join(numbers["source"].unique())
    return PublishedTable(f"{first['protocol']} ({sources}): {first['note']}.", columns, lines)


def _format(number: Any) -> str:
    digits = 1 if number.metric == _DECIBEL else 3
    deviation = "" if pd.isna(number.deviation) else f" ± {number.deviation:.{digits}f}"
    return f"{number.value:.{digits}f}{deviation}"
