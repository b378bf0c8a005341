"""Training runs: the content of their folders, and the verdict on each run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from jepa_audio.class_paths import parse_yaml
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import read_csv
from jepa_audio.report.probe_figures import variant_style

Curve = tuple[np.ndarray, np.ndarray]
"""Optimizer steps, values."""
Curves = Mapping[str, Curve]
"""The curve of each metric key."""
VERDICTS = {
    "ahead": "Ahead of",
    "behind": "Behind",
    "no significant difference": "No significant difference to",
}
BADGES = {
    (True, False): ("learned", "ahead"),
    (False, True): ("worse than untrained", "behind"),
    (True, True): ("ahead and behind", ""),
}
"""Text and CSS class of a badge.

The keys state whether some result is ahead of its random-init baseline and whether some result is
behind.
"""
OLD_KEYS = {
    f"collapse/{name}": f"train/{name}" for name in ("loss_mean_target", "loss_nearest_context")
}
"""Metric keys of earlier versions → current keys."""


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a training run.

    Attributes:
        name: name of the folder; encoders of the run have the same name in probe results.
        label: path relative to the folder of the report.
        metric_files: one file for each start of the run, in the order of the starts.
        damage: what is wrong with these files; empty if they are complete.
    """

    name: str
    label: str
    folder: Path
    curves: Curves
    metric_files: list[Path]
    damage: list[str] = field(default_factory=list)

    def curve(self, key: str) -> Curve:
        """Steps and values of a metric key; empty if nothing was logged."""
        return self.curves.get(key, (np.empty(0), np.empty(0)))

    def last(self, key: str, steps: np.ndarray | None = None) -> float:
        """The last finite value of a metric key, only at `steps` if given; NaN if there is none."""
        at, values = self.curve(key)
        if steps is not None:
            values = values[np.isin(at, steps)]
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

    @property
    def config_text(self) -> str:
        """The text of `config`.

        Raises:
            UserError: if there is none, or if it cannot be read or is not YAML.
        """
        path = self.config
        if path is None:
            raise MissingFileError(f"{self.folder / 'config.yaml'} is missing")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        parse_yaml(text, str(path))
        return text


def find_runs(directory: Path) -> list[Run]:
    """The runs in a folder and its subfolders, sorted by path; the folder itself may be a run."""
    folders = {
        path.parent.parent.parent if path.parent.name.startswith("version_") else path.parent
        for path in directory.rglob("metrics.csv")
    }
    return [read_run(folder, directory) for folder in sorted(folders)]


