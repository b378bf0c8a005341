"""Result rows and their evidence: `results.jsonl` and the `.npz` files next to it."""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Shaped

from jepa_audio import files
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.features import Frequency
from jepa_audio.parallel import file_lock
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.tasks import TASKS

log = logging.getLogger(__name__)

SweepScores = tuple[tuple[float, float], ...]
"""(level of the degradation, score), from mild to strong."""

RANDOM_INIT, STATISTICS = "random", "statistics"
"""Variants of the two baselines; `random-7` is a random-init baseline with seed 7."""

# In other fields, `null` in JSON is a score that is not finite.
_OPTIONAL = {"decoder", "chance", "num_scored", "against_random", "robustness", "robustness_area"}


@dataclass(frozen=True)
class Score:
    """A metric on the test split with its 95 % interval.

    `num_scored` classes or regression targets are in the mean; `None` if the metric is no mean.
    """

    value: float
    low: float
    high: float
    num_scored: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ProbeRow:
    """The test result of the selected head of one kind, for one encoder, task and seed.

    Attributes:
        encoder: name of the run or of the baseline.
        variant: "context", "target", "random" (random-init baseline), "random-7" (the same with
            seed 7), "statistics" (log-mel statistics) or "function".
        encoder_hash: hash of the weights.
        pooling: how the tokens of a clip become features, as time/frequency: "thirds_std/concat"
            has the means of three thirds and the deviation, with the frequency rows concatenated.
        preset: "marble-v1", "linear", "attentive" or "marble-v2"; "finetune" for fine-tuning.
        select: epoch of the head that is tested, "best" on the validation split or "last".
        head: "mlp", "logistic", "ridge", "knn" or "attentive"; "finetune-MODE" for fine-tuning.
        layer: layer with the best validation score.
        setting: learning rate, penalty or number of neighbours with the best validation score;
            `setting_name` is which of them.
        decoder: decoder of annotations in time; `None` for labels of clips.
        unit: what is scored, "file" or "window"; `num_train`, `num_valid`, `num_test` count it.
        metric: headline metric; it selected layer and setting.
        scores: every metric on the test split; other units have a prefix: "file_accuracy".
        chance: headline metric of the trivial predictor; `None` where there is none.
        valid: validation score of the selected head.
        valid_grid: validation scores by layer and setting, mean over seeds; `layers` and `settings`
            are all in the search.
        evidence: path of the evidence, relative to the folder of the results; see `Evidence`.
        against_random: difference to the random-init baseline of the run; `None` for baselines.
        robustness: headline metric by condition as (level, score), from mild to strong, without
            the clean test split.
        robustness_area: mean height of the curve of each condition, including the clean score;
            see `robustness.area`.
        split_checksum: checksum of the records, which define the splits.
        num_padded: windows, of all splits, that are too short for one token and were padded.

    Raises:
        UserError: if `scores` lacks `metric`, or `valid_grid` is not layers × settings.
    """

    encoder: str
    variant: str
    encoder_hash: str
    pooling: str
    task: str
    preset: str
    select: str
    head: str
    layer: str
    setting: float
    setting_name: str
    seed: int
    decoder: str | None
    unit: str
    metric: str
    scores: dict[str, Score]
    chance: float | None
    valid: float
    layers: tuple[str, ...]
    settings: tuple[float, ...]
    valid_grid: tuple[tuple[float, ...], ...]
    num_train: int
    num_valid: int
    num_test: int
    class_names: tuple[str, ...]
    evidence: str
    against_random: Difference | None
    robustness: dict[str, SweepScores] | None
    robustness_area: dict[str, float] | None
    split_checksum: str
    versions: dict[str, str]
    num_padded: int = 0

    def __post_init__(self) -> None:
        if self.metric not in self.scores:
            known = ", ".join(self.scores) or "nothing"
            raise UserError(f"`metric` is {self.metric!r}, but `scores` holds {known}")
        if list(map(len, self.valid_grid)) != [len(self.settings)] * len(self.layers):
            shape = f"{len(self.layers)} layers of {len(self.settings)} settings"
            raise UserError(f"`valid_grid` must be {shape}")

    @property
    def score(self) -> Score:
        """The headline metric with its interval."""
        return self.scores[self.metric]

    @property
    def value(self) -> float:
        """The headline metric."""
        return self.score.value

    @property
    def valid_by_layer(self) -> tuple[float, ...]:
        """The best validation score of each layer; NaN if no score of the layer is finite."""
        finite = [filter(np.isfinite, scores) for scores in self.valid_grid]
        return tuple(max(scores, default=float("nan")) for scores in finite)

    @property
    def is_baseline(self) -> bool:
        """Whether this is a random-init baseline or log-mel statistics."""
        return self.variant.partition("-")[0] in {RANDOM_INIT, STATISTICS}


@dataclass(frozen=True)
class Evidence:
    """Data from which results can be compared and errors can be drawn.

    Attributes:
        predictions: of the selected head, for each test unit.
        uids: names of the units.
        draws: metrics on bootstrap resamples of the units. The resamples are the same for every
            encoder: draws of two rows with equal task, split checksum and number of draws can be
            subtracted.
    """

    predictions: Float[np.ndarray, "units A"]
    labels: Shaped[np.ndarray, "units ..."]
    uids: tuple[str, ...]
    draws: dict[str, Float[np.ndarray, " draws"]]


