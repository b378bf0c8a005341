"""The content of the leaderboard: an overview, averages, and for each task its tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from jepa_audio.report.comparisons import (
    COMPARABLE,
    Average,
    add_baselines,
    average_tasks,
    rank_lines,
)
from jepa_audio.report.published import (
    PublishedTable,
    published_elsewhere,
    published_on,
    published_tables,
    why_not_comparable,
)
from jepa_audio.report.results import ENCODER, PROTOCOL, RECORDS, current

Line = Any
"""A line of a DataFrame, as `itertuples` yields it."""


@dataclass(frozen=True)
class Overview:
    """The current results of one preset.

    Attributes:
        protocol: preset and epoch.
        header: of each task: metric, chance and number of test units.
        lines: (line with the columns of the encoder and its head, results by task).
        results: all results; see `current_results`.
    """

    protocol: str
    header: dict[str, str]
    lines: list[tuple[Line, dict[str, Line]]]
    results: pd.DataFrame


def current_results(table: pd.DataFrame) -> pd.DataFrame:
    """Lines of `current`, with their `protocol`, `value` and the columns of `add_baselines`."""
    lines = current(table)
    protocol = lines["preset"] + np.where(
        lines["select"] == "best", "", ", " + lines["select"] + " epoch"
    )
    lines = lines.assign(protocol=protocol, value=[row.value for row in lines["row"]])
    groups = [add_baselines(group) for _, group in lines.groupby([*PROTOCOL, *RECORDS], sort=False)]
    return pd.concat(groups).sort_index() if groups else add_baselines(lines)


def build_overviews(results: pd.DataFrame) -> list[Overview]:
    """An overview for each protocol."""
    return [_overview(str(key), group) for key, group in results.groupby("protocol", sort=False)]


def _overview(protocol: str, results: pd.DataFrame) -> Overview:
    header = {}
    for row in results["row"]:
        chance = "" if row.chance is None else f", chance {row.chance:.3f}"
        header[row.task] = f"{row.metric}{chance}, {row.num_test} {row.unit}s"
    # Encoders in alphabetical order, each with its variants in the order of the results.
    by_encoder = results.sort_values("encoder", kind="stable")
    lines = []
    for _, group in by_encoder.groupby([*ENCODER, "head"], sort=False):
        of_task = {line.task: line for line in group.itertuples()}
        lines.append((next(iter(of_task.values())), of_task))
    return Overview(protocol, header, lines, results)


@dataclass(frozen=True)
class ScoreTable:
    """A metric of comparable results, best first.

    Attributes:
        name: of the metric.
        lines: see `rank_lines`, with a `note` that identifies the encoder.
        chance: score of the trivial predictor; `None` where there is none.
        axis: ends of the axis of the intervals.
    """

    name: str
    lines: list[Line]
    chance: float | None
    axis: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Results that are comparable with each other.

    Attributes:
        protocol: preset, head, epoch, decoder.
        data: sizes and checksum of the splits.
        tables: of the headline metric and of metrics with published numbers.
        other_tables: of the other metrics.
        without_random_init: encoders whose random-init baseline was not probed.
        has_log_mel: whether log-mel statistics were probed.
        obstacle: why published numbers are not comparable; `None` if they are.
    """

    protocol: str
    data: str
    tables: list[ScoreTable]
    other_tables: list[ScoreTable]
    without_random_init: list[str]
    has_log_mel: bool
    obstacle: str | None


@dataclass(frozen=True)
class TaskSection:
    """All about one task.

    Attributes:
        name: of the task.
        comparisons: sets of comparable results.
        differing: what distinguishes the comparisons.
        obstacles: why published numbers are not comparable.
        best: our best encoder in the comparison with published numbers, with its marks.
        published: comparable published numbers, with their position relative to our best.
        published_otherwise: numbers of other protocols, for orientation.
    """

    name: str
    comparisons: list[Comparison]
    differing: list[str]
    obstacles: list[str]
    best: str
    published: list[PublishedTable]
    published_otherwise: list[PublishedTable]


def describe_encoders(scores: pd.DataFrame) -> pd.DataFrame:
    """Add a `note`: variant, pooling and, if several weights have one name, their hash."""
    if scores.empty:
        return scores
    num_weights = scores.groupby(ENCODER[:3])["encoder_hash"].transform("nunique")
    weights = np.where(num_weights > 1, ", weights " + scores["encoder_hash"].str[:8], "")
    return scores.assign(note=scores["variant"] + ", " + scores["pooling"] + weights)