def find_several(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The runs in several folders, and the files `results.jsonl` of probes in them.

    A run that is in several of the folders is taken once. Runs with equal labels get the path of
    their folder as label.

    Raises:
        MissingFileError: if a folder does not exist.
        UserError: if a folder has neither runs nor results.
    """
    runs: dict[Path, Run] = {}
    results: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise MissingFileError(f"no folder at {folder}: give the folder that holds the runs")
        found, files = find_runs(folder), sorted(folder.rglob("results.jsonl"))
        if not found and not files:
            raise UserError(
                f"{folder} holds no runs (folders with a metrics.csv) and no probe results "
                f"(results.jsonl): give the folder above the `--run_dir` of `jepa-audio fit`"
            )
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
        for file in files:
            results.setdefault(file.resolve(), file)
    counts = Counter(run.label for run in runs.values())
    named = [
        replace(run, label=run.folder.as_posix()) if counts[run.label] > 1 else run
        for run in runs.values()
    ]
    return named, list(results.values())


def read_run(folder: Path, directory: Path) -> Run:
    """The run in a folder below `directory`; without metrics, it has no curves."""
    files = folder.glob("metrics/version_*/metrics.csv")
    by_number = sorted(files, key=lambda file: (len(file.parent.name), file.parent.name))
    paths = [path for path in (folder / "metrics.csv", *by_number) if path.is_file()]
    starts: list[pd.DataFrame] = []
    damage: list[str] = []
    for points in (_read_metrics(path, damage) for path in paths):
        # A resumed run continues from its checkpoint. It logs again the steps after the checkpoint,
        # which replace those of the previous start.
        first = points["step"].min() if len(points) else math.inf
        starts = [start[start["step"] < first] for start in starts] + [points]
    logged = pd.concat(starts or [pd.DataFrame(columns=["step", "key", "value"])])
    logged = logged.drop_duplicates(["key", "step"], keep="last").sort_values("step")
    curves = {
        str(key): (group["step"].to_numpy(float), group["value"].to_numpy(float))
        for key, group in logged.groupby("key", sort=False)
    }
    name = folder.resolve().name
    label = name if folder == directory else folder.relative_to(directory).as_posix()
    return Run(name, label, folder, curves, paths, damage)


def _read_metrics(path: Path, damage: list[str]) -> pd.DataFrame:
    """Columns `step`, `key`, `value`; a line of the file has values of some keys only.

    Lines that are not numbers, and the rest of a file that is not CSV, are left out; `damage` then
    gets a sentence.
    """
    points: list[tuple[int, str, float]] = []
    wrong: list[int] = []
    num_lines, is_csv = 0, True
    try:
        for number, line in read_csv(path)[1]:
            num_lines += 1
            try:
                points += _points(line)
            except (ValueError, TypeError, OverflowError):
                wrong.append(number)
    except UserError as error:
        is_csv = False
        damage.append(str(error))
    if wrong:
        lines = f"{len(wrong)} lines (the first is line {wrong[0]})"
        damage.append(f"{path} is damaged: {lines} without numbers are left out")
    elif not num_lines and is_csv:
        damage.append(f"{path} is empty: no metrics were logged, or the file was cut off")
    return pd.DataFrame(points, columns=["step", "key", "value"])


def _points(line: Mapping[str, str | None]) -> list[tuple[int, str, float]]:
    if not (step := line.get("step")):
        return []
    return [
        (int(float(step)), OLD_KEYS.get(key, key), float(value))
        for key, value in line.items()
        if value and key not in {"step", "epoch"}
    ]


def judge_run(run: Run, results: pd.DataFrame) -> tuple[list[tuple[str, str]], str]:
    """Whether the run learned, collapsed and predicts better than trivial predictors.

    Args:
        run: the run.
        results: lines of `current` of this run.

    Returns:
        Badges, each a text and a CSS class ("ahead", "behind" or ""), and sentences on probes, the
        collapse monitor and losses.
    """
    compared = results[results["against_random"].notna()]
    # The verdict uses trained heads. It uses nearest neighbours only if there are no trained heads.
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
    sentences = [
        f"{text} its random-init baseline: {'; '.join(found[verdict])}."
        for verdict, text in VERDICTS.items()
        if verdict in found
    ]
    if not found:
        sentences = ["It was not probed; only a probe shows whether it learned.", *_online(run)]
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
    steps, means = run.curve("train/loss_mean_target")
    measured = steps[np.isfinite(means)][-1:]
    # The training loss of the step in which the baselines were measured; of earlier versions, the
    # loss of the monitor.
    loss = run.last("collapse/loss", measured)
    loss = run.last("train/loss", measured) if math.isnan(loss) else loss
    mean = run.last("train/loss_mean_target")
    copied = run.last("train/loss_nearest_context")
    if all(map(math.isfinite, (loss, mean))):
        by_mean, by_copy = ("below" if loss < other else "not below" for other in (mean, copied))
        copy = f" and {by_copy} that of copying the nearest context token ({copied:.3g})"
        yield (
            f"The last loss, {loss:.3g}, is {by_mean} that of predicting the mean target "
            f"({mean:.3g}){copy if math.isfinite(copied) else ''}."
        )
    if math.isfinite(valid := run.last("valid/loss")):
        yield f"The last validation loss is {valid:.3g}."


def is_online_score(key: str) -> bool:
    """Whether a logged key is the metric of an online probe, not its baseline or the difference."""
    first, *rest = key.split("/")
    return first == "probe" and len(rest) == 2 and rest[1] not in {"twin", "difference"}
