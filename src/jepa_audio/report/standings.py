"""Which encoders are told apart: rows of equal terms, averaged over seeds, compared draw by draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.intervals import Difference, difference, interval
from jepa_audio.probing.rows import (
    STATISTICS,
    TWIN,
    Evidence,
    ProbeRow,
    latest,
    load_evidence,
    read_jsonl,
)

TWO_METRICS = (("auroc", "ap"), ("r2_valence", "r2_arousal"))
"""Of such a task the mean of both enters an average over tasks (Yuan et al., 2023, arXiv:2306.10548)."""


@dataclass(frozen=True)
class Terms:
    """What rows must have in common to be compared.

    Attributes:
        task: its name.
        preset: the protocol.
        select: "best" or "last" epoch.
        head: its kind.
        decoder: of annotations in time.
        unit: what is scored.
        metric: by which layers and settings were chosen.
        split_checksum: of the records.
        sizes: units of train, val and test.
        resamples: digest of the names of the test units and of the number of draws.
    """

    task: str
    preset: str
    select: str
    head: str
    decoder: str | None
    unit: str
    metric: str
    split_checksum: str
    sizes: tuple[int, int, int]
    resamples: str

    @property
    def protocol(self) -> str:
        """How was probed."""
        decoder = "" if self.decoder is None else f", decoder {self.decoder}"
        return f"{self.preset}, {self.head} head, {self.select} epoch{decoder}"

    @property
    def data(self) -> str:
        """On what."""
        sizes = "/".join(map(str, self.sizes))
        return f"{sizes} {self.unit}s in train, val and test, split {self.split_checksum[:8]}"


@dataclass(frozen=True)
class Mean:
    """A metric's mean over seeds.

    Attributes:
        value: the mean.
        draws: the mean on every resample of the test units.
        deviation: over the seeds; `None` for one seed.
    """

    value: float
    draws: Float[np.ndarray, " draws"]
    deviation: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws."""
        return interval(self.draws)


@dataclass(frozen=True)
class Encoder:
    """Who was probed."""

    name: str
    variant: str
    pooling: str
    encoder_hash: str

    @property
    def is_reference(self) -> bool:
        """Whether it is a random-init twin or the baseline without a network: shown, but not ranked."""
        return self.variant == STATISTICS or self.variant.partition("-")[0] == TWIN


@dataclass(frozen=True)
class Standing:
    """One encoder's result under some terms.

    Attributes:
        encoder: who.
        seeds: of the heads.
        layers: chosen, one for each seed.
        means: by metric.
    """

    encoder: Encoder
    seeds: tuple[int, ...]
    layers: tuple[str, ...]
    means: dict[str, Mean]


