"""The leaderboard: paired comparisons on equal bootstrap resamples, averages over tasks, tables.

The functions `build_…` return what the templates show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jepa_audio.errors import UserError
from jepa_audio.probing.intervals import difference, interval
from jepa_audio.probing.rows import STATISTICS, ProbeRow, load_evidence
from jepa_audio.report.published import published_on, published_tables, why_not_comparable
from jepa_audio.report.results import ENCODER, PROTOCOL, RECORDS, add_baselines, latest

Draws = Float[np.ndarray, " draws"]
COMPARABLE = [*PROTOCOL, *RECORDS, "resamples"]
"""Columns that must be equal for two results to be compared."""
MEANS = ["value", "draws", "low", "high"]
"""Columns of `mean_scores`."""
TASK_METRICS = (("auroc", "ap"), ("r2_valence", "r2_arousal"))
"""Tasks with both metrics enter an average with the mean of the two (arXiv:2306.10548)."""


def compute_scores(table: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder, metric and set of comparable results: the mean over seeds.

    Columns: `COMPARABLE`, `ENCODER`, `is_baseline`, `chance`, `name` (of the metric), `value`,
    `draws` (the mean on each resample of the test units), `low`, `high`, `deviation` (over seeds;
    NaN for one), `num_seeds`, `layer`, `comparison` (number of the set of comparable results), and
    `note`: variant, pooling and, if several weights have one name, their hash.

    Raises:
        UserError: naming the evidence that is missing or damaged.
    """
    table = latest(table)
    found = [_load_draws(row, folder) for row, folder in table[["row", "folder"]].to_numpy()]
    table = table.assign(draws=[draws for draws, _ in found], resamples=[key for _, key in found])
    inherited = [*COMPARABLE, *ENCODER, "is_baseline", "chance"]
    lines = [
        {**group.iloc[0][inherited], **line}
        for _, group in table.groupby([*COMPARABLE, *ENCODER], sort=False)
        for line in _mean_over_seeds(group["row"].tolist(), group["draws"].tolist())
    ]
    scores = pd.DataFrame(
        lines, columns=[*inherited, "name", *MEANS, "deviation", "num_seeds", "layer"]
    )
    num_weights = scores.groupby(ENCODER[:3])["encoder_hash"].transform("nunique")
    weights = np.where(num_weights > 1, ", weights " + scores["encoder_hash"].str[:8], "")
    scores = scores.assign(
        comparison=scores.groupby(COMPARABLE, sort=False).ngroup(),
        note=scores["variant"] + ", " + scores["pooling"] + weights,
    )
    return scores.sort_values("comparison", kind="stable", ignore_index=True)


def _load_draws(row: ProbeRow, folder: Path) -> tuple[dict[str, Draws], str]:
    """Draws by metric, and a digest of the names of the units and the number of draws."""
    path = folder / row.evidence
    # The predictions, up to gigabytes for all rows together, are not kept.
    evidence = load_evidence(path)
    if missing := sorted(row.scores.keys() - evidence.draws.keys()):
        raise UserError(
            f"{path} holds no `draws/{missing[0]}`, but the row has this score: probe again"
        )
    digest = hashlib.sha256("\n".join(evidence.uids).encode()).hexdigest()[:8]
    return evidence.draws, f"{digest} {len(evidence.draws[row.metric])}"


def _mean_over_seeds(
    rows: list[ProbeRow], draws: list[dict[str, Draws]]
) -> Iterator[dict[str, Any]]:
    for name in rows[0].scores:
        if all(name in row.scores for row in rows):
            values = pd.Series([row.scores[name].value for row in rows])
            yield {
                "name": name,
                **mean_scores(values, [found[name] for found in draws]),
                "deviation": values.std(),
                "num_seeds": len(rows),
                "layer": ", ".join(dict.fromkeys(row.layer for row in rows)),
            }


def mean_scores(values: pd.Series, draws: Iterable[Draws]) -> dict[str, Any]:
    """Mean `value` and `draws`, which are empty if the numbers of draws differ, and interval."""
    draws = list(draws)
    is_paired = len(set(map(len, draws))) == 1
    mean = np.mean(draws, axis=0) if is_paired else np.empty(0, np.float32)
    return dict(zip(MEANS, (float(values.mean()), mean, *interval(mean)), strict=True))


