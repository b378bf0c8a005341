"""The command `probe`: frozen encoders → features → heads → results with evidence."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from jepa_audio.errors import UserError, did_you_mean
from jepa_audio.probing.encoder_loading import (
    EncoderOptions,
    Windowing,
    check_source,
    load_encoders,
    run_name,
)
from jepa_audio.probing.encoders import Frequency, LogMelStatistics, ProbeEncoder
from jepa_audio.probing.features import Features, FeatureStore, Preparation
from jepa_audio.probing.heads import Choice, FitContext, Head, choose
from jepa_audio.probing.heads.stacked import Select
from jepa_audio.probing.intervals import Difference, difference
from jepa_audio.probing.presets import HeadKind, Preset, preset_of
from jepa_audio.probing.robustness import SWEEPS, Condition, area, noise_sweep
from jepa_audio.probing.rows import ProbeRow, append_rows, save_evidence
from jepa_audio.probing.scoring import TestResult, chance_score, score_head
from jepa_audio.probing.tasks import ProbeData, load_task
from jepa_audio.probing.tasks.table import LabelKind

_Results = dict[tuple[str, str, HeadKind, int], TestResult]
"""Results by task, checksum of its records, kind of head and seed."""


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
    overlap: float = 0.0,
    windowing: Windowing = "exact",
    max_train: int | None = None,
    seeds: Sequence[int] = (),
    random_seeds: Sequence[int] = (),
    robustness: bool | list[str] = False,
    noise: Path | None = None,
    table_kind: LabelKind = "multiclass",
    batch_seconds: float = 240.0,
    device: str = "auto",
) -> list[ProbeRow]:
    """Probe frozen encoders against random-init baselines.

    For each checkpoint, the random-init baseline is probed first, then its encoders. Log-mel
    statistics are probed once for each sample rate. The layer and the learning rate (or penalty)
    are chosen on the validation split; the chosen head is scored on the test split. Results are
    appended to `results.jsonl`; `leaderboard.md`, `leaderboard.html` and `pictures/` show all of
    them. Features are cached in `features/`: each clip is encoded once.

    Args:
        encoder: checkpoints, for example runs/NAME/checkpoints/last.ckpt, or MODULE:FUNCTION for a
            function that returns a `ProbeEncoder`. Separate several with commas.
        tasks: names of tasks, or tables of your own (.csv, .tsv) with the columns `path` and
            `label`. Separate several with commas.
        data: folder with records in MARBLE's layout, or with a raw data set that `data convert`
            supports. Separate several with commas. Tables do not need it.
        output: folder of the results.
        preset: "marble-v1" (MLP heads on each layer and on the weighted sum, six learning rates),
            "linear" (logistic or ridge regression, and nearest neighbours; fast) or "marble-v2"
            (for cross-checks).
        select: epoch of the head that is scored, "best" or "last". MARBLE v2 itself uses "last".
            Only marble-v2 has this option.
        variants: encoders of each checkpoint, besides its random-init baseline.
        frequency: how the frequency rows of a time column become one vector: "mean" or "concat".
            Checkpoints only.
        layers: indices of the layers that are probed, 0 for the input of the first block. The
            default is all.
        overlap: overlap of the windows of a long clip as a share of a window, in [0, 1).
            Checkpoints only.
        windowing: "exact", or "wavjepa" for the windows of the published WavJEPA. Checkpoints only.
        max_train: number of random training units. The default is all.
        seeds: seeds of the heads. The default is 1234, or 1234 to 1236 for tasks with few test
            files.
        random_seeds: seeds of further random-init baselines, besides that of the run.
        robustness: true for all degradations of the test clips, or the names of some.
        noise: folder of recordings that are added to the test clips as one more degradation.
        table_kind: kind of the labels in your own tables: "multiclass", "multilabel" or
            "regression".
        batch_seconds: seconds of audio that are encoded at once.
        device: "auto" uses the GPU if there is one.
    """
    chosen_preset = preset_of(preset, select)
    sources = _comma_list(encoder)
    _check_unique("encoder", [run_name(Path(s)) for s in sources if s.endswith(".ckpt")])
    for source in sources:
        check_source(source)
    roots = [Path(root) for root in _comma_list(data)]
    datasets = [load_task(task, roots, table_kind) for task in _comma_list(tasks)]
    _check_unique("tasks", [dataset.task.name for dataset in datasets])
    for dataset in datasets:
        chosen_preset.protocol(dataset.task)
    run = ProbeRun(
        chosen_preset,
        output,
        tuple(seeds),
        _select_sweeps(robustness, noise),
        batch_seconds,
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
    )
    options = EncoderOptions(variants, frequency, layers, random_seeds, overlap, windowing)
    encoders = [load_encoders(source, options) for source in sources]
    return run.probe_all(encoders, [dataset.with_train(max_train) for dataset in datasets])


@dataclass(frozen=True)
class ProbeRun:
    """Settings that are the same for all encoders and tasks of a command.

    Attributes:
        preset: the protocol.
        output: folder of the results.
        seeds: seeds of the heads; empty for the default of each task.
        sweeps: conditions of each degradation, from mild to severe.
        batch_seconds: seconds of audio that are encoded at once.
        device: device of encoders and heads.
    """

    preset: Preset
    output: Path
    seeds: tuple[int, ...]
    sweeps: Mapping[str, tuple[Condition, ...]]
    batch_seconds: float
    device: str

    def probe_all(
        self, sources: Iterable[Iterator[ProbeEncoder]], datasets: Sequence[ProbeData]
    ) -> list[ProbeRow]:
        """Probe every encoder of every source on every task, and append the results to the file.

        Encoders are compared with the random-init baseline of their own source, which comes first.
        """
        rows: list[ProbeRow] = []
        sample_rates: set[int] = set()
        for encoders in sources:
            baseline: _Results = {}
            for encoder in _with_statistics(encoders, sample_rates):
                encoder.to(self.device)
                for data in datasets:
                    new_rows, results = self._probe(encoder, data, baseline)
                    if encoder.variant == "random":
                        baseline |= results
                    append_rows(self.output / "results.jsonl", new_rows)
                    rows += new_rows
        return rows

    def _probe(
        self, encoder: ProbeEncoder, data: ProbeData, baseline: _Results
    ) -> tuple[list[ProbeRow], _Results]:
        """Rows and results of one encoder on one task, for each kind of head and seed."""
        preparation = self.preset.preparation(data.task)
        features = {
            split: self._features(encoder, data, split, preparation) for split in data.splits
        }
        test, unit = features["test"], data.task.units[0]
        chance = chance_score(data, features["train"].rows, test.rows)
        sizes = tuple(
            len(set(of_split.rows.unit_index(data.splits[split], unit).tolist()))
            for split, of_split in features.items()
        )
        rows: list[ProbeRow] = []
        results: _Results = {}
        for kind, choice in self._fit(encoder, data, features).items():
            for head in choice.heads:
                logits = head.logits(test, self.device)
                result = score_head(logits, data, data.splits["test"], test.rows)
                key = data.task.name, data.checksum, kind, head.seed
                results[key] = result
                row = self._row(encoder, data, kind, choice, head, result, sizes, chance)
                if encoder.variant in ("context", "target") and key in baseline:
                    row = replace(row, against_random=_compare(row.metric, result, baseline[key]))
                if self.sweeps:
                    row = self._with_robustness(row, encoder, data, head)
                save_evidence(self.output / row.evidence, result.evidence)
                rows.append(row)
        return rows, results

    def _features(
        self, encoder: ProbeEncoder, data: ProbeData, split: str, preparation: Preparation
    ) -> Features:
        folder = self.output / "features"
        store = FeatureStore(folder, encoder, preparation, self.batch_seconds)
        description = f"{encoder.name} {encoder.variant}: {data.task.name}, {split}"
        return store.features(data.splits[split], description)

    def _fit(
        self, encoder: ProbeEncoder, data: ProbeData, features: Mapping[str, Features]
    ) -> dict[HeadKind, Choice]:
        """The best heads of each kind on the validation split."""
        seeds = self.seeds or tuple(range(1234, 1234 + data.task.num_seeds))
        description = f"{encoder.name} {encoder.variant}: {data.task.name}, heads"
        fit = FitContext(features, data, encoder.layer_names, seeds, self.device, description)
        return {kind: choose(heads) for kind, heads in self.preset.fit(fit).items()}

    def _with_robustness(
        self, row: ProbeRow, encoder: ProbeEncoder, data: ProbeData, head: Head
    ) -> ProbeRow:
        """Add the scores of a head on degraded test clips; the head was trained on clean clips."""
        clean, split = row.value, data.splits["test"]
        curves = {}
        for name, conditions in self.sweeps.items():
            curve = []
            for condition in conditions:
                score = clean
                if condition.changes(encoder.sample_rate):
                    preparation = replace(self.preset.preparation(data.task), condition=condition)
                    features = self._features(encoder, data, "test", preparation)
                    logits = head.logits(features, self.device)
                    score = float(data.scores(logits, split, features.rows))
                curve.append((condition.level, score))
            curves[name] = tuple(curve)
        areas = {name: area([score for _, score in curve], clean) for name, curve in curves.items()}
        return replace(row, robustness=curves, robustness_area=areas)

    def _row(
        self,
        encoder: ProbeEncoder,
        data: ProbeData,
        kind: HeadKind,
        choice: Choice,
        head: Head,
        result: TestResult,
        sizes: tuple[int, ...],
        chance: float,
    ) -> ProbeRow:
        task, preset = data.task, self.preset
        weights, names = encoder.encoder_hash, encoder.layer_names
        encoder_key = (encoder.name, encoder.variant, weights, encoder.frequency, names)
        task_key = (task.name, data.checksum, sizes, preset.name, preset.select, kind, head.seed)
        name = hashlib.sha256(repr((encoder_key, task_key)).encode()).hexdigest()[:16]
        return ProbeRow(
            encoder=encoder.name,
            variant=encoder.variant,
            encoder_hash=encoder.encoder_hash,
            pooling=encoder.frequency,
            task=task.name,
            preset=preset.name,
            select=preset.select,
            head=kind,
            layer=head.input.name,
            setting=head.setting,
            setting_name=head.setting_name,
            seed=head.seed,
            decoder=data.labels.decoder,
            unit=task.units[0],
            metric=task.metrics[0].name,
            scores=result.scores,
            chance=chance,
            valid=head.valid,
            layers=tuple(head_input.name for head_input in choice.inputs),
            settings=choice.settings,
            valid_grid=tuple(tuple(map(float, line)) for line in choice.valid),
            num_train=sizes[0],
            num_valid=sizes[1],
            num_test=sizes[2],
            class_names=data.labels.names,
            evidence=f"evidence/{task.name}-{name}.npz",
            against_random=None,
            robustness=None,
            robustness_area=None,
            split_checksum=data.checksum,
            versions={
                package: importlib.metadata.version(package)
                for package in ("jepa-audio", "torch", "torchmetrics")
            },
        )


def _compare(metric: str, result: TestResult, baseline: TestResult) -> Difference:
    scores = (result.scores[metric].value, baseline.scores[metric].value)
    return difference(*scores, result.evidence.draws[metric], baseline.evidence.draws[metric])


def _with_statistics(
    encoders: Iterator[ProbeEncoder], sample_rates: set[int]
) -> Iterator[ProbeEncoder]:
    """The encoders, then log-mel statistics if their sample rate is not in `sample_rates` yet."""
    encoder: ProbeEncoder | None = None
    for encoder in encoders:
        yield encoder
    if encoder is not None and encoder.sample_rate not in sample_rates:
        sample_rates.add(encoder.sample_rate)
        yield LogMelStatistics(encoder.sample_rate)


def _comma_list(words: Sequence[str | Path] | Path) -> list[str]:
    """The words of `a,b` or `[a, b]`."""
    parts = str(words).split(",") if isinstance(words, (str, Path)) else words
    return [str(word).strip() for word in parts]


def _check_unique(option: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"`{option}` must have different names in the results, got {list(names)}")


def _select_sweeps(
    robustness: bool | list[str], noise: Path | None
) -> dict[str, tuple[Condition, ...]]:
    names = (list(SWEEPS) if robustness else []) if isinstance(robustness, bool) else robustness
    unknown = [name for name in names if name not in SWEEPS]
    if unknown:
        raise UserError(
            f"`robustness` has unknown conditions {', '.join(unknown)}; the known ones are "
            f"{', '.join(SWEEPS)}{did_you_mean(unknown[0], SWEEPS)}"
        )
    sweeps = {name: SWEEPS[name] for name in names}
    return sweeps if noise is None else sweeps | {"recorded_noise": noise_sweep(noise)}