@dataclass(frozen=True, eq=False)
class Block:
    """All that may be compared with one another.

    Attributes:
        terms: what it has in common.
        chance: headline metric of the trivial predictor.
        standings: in the order in which they were probed.
    """

    terms: Terms
    chance: float | None
    standings: tuple[Standing, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The headline metric first."""
        found = dict.fromkeys(metric for standing in self.standings for metric in standing.means)
        return tuple(sorted(found, key=lambda metric: metric != self.terms.metric))

    def having(self, metric: str) -> list[Standing]:
        """Those with a finite value, best first."""
        with_it = [
            one
            for one in self.standings
            if metric in one.means and np.isfinite(one.means[metric].value)
        ]
        return sorted(with_it, key=lambda one: -one.means[metric].value)

    def twin_of(self, standing: Standing) -> Standing | None:
        """The random-init twin of the same run, the last one probed."""
        wanted = (standing.encoder.name, TWIN, standing.encoder.pooling)
        twins = [
            s
            for s in self.standings
            if (s.encoder.name, s.encoder.variant, s.encoder.pooling) == wanted
        ]
        return twins[-1] if twins else None

    def statistics(self, metric: str) -> Standing | None:
        """The baseline without a network; the best, where there are several."""
        return next((one for one in self.having(metric) if one.encoder.variant == STATISTICS), None)


@dataclass(frozen=True)
class Rank:
    """Places that an encoder may hold: `first` - 1 are told apart as better, all behind `last` as worse."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"  # noqa: RUF001


def gap(one: Mean, other: Mean) -> Difference:
    """The difference of two means on the same resamples of the same test units."""
    return difference(one.value, other.value, one.draws, other.draws)


def ranks(means: Sequence[Mean]) -> list[Rank]:
    """The places that each may hold; those who share some are no significant difference, at 95 % for each pair."""
    signs = np.array([[_sign(gap(one, other)) for other in means] for one in means]).reshape(
        len(means), -1
    )
    behind, ahead = (signs < 0).sum(axis=1), (signs > 0).sum(axis=1)
    return [Rank(int(b) + 1, len(means) - int(a)) for b, a in zip(behind, ahead, strict=True)]


def _sign(of: Difference) -> int:
    return {"ahead": 1, "behind": -1, "no significant difference": 0}[of.verdict]


def read_blocks(results: Path) -> list[Block]:
    """The rows of a file of results with their evidence, gathered by terms, in the order of the tasks.

    Raises:
        UserError: if there is no such file, or naming the evidence that is missing.
        UserError: naming the line that is no row, or the evidence that is damaged.
    """
    if not results.is_file():
        raise MissingFileError(f"there is no {results}: `jepa-audio probe` writes it")
    blocks: dict[Terms, dict[Encoder, list[tuple[ProbeRow, Evidence]]]] = {}
    for row in latest(read_jsonl(results)):
        evidence = _evidence(row, results.parent / row.evidence)
        encoder = Encoder(row.encoder, row.variant, row.pooling, row.encoder_hash)
        found = blocks.setdefault(_terms(row, evidence), {}).setdefault(encoder, [])
        found.append((row, evidence))
    read = [_block(terms, of_terms) for terms, of_terms in blocks.items()]
    tasks = list(dict.fromkeys(block.terms.task for block in read))
    return sorted(read, key=lambda block: tasks.index(block.terms.task))


def _evidence(row: ProbeRow, path: Path) -> Evidence:
    """What is needed of it, without the answers, of which there can be gigabytes."""
    evidence = load_evidence(path)
    if missing := sorted(row.scores.keys() - evidence.draws.keys()):
        raise UserError(
            f"{path} holds no `draws/{missing[0]}`, which the row has a score of: probe again"
        )
    return Evidence(np.empty((0, 0), np.float32), np.empty(0), evidence.uids, evidence.draws)


def _terms(row: ProbeRow, evidence: Evidence) -> Terms:
    digest = hashlib.sha256("\n".join(evidence.uids).encode()).hexdigest()[:8]
    return Terms(
        row.task,
        row.preset,
        row.select,
        row.head,
        row.decoder,
        row.unit,
        row.metric,
        row.split_checksum,
        (row.num_train, row.num_valid, row.num_test),
        f"{digest} {len(evidence.draws[row.metric])}",
    )


def _block(terms: Terms, found: dict[Encoder, list[tuple[ProbeRow, Evidence]]]) -> Block:
    rows = [row for of_encoder in found.values() for row, _ in of_encoder]
    chance = next((row.chance for row in rows if row.chance is not None), None)
    return Block(terms, chance, tuple(_standing(encoder, found[encoder]) for encoder in found))


def _standing(encoder: Encoder, found: list[tuple[ProbeRow, Evidence]]) -> Standing:
    rows = [row for row, _ in found]
    shared = [metric for metric in rows[0].scores if all(metric in row.scores for row in rows)]
    means = {}
    for metric in shared:
        values = np.array([row.scores[metric].value for row in rows])
        draws = np.mean([evidence.draws[metric] for _, evidence in found], axis=0)
        means[metric] = Mean(
            float(values.mean()), draws, float(values.std(ddof=1)) if len(rows) > 1 else None
        )
    return Standing(
        encoder, tuple(row.seed for row in rows), tuple(row.layer for row in rows), means
    )


def headline(standing: Standing, metric: str) -> Mean | None:
    """What enters an average over tasks: the metric, or the mean of two where a task has two."""
    pair = next((two for two in TWO_METRICS if standing.means.keys() >= set(two)), (metric,))
    means = [standing.means[name] for name in pair if name in standing.means]
    return mean_of(means) if means else None


def mean_of(means: Sequence[Mean]) -> Mean:
    """Of several metrics or tasks; it has no draws if theirs are of different numbers."""
    same = len({len(mean.draws) for mean in means}) == 1
    draws = np.mean([mean.draws for mean in means], axis=0) if same else np.empty(0, np.float32)
    return Mean(float(np.mean([mean.value for mean in means])), draws)


@dataclass(frozen=True)
class Average:
    """Encoders that have all of the same tasks, under the same terms.

    Attributes:
        protocol: preset, kind of head and epoch.
        blocks: one for each task.
        lines: of each encoder its mean over the tasks and the tasks' own, best first.
    """

    protocol: str
    blocks: tuple[Block, ...]
    lines: tuple[tuple[Encoder, Mean, tuple[Mean, ...]], ...]


def averages(blocks: Iterable[Block]) -> list[Average]:
    """A table for each set of two or more tasks that some encoder has, the largest set first."""
    found = []
    by_protocol = sorted(blocks, key=_protocol)
    for protocol, group in groupby(by_protocol, _protocol):
        of_encoder: dict[Encoder, dict[str, tuple[Block, Mean]]] = {}
        for block in group:
            for standing in block.standings:
                mean = headline(standing, block.terms.metric)
                if mean is not None and np.isfinite(mean.value):
                    of_encoder.setdefault(standing.encoder, {})[block.terms.task] = (block, mean)
        asked = {
            tuple(block for block, _ in tasks.values()): None
            for tasks in of_encoder.values()
            if len(tasks) > 1
        }
        found += [
            _average(protocol, wanted, of_encoder)
            for wanted in sorted(asked, key=len, reverse=True)
        ]
    return found


def _protocol(block: Block) -> str:
    # Logistic regression and ridge are one head for two kinds of labels.
    head = {"logistic": "linear", "ridge": "linear"}.get(block.terms.head, block.terms.head)
    return f"{block.terms.preset}, {head} head, {block.terms.select} epoch"


def _average(
    protocol: str,
    wanted: tuple[Block, ...],
    of_encoder: dict[Encoder, dict[str, tuple[Block, Mean]]],
) -> Average:
    lines = []
    for encoder, tasks in of_encoder.items():
        if all(
            block.terms.task in tasks and tasks[block.terms.task][0] is block for block in wanted
        ):
            means = tuple(tasks[block.terms.task][1] for block in wanted)
            lines.append((encoder, mean_of(means), means))
    return Average(protocol, wanted, tuple(sorted(lines, key=lambda line: -line[1].value)))
