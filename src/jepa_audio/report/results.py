"""The table of probe results: latest results, means over seeds, a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from jepa_audio.errors import printable
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import RANDOM_INIT, STATISTICS, ProbeRow, Score, read_rows

ENCODER = ["encoder", "variant", "pooling", "encoder_hash"]
"""Columns that identify an encoder."""
PROTOCOL = ["task", "preset", "select", "head", "decoder", "unit", "metric"]
"""Columns of what is scored and how."""
RECORDS = ["split_checksum", "num_train", "num_valid", "num_test"]
"""Columns of the data."""
EQUAL = "log-mel, equal pooling"
"""Name of a baseline; see `add_baselines`."""


def to_table(rows: Sequence[ProbeRow], folders: Sequence[Path] | None = None) -> pd.DataFrame:
    """One line for each row: its fields, `value` and `is_baseline`, the `row`, and its `folder`."""
    columns = [field.name for field in fields(ProbeRow)]
    table = pd.DataFrame([vars(row) for row in rows], columns=columns, dtype=object)
    return table.assign(
        decoder=[row.decoder or "" for row in rows],
        value=[row.value for row in rows],
        is_baseline=np.array([row.is_baseline for row in rows], bool),
        row=rows,
        folder=folders or [Path()] * len(rows),
    )


def read_results(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of several `results.jsonl`; the file that was written last comes last.

    Raises:
        UserError: if a file is missing, or a line is not a row.
    """
    rows = {path: read_rows(path) for path in paths}
    by_time = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    folders = [path.parent for path in by_time for _ in rows[path]]
    return to_table([row for path in by_time for row in rows[path]], folders)


def latest(table: pd.DataFrame) -> pd.DataFrame:
    """The last result of each encoder, protocol, seed and set of layers, in order.

    `results.jsonl` grows with each call of `jepa-audio probe`.
    """
    # The hash of the weights alone is not enough: random-init baselines of two architectures can
    # have equal weights, and an untrained encoder equals its own random-init baseline.
    identity = [*ENCODER, "task", "preset", "select", "head", "seed", "layers", *RECORDS]
    return table.drop_duplicates(identity, keep="last")


def current(table: pd.DataFrame) -> pd.DataFrame:
    """Results of the last weights of each name on the last records, averaged over seeds.

    New columns: those of `add_baselines`, and `protocol`, the preset and the epoch.
    """
    table = latest(table)
    # There is one log-mel baseline for each sample rate.
    rate = table["encoder_hash"].where(table["variant"] == STATISTICS, "")
    identity = ["encoder", "variant", "pooling", "task", "preset", "select", "head"]
    state = table["encoder_hash"] + table["split_checksum"]
    last = state.groupby([*(table[key] for key in identity), rate]).transform("last")
    lines = mean_over_seeds(table[state == last])
    epoch = np.where(lines["select"] == "best", "", ", " + lines["select"] + " epoch")
    lines = lines.assign(protocol=lines["preset"] + epoch)
    groups = lines.groupby([*PROTOCOL, *RECORDS], sort=False)
    found = [add_baselines(group) for _, group in groups] or [add_baselines(lines)]
    return pd.concat(found).sort_index()


def add_baselines(lines: pd.DataFrame) -> pd.DataFrame:
    """Add the baselines of each line of comparable results, and labels where it is below them.

    New columns: `baselines`, lines by name, of "random-init" (the last result with the same encoder
    and pooling), "log-mel" (the best pooling of log-mel statistics) and "log-mel, equal pooling"
    (with the same pooling over time); `below`, a tuple such as ("below log-mel",). Baselines
    themselves have no baselines.
    """
    random_init = {
        (line.encoder, line.pooling): line
        for line in lines[lines["variant"] == RANDOM_INIT].itertuples()
    }
    statistics = list(lines[lines["variant"] == STATISTICS].itertuples())
    log_mel = max(statistics, key=lambda line: line.value, default=None)
    equal = {_time_pooling(line): line for line in statistics}
    baselines: list[dict[str, Any]] = []
    for line in lines.itertuples():
        own = random_init.get((line.encoder, line.pooling))
        found = {"random-init": own, "log-mel": log_mel, EQUAL: equal.get(_time_pooling(line))}
        found = {} if line.is_baseline else found
        baselines.append({name: other for name, other in found.items() if other is not None})
    below = [
        tuple(f"below {n}" for n, other in found.items() if n != EQUAL and value < other.value)
        for value, found in zip(lines["value"], baselines, strict=True)
    ]
    return lines.assign(baselines=baselines, below=below)


def _time_pooling(line: Any) -> str:
    """The pooling over time of a line; log-mel bands are never averaged."""
    return str(line.pooling).partition("/")[0]


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
    first = rows[0]
    if len(rows) == 1:
        return first
    scores = [{name: astuple(score)[:3] for name, score in row.scores.items()} for row in rows]
    differences = [astuple(row.against_random) for row in rows if row.against_random]
    sweeps = _mean_shared([row.robustness for row in rows if row.robustness])
    areas = _mean_shared([row.robustness_area for row in rows if row.robustness_area])
    return replace(
        first,
        layer=", ".join(dict.fromkeys(row.layer for row in rows)),
        valid=float(np.mean([row.valid for row in rows])),
        scores={
            name: Score(value, low, high, first.scores[name].num_scored)
            for name, (value, low, high) in _mean_shared(scores).items()
        },
        against_random=Difference(*np.mean(differences, axis=0).tolist())
        if len(differences) == len(rows)
        else None,
        robustness={name: tuple(map(tuple, sweep)) for name, sweep in sweeps.items()} or None,
        robustness_area=areas or None,
    )


def _mean_shared(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each value whose key is in all groups."""
    shared = [key for key in groups[0] if all(key in group for group in groups)] if groups else []
    return {key: np.mean([group[key] for group in groups], axis=0).tolist() for key in shared}


def terminal_table(rows: Iterable[ProbeRow]) -> Table:
    """A table for each task and protocol, at most 80 columns wide."""
    layout = Table.grid()
    table = mean_over_seeds(to_table(list(rows)))
    titles = [
        f"{row.task}: {row.metric}; {row.preset}, {row.head}, {row.select} epoch"
        + ("" if row.chance is None else f"; chance {row.chance:.3f}")
        + f"; {row.num_test} {row.unit}s"
        for row in table["row"]
    ]
    # A list of one title would be a list of keys.
    for title, group in table.groupby(pd.Series(titles, index=table.index), sort=False):
        columns = ("encoder", "layer", "test", "against random-init")
        section = Table(*columns, box=box.SIMPLE_HEAD, title_justify="left")
        section.title = Text(printable(title), style="bold")
        for row, num_seeds in zip(group["row"], group["num_seeds"], strict=True):
            gap = row.against_random
            cells = (
                f"{row.encoder}\n{row.variant}, {row.pooling}",
                row.layer + (f"\n{num_seeds} seeds" if num_seeds > 1 else ""),
                str(row.score).replace(" [", "\n["),
                f"{gap.value:+.3f} {gap.verdict}\n[{gap.low:+.3f}, {gap.high:+.3f}]" if gap else "",
            )
            section.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
        layout.add_row(section)
    return layout
