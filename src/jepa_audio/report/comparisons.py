"""Paired comparisons of encoders on equal bootstrap resamples: ranks, averages over tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jepa_audio.errors import UserError
from jepa_audio.probing.intervals import difference, interval
from jepa_audio.probing.rows import RANDOM_INIT, STATISTICS, ProbeRow, load_evidence
from jepa_audio.report.results import ENCODER, PROTOCOL, RECORDS, latest

Draws = Float[np.ndarray, " draws"]
COMPARABLE = [*PROTOCOL, *RECORDS, "resamples"]
"""Columns that must be equal for two results to be compared."""
TASK_METRICS = (("auroc", "ap"), ("r2_valence", "r2_arousal"))
"""Tasks with both metrics enter an average with the mean of the two (arXiv:2306.10548)."""


def compute_scores(table: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder, metric and set of comparable results: the mean over seeds.

    Columns: `COMPARABLE`, `ENCODER`, `chance`, `name` (of the metric), `value`, `draws` (the mean
    on each resample of the test units), `low`, `high`, `deviation` (over seeds; `None` for one),
    `num_seeds`, `layer` and `comparison` (number of the set of comparable results). Sets of one
    task are neighbours.

    Raises:
        UserError: naming the evidence that is missing or damaged.
    """
    table = latest(table)
    draws = [
        _load_draws(row, Path(folder) / row.evidence)
        for row, folder in zip(table["row"], table["folder"], strict=True)
    ]
    table = table.assign(draws=[found for found, _ in draws], resamples=[key for _, key in draws])
    scores = pd.DataFrame(
        line
        for _, group in table.groupby([*COMPARABLE, *ENCODER], sort=False)
        for line in _mean_scores(group)
    )
    if scores.empty:
        return scores
    tasks = pd.Categorical(scores["task"], scores["task"].unique())
    scores = scores.assign(
        comparison=scores.groupby(COMPARABLE, sort=False).ngroup(), task_order=tasks.codes
    )
    return scores.sort_values(["task_order", "comparison"], kind="stable", ignore_index=True)


def _load_draws(row: ProbeRow, path: Path) -> tuple[dict[str, Draws], str]:
    """Draws by metric, and a digest of the names of the units and the number of draws."""
    # The predictions, up to gigabytes for all rows together, are not kept.
    evidence = load_evidence(path)
    if missing := sorted(row.scores.keys() - evidence.draws.keys()):
        raise UserError(
            f"{path} holds no `draws/{missing[0]}`, but the row has this score: probe again"
        )
    digest = hashlib.sha256("\n".join(evidence.uids).encode()).hexdigest()[:8]
    return evidence.draws, f"{digest} {len(evidence.draws[row.metric])}"


