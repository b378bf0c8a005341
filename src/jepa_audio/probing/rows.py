"""Result rows: what was probed, how, and how sure it is; as JSON lines, with the evidence, and as a table."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from rich import box
from rich.table import Table
from rich.text import Text

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.intervals import Difference

Curve = tuple[tuple[float, float], ...]
"""(level, score) by level."""

TWIN, STATISTICS = "random", "statistics"
"""Variants that are no trained encoder; `random-7` is the twin of seed 7."""


@dataclass(frozen=True)
class Score:
    """A metric on the test split with its 95 % interval.

    Attributes:
        value: the metric.
        low: lower end of the interval.
        high: upper end.
        num_scored: classes or numbers that entered the mean; `None` where there is none.
    """

    value: float
    low: float
    high: float
    num_scored: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ProbeRow:
    """The chosen head's result on one task.

    Attributes:
        encoder: name of the run or of the baseline.
        variant: "context", "target", "random", "random-7" (the twin of seed 7), "statistics" or
            "function".
        encoder_hash: of the weights.
        pooling: of frequency rows.
        task: its name.
        preset: "marble-v1", "linear" or "marble-v2".
        select: epoch whose head is tested, "best" on the validation split or "last".
        head: "mlp", "logistic", "ridge" or "knn".
        layer: chosen on the validation split.
        setting: chosen learning rate, penalty or number of neighbours.
        setting_name: what `setting` is.
        seed: of the head.
        decoder: of annotations in time; `None` for clips.
        unit: what is scored, "file" or "window".
        metric: the one by which layer and setting were chosen.
        scores: every metric on the test split; those of other units have a prefix, as
            "file_accuracy".
        chance: headline metric of the trivial predictor; `None` where there is none.
        valid: validation score of the chosen head.
        layers: names of those that were tried.
        settings: that were tried.
        valid_grid: validation scores by layer and setting, mean over seeds.
        num_train: units.
        num_valid: units.
        num_test: units.
        class_names: of the outputs.
        evidence: file name of the answers, from the folder of the results; see `Evidence`.
        against_random: difference to the run's random-init twin; `None` for the twin and for
            baselines.
        robustness: headline metric by condition, as (level, score) from mild to hard; without the
            clean test split.
        robustness_area: mean height of its curve from the clean score on, by condition; see
            `robustness.area`.
        split_checksum: of the records that say what is in which split.
        versions: of the libraries.
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
    robustness: dict[str, Curve] | None
    robustness_area: dict[str, float] | None
    split_checksum: str
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if self.metric not in self.scores:
            raise UserError(
                f"`metric` is {self.metric!r}, but `scores` holds {', '.join(self.scores) or 'nothing'}"
            )
        shape = [len(self.layers), *(len(line) for line in self.valid_grid)]
        if shape != [len(self.valid_grid), *[len(self.settings)] * len(self.layers)]:
            raise UserError(
                f"`valid_grid` must be {len(self.layers)} layers of {len(self.settings)} settings"
            )

    @property
    def value(self) -> float:
        """The headline metric."""
        return self.scores[self.metric].value

    @property
    def low(self) -> float:
        """Lower end of its 95 % interval."""
        return self.scores[self.metric].low

    @property
    def high(self) -> float:
        """Upper end."""
        return self.scores[self.metric].high

    @property
    def valid_by_layer(self) -> tuple[float, ...]:
        """The best validation score of each layer; NaN where no head has a finite one."""
        finite = [[score for score in line if np.isfinite(score)] for line in self.valid_grid]
        return tuple(max(line, default=float("nan")) for line in finite)

    @property
    def is_twin(self) -> bool:
        """Whether this is a network with weights drawn at random."""
        return self.variant.partition("-")[0] == TWIN


@dataclass(frozen=True)
class Evidence:
    """What a result rests on: enough to compare two rows anew, and to draw where the errors are.

    Attributes:
        answers: of the chosen head, of every unit.
        truth: of every unit.
        uids: of the units.
        draws: metrics on resamples of the units. The resamples are the same for every encoder:
            draws of two rows with equal task, split checksum and number of draws can be subtracted.
    """

    answers: Float[np.ndarray, "units A"]
    truth: Shaped[np.ndarray, "units ..."]
    uids: tuple[str, ...]
    draws: dict[str, Float[np.ndarray, " draws"]]


