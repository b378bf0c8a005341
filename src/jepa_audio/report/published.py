"""What others have published about frozen encoders, and where it may be held beside our own rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jepa_audio.probing.tasks.base import Sizes, differ_from_published

PROTOCOL_NOISE = (
    "Papers differ by 2 to 4 points on the same model under the same protocol (MERT-330M on GiantSteps: 61.7 and 65.6),"
    " so a smaller gap to a published number says nothing."
)


@dataclass(frozen=True)
class PublishedProtocol:
    """How published numbers were come by.

    Attributes:
        name: as it is shown.
        preset: ours that does the same; `None` if there is none, so that no number of ours may be
            held beside it.
        note: what it is, or where it differs.
    """

    name: str
    preset: str | None
    note: str


@dataclass(frozen=True)
class PublishedNumber:
    """A published score.

    Attributes:
        model: as its paper calls it.
        task: ours, or the benchmark's own name for it.
        metric: ours, or a unit.
        value: 0 to 1 where percent was printed, as our own scores.
        deviation: over repeats, on the same scale; `None` if it was not given.
        source: paper or repository.
        protocol: how it was come by.
        benchmark: the collection of tasks; empty for tasks that are probed here.
    """

    model: str
    task: str
    metric: str
    value: float
    deviation: float | None
    source: str
    protocol: PublishedProtocol
    benchmark: str = ""

    def __str__(self) -> str:
        digits = 3 if self.metric != "SDR in dB" else 1
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.value:.{digits}f}{deviation}"


@cache
def load_published() -> tuple[PublishedNumber, ...]:
    """Every number of `published.json`, in the order of its tables."""
    content = json.loads(
        files("jepa_audio.report").joinpath("published.json").read_text(encoding="utf-8")
    )
    protocols = {
        key: PublishedProtocol(**protocol) for key, protocol in content["protocols"].items()
    }
    return tuple(
        _number(table, protocols[table["protocol"]], model, column, printed)
        for table in content["tables"]
        for model, line in table["models"].items()
        for column, printed in zip(table["columns"], line, strict=True)
        if printed is not None
    )


def _number(
    table: dict[str, Any],
    protocol: PublishedProtocol,
    model: str,
    column: str,
    printed: float | list[float],
) -> PublishedNumber:
    value, deviation = printed if isinstance(printed, list) else (printed, None)
    scale = 100 if table["unit"] == "percent" else 1
    benchmark = table.get("benchmark", "")
    task, metric = (column, table["unit"]) if benchmark else column.split()
    return PublishedNumber(
        model,
        task,
        metric,
        round(value / scale, 6),
        None if deviation is None else round(deviation / scale, 6),
        table["source"],
        protocol,
        benchmark,
    )


def published_on(task: str) -> list[PublishedNumber]:
    """The numbers on one of our tasks."""
    return [number for number in load_published() if not number.benchmark and number.task == task]


def published_elsewhere() -> list[PublishedNumber]:
    """The numbers on benchmarks that are not probed here."""
    return [number for number in load_published() if number.benchmark]


def place(value: float, low: float, high: float) -> str:
    """Where a published value lies, seen from our interval."""
    if low <= value <= high:
        return "inside our interval"
    return "above" if value > high else "below"


def why_not_comparable(
    preset: str, select: str, sizes: tuple[int, int, int], published_sizes: Sizes
) -> str | None:
    """A clause that says what keeps rows of ours from being held beside numbers of MARBLE v1; `None` if nothing does.

    Args:
        preset: of our rows.
        select: epoch that was tested.
        sizes: units of our train, val and test splits.
        published_sizes: those of the published split, as far as they are known.
    """
    if preset != "marble-v1":
        return f"the preset of our rows is {preset}, the published protocol is that of marble-v1"
    if select != "best":
        return "our rows test the last epoch, the published ones the best on the validation split"
    if published_sizes[2] is None:
        return "the size of the published test split is not known"
    if differ_from_published(sizes, published_sizes):
        ours, theirs = (
            "/".join(map(str, some)).replace("None", "?") for some in (sizes, published_sizes)
        )
        return (
            f"our rows are of {ours} units in train, val and test, the published ones of {theirs}"
        )
    return None
