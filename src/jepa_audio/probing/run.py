"""The command `probe`: frozen encoders → features → heads → rows, evidence and a leaderboard."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from jepa_audio.errors import UserError, did_you_mean
from jepa_audio.probing.encoders import (
    Frequency,
    LogMelStatistics,
    ProbeEncoder,
    check_source,
    encoders_of,
    run_name,
)
from jepa_audio.probing.features import Features, FeatureStore, Preparation
from jepa_audio.probing.heads import Choice, Head, choose
from jepa_audio.probing.heads.sweep import Select
from jepa_audio.probing.intervals import Difference, difference
from jepa_audio.probing.presets import SETTING_NAMES, Fit, Kind, Preset, preset_of
from jepa_audio.probing.robustness import SWEEPS, Condition, area, noise_sweep
from jepa_audio.probing.rows import ProbeRow, append_jsonl, save_evidence
from jepa_audio.probing.scoring import TestResult, chance, judge
from jepa_audio.probing.tasks import ProbeData, load_task
from jepa_audio.probing.tasks.table import LabelKind

_Judged = dict[tuple[str, str, Kind, int], tuple[float, TestResult]]
"""By task, checksum of its records, kind of head and seed."""


@dataclass(frozen=True)
class Probing:
    """What is the same for all encoders and tasks of one call.

    Attributes:
        preset: the protocol.
        output: folder of the results.
        seeds: of the heads; the task's own number of them if empty.
        sweeps: conditions by name, each from mild to hard.
        batch_seconds: of audio encoded at once.
        device: where encoders and heads are.
    """

    preset: Preset
    output: Path
    seeds: tuple[int, ...]
    sweeps: Mapping[str, tuple[Condition, ...]]
    batch_seconds: float
    device: str

    def features(
        self, encoder: ProbeEncoder, data: ProbeData, split: str, preparation: Preparation
    ) -> Features:
        """Of one split, from the disk where they are known."""
        store = FeatureStore(self.output / "features", encoder, preparation)
        description = f"{encoder.name} {encoder.variant}: {data.task.name}, {split}"
        return store.features(data.splits[split], self.batch_seconds, description)

    def fit(
        self, encoder: ProbeEncoder, data: ProbeData
    ) -> tuple[dict[str, Features], dict[Kind, Choice]]:
        """Features of all splits, and of each kind of head the one that is best on the validation split."""
        preparation = self.preset.preparation(data.task)
        features = {
            split: self.features(encoder, data, split, preparation) for split in data.splits
        }
        seeds = self.seeds or tuple(range(1234, 1234 + data.task.num_seeds))
        description = f"{encoder.name} {encoder.variant}: {data.task.name}, heads"
        fit = Fit(features, data, encoder.layer_names, seeds, self.device, description)
        return features, {kind: choose(heads) for kind, heads in self.preset.fit(fit).items()}

    def curve(
        self, encoder: ProbeEncoder, data: ProbeData, head: Head, clean: float, name: str
    ) -> tuple[tuple[float, float], ...]:
        """Scores of a head on test clips degraded in one way, by level; it has learnt from clean ones."""
        scores = []
        for condition in self.sweeps[name]:
            said = clean
            if condition.changes(encoder.sample_rate):
                preparation = replace(self.preset.preparation(data.task), condition=condition)
                features = self.features(encoder, data, "test", preparation)
                said = float(
                    data.scores(
                        head.logits(features, self.device), data.splits["test"], features.rows
                    )
                )
            scores.append((condition.level, said))
        return tuple(scores)


def probe(
    encoder: list[str] | str,
    tasks: list[str] | str,
    data: Sequence[Path] | Path = (),
    output: Path = Path("probe"),
    *,
    preset: str = "marble-v1",
    select: Select = "best",
    variants: Sequence[Literal["context", "target"]] = ("context", "target"),
    frequency: Frequency = "mean",
    layers: Sequence[int] = (),
    max_train: int | None = None,
    seeds: Sequence[int] = (),
    random_seeds: Sequence[int] = (),
    robustness: bool | list[str] = False,
    noise: Path | None = None,
    table_kind: LabelKind = "multiclass",
    batch_seconds: float = 240.0,
    device: str = "auto",
) -> list[ProbeRow]:
    """Ask frozen encoders for labels, and the same networks as they were before step 0.

    For every checkpoint the random-init twin is probed first, then its encoders; log-mel statistics
    once for each sample rate. Layer and learning rate (or penalty) are chosen on the validation
    split, the chosen head is reported on the test split. Rows are appended to `results.jsonl`, all
    of which `leaderboard.md`, `.html` and `pictures/` show. Features are kept in `features/`, and
    nothing that was heard once is heard again.

    Args:
        encoder: checkpoints, as `runs/NAME/checkpoints/last.ckpt`, or MODULE:FUNCTION for a
            function that returns a `ProbeEncoder`; several with commas between them.
        tasks: names of the tasks, or tables of your own (.csv, .tsv; see `table_task`); several
            with commas.
        data: folder of records in MARBLE's layout, or of a raw data set that `data convert` knows;
            several with commas; needless for tables, which say where their files are.
        output: folder of the results.
        preset: "marble-v1" (each layer and the weighted sum by six learning rates), "linear"
            (logistic or ridge regression and nearest neighbours, for tracking), or "marble-v2" (for
            cross-checks).
        select: state of a head that is scored; "last" is MARBLE v2's own, and for it alone.
        variants: which encoders of a checkpoint, besides its random-init twin.
        frequency: how a spectrogram encoder's tokens of one time become one vector: "mean" averages
            them, "concat" keeps them side by side.
        layers: places of the layers that are probed, 0 for what enters the first block; all if
            empty.
        max_train: use so many random training units instead of all.
        seeds: of the heads; by default 1234, and 1235 and 1236 for tasks of few test files.
        random_seeds: of further random-init twins, beside the run's own.
        robustness: true, or names of conditions: scores on degraded test clips too.
        noise: folder of recordings, for a further condition: noise of your own.
        table_kind: of the labels in tables of your own: "multiclass", "multilabel" or "regression".
        batch_seconds: of audio encoded at once.
        device: "auto" is the GPU if there is one.
    """
    chosen = preset_of(preset, select)
    sources, loaded = _sources(encoder), _tasks(tasks, data, table_kind, max_train, chosen)
    probing = Probing(
        chosen, output, tuple(seeds), _sweeps(robustness, noise), batch_seconds, _device(device)
    )
    encoders = (
        encoders_of(source, variants, frequency, random_seeds, layers) for source in sources
    )
    return _ask(probing, encoders, loaded)


def _ask(
    probing: Probing, encoders: Iterable[Iterator[ProbeEncoder]], loaded: Sequence[ProbeData]
) -> list[ProbeRow]:
    """Every encoder of every source on every task, each beside the twin of its own source."""
    results = probing.output / "results.jsonl"
    rows: list[ProbeRow] = []
    rates: set[int] = set()
    for of_source in encoders:
        twin: _Judged = {}
        for encoder in _with_statistics(of_source, rates):
            encoder.to(probing.device)
            for data in loaded:
                new, judged = _rows(probing, encoder, data, twin)
                if encoder.variant == "random":
                    twin |= judged
                append_jsonl(results, new)
                rows += new
    return rows


def _rows(
    probing: Probing,
    encoder: ProbeEncoder,
    data: ProbeData,
    twin: _Judged,
) -> tuple[list[ProbeRow], _Judged]:
    """One row for each kind of head and seed, and what they rest on."""
    features, choices = probing.fit(encoder, data)
    test, rows = features["test"], []
    judged: _Judged = {}
    guess = chance(data, features["train"].rows, test.rows)
    compared = encoder.variant in ("context", "target")
    by = data.task.units[0]
    sizes = tuple(
        len(set(of.rows.unit_index(data.splits[split], by).tolist()))
        for split, of in features.items()
    )
    for kind, choice in choices.items():
        for head in choice.heads:
            judgement = judge(
                head.logits(test, probing.device), data, data.splits["test"], test.rows
            )
            key = data.task.name, data.checksum, kind, head.seed
            value = judgement.scores[data.task.metrics[0].name].value
            judged[key] = value, judgement
            against = (
                _against(data, value, judgement, *twin[key]) if compared and key in twin else None
            )
            row = _row(probing, encoder, data, kind, choice, head, sizes, judgement, guess, against)
            if probing.sweeps:
                curves = {
                    name: probing.curve(encoder, data, head, value, name) for name in probing.sweeps
                }
                areas = {name: area([s for _, s in curve], value) for name, curve in curves.items()}
                row = replace(row, robustness=curves, robustness_area=areas)
            save_evidence(probing.output / row.evidence, judgement.evidence)
            rows.append(row)
    return rows, judged


def _against(
    data: ProbeData, value: float, judgement: TestResult, other: float, of_twin: TestResult
) -> Difference:
    metric = data.task.metrics[0].name
    return difference(
        value, other, judgement.evidence.draws[metric], of_twin.evidence.draws[metric]
    )


def _row(
    probing: Probing,
    encoder: ProbeEncoder,
    data: ProbeData,
    kind: Kind,
    choice: Choice,
    head: Head,
    sizes: tuple[int, ...],
    judgement: TestResult,
    guess: float,
    against: Difference | None,
) -> ProbeRow:
    task = data.task
    said = (
        encoder.name,
        encoder.variant,
        encoder.encoder_hash,
        encoder.frequency,
        encoder.layer_names,
    )
    what = (
        task.name,
        data.checksum,
        sizes,
        probing.preset.name,
        probing.preset.select,
        kind,
        head.seed,
    )
    name = hashlib.sha256(repr((said, what)).encode()).hexdigest()[:16]
    return ProbeRow(
        encoder=encoder.name,
        variant=encoder.variant,
        encoder_hash=encoder.encoder_hash,
        pooling=encoder.frequency,
        task=task.name,
        preset=probing.preset.name,
        select=probing.preset.select,
        head=kind,
        layer=head.source.name,
        setting=head.setting,
        setting_name=SETTING_NAMES[kind],
        seed=head.seed,
        decoder=data.labels.decoder,
        unit=task.units[0],
        metric=task.metrics[0].name,
        scores=judgement.scores,
        chance=guess,
        valid=head.valid,
        layers=tuple(source.name for source in choice.sources),
        settings=choice.settings,
        valid_grid=tuple(tuple(map(float, line)) for line in choice.valid),
        num_train=sizes[0],
        num_valid=sizes[1],
        num_test=sizes[2],
        class_names=data.labels.names,
        evidence=f"evidence/{task.name}-{name}.npz",
        against_random=against,
        robustness=None,
        robustness_area=None,
        split_checksum=data.checksum,
        versions={
            package: importlib.metadata.version(package)
            for package in ("jepa-audio", "torch", "torchmetrics")
        },
    )


def _listed(words: Sequence[str | Path] | Path) -> list[str]:
    """`a,b` or `[a, b]`."""
    several = str(words).split(",") if isinstance(words, (str, Path)) else words
    return [str(word).strip() for word in several]


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sources(encoder: list[str] | str) -> list[str]:
    """What is named, if it is all there and every run has a name of its own."""
    sources = _listed(encoder)
    _check_apart(
        "encoder", [run_name(Path(source)) for source in sources if source.endswith(".ckpt")]
    )
    for source in sources:
        check_source(source)
    return sources


def _tasks(
    tasks: list[str] | str,
    data: Sequence[Path] | Path,
    table_kind: LabelKind,
    max_train: int | None,
    preset: Preset,
) -> list[ProbeData]:
    """The tasks, if the preset knows them all and each has a name of its own."""
    roots = [Path(root) for root in _listed(data)]
    loaded = [load_task(name, roots, table_kind).with_train(max_train) for name in _listed(tasks)]
    _check_apart("tasks", [one.task.name for one in loaded])
    for one in loaded:
        preset.protocol(one.task)
    return loaded


def _check_apart(key: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(
            f"`{key}` must have different names in the results, these are called {list(names)}"
        )


def _sweeps(robustness: bool | list[str], noise: Path | None) -> dict[str, tuple[Condition, ...]]:
    """The conditions asked for, by name."""
    names = (list(SWEEPS) if robustness else []) if isinstance(robustness, bool) else robustness
    unknown = [name for name in names if name not in SWEEPS]
    if unknown:
        guess = did_you_mean(unknown[0], SWEEPS)
        raise UserError(
            f"`robustness` holds {', '.join(unknown)}; there are {', '.join(SWEEPS)}{guess}"
        )
    sweeps = {name: SWEEPS[name] for name in names}
    return sweeps if noise is None else sweeps | {"recorded_noise": noise_sweep(noise)}


def _with_statistics(encoders: Iterator[ProbeEncoder], rates: set[int]) -> Iterator[ProbeEncoder]:
    """Log-mel statistics behind the encoders of a sample rate that is new."""
    encoder: ProbeEncoder | None = None
    for encoder in encoders:
        yield encoder
    if encoder is not None and encoder.sample_rate not in rates:
        rates.add(encoder.sample_rate)
        yield LogMelStatistics(encoder.sample_rate)
