"""The leaderboard: paired comparisons on equal bootstrap resamples, averages over tasks, tables.

The functions `build_…` return the values that the templates show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jepa_audio.errors import UserError
from jepa_audio.probing.intervals import difference, interval
from jepa_audio.probing.rows import STATISTICS, load_evidence
from jepa_audio.report.published import published_on, published_tables, why_not_comparable
from jepa_audio.report.results import ENCODER, PROTOCOL, RECORDS, add_baselines, latest

Draws = Float[np.ndarray, " draws"]
COMPARABLE = [*PROTOCOL, *RECORDS, "resamples"]
"""Columns that must be equal for two results to be compared."""
TASK_METRICS = (("auroc", "ap"), ("r2_valence", "r2_arousal"))
"""Pairs of metrics: a task with both metrics of a pair has their mean in averages over tasks.

This is the rule of MARBLE (arXiv:2306.10548).
"""


def compute_scores(table: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder, metric and set of comparable results: the mean over seeds.

    New columns, in addition to those of the first seed: `name` (of the metric), those of
    `mean_scores`, `deviation` (over seeds; NaN for one), `num_seeds`, `layer`, `comparison` (number
    of the set of comparable results), and `note`: variant, pooling and, if several weights have one
    name, their hash.

    Raises:
        UserError: if evidence is missing or damaged; the message names it.
    """
    table = latest(table)
    seeds = pd.DataFrame(
        [line | score for line in table.to_dict("records") for score in _load_scores(line)],
        columns=[*table.columns, "name", "draws", "resamples"],
    )
    groups = seeds.groupby([*COMPARABLE, *ENCODER, "name"], sort=False)
    means = [
        {
            **group.iloc[0],
            **mean_scores(group),
            "deviation": group["value"].std(),
            "num_seeds": len(group),
            "layer": ", ".join(group["layer"].unique()),
        }
        for _, group in groups
    ]
    scores = pd.DataFrame(means, columns=[*seeds.columns, "low", "high", "deviation", "num_seeds"])
    num_weights = scores.groupby(ENCODER[:3])["encoder_hash"].transform("nunique")
    weights = np.where(num_weights > 1, ", weights " + scores["encoder_hash"].str[:8], "")
    scores = scores.assign(
        comparison=scores.groupby(COMPARABLE, sort=False).ngroup(),
        note=scores["variant"] + ", " + scores["pooling"] + weights,
    )
    return scores.sort_values("comparison", kind="stable", ignore_index=True)