def rank_lines(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines with finite values, best first, with ranks and differences to the baselines.

    New columns, next to those of `add_baselines`: `rank` ("1", "2–3", or "" for baselines),
    `is_best` (rank 1 is possible, and no baseline is better) and `differences`, by baseline.
    """
    lines = add_baselines(lines[np.isfinite(lines["value"])])
    lines = lines.sort_values("value", ascending=False, kind="stable")
    ranked = lines[~lines["is_baseline"]]
    # Averages over tasks with different numbers of draws have no draws.
    has_draws = all(map(len, ranked["draws"]))
    ranges = rank_ranges(ranked["value"], ranked["draws"]) if has_draws else []
    range_of = dict(zip(ranked.index, ranges, strict=False))
    added = []
    for line in lines.itertuples():
        first, last = range_of.get(line.Index, (0, 0))
        differences = {
            name: difference(line.value, other.value, line.draws, other.draws)
            for name, other in line.baselines.items()
            if 0 < len(line.draws) == len(other.draws)
        }
        rank = f"{first}–{last}" if first < last else str(first or "")  # noqa: RUF001
        is_best = first == 1 and not line.below
        added.append({"rank": rank, "is_best": is_best, "differences": differences})
    return lines.join(pd.DataFrame(added, lines.index))


def rank_ranges(values: Iterable[float], draws: Iterable[Draws]) -> list[tuple[int, int]]:
    """First and last rank that each encoder may have, from paired tests at 95 % of every pair.

    `first` - 1 encoders are significantly better, all after `last` significantly worse. Encoders
    without a significant difference share ranks; that relation is not transitive.
    """
    scores = list(zip(values, draws, strict=True))
    verdicts = [
        [difference(value, other, draws, other_draws).verdict for other, other_draws in scores]
        for value, draws in scores
    ]
    return [(line.count("behind") + 1, len(scores) - line.count("ahead")) for line in verdicts]


def build_averages(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over each set of two or more tasks that an encoder has, the largest set first.

    The lines are the encoders that have results on all tasks of the set under equal conditions;
    `values` of a line are the scores on the tasks.
    """
    averages = []
    for protocol, lines in _task_scores(scores).groupby("average_protocol"):
        of_task = lines.drop_duplicates([*ENCODER, "task"], keep="last")
        of_encoder = [group for _, group in of_task.groupby(ENCODER, sort=False)]
        sets = {tuple(group["comparison"]) for group in of_encoder if len(group) > 1}
        for comparisons in sorted(sets, key=lambda found: (-len(found), found)):
            chosen = [group[group["comparison"].isin(comparisons)] for group in of_encoder]
            chosen = [group for group in chosen if len(group) == len(comparisons)]
            means = pd.DataFrame(
                {**group.iloc[0], **_mean_lines(group), "values": tuple(group["value"])}
                for group in chosen
            )
            table = _score_table("mean", means)
            averages.append({"protocol": protocol, "tasks": tuple(chosen[0]["task"]), **table})
    return averages


def _task_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder and task: the headline metric, or the mean of the two of a task."""
    lines = []
    for _, group in scores.groupby(["comparison", *ENCODER], sort=False):
        pairs = (pair for pair in TASK_METRICS if set(pair) <= set(group["name"]))
        found = group[group["name"].isin(next(pairs, group["metric"].iloc[:1]))]
        if np.isfinite(found["value"]).all():
            lines.append({**found.iloc[0], **_mean_lines(found)})
    table = pd.DataFrame(lines, columns=scores.columns)
    # Logistic regression and ridge regression are one head for two kinds of labels.
    heads = table["head"].replace({"logistic": "linear", "ridge": "linear"})
    protocol = table["preset"] + ", " + heads + " head, " + table["select"] + " epoch"
    return table.assign(average_protocol=protocol)


def _mean_lines(lines: pd.DataFrame) -> dict[str, Any]:
    return mean_scores(lines["value"], lines["draws"])


def build_tasks(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """A section for each task: its sets of comparable results, and published numbers."""
    return [_task(str(task), group) for task, group in scores.groupby("task", sort=False)]


def _task(task: str, scores: pd.DataFrame) -> dict[str, Any]:
    published = published_on(task)
    groups = [group for _, group in scores.groupby("comparison", sort=False)]
    comparisons = [_comparison(group, set(published["metric"])) for group in groups]
    obstacles = [each["obstacle"] for each in comparisons]
    # Baselines are the best only if nothing else was probed.
    bests = (
        {
            table["metric"]: min(table["lines"], key=lambda line: line.is_baseline)
            for table in each["tables"]
            if table["lines"]
        }
        for each in comparisons
        if each["obstacle"] is None and each["tables"][0]["lines"]
    )
    best = next(bests, {})
    ours = {metric: (line.low, line.high) for metric, line in best.items()}
    is_comparable = (published["preset"] == "marble-v1") & bool(ours)
    columns = {"split_checksum": "split", "resamples": "test units or resamples"}
    columns |= dict.fromkeys(RECORDS[1:], "number of units")
    differing = [column for column in COMPARABLE if scores[column].nunique() > 1]
    return {
        "name": task,
        "comparisons": comparisons,
        "differing": dict.fromkeys(columns.get(column, column) for column in differing),
        "obstacles": dict.fromkeys(filter(None, obstacles)),
        "best": next(iter(best.values()), None),
        "published": published_tables(published[is_comparable], ours),
        "published_otherwise": published_tables(published[~is_comparable]),
    }


def _comparison(scores: pd.DataFrame, published_metrics: set[str]) -> dict[str, Any]:
    """Results that are comparable with each other.

    `tables` are of the headline metric and of metrics with published numbers; `obstacle` is the
    reason why published numbers are not comparable.
    """
    first = next(scores.itertuples())
    chance = next(iter(scores["chance"].dropna()), None)
    by_metric = dict(list(scores.groupby("name", sort=False)))
    headline = by_metric.pop(first.metric)
    tables = [_score_table(first.metric, headline, chance)]
    others = {name: _score_table(name, group) for name, group in by_metric.items()}
    sizes = (first.num_train, first.num_valid, first.num_test)
    counts = f"{'/'.join(map(str, sizes))} {first.unit}s in train, valid and test"
    decoder = f", decoder {first.decoder}" if first.decoder else ""
    return {
        "protocol": f"{first.preset}, {first.head} head, {first.select} epoch{decoder}",
        "data": f"{counts}, split {first.split_checksum[:8]}",
        "tables": tables + [others[name] for name in others if name in published_metrics],
        "other_tables": [others[name] for name in others if name not in published_metrics],
        "without_random_init": sorted(
            {
                line.encoder
                for line in add_baselines(headline).itertuples()
                if not line.is_baseline and "random-init" not in line.baselines
            }
        ),
        "has_log_mel": (headline["variant"] == STATISTICS).any(),
        "obstacle": why_not_comparable(first.task, first.preset, first.select, sizes),
    }


def _score_table(metric: str, scores: pd.DataFrame, chance: float | None = None) -> dict[str, Any]:
    """Lines of a metric, best first; `axis` are the ends of the axis of their intervals."""
    lines = rank_lines(scores)
    ends = lines[["low", "value", "high"]].to_numpy(float)
    ends = np.append(ends[np.isfinite(ends)], [] if chance is None else [chance])
    axis = (ends.min(), ends.max()) if len(ends) else (0.0, 1.0)
    return {"metric": metric, "lines": list(lines.itertuples()), "chance": chance, "axis": axis}


def build_overviews(results: pd.DataFrame) -> list[dict[str, Any]]:
    """The current results of each protocol: for each encoder and head, its line on each task."""
    overviews = []
    for protocol, group in results.groupby("protocol", sort=False):
        rows = group["row"].tolist()
        # Encoders in alphabetical order, each with its variants in the order of the results.
        by_name = group.sort_values("encoder", kind="stable")
        by_head = by_name.groupby([*ENCODER, "head"], sort=False)
        overviews.append(
            {
                "protocol": protocol,
                "rows": rows,
                "tasks": {row.task: row for row in rows},
                "lines": [{line.task: line for line in lines.itertuples()} for _, lines in by_head],
            }
        )
    return overviews