def _mean_scores(group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    rows: list[ProbeRow] = group["row"].tolist()
    for name in rows[0].scores:
        if not all(name in row.scores for row in rows):
            continue
        values = np.array([row.scores[name].value for row in rows])
        draws = np.mean([found[name] for found in group["draws"]], axis=0)
        low, high = interval(draws)
        yield {
            **group.iloc[0][[*COMPARABLE, *ENCODER, "chance"]],
            "name": name,
            "value": float(values.mean()),
            "draws": draws,
            "low": low,
            "high": high,
            "deviation": float(values.std(ddof=1)) if len(rows) > 1 else None,
            "num_seeds": len(rows),
            "layer": ", ".join(dict.fromkeys(row.layer for row in rows)),
        }


def is_baseline(variant: str) -> bool:
    """Whether it is a random-init baseline or log-mel statistics: listed without a rank."""
    return variant == STATISTICS or variant.partition("-")[0] == RANDOM_INIT


def add_baselines(lines: pd.DataFrame) -> pd.DataFrame:
    """Add the baselines of each line of comparable results, and labels where it is below them.

    New columns: `is_baseline`; `random_init`, the last result of the random-init baseline of the
    same encoder and pooling; `log_mel`, the best log-mel statistics; both are lines or `None`.
    `below` is a tuple of labels such as "below log-mel".
    """
    random_init = {
        (line.encoder, line.pooling): line
        for line in lines[lines["variant"] == RANDOM_INIT].itertuples()
    }
    statistics = lines[lines["variant"] == STATISTICS].itertuples()
    log_mel = max(statistics, key=lambda line: line.value, default=None)
    found = []
    for line in lines.itertuples():
        others = (random_init.get((line.encoder, line.pooling)), log_mel)
        others = (None, None) if is_baseline(line.variant) else others
        below = (
            f"below {name}"
            for name, other in zip(("random-init", "log-mel"), others, strict=True)
            if other is not None and line.value < other.value
        )
        found.append((is_baseline(line.variant), *others, tuple(below)))
    names = ("is_baseline", "random_init", "log_mel", "below")
    columns = {
        name: pd.Series([each[number] for each in found], lines.index, object)
        for number, name in enumerate(names)
    }
    return lines.assign(**columns).astype({"is_baseline": bool})


def rank_lines(lines: pd.DataFrame) -> pd.DataFrame:
    """Lines with finite values, best first, with ranks and differences to the baselines.

    New columns, next to those of `add_baselines`: `rank` ("1", "2–3", or "" for baselines),
    `is_best` (rank 1 is possible, and no baseline is better), `against_random` and
    `against_log_mel` (`Difference` or `None`).
    """
    lines = add_baselines(lines[np.isfinite(lines["value"].astype(float))])
    lines = lines.sort_values("value", ascending=False, kind="stable")
    ranked = lines[~lines["is_baseline"]]
    # Averages over tasks with different numbers of draws have none.
    has_draws = all(map(len, ranked["draws"]))
    ranks = rank_ranges(ranked["value"].tolist(), ranked["draws"].tolist()) if has_draws else []
    rank_of = dict(zip(ranked.index, ranks, strict=False))
    shown = {
        label: str(first) if first == last else f"{first}–{last}"  # noqa: RUF001
        for label, (first, last) in rank_of.items()
    }
    return lines.assign(
        rank=[shown.get(label, "") for label in lines.index],
        is_best=[
            not below and rank_of.get(label, (0, 0))[0] == 1
            for label, below in lines["below"].items()
        ],
        against_random=_differences(lines, "random_init"),
        against_log_mel=_differences(lines, "log_mel"),
    )


def rank_ranges(values: Sequence[float], draws: Sequence[Draws]) -> list[tuple[int, int]]:
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


def _differences(lines: pd.DataFrame, baseline: str) -> pd.Series:
    found = [
        difference(line.value, other.value, line.draws, other.draws)
        if other is not None and 0 < len(line.draws) == len(other.draws)
        else None
        for line, other in zip(lines.itertuples(), lines[baseline], strict=True)
    ]
    return pd.Series(found, lines.index, object)


@dataclass(frozen=True, eq=False)
class Average:
    """Mean over tasks of the encoders that have results on all of them, under equal conditions.

    Attributes:
        protocol: preset, kind of head and epoch.
        tasks: names of the tasks.
        lines: see `rank_lines`; `values` holds the scores on the tasks.
    """

    protocol: str
    tasks: tuple[str, ...]
    lines: pd.DataFrame


def average_tasks(scores: pd.DataFrame) -> list[Average]:
    """An average for each set of two or more tasks that an encoder has, the largest set first."""
    averages = []
    task_scores = _task_scores(scores)
    for protocol, group in task_scores.groupby("average_protocol"):
        of_task = group.drop_duplicates([*ENCODER, "task"], keep="last")
        sets = of_task.groupby(ENCODER, sort=False)["comparison"].agg(tuple)
        several = {found for found in sets if len(found) > 1}
        averages += [
            _average(str(protocol), found, of_task)
            for found in sorted(several, key=lambda found: (-len(found), found))
        ]
    return averages


def _task_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """One line for each encoder and task: the headline metric, or the mean of the two of a task."""
    lines = []
    for _, group in scores.groupby(["comparison", *ENCODER], sort=False):
        names = set(group["name"])
        pair = next((pair for pair in TASK_METRICS if names >= set(pair)), group["metric"].iloc[:1])
        found = group[group["name"].isin(pair)]
        if len(found) and np.isfinite(found["value"]).all():
            lines.append({**found.iloc[0], **mean_scores(found)})
    columns = [*scores.columns, "average_protocol"]
    table = pd.DataFrame(lines, columns=columns)
    # Logistic regression and ridge regression are one head for two kinds of labels.
    heads = table["head"].replace({"logistic": "linear", "ridge": "linear"})
    protocol = table["preset"] + ", " + heads + " head, " + table["select"] + " epoch"
    return table.assign(average_protocol=protocol)


def mean_scores(lines: pd.DataFrame) -> dict[str, Any]:
    """Mean `value` and `draws`, which are empty if the numbers of draws differ, and interval."""
    same = lines["draws"].map(len).nunique() == 1
    draws = np.mean(lines["draws"].tolist(), axis=0) if same else np.empty(0, np.float32)
    low, high = interval(draws)
    return {"value": float(lines["value"].mean()), "draws": draws, "low": low, "high": high}


def _average(protocol: str, comparisons: tuple[int, ...], task_scores: pd.DataFrame) -> Average:
    chosen = task_scores[task_scores["comparison"].isin(comparisons)]
    groups = [
        group for _, group in chosen.groupby(ENCODER, sort=False) if len(group) == len(comparisons)
    ]
    lines = pd.DataFrame(
        {**group.iloc[0], **mean_scores(group), "values": tuple(group["value"])} for group in groups
    )
    return Average(protocol, tuple(groups[0]["task"]), rank_lines(lines))
