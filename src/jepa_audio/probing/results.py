"""Result rows: what was probed, how, and how sure it is; as JSON lines and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from jepa_audio.probing.intervals import Difference


@dataclass(frozen=True)
class ProbeRow:
    """One head's result on one task.

    Attributes:
        encoder: name of the run or of the baseline.
        variant: which encoder of the run.
        encoder_hash: sha256 of the weights.
        task: its name.
        preset: the protocol.
        head: "linear" or "knn".
        pooling: of frequency rows.
        layer: chosen on the validation clips.
        layer_name: of that layer.
        setting: chosen L2 strength or number of neighbours.
        metric: what `value` is.
        value: on the test clips.
        low: lower end of its 95 % interval.
        high: upper end.
        valid_value: of the chosen head on the validation clips.
        valid_by_layer: the best of each layer on the validation clips.
        num_train: clips.
        num_valid: clips.
        num_test: clips.
        num_classes: classes of the training split.
        chance: test accuracy of always naming the most frequent training class.
        seed: of the training subset and of the resampling.
        against_random: difference to the run's random-init twin; `None` for the twin and for baselines.
        split_checksum: of the files that say what is in which split.
        versions: of the libraries.
    """

    encoder: str
    variant: str
    encoder_hash: str
    task: str
    preset: str
    head: str
    pooling: str
    layer: int
    layer_name: str
    setting: float
    metric: str
    value: float
    low: float
    high: float
    valid_value: float
    valid_by_layer: tuple[float, ...]
    num_train: int
    num_valid: int
    num_test: int
    num_classes: int
    chance: float
    seed: int
    against_random: Difference | None
    split_checksum: str
    versions: dict[str, str]


def append_jsonl(path: Path, rows: Iterable[ProbeRow]) -> None:
    """One line a row, behind those already there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[ProbeRow]:
    """The rows of a file, in order."""
    return [_from_json(json.loads(line)) for line in path.read_text().splitlines() if line]


def _from_json(row: dict) -> ProbeRow:
    against = row.pop("against_random")
    by_layer = tuple(row.pop("valid_by_layer"))
    return ProbeRow(**row, valid_by_layer=by_layer, against_random=None if against is None else Difference(**against))


def table(rows: Iterable[ProbeRow]) -> Table:
    """One line for each encoder and head, one column for each task: won, lost and undecided ones alike."""
    header, lines, chance = _cells(list(rows), lambda row: f"{_value(row)}\n{_against(row)}".replace(" (", "\n("))
    title = "accuracy on the test clips [95 %]\nagainst the random-init twin"
    shown = Table("encoder", *header[3:], title=title, caption=chance, show_lines=True)
    for encoder, variant, pooling, *cells in lines:
        shown.add_row(f"{encoder}\n{variant}\n{pooling}", *(cell.rstrip() for cell in cells))
    return shown


def markdown(rows: Iterable[ProbeRow]) -> str:
    """The same table in Markdown."""
    header, lines, chance = _cells(list(rows), lambda row: f"{_value(row)} {_against(row)}".rstrip())
    cells = [header, ["---"] * len(header), *lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return (
        f"{text}\n\nAccuracy on the test clips with a 95 % bootstrap interval, and against the run's "
        f"random-init twin (paired; noise of the test clips only, not of training seeds). {chance}\n"
    )


def _cells(rows: list[ProbeRow], cell: Callable[[ProbeRow], str]) -> tuple[list[str], list[list[str]], str]:
    tasks = list(dict.fromkeys(row.task for row in rows))
    chance = {row.task: row.chance for row in rows}
    lines: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((row.encoder, row.variant, row.pooling, row.head), {})[row.task] = cell(row)
    body = [[*line, *(cells.get(task, "") for task in tasks)] for line, cells in lines.items()]
    guessed = ", ".join(f"{task} {chance[task]:.3f}" for task in tasks)
    return ["encoder", "variant", "frequency", "head", *tasks], body, f"Most frequent class: {guessed}."


def _value(row: ProbeRow) -> str:
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _against(row: ProbeRow) -> str:
    return "" if row.against_random is None else str(row.against_random)
