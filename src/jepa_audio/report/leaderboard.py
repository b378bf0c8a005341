"""The leaderboard beside a file of results: who is told apart from whom, and from what others have published."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime
from itertools import groupby
from pathlib import Path

import numpy as np

from jepa_audio.errors import UserError
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.tasks import TASKS
from jepa_audio.report.page import (
    Cell,
    Fold,
    Grid,
    Heading,
    Line,
    Part,
    Sentence,
    Span,
    to_html,
    to_markdown,
)
from jepa_audio.report.published import (
    PROTOCOL_NOISE,
    PublishedNumber,
    PublishedProtocol,
    place,
    published_elsewhere,
    published_on,
    why_not_comparable,
)
from jepa_audio.report.standings import (
    Average,
    Block,
    Encoder,
    Mean,
    Rank,
    Standing,
    Terms,
    averages,
    gap,
    ranks,
    read_blocks,
)

log = logging.getLogger(__name__)

TITLE = "Leaderboard of frozen encoders"
HOW_TO_READ = (
    "Every value is a mean over the seeds of the head, with a 95 % bootstrap interval over the test units; beside it"
    " the number of seeds and their standard deviation, which the interval does not hold.",
    "Ranks are places that an encoder may hold: it shares them with those whose difference to it, on the same resamples"
    " of the same test units, has a 95 % interval that holds zero. Each pair is tested by itself, uncorrected.",
    "The lines that are marked are those that nothing is told apart from as better. Random-init twins and log-mel"
    " statistics are shown beside, without a rank.",
)
ONE_SEED = "One seed of pre-training each: another seed of the same recipe can stand elsewhere."


def write_leaderboard(results: Path) -> Path:
    """Write `leaderboard.md` and `leaderboard.html` beside a file of results.

    Args:
        results: `results.jsonl` as `jepa-audio probe` writes it, with its evidence.

    Returns:
        The page; it needs no other file.

    Raises:
        UserError: if there are no results, or naming the evidence that is missing.
        UserError: naming the line that is no row, or if there are none.
    """
    blocks = read_blocks(results)
    if not blocks:
        raise UserError(f"{results} holds no rows: probe something first")
    names = _names(blocks)
    parts = [*map(Sentence, HOW_TO_READ), Sentence(ONE_SEED, "quiet"), *_averages(blocks, names)]
    for task, of_task in groupby(blocks, lambda block: block.terms.task):
        parts += _task(task, list(of_task), names)
    parts += _elsewhere()
    page = results.with_name("leaderboard.html")
    num_ranked = sum(not encoder.is_reference for encoder in names)
    num_tasks = len({block.terms.task for block in blocks})
    said = [
        f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((num_ranked, "encoder"), (num_tasks, "task"))
    ]
    subtitle = f"{', '.join(said)}; {datetime.now():%Y-%m-%d %H:%M}"
    _write(results.with_name("leaderboard.md"), to_markdown(TITLE, [Sentence(subtitle), *parts]))
    _write(page, to_html(TITLE, subtitle, parts))
    log.info("the leaderboard is %s", page)
    return page


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _names(blocks: Iterable[Block]) -> dict[Encoder, Cell]:
    """What each encoder is called; those of one name are told apart by their weights."""
    encoders = dict.fromkeys(standing.encoder for block in blocks for standing in block.standings)
    count = Counter((encoder.name, encoder.variant, encoder.pooling) for encoder in encoders)
    names = {}
    for encoder in encoders:
        note = f"{encoder.variant}, {encoder.pooling}"
        if count[encoder.name, encoder.variant, encoder.pooling] > 1:
            note += f", weights {encoder.encoder_hash[:8]}"
        names[encoder] = Cell(encoder.name, note=note)
    return names


def _averages(blocks: Sequence[Block], names: dict[Encoder, Cell]) -> Iterator[Part]:
    found = averages(blocks)
    if not found:
        return
    yield Heading("Averages over tasks")
    yield Sentence(
        "The plain mean of the tasks' headline metrics, of encoders that have all of the same tasks under the same"
        " terms; where a task has two metrics, their mean enters."
    )
    for average in found:
        yield Heading(f"{average.protocol}, {len(average.blocks)} tasks", 3)
        yield _average_table(average, names)


def _average_table(average: Average, names: dict[Encoder, Cell]) -> Grid:
    ranked = [line for line in average.lines if not line[0].is_reference]
    if all(len(mean.draws) for _, mean, _ in ranked):
        places = dict(
            zip((line[0] for line in ranked), ranks([line[1] for line in ranked]), strict=True)
        )
    else:
        places = {}
    axis = _axis([mean for _, mean, _ in average.lines], None)
    lines = []
    for encoder, mean, of_tasks in average.lines:
        rank = places.get(encoder)
        cells = [
            _rank(rank),
            names[encoder],
            _score(mean, axis, None),
            *(Cell(f"{one.value:.3f}") for one in of_tasks),
        ]
        lines.append(Line(cells, _look(encoder, rank)))
    return Grid(
        ["rank", "encoder", "mean [95 %]", *(block.terms.task for block in average.blocks)], lines
    )


def _rank(rank: Rank | None) -> Cell:
    return Cell("" if rank is None else str(rank), "strong")


def _score(mean: Mean, axis: tuple[float, float], chance: float | None) -> Cell:
    low, high = mean.interval
    if not np.isfinite(low):
        return Cell(f"{mean.value:.3f}", "strong")
    return Cell(
        f"{mean.value:.3f}",
        "strong",
        f"[{low:.3f}, {high:.3f}]",
        Span(low, mean.value, high, axis, chance),
    )


def _look(encoder: Encoder, rank: Rank | None) -> str:
    if encoder.is_reference:
        return "reference"
    return "best" if rank is not None and rank.first == 1 else ""


def _task(task: str, blocks: Sequence[Block], names: dict[Encoder, Cell]) -> Iterator[Part]:
    yield Heading(task)
    if len(blocks) > 1:
        yield Sentence(
            f"{len(blocks)} tables that are not compared with each other: {_differing(blocks)}."
        )
    published = published_on(task)
    for block in blocks:
        open_metrics = {block.terms.metric} | {number.metric for number in published}
        for metric in (metric for metric in block.metrics if metric in open_metrics):
            yield from _metric(block, metric, names)
        others = [
            part
            for metric in block.metrics
            if metric not in open_metrics
            for part in _metric(block, metric, names)
        ]
        if others:
            yield Fold("other metrics", others)
    yield from _published(published, blocks)


def _differing(blocks: Sequence[Block]) -> str:
    said = {
        "split_checksum": "split",
        "sizes": "number of units",
        "resamples": "test units or resamples",
    }
    differing = [
        f.name for f in fields(Terms) if len({getattr(block.terms, f.name) for block in blocks}) > 1
    ]
    return "they differ in " + ", ".join(said.get(name, name) for name in differing)


def _metric(
    block: Block, metric: str, names: dict[Encoder, Cell]
) -> Iterator[Heading | Sentence | Grid]:
    standings = block.having(metric)
    is_headline = metric == block.terms.metric
    chance = block.chance if is_headline else None
    yield Heading(f"{metric}: {block.terms.protocol}", 3)
    yield Sentence(
        block.terms.data + ("" if chance is None else f"; chance {chance:.3f}") + ".", "quiet"
    )
    if not standings:
        yield Sentence("No encoder has a finite value.")
        return
    ranked = [standing for standing in standings if not standing.encoder.is_reference]
    places = ranks([standing.means[metric] for standing in ranked])
    rank_of = {one.encoder: rank for one, rank in zip(ranked, places, strict=True)}
    axis = _axis([standing.means[metric] for standing in standings], chance)
    lines = []
    for standing in standings:
        mean, rank = standing.means[metric], rank_of.get(standing.encoder)
        cells = [
            _rank(rank),
            names[standing.encoder],
            _score(mean, axis, chance),
            _seeds(standing, mean),
            *_gaps(block, standing, metric),
            Cell(", ".join(dict.fromkeys(standing.layers)), "quiet"),
        ]
        lines.append(Line(cells, _look(standing.encoder, rank)))
    columns = [
        "rank",
        "encoder",
        "test [95 %]",
        "seeds",
        "against its random-init twin",
        "against log-mel",
        "layer",
    ]
    yield Grid(columns, lines)
    if is_headline:
        yield from _missing(block, metric)


def _axis(means: Sequence[Mean], chance: float | None) -> tuple[float, float]:
    ends = [end for mean in means for end in (mean.value, *mean.interval) if np.isfinite(end)]
    ends += [] if chance is None else [chance]
    return min(ends), max(ends)


def _seeds(standing: Standing, mean: Mean) -> Cell:
    deviation = "" if mean.deviation is None else f"sd {mean.deviation:.3f}"
    return Cell(str(len(standing.seeds)), "quiet", deviation)


def _gaps(block: Block, standing: Standing, metric: str) -> Iterator[Cell]:
    """The differences to the two references; the references themselves have none."""
    for other in (block.twin_of(standing), block.statistics(metric)):
        if standing.encoder.is_reference or other is None or metric not in other.means:
            yield Cell("" if standing.encoder.is_reference else "not probed", "quiet")
        else:
            yield _told(gap(standing.means[metric], other.means[metric]))


def _told(of: Difference) -> Cell:
    look = "quiet" if of.verdict == "no significant difference" else of.verdict
    return Cell(f"{of.value:+.3f} {of.verdict}", look, f"[{of.low:+.3f}, {of.high:+.3f}]")


def _missing(block: Block, metric: str) -> Iterator[Sentence]:
    """Who has no place in the table, and why."""
    ranked = [one for one in block.standings if not one.encoder.is_reference]
    without_twin = sorted({one.encoder.name for one in ranked if block.twin_of(one) is None})
    if without_twin:
        yield Sentence(f"No random-init twin was probed for {', '.join(without_twin)}.", "quiet")
    if block.statistics(metric) is None:
        yield Sentence("Log-mel statistics were not probed under these terms.", "quiet")


def _published(numbers: Sequence[PublishedNumber], blocks: Sequence[Block]) -> Iterator[Part]:
    if not numbers:
        return
    of_ours = {number.protocol: number.protocol.preset == "marble-v1" for number in numbers}
    reasons = {block: _why_not(block) for block in blocks}
    ours = next((block for block, reason in reasons.items() if reason is None), None)
    yield Heading("published", 3)
    if ours is None:
        said = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason is not None))
        yield Sentence(f"Published numbers are not comparable with ours: {said}.")
        yield Fold(
            "published all the same, for orientation", list(_published_tables(numbers, None))
        )
        return
    yield Sentence(
        f"Beside our best, of {ours.terms.protocol}, {ours.terms.data}. {PROTOCOL_NOISE}"
    )
    yield from _published_tables([number for number in numbers if of_ours[number.protocol]], ours)
    if others := [number for number in numbers if not of_ours[number.protocol]]:
        yield Fold(
            "published under other protocols, not comparable", list(_published_tables(others, None))
        )


def _why_not(block: Block) -> str | None:
    terms = block.terms
    known = TASKS[terms.task].num_units if terms.task in TASKS else (None, None, None)
    return why_not_comparable(terms.preset, terms.select, terms.sizes, known)


def _published_tables(
    numbers: Sequence[PublishedNumber], ours: Block | None
) -> Iterator[Sentence | Grid]:
    """A table for each protocol: what is of different protocols never stands in one."""
    for protocol, of_protocol in _by_protocol(numbers).items():
        sources = ", ".join(dict.fromkeys(number.source for number in of_protocol))
        yield Sentence(f"{protocol.name} ({sources}): {protocol.note}.", "quiet")
        models: dict[str, dict[str, PublishedNumber]] = {}
        for number in of_protocol:
            models.setdefault(number.model, {})[_column(number)] = number
        columns = list(dict.fromkeys(map(_column, of_protocol)))
        best_first = sorted(models.items(), key=lambda item: -_value(item[1].get(columns[0])))
        lines = [
            Line([Cell(model), *(_published_cell(found.get(column), ours) for column in columns)])
            for model, found in best_first
        ]
        yield Grid(["model", *columns], lines)


def _column(number: PublishedNumber) -> str:
    return number.task if number.benchmark else number.metric


def _by_protocol(
    numbers: Iterable[PublishedNumber],
) -> dict[PublishedProtocol, list[PublishedNumber]]:
    found: dict[PublishedProtocol, list[PublishedNumber]] = {}
    for number in numbers:
        found.setdefault(number.protocol, []).append(number)
    return found


def _value(number: PublishedNumber | None) -> float:
    return float("-inf") if number is None else number.value


def _published_cell(number: PublishedNumber | None, ours: Block | None) -> Cell:
    if number is None:
        return Cell("", "quiet")
    best = _best(ours, number.metric) if ours else None
    if best is None:
        return Cell(str(number))
    where = place(number.value, *best.interval)
    return Cell(f"{number} {where}", {"above": "behind", "below": "ahead"}.get(where, ""))


def _best(block: Block, metric: str) -> Mean | None:
    """Of the trained encoders, or of the references if nothing else was probed."""
    standings = sorted(block.having(metric), key=lambda standing: standing.encoder.is_reference)
    return standings[0].means[metric] if standings else None


def _elsewhere() -> Iterator[Part]:
    parts: list[Sentence | Grid | Heading] = []
    for benchmark, numbers in groupby(published_elsewhere(), lambda number: number.benchmark):
        of_benchmark = list(numbers)
        unit = "" if of_benchmark[0].metric == "percent" else f", {of_benchmark[0].metric}"
        parts += [Heading(f"{benchmark}{unit}", 3), *_published_tables(of_benchmark, None)]
    yield Heading("Published on other benchmarks")
    yield Fold("tables of benchmarks that are not probed here", parts)
