"""Published scores of frozen encoders, and whether they are comparable with our results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import Sizes, differ_from_published


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
    lines = []
    for table in content["tables"]:
        scale = 100 if table["unit"] == "percent" else 1
        shared = {"source": table["source"], "benchmark": table.get("benchmark", "")}
        shared |= content["protocols"][table["protocol"]]
        for model, printed in table["models"].items():
            for column, number in zip(table["columns"], printed, strict=True):
                if number is None:
                    continue
                pair = number if isinstance(number, list) else (number, math.nan)
                value, deviation = (round(part / scale, 6) for part in pair)
                task, metric = [column, table["unit"]] if shared["benchmark"] else column.split()
                line = {"model": model, "task": task, "metric": metric, "value": value}
                lines.append({**line, "deviation": deviation, **shared})
    return pd.DataFrame(lines).rename(columns={"name": "protocol"})


def published_on(task: str) -> pd.DataFrame:
    """The numbers on a task of this package."""
    numbers = load_published()
    return numbers[(numbers["benchmark"] == "") & (numbers["task"] == task)]


def build_elsewhere() -> dict[str, list[dict[str, Any]]]:
    """The tables of the benchmarks that this package does not probe, by title."""
    numbers = load_published()
    elsewhere = numbers[numbers["benchmark"] != ""]
    unit = ", " + elsewhere["metric"].groupby(elsewhere["benchmark"]).transform("first")
    titles = elsewhere["benchmark"] + unit.replace(", percent", "")
    return {
        str(title): published_tables(group)
        for title, group in elsewhere.groupby(titles, sort=False)
    }


def position(value: float, low: float, high: float) -> str:
    """Where a published value lies relative to the interval of our result."""
    if low <= value <= high:
        return "inside our interval"
    return "above" if value > high else "below"


def why_not_comparable(
    task: str, preset: str, select: str, sizes: tuple[int, int, int]
) -> str | None:
    """Why results cannot be compared with numbers of MARBLE v1; `None` if they can.

    `sizes` are the units in our train, valid and test splits.
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


def published_tables(
    numbers: pd.DataFrame, ours: Mapping[str, tuple[float, float]] | None = None
) -> list[dict[str, Any]]:
    """A table for each protocol, because numbers of different protocols are not comparable.

    The columns are metrics of a task, or tasks of a benchmark; models are sorted by the first
    column, best first.

    Args:
        numbers: lines of `load_published`.
        ours: intervals of our best result by metric, if they are comparable with the numbers.
    """
    column = numbers["task"].where(numbers["benchmark"] != "", numbers["metric"])
    tables = []
    for (protocol, note), group in numbers.assign(column=column).groupby(
        ["protocol", "note"], sort=False
    ):
        columns = group["column"].unique().tolist()
        cells = {(each.model, each.column): _cell(each, ours or {}) for each in group.itertuples()}
        first = group[group["column"] == columns[0]]
        best_first = first.sort_values("value", ascending=False, kind="stable")["model"]
        lines = {
            model: [cells.get((model, column), ("", "")) for column in columns]
            for model in dict.fromkeys([*best_first, *group["model"]])
        }
        title = f"{protocol} ({', '.join(group['source'].unique())}): {note}."
        tables.append({"title": title, "columns": columns, "lines": lines})
    return tables


def _cell(number: Any, ours: Mapping[str, tuple[float, float]]) -> tuple[str, str]:
    """The number, and its position relative to our interval, empty if it is not comparable."""
    digits = 1 if number.metric == "SDR in dB" else 3
    text = f"{number.value:.{digits}f}"
    if not math.isnan(number.deviation):
        text += f" ± {number.deviation:.{digits}f}"
    return text, position(number.value, *ours[number.metric]) if number.metric in ours else ""
