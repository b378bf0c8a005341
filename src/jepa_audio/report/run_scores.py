"""The probe results that belong to training runs: names of encoders, checked by their weights."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import state_hash
from jepa_audio.inference.load import Which, load_encoder
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import STATISTICS
from jepa_audio.report.results import latest, mean_over_seeds
from jepa_audio.report.runs import Run
from jepa_audio.training.run.folder import LAST

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunResults:
    """Lines of `read_results` of a run and of baselines; `problem` is why some are left out."""

    table: pd.DataFrame
    problem: str = ""


@dataclass(frozen=True)
class RunScore:
    """The probe score of a run on one task: the test score of the best result on validation data.

    Attributes:
        value: test score, mean over seeds of the head.
        against_random: difference to the random-init baseline, if the results have it.
    """

    value: float
    against_random: Difference | None

    def __str__(self) -> str:
        gap = self.against_random
        return f"{self.value:.3f}" + ("" if gap is None else f" ({gap.value:+.3f} to random-init)")


def results_of_runs(runs: Sequence[Run], table: pd.DataFrame) -> dict[Path, RunResults]:
    """The results of the encoders in each run's `last.ckpt`, by the folder of the run.

    Results have the name of a run and the hash of the weights. Where the weights of a run cannot be
    read, its name is enough if it is the name of no other run, and if the results are not older
    than the run.

    Args:
        runs: the runs.
        table: of `read_results`.
    """
    counts = Counter(run.name for run in {run.folder.resolve(): run for run in runs}.values())
    return {run.folder: _results_of(run, table, counts[run.name]) for run in runs}


def _results_of(run: Run, table: pd.DataFrame, num_namesakes: int) -> RunResults:
    is_named, is_baseline = table["encoder"] == run.name, table["is_baseline"].astype(bool)
    named = table[is_named & ~is_baseline]
    if named.empty:
        return RunResults(named)
    checkpoint = run.folder / "checkpoints" / LAST
    hashes = _hashes(checkpoint, sorted(set(named["variant"])))
    if hashes is None and num_namesakes > 1:
        problem = (
            f"`{run.name}` is the name of {num_namesakes} runs: their probe scores are left out; "
            "rename the folders and probe the runs again"
        )
        return RunResults(named.iloc[:0], problem)
    if hashes is not None:
        own = named[named["encoder_hash"].isin(hashes)]
        reason = f"are of other weights than {checkpoint}"
    else:
        start = _started(run)
        own = named[[_written(line) >= start for line in named.itertuples()]]
        reason = f"are older than the run in {run.folder}"
    problem = ""
    if own.empty or (len(own) < len(named) and num_namesakes == 1):
        problem = (
            f"{len(named) - len(own)} of {len(named)} probe results named `{run.name}` {reason} "
            "and are left out: probe the run again"
        )
    baselines = table[is_baseline & (is_named | (table["variant"] == STATISTICS))]
    return RunResults(own if own.empty else pd.concat([own, baselines]).sort_index(), problem)


def best_scores(own: pd.DataFrame) -> dict[str, RunScore]:
    """For each task, the result with the best validation score, of the results of one run."""
    lines = mean_over_seeds(latest(own[~own["is_baseline"].astype(bool)]))
    ranked = lines.astype({"valid": float}).sort_values("valid", ascending=False, kind="stable")
    best = ranked.drop_duplicates("task").sort_values("task")
    return {row.task: RunScore(row.value, row.against_random) for row in best["row"]}


def _hashes(checkpoint: Path, variants: Sequence[str]) -> set[str] | None:
    """The hashes of encoders of a checkpoint as in results; `None` if they cannot be read."""
    if not checkpoint.is_file():
        return None
    known = [cast(Which, variant) for variant in variants if variant in get_args(Which)]
    try:
        return {state_hash(load_encoder(checkpoint, which)) for which in known}
    except UserError as error:
        log.debug("no hash of %s: %s", checkpoint, error)
        return None


def _started(run: Run) -> float:
    """When a run began: the time of its oldest configuration or metrics."""
    paths = [*run.folder.glob("config*.yaml"), *run.metric_files]
    return min((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def _written(line: Any) -> float:
    """When a result was written; without evidence on disk it counts as new."""
    evidence = line.folder / line.evidence
    return evidence.stat().st_mtime if evidence.is_file() else math.inf