def build_averages(scores: pd.DataFrame) -> list[tuple[Average, ScoreTable]]:
    """The averages over tasks, each with its table."""
    if scores.empty:
        return []
    return [
        (average, _score_table("mean", average.lines, None)) for average in average_tasks(scores)
    ]


def build_tasks(scores: pd.DataFrame) -> list[TaskSection]:
    """A section for each task."""
    if scores.empty:
        return []
    return [_task(str(task), group) for task, group in scores.groupby("task", sort=False)]


def _task(task: str, scores: pd.DataFrame) -> TaskSection:
    published = published_on(task)
    groups = [group for _, group in scores.groupby("comparison", sort=False)]
    comparisons = [_comparison(group, set(published["metric"])) for group in groups]
    comparable = next(
        (each for each in comparisons if each.obstacle is None and each.tables[0].lines), None
    )
    is_ours = published["preset"] == "marble-v1"
    if comparable is None or published.empty:
        best, tables, otherwise = "", [], published_tables(published)
    else:
        best, ours = _best(comparable)
        tables = published_tables(published[is_ours], ours)
        otherwise = published_tables(published[~is_ours])
    return TaskSection(
        name=task,
        comparisons=comparisons,
        differing=_differing_columns(scores),
        obstacles=list(dict.fromkeys(each.obstacle for each in comparisons if each.obstacle)),
        best=best,
        published=tables,
        published_otherwise=otherwise,
    )


def _differing_columns(scores: pd.DataFrame) -> list[str]:
    names = {"split_checksum": "split", "resamples": "test units or resamples"}
    names |= dict.fromkeys(RECORDS[1:], "number of units")
    differing = [column for column in COMPARABLE if scores[column].nunique() > 1]
    return list(dict.fromkeys(names.get(column, column) for column in differing))


def _comparison(scores: pd.DataFrame, published_metrics: set[str]) -> Comparison:
    first = next(scores.itertuples())
    chance = next((chance for chance in scores["chance"] if chance is not None), None)
    tables = {
        str(name): _score_table(
            str(name), rank_lines(group), chance if name == first.metric else None
        )
        for name, group in scores.groupby("name", sort=False)
    }
    headline = tables.pop(first.metric)
    shown = {name: table for name, table in tables.items() if name in published_metrics}
    sizes = (first.num_train, first.num_valid, first.num_test)
    counts = f"{'/'.join(map(str, sizes))} {first.unit}s in train, valid and test"
    data = f"{counts}, split {first.split_checksum[:8]}"
    decoder = f", decoder {first.decoder}" if first.decoder else ""
    lines = add_baselines(scores[scores["name"] == first.metric])
    ranked = lines[~lines["is_baseline"]]
    return Comparison(
        protocol=f"{first.preset}, {first.head} head, {first.select} epoch{decoder}",
        data=data,
        tables=[headline, *shown.values()],
        other_tables=[table for name, table in tables.items() if name not in shown],
        without_random_init=sorted(set(ranked[ranked["random_init"].isna()]["encoder"])),
        has_log_mel=bool((lines["variant"] == "statistics").any()),
        obstacle=why_not_comparable(first.task, first.preset, first.select, sizes),
    )


def _score_table(name: str, lines: pd.DataFrame, chance: float | None) -> ScoreTable:
    ends = lines[["low", "value", "high"]].to_numpy(float)
    ends = np.append(ends[np.isfinite(ends)], [] if chance is None else [chance])
    axis = (float(ends.min()), float(ends.max())) if len(ends) else (0.0, 1.0)
    return ScoreTable(name, list(lines.itertuples()), chance, axis)


def _best(comparison: Comparison) -> tuple[str, dict[str, tuple[float, float]]]:
    """Our best encoder of the headline metric, and the interval of the best by metric.

    Baselines are the best only if nothing else was probed.
    """
    best = {
        table.name: min(table.lines, key=lambda line: line.is_baseline)
        for table in comparison.tables
        if table.lines
    }
    line = next(iter(best.values()))
    marks = f" ({', '.join(line.below)})" if line.below else ""
    name = f"{line.encoder}, {line.note}{marks}"
    return name, {metric: (found.low, found.high) for metric, found in best.items()}


@cache
def build_elsewhere() -> list[tuple[str, list[PublishedTable]]]:
    """Title and tables of the benchmarks that this package does not probe."""
    sections = []
    for benchmark, numbers in published_elsewhere().groupby("benchmark", sort=False):
        unit = numbers["metric"].iloc[0]
        title = str(benchmark) if unit == "percent" else f"{benchmark}, {unit}"
        sections.append((title, published_tables(numbers)))
    return sections