def _load_scores(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a result with their draws, and an identifier of the resamples."""
    row, path = line["row"], line["folder"] / line["evidence"]
    # The predictions of all rows together can take gigabytes, so they are not kept.
    evidence = load_evidence(path)
    if missing := sorted(row.scores.keys() - evidence.draws.keys()):
        raise UserError(
            f"{path} has no `draws/{missing[0]}`, but the result has this score: run "
            "`jepa-audio probe` again"
        )
    digest = hashlib.sha256("\n".join(evidence.uids).encode()).hexdigest()[:8]
    resamples = f"{digest} {len(evidence.draws[row.metric])}"
    return [
        {"name": name, "value": score.value, "draws": evidence.draws[name], "resamples": resamples}
        for name, score in row.scores.items()
    ]


def mean_scores(lines: pd.DataFrame) -> dict[str, Any]:
    """Means of `value` and `draws`, and the interval `low` to `high`.

    The draws are empty if the lines have different numbers of draws.
    """
    is_paired = lines["draws"].map(len).nunique() == 1
    draws = np.mean(lines["draws"].tolist(), axis=0) if is_paired else np.empty(0, np.float32)
    low, high = interval(draws)
    return {"value": float(lines["value"].mean()), "draws": draws, "low": low, "high": high}


def rank_lines(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines with finite values, best first, with ranks and differences to the baselines.

    New columns, in addition to those of `add_baselines`: `rank` ("1", "2–3", or "" for baselines),
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

    `first` - 1 encoders are significantly better. The encoders after `last` are significantly
    worse. Encoders without a significant difference share ranks. Sharing is not transitive: A and
    C can differ significantly although neither differs from B.
    """
    scores = list(zip(values, draws, strict=True))
    verdicts = [
        [difference(value, other, draws, other_draws).verdict for other, other_draws in scores]
        for value, draws in scores
    ]
    return [(line.count("behind") + 1, len(scores) - line.count("ahead")) for line in verdicts]


def build_averages(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """One table of means for each set of two or more tasks on which an encoder has results.

    The largest set comes first. The lines are the encoders that have results on all tasks of the
    set under equal conditions; `values` of a line are the scores on the tasks.
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
                {**group.iloc[0], **mean_scores(group), "values": tuple(group["value"])}
                for group in chosen
            )
            table = _score_table("mean", means)
            averages.append({"protocol": protocol, "tasks": tuple(chosen[0]["task"]), **table})
    return averages


def _task_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder and task: the headline metric, or the mean of `TASK_METRICS`."""
    lines = []
    for _, group in scores.groupby(["comparison", *ENCODER], sort=False):
        pairs = (pair for pair in TASK_METRICS if set(pair) <= set(group["name"]))
        found = group[group["name"].isin(next(pairs, group["metric"].iloc[:1]))]
        if np.isfinite(found["value"]).all():
            lines.append({**found.iloc[0], **mean_scores(found)})
    table = pd.DataFrame(lines, columns=scores.columns)
    # Logistic regression and ridge regression are one head for two kinds of labels.
    heads = table["head"].replace({"logistic": "linear", "ridge": "linear"})
    protocol = table["preset"] + ", " + heads + " head, " + table["select"] + " epoch"
    return table.assign(average_protocol=protocol)


def build_tasks(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """A section for each task: its sets of comparable results, and published numbers."""
    return [_task(str(task), group) for task, group in scores.groupby("task", sort=False)]


def _task(task: str, scores: pd.DataFrame) -> dict[str, Any]:
    published = published_on(task)
    groups = [group for _, group in scores.groupby("comparison", sort=False)]
    comparisons = [_comparison(group, set(published["metric"])) for group in groups]
    comparable = [
        each for each in comparisons if not each["obstacle"] and each["tables"][0]["lines"]
    ]
    # A baseline is the best line only if nothing else was probed.
    best = {
        table["metric"]: min(table["lines"], key=lambda line: line.is_baseline)
        for each in comparable[:1]
        for table in each["tables"]
        if table["lines"]
    }
    ours = {metric: (line.low, line.high) for metric, line in best.items()}
    is_comparable = (published["preset"] == "marble-v1") & bool(ours)
    columns = {"split_checksum": "split", "resamples": "test units or resamples"}
    columns |= dict.fromkeys(RECORDS[1:], "number of units")
    differing = [column for column in COMPARABLE if scores[column].nunique() > 1]
    return {
        "name": task,
        "comparisons": comparisons,
        "differing": dict.fromkeys(columns.get(column, column) for column in differing),
        "obstacles": dict.fromkeys(filter(None, (each["obstacle"] for each in comparisons))),
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
    others = {name: _score_table(name, group) for name, group in by_metric.items()}
    shown = [others.pop(name) for name in list(others) if name in published_metrics]
    sizes = (first.num_train, first.num_valid, first.num_test)
    counts = f"{'/'.join(map(str, sizes))} {first.unit}s in train, valid and test"
    decoder = f", decoder {first.decoder}" if first.decoder else ""
    return {
        "protocol": f"{first.preset}, {first.head} head, {first.select} epoch{decoder}",
        "data": f"{counts}, split {first.split_checksum[:8]}",
        "tables": [_score_table(first.metric, headline, chance), *shown],
        "other_tables": list(others.values()),
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
    """Lines of a metric, best first; `axis` has both ends of the axis of the drawn intervals."""
    lines = rank_lines(scores)
    ends = lines[["low", "value", "high"]].to_numpy(float)
    ends = np.append(ends[np.isfinite(ends)], [] if chance is None else [chance])
    axis = (ends.min(), ends.max()) if len(ends) else (0.0, 1.0)
    return {"metric": metric, "lines": list(lines.itertuples()), "chance": chance, "axis": axis}


def build_overviews(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Current results of each protocol: one line for each encoder and head, one cell per task."""
    # Encoders in alphabetical order, each with its variants in the order of the results.
    return [
        {
            "protocol": protocol,
            "rows": group["row"].tolist(),
            "tasks": {row.task: row for row in group["row"]},
            "lines": [
                {line.task: line for line in lines.itertuples()}
                for _, lines in group.sort_values("encoder", kind="stable").groupby(
                    [*ENCODER, "head"], sort=False
                )
            ],
        }
        for protocol, group in results.groupby("protocol", sort=False)
    ]