def save_evidence(path: Path, evidence: Evidence) -> None:
    """Write an `.npz`; the file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "answers": evidence.answers.astype(np.float32),
        "truth": evidence.truth,
        "uids": np.array(evidence.uids),
    }
    arrays |= {
        f"draws/{metric}": draws.astype(np.float32) for metric, draws in evidence.draws.items()
    }
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    unfinished.replace(path)


def load_evidence(path: Path) -> Evidence:
    """Read what `save_evidence` wrote.

    Raises:
        UserError: if there is no such file.
        UserError: if it is damaged or holds something else.
    """
    if not path.is_file():
        raise MissingFileError(
            f"there is no {path}: it belongs to a row of the results in the same folder; bring it back or probe again"
        )
    try:
        with np.load(path) as stored:
            draws = {
                name.removeprefix("draws/"): stored[name]
                for name in stored.files
                if name.startswith("draws/")
            }
            return Evidence(
                stored["answers"], stored["truth"], tuple(map(str, stored["uids"])), draws
            )
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no evidence of a probe ({error}): delete it and probe again"
        ) from error


def append_jsonl(path: Path, rows: Iterable[ProbeRow]) -> None:
    """One line a row, behind those already there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_plain(asdict(row)), allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[ProbeRow]:
    """The rows of a file, in order.

    Raises:
        UserError: naming file and line, if a line is no row of this version.
    """
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [_from_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity, which are scores of heads that have diverged: `null` stands for them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _score(score: dict[str, Any]) -> Score:
    return Score(
        _number(score["value"]), _number(score["low"]), _number(score["high"]), score["num_scored"]
    )


def _from_json(line: str, where: str) -> ProbeRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not JSON ({error}): delete the line, or use another --output"
        ) from error
    wanted, found = (
        {field.name for field in fields(ProbeRow)},
        set(row) if isinstance(row, dict) else set(),
    )
    if wanted != found:
        missing, unknown = ", ".join(sorted(wanted - found)), ", ".join(sorted(found - wanted))
        raise UserError(
            f"{where}: not a row of this version of jepa-audio (missing: {missing or 'nothing'}; unknown: "
            f"{unknown or 'nothing'}); use another --output, which leaves this file as it is"
        )
    try:
        return ProbeRow(**row | _nested(row))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{where}: not a row of this version of jepa-audio ({error}); use another --output"
        ) from error


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    against, robustness = row["against_random"], row["robustness"]
    return {
        "scores": {metric: _score(score) for metric, score in row["scores"].items()},
        "valid": _number(row["valid"]),
        "layers": tuple(row["layers"]),
        "settings": tuple(row["settings"]),
        "valid_grid": tuple(tuple(map(_number, line)) for line in row["valid_grid"]),
        "class_names": tuple(row["class_names"]),
        "against_random": None
        if against is None
        else Difference(**{end: _number(at) for end, at in against.items()}),
        "robustness": None
        if robustness is None
        else {
            key: tuple((level, _number(score)) for level, score in curve)
            for key, curve in robustness.items()
        },
    }


def latest(rows: Iterable[ProbeRow]) -> list[ProbeRow]:
    """The last answer of every encoder to every question, in the order of these last answers.

    A file of results grows with each call of `probe`.
    """
    kept: dict[tuple[object, ...], ProbeRow] = {}
    for row in rows:
        # Twins of two architectures can have the same weights, and an untrained encoder is its own
        # twin.
        who = (row.encoder, row.variant, row.encoder_hash, row.pooling)
        sizes = (row.split_checksum, row.num_train, row.num_valid, row.num_test)
        question = (*who, row.task, row.preset, row.select, row.head, row.seed, row.layers, *sizes)
        kept.pop(question, None)
        kept[question] = row
    return list(kept.values())


def current(rows: Iterable[ProbeRow]) -> list[ProbeRow]:
    """The last answers of the last weights of every name on the last records, as means over the seeds of the head."""
    answers = latest(rows)
    last = {_question(row): (row.encoder_hash, row.split_checksum) for row in answers}
    kept = (
        row for row in answers if (row.encoder_hash, row.split_checksum) == last[_question(row)]
    )
    return [row for row, _ in mean_over_seeds(kept)]


def _question(row: ProbeRow) -> tuple[str, ...]:
    baseline = row.encoder_hash if row.variant == STATISTICS else ""  # one for each sample rate
    return (
        row.encoder,
        row.variant,
        baseline,
        row.pooling,
        row.task,
        row.preset,
        row.select,
        row.head,
    )


