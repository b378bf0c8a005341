"""Training runs: what their folders hold, and the verdict on each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from jepa_audio.files import read_csv
from jepa_audio.report.curves import Curve, Curves, is_online_score
from jepa_audio.report.probe_figures import variant_style

VERDICTS = {
    "ahead": "Ahead of its random-init baseline",
    "behind": "Behind its random-init baseline",
    "no significant difference": "No significant difference to its random-init baseline",
}
BADGES = {
    (True, False): ("learned", "ahead"),
    (False, True): ("worse than untrained", "behind"),
    (True, True): ("ahead and behind", ""),
}
"""Text and look by whether a result is ahead of, and one behind, the random-init baseline."""


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a training run.

    Attributes:
        name: of the folder; the name of its encoders in probe results.
        label: path from the folder of the report.
        metric_files: one for each start of the run, in that order.
    """

    name: str
    label: str
    folder: Path
    curves: Curves
    metric_files: list[Path]

    def curve(self, key: str) -> Curve:
        """Steps and values, empty if nothing was logged."""
        return self.curves.get(key, (np.empty(0), np.empty(0)))

    def last(self, key: str) -> float:
        """The last finite value; NaN if there is none."""
        values = self.curve(key)[1]
        return next((float(value) for value in values[::-1] if math.isfinite(value)), math.nan)

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged."""
        return int(max((steps[-1] for steps, _ in self.curves.values()), default=0))

    @property
    def written(self) -> datetime:
        """When metrics were written last."""
        return datetime.fromtimestamp(self.metric_files[-1].stat().st_mtime)

    @property
    def config(self) -> Path | None:
        """The configuration of the run."""
        paths = (self.folder / "config.yaml", self.metric_files[-1].with_name("config.yaml"))
        return next((path for path in paths if path.is_file()), None)


def find_runs(directory: Path) -> list[Run]:
    """The runs below a folder, by path; the folder itself may be a run."""
    folders = {
        path.parent.parent.parent if path.parent.name.startswith("version_") else path.parent
        for path in directory.rglob("metrics.csv")
    }
    return [_read_run(folder, directory) for folder in sorted(folders)]


def _read_run(folder: Path, directory: Path) -> Run:
    files = folder.glob("metrics/version_*/metrics.csv")
    by_number = sorted(files, key=lambda file: int(file.parent.name.removeprefix("version_")))
    paths = [path for path in (folder / "metrics.csv", *by_number) if path.is_file()]
    starts: list[pd.DataFrame] = []
    for points in map(_read_metrics, paths):
        # A resumed run continues from its checkpoint; what the previous start logged after that
        # step is replaced.
        first = points["step"].min() if len(points) else math.inf
        starts = [start[start["step"] < first] for start in starts] + [points]
    logged = pd.concat(starts).drop_duplicates(["key", "step"], keep="last").sort_values("step")
    curves = {
        str(key): (group["step"].to_numpy(float), group["value"].to_numpy(float))
        for key, group in logged.groupby("key", sort=False)
    }
    name = folder.resolve().name
    label = name if folder == directory else folder.relative_to(directory).as_posix()
    return Run(name, label, folder, curves, paths)


def _read_metrics(path: Path) -> pd.DataFrame:
    """Columns `step`, `key`, `value`; a line of the file has values of some keys only."""
    points = [
        (int(float(step)), key, float(value))
        for _, line in read_csv(path)[1]
        if (step := line.get("step"))
        for key, value in line.items()
        if value and key not in {"step", "epoch"}
    ]
    return pd.DataFrame(points, columns=["step", "key", "value"])


def judge_run(
    run: Run, results: pd.DataFrame, runs: Sequence[Run] = ()
) -> tuple[list[tuple[str, str]], str]:
    """Whether the run learned, collapsed and predicts better than trivial predictors.

    Args:
        run: the run.
        results: lines of `current`.
        runs: all runs; results of runs with the same name cannot be distinguished.

    Returns:
        Badges, each a text and its look ("ahead", "behind" or ""), and sentences with the reasons:
        probes, collapse monitor, losses.
    """
    compared = results[(results["encoder"] == run.name) & results["against_random"].notna()]
    # Trained heads decide; nearest neighbours only if nothing else was probed.
    if (compared["head"] != "knn").any():
        compared = compared[compared["head"] != "knn"]
    several_protocols = compared["protocol"].nunique() > 1
    found: dict[str, list[str]] = {}
    for line in compared.itertuples():
        difference = line.against_random
        task = line.task + (f", {line.protocol}" if several_protocols else "")
        size = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        text = f"{variant_style(line.variant).label} on {task} ({size})"
        found.setdefault(difference.verdict, []).append(text)
    sentences = [f"{VERDICTS[key]}: {'; '.join(found[key])}." for key in VERDICTS if key in found]
    if not found:
        sentences = ["It was not probed; only a probe shows whether it learned.", *_online(run)]
    namesakes = [other.label for other in runs if other.name == run.name and other != run]
    if namesakes and found:
        names = ", ".join(namesakes)
        sentences.append(f"These results may be of a run with the same name: {names}.")
    undecided = "no significant difference to untrained" if found else "not probed"
    badges = [BADGES.get(("ahead" in found, "behind" in found), (undecided, ""))]
    if num_below := sum("below log-mel" in labels for labels in compared["below"]):
        badges.append((f"below log-mel on {num_below} of {len(compared)} results", "behind"))
    return badges, " ".join([*sentences, _collapse(run), *_losses(run)])


def _online(run: Run) -> Iterator[str]:
    for key in sorted(run.curves):
        if is_online_score(key):
            _, task, metric = key.split("/")
            baseline = run.last(f"probe/{task}/twin")
            yield (
                f"The last online probe of {task} had {metric} {run.last(key):.3f}, "
                f"its random-init baseline {baseline:.3f}."
            )


def _collapse(run: Run) -> str:
    steps, raised = run.curve("collapse/alarm")
    if not len(steps):
        return "Collapse was not monitored."
    sentence = f"Not collapsed: no alarm at any of {len(steps)} checks"
    if (raised > 0).any():
        first = steps[raised > 0][0]
        end = "including the last" if raised[-1] > 0 else "but not at the last"
        count = f"{(raised > 0).sum()} of {len(steps)} checks"
        sentence = f"Collapse alarm at {count}, first at step {first:.0f}, {end}"
    ranks = [f"{rank:.1f}" for rank in run.curve("collapse/context_rank")[1]] or ["unknown"]
    return f"{sentence}; RankMe of the context went from {ranks[0]} to {ranks[-1]}."


def _losses(run: Run) -> Iterator[str]:
    _, losses = run.curve("train/loss")
    if len(losses) and not math.isfinite(losses[-1]):
        yield "The last training loss is not a finite number."
    loss, mean = run.last("collapse/loss"), run.last("collapse/loss_mean_target")
    copied = run.last("collapse/loss_nearest_context")
    if all(map(math.isfinite, (loss, mean, copied))):
        by_mean, by_copy = ("below" if loss < other else "not below" for other in (mean, copied))
        yield (
            f"The last loss, {loss:.3g}, is {by_mean} that of predicting the mean target "
            f"({mean:.3g}) and {by_copy} that of copying the nearest context token ({copied:.3g})."
        )
    if math.isfinite(valid := run.last("valid/loss")):
        yield f"The last validation loss is {valid:.3g}."