def save_evidence(path: Path, evidence: Evidence) -> None:
    """Write an `.npz` file atomically."""
    arrays = {
        "answers": evidence.predictions.astype(np.float32),
        "truth": evidence.labels,
        "uids": np.array(evidence.uids),
        **{f"draws/{name}": draws.astype(np.float32) for name, draws in evidence.draws.items()},
    }
    with files.atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_evidence(path: Path) -> Evidence:
    """Read a file of `save_evidence`.

    Raises:
        UserError: if the file is missing, damaged or not evidence.
    """
    if not path.is_file():
        raise MissingFileError(
            f"there is no {path}: it belongs to a row of the results in the same folder; "
            f"restore it or probe again"
        )
    try:
        with np.load(path) as stored:
            names = [name for name in stored.files if name.startswith("draws/")]
            draws = {name.removeprefix("draws/"): stored[name] for name in names}
            uids = tuple(map(str, stored["uids"]))
            return Evidence(stored["answers"], stored["truth"], uids, draws)
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not evidence of a probe ({error}): delete it and probe again"
        ) from error


def append_rows(path: Path, rows: Iterable[ProbeRow]) -> None:
    """Append one JSON line with a checksum for each row; all are on disk at the return.

    Raises:
        UserError: if the disk is full or cannot be written. The file is then as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(map(_to_line, rows)).encode()
    with file_lock(path):
        _complete_last_line(path)
        try:
            files.append_bytes(path, lines)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror or error}; its earlier rows and the "
                "cached features remain valid: free disk space, then repeat the command"
            ) from error


def prepare_results(path: Path) -> None:
    """Check the file before rows are computed for it; a last line that was cut off is removed.

    Raises:
        UserError: if a line is not a row of this version.
    """
    if path.is_file():
        with file_lock(path):
            _complete_last_line(path)
        read_rows(path)


def read_rows(path: Path) -> list[ProbeRow]:
    """The rows of a file, in order; a last line that was cut off is left out, with a warning.

    Raises:
        UserError: if the file is missing, or a line is not a row of this version.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no {path}: `jepa-audio probe` writes it")
    lines = list(files.scan_jsonl(path))
    if lines and isinstance(lines[-1][1], UserError) and _cut_line(path):
        _warn_of_cut_line(path, "is left out")
        del lines[-1]
    try:
        return [_parse_row(values, f"{path}, line {number}") for number, values in lines]
    except UserError as error:
        raise UserError(f"{error}; delete the line, or use another --output") from error


def _cut_line(path: Path) -> bytes:
    """The end of a file after its last line break."""
    return path.read_bytes().rpartition(b"\n")[2]


def _complete_last_line(path: Path) -> None:
    """Remove a last line that was cut off, or end it if it is a JSON object."""
    line = _cut_line(path)
    if not line:
        return
    try:
        files.parse_json_object(line)
    except UserError:
        _warn_of_cut_line(path, "is removed")
        os.truncate(path, path.stat().st_size - len(line))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def _warn_of_cut_line(path: Path, action: str) -> None:
    log.warning(
        "%s: the last line was cut off, by a killed process or a full disk, and %s: probe its "
        "encoder and task again",
        path,
        action,
    )


def _to_line(row: ProbeRow) -> str:
    values = _without_nan(asdict(row))
    return json.dumps(values | {"checksum": _checksum(values)}, allow_nan=False) + "\n"


def _checksum(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, scores of heads that diverged, by `None`: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _parse_row(line: dict[str, Any] | UserError, where: str) -> ProbeRow:
    if isinstance(line, UserError):
        raise UserError(f"{where}: {line}")
    values: dict[str, Any] = line
    # Earlier versions wrote no checksum.
    checksum = values.pop("checksum", None)
    if checksum not in (None, _checksum(values)):
        raise UserError(f"{where}: the row differs from its checksum: it is damaged or was edited")
    _name_pooling(values)
    known = {field.name for field in fields(ProbeRow)}
    required = {field.name for field in fields(ProbeRow) if field.default is MISSING}
    if not required <= values.keys() <= known:
        missing = ", ".join(sorted(required - values.keys())) or "nothing"
        unknown = ", ".join(sorted(values.keys() - known)) or "nothing"
        raise UserError(
            f"{where}: not a row of this version of jepa-audio "
            f"(missing: {missing}; unknown: {unknown})"
        )
    try:
        values = _from_json(values)
        nested = {
            "scores": {name: Score(**score) for name, score in values["scores"].items()},
            "against_random": values["against_random"] and Difference(**values["against_random"]),
        }
        return ProbeRow(**values | nested)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{where}: not a row of this version of jepa-audio ({error})") from error


def _name_pooling(values: dict[str, Any]) -> None:
    """Complete the pooling of a row of an earlier version, which named the frequency alone."""
    frequency = values.get("pooling")
    if frequency in get_args(Frequency):
        task, is_log_mel = TASKS.get(str(values.get("task"))), values.get("variant") == STATISTICS
        time = "mean_std_change" if is_log_mel else "mean"
        if task is not None and task.grid_hz is not None:
            time = "frames"
        values["pooling"] = f"{time}/{frequency}"


def _from_json(value: Any, key: str = "") -> Any:
    """The inverse of `_without_nan`, with tuples for lists."""
    if isinstance(value, dict):
        return {name: _from_json(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return float("nan") if value is None and key not in _OPTIONAL else value
