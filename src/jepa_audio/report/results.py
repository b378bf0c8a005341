"""The table of probe results: latest results, means over seeds, a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import (
    STATISTICS,
    ProbeRow,
    Score,
    SweepScores,
    read_rows,
)

ENCODER = ["encoder", "variant", "pooling", "encoder_hash"]
"""Columns that identify an encoder."""
PROTOCOL = ["task", "preset", "select", "head", "decoder", "unit", "metric"]
"""Columns of what is scored and how."""
RECORDS = ["split_checksum", "num_train", "num_valid", "num_test"]
"""Columns of the data."""
_COLUMNS = [field.name for field in fields(ProbeRow)]


def to_table(rows: Sequence[ProbeRow], folders: Sequence[Path] = ()) -> pd.DataFrame:
    """One line for each row: its fields, the `row` itself and the `folder` of its evidence."""
    columns: dict[str, list[Any]] = {
        **{name: [getattr(row, name) for row in rows] for name in _COLUMNS},
        "row": list(rows),
        "folder": list(folders) or [Path()] * len(rows),
    }
    table = pd.DataFrame(
        {name: pd.Series(column, dtype=object) for name, column in columns.items()}
    )
    return table.assign(decoder=table["decoder"].fillna(""))


def read_results(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of several `results.jsonl`; the file that was written last comes last.

    Raises:
        UserError: if a file is missing, or naming the line that is not a row.
    """
    rows = {path: read_rows(path) for path in paths}
    by_time = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    pairs = [(row, path.parent) for path in by_time for row in rows[path]]
    return to_table([row for row, _ in pairs], [folder for _, folder in pairs])


def latest(table: pd.DataFrame) -> pd.DataFrame:
    """The last result of each encoder, protocol, seed and set of layers, in order.

    `results.jsonl` grows with each call of `jepa-audio probe`.
    """
    # The hash of the weights alone is not enough: random-init baselines of two architectures can
    # have equal weights, and an untrained encoder equals its own random-init baseline.
    question = [*ENCODER, "task", "preset", "select", "head", "seed", "layers", *RECORDS]
    return table.drop_duplicates(question, keep="last")


def current(table: pd.DataFrame) -> pd.DataFrame:
    """Results of the last weights of each name on the last records, averaged over seeds."""
    table = latest(table)
    # There is one log-mel baseline for each sample rate.
    rate = table["encoder_hash"].where(table["variant"] == STATISTICS, "")
    question = ["encoder", "variant", "pooling", "task", "preset", "select", "head", rate]
    state = table["encoder_hash"] + table["split_checksum"]
    is_last = state == state.groupby([_column(table, key) for key in question]).transform("last")
    return mean_over_seeds(table[is_last])


def _column(table: pd.DataFrame, key: str | pd.Series) -> pd.Series:
    return table[key] if isinstance(key, str) else key


def mean_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One line for the rows that differ only in the seed of the head, with their `num_seeds`.

    Scores, differences and the ends of their intervals are means. These intervals are at most too
    wide, because the draws of different seeds are correlated at most fully. The leaderboard
    averages the draws themselves.
    """
    identity = [*ENCODER, *PROTOCOL, *RECORDS, "layers"]
    groups = [group["row"].tolist() for _, group in table.groupby(identity, sort=False)]
    return to_table(list(map(_mean_row, groups))).assign(num_seeds=list(map(len, groups)))


def _mean_row(rows: Sequence[ProbeRow]) -> ProbeRow:
    if len(rows) == 1:
        return rows[0]
    metrics = [name for name in rows[0].scores if all(name in row.scores for row in rows)]
    differences = [row.against_random for row in rows if row.against_random is not None]
    areas = pd.DataFrame([row.robustness_area for row in rows if row.robustness_area])
    return replace(
        rows[0],
        layer=", ".join(dict.fromkeys(row.layer for row in rows)),
        valid=float(np.mean([row.valid for row in rows])),
        scores={
            name: Score(
                *_mean_interval([row.scores[name] for row in rows]), rows[0].scores[name].num_scored
            )
            for name in metrics
        },
        against_random=Difference(*_mean_interval(differences))
        if len(differences) == len(rows)
        else None,
        robustness=_mean_curves([row.robustness for row in rows if row.robustness]),
        # Only conditions that all seeds have.
        robustness_area=areas.dropna(axis="columns").mean().to_dict() or None,
    )


def _mean_curves(curves: Sequence[dict[str, SweepScores]]) -> dict[str, SweepScores] | None:
    """Mean score at each level, of the conditions that all seeds have."""
    if not curves:
        return None
    shared = [name for name in curves[0] if all(name in other for other in curves)]
    means = {name: np.mean([curve[name] for curve in curves], axis=0) for name in shared}
    return {
        name: tuple((float(level), float(score)) for level, score in mean)
        for name, mean in means.items()
    } or None


def _mean_interval(scores: Sequence[Score] | Sequence[Difference]) -> tuple[float, float, float]:
    value, low, high = np.mean([(score.value, score.low, score.high) for score in scores], axis=0)
    return float(value), float(low), float(high)


def terminal_table(rows: Iterable[ProbeRow]) -> Table:
    """A table for each task and protocol, at most 80 columns wide."""
    layout = Table.grid()
    table = mean_over_seeds(to_table(list(rows)))
    table["title"] = [_title(row) for row in table["row"]]
    for title, group in table.groupby("title", sort=False):
        columns = ("encoder", "layer", "test", "against random-init")
        section = Table(*columns, box=box.SIMPLE_HEAD, title_justify="left")
        section.title = Text(str(title), style="bold")
        for row, num_seeds in zip(group["row"], group["num_seeds"], strict=True):
            cells = (
                f"{row.encoder}\n{row.variant}, {row.pooling}",
                row.layer + (f"\n{num_seeds} seeds" if num_seeds > 1 else ""),
                str(row.score).replace(" [", "\n["),
                _against_random(row),
            )
            section.add_row(*(Text(cell, overflow="fold") for cell in cells))
        layout.add_row(section)
    return layout


def _title(row: ProbeRow) -> str:
    chance = "" if row.chance is None else f"; chance {row.chance:.3f}"
    protocol = f"{row.preset}, {row.head}, {row.select} epoch"
    return f"{row.task}: {row.metric}; {protocol}{chance}; {row.num_test} {row.unit}s"


def _against_random(row: ProbeRow) -> str:
    if (found := row.against_random) is None:
        return ""
    return f"{found.value:+.3f} {found.verdict}\n[{found.low:+.3f}, {found.high:+.3f}]"