def mean_over_seeds(rows: Iterable[ProbeRow]) -> list[tuple[ProbeRow, int]]:
    """Rows that differ in the seed of the head alone as one row, and how many there were.

    Scores and differences are means, and so are the ends of their intervals: at most too wide, as
    draws of the seeds vary together at most fully. `write_leaderboard` averages the draws
    themselves.
    """
    groups: dict[tuple[object, ...], list[ProbeRow]] = {}
    for row in rows:
        who = (row.encoder, row.variant, row.encoder_hash, row.pooling)
        terms = (row.task, row.preset, row.select, row.head, row.decoder, row.split_checksum)
        sizes = (row.layers, row.num_train, row.num_valid, row.num_test)
        groups.setdefault((*who, *terms, *sizes), []).append(row)
    return [(_mean(group), len(group)) for group in groups.values()]


def _mean(rows: Sequence[ProbeRow]) -> ProbeRow:
    if len(rows) == 1:
        return rows[0]
    metrics = [metric for metric in rows[0].scores if all(metric in row.scores for row in rows)]
    gaps = [row.against_random for row in rows if row.against_random is not None]
    return replace(
        rows[0],
        layer=", ".join(dict.fromkeys(row.layer for row in rows)),
        valid=float(np.mean([row.valid for row in rows])),
        scores={
            metric: Score(
                *_ends([row.scores[metric] for row in rows]), rows[0].scores[metric].num_scored
            )
            for metric in metrics
        },
        against_random=Difference(*_ends(gaps)) if len(gaps) == len(rows) else None,
        robustness=_mean_curves([row.robustness for row in rows if row.robustness]),
        robustness_area=_mean_areas([row.robustness_area for row in rows if row.robustness_area]),
    )


def _mean_curves(curves: Sequence[dict[str, Curve]]) -> dict[str, Curve] | None:
    """Of the conditions that all have, level by level."""
    names = [name for name in (curves[0] if curves else ()) if all(name in one for one in curves)]
    means = {name: np.mean([one[name] for one in curves], axis=0) for name in names}
    return {
        name: tuple((float(at), float(score)) for at, score in mean) for name, mean in means.items()
    } or None


def _mean_areas(areas: Sequence[dict[str, float]]) -> dict[str, float] | None:
    names = [name for name in (areas[0] if areas else ()) if all(name in one for one in areas)]
    return {name: float(np.mean([one[name] for one in areas])) for name in names} or None


def _ends(of: Sequence[Score] | Sequence[Difference]) -> tuple[float, float, float]:
    value, low, high = np.mean([(one.value, one.low, one.high) for one in of], axis=0)
    return float(value), float(low), float(high)


def name_of(row: ProbeRow) -> str:
    """Encoder, which one of the run, and pooling."""
    return f"{row.encoder}, {row.variant}, {row.pooling}"


def table(rows: Iterable[ProbeRow]) -> Table:
    """A small table for each task and protocol, 80 columns wide at most: won, lost and undecided ones alike."""
    whole = Table.grid()
    for title, of_task in _sections(rows):
        part = Table(
            "encoder",
            "layer",
            "test",
            "against its twin",
            box=box.SIMPLE_HEAD,
            title_justify="left",
        )
        part.title = Text(title, style="bold")
        for row, num_seeds in of_task:
            seeds = f"\n{num_seeds} seeds" if num_seeds > 1 else ""
            score, against = (
                text.replace(" [", "\n[") for text in (str(row.scores[row.metric]), _against(row))
            )
            cells = (
                f"{row.encoder}\n{row.variant}, {row.pooling}",
                row.layer + seeds,
                score,
                against,
            )
            part.add_row(*(Text(cell, overflow="fold") for cell in cells))
        whole.add_row(part)
    return whole


def _sections(rows: Iterable[ProbeRow]) -> Iterator[tuple[str, list[tuple[ProbeRow, int]]]]:
    sections: dict[str, list[tuple[ProbeRow, int]]] = {}
    for row, num_seeds in mean_over_seeds(rows):
        said = f"{row.task}: {row.metric}; {row.preset}, {row.head}, {row.select} epoch"
        chance = "" if row.chance is None else f"; chance {row.chance:.3f}"
        sections.setdefault(f"{said}{chance}; {row.num_test} {row.unit}s", []).append(
            (row, num_seeds)
        )
    yield from sections.items()


def _against(row: ProbeRow) -> str:
    if (gap := row.against_random) is None:
        return ""
    return f"{gap.value:+.3f} {gap.verdict} [{gap.low:+.3f}, {gap.high:+.3f}]"
