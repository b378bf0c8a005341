"""The command `probe`: frozen encoders → features → heads → results with evidence."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from jepa_audio.errors import UserError, did_you_mean
from jepa_audio.inference.pooling import Pooling, parse_poolings
from jepa_audio.probing.clips import UnusableClipsError
from jepa_audio.probing.encoders import (
    EncoderOptions,
    LogMelStatistics,
    ProbeEncoder,
    Windowing,
    load_encoders,
    source_name,
)
from jepa_audio.probing.feature_store import FeatureStore
from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import Choice, FitContext, Head, choose
from jepa_audio.probing.heads.stacked import Select
from jepa_audio.probing.intervals import difference
from jepa_audio.probing.presets import HeadKind, Preset, preset_of
from jepa_audio.probing.robustness import SWEEPS, Condition, area, noise_sweep
from jepa_audio.probing.rows import (
    RANDOM_INIT,
    STATISTICS,
    Evidence,
    ProbeRow,
    Score,
    append_rows,
    prepare_results,
    save_evidence,
)
from jepa_audio.probing.scores import chance_score, score_head
from jepa_audio.probing.tasks import ProbeData, load_task
from jepa_audio.probing.tasks.label_checks import check_labels
from jepa_audio.probing.tasks.table import LabelKind

log = logging.getLogger(__name__)

_Results = dict[tuple[str, str, str, HeadKind, int], tuple[float, Evidence]]
"""Headline score and evidence by task, checksum of its records, pooling, kind of head and seed."""


def probe(
    encoder: list[str] | str,
    tasks: list[str] | str,
    data: Sequence[Path] | Path = (),
    output: Path = Path("probe"),
    *,
    preset: str = "marble-v1",
    select: Select = "best",
    variants: Sequence[Literal["context", "target"]] = ("context", "target"),
    pooling: list[str] | str | None = None,
    frequency: list[str] | str = "mean",
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
        encoder: folders of runs, checkpoints, folders of `export hf`, names of models on the Hub,
            or MODULE:FUNCTION for a function that returns a `ProbeEncoder`. Separate several with
            commas.
        tasks: names of tasks, or tables of your own (.csv, .tsv) with the columns `path` and
            `label`. Separate several with commas.
        data: folder with records in MARBLE's layout, or with a raw data set that `data convert`
            supports. Separate several with commas. Tables do not need it.
        output: folder of the results.
        preset: "marble-v1" (MLP heads on each layer and on the weighted sum, six learning rates),
            "linear" (logistic or ridge regression, and nearest neighbours; fast), "attentive"
            (heads that weight the time columns of a clip) or "marble-v2" (for cross-checks).
        select: epoch of the head that is scored, "best" or "last". MARBLE v2 itself uses "last".
            Only marble-v2 has this option.
        variants: encoders of each checkpoint, besides its random-init baseline.
        pooling: what is kept of the time columns of a clip: "mean", "thirds" (means of three equal
            parts) or "regions_N" (of N parts); a name that ends in "_std" or "_change" adds the
            deviation or the mean absolute change over the clip, as in "thirds_std". Separate
            several with commas: they share one encoding. The default is "mean". Labels in time, and
            clips of the preset "attentive", are not pooled. Log-mel statistics have the same
            poolings, and always "mean_std_change".
        frequency: how the frequency rows of a time column become one vector: "mean" or "concat".
            Separate several with commas. Log-mel statistics always have "concat".
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
    _check_unique("encoder", list(map(source_name, sources)))
    if pooling is not None and not chosen_preset.is_pooled:
        raise UserError(f"`pooling` must be left out: heads of the preset {preset} pool themselves")
    poolings = parse_poolings(
        _comma_list("mean" if pooling is None else pooling), _comma_list(frequency)
    )
    options = EncoderOptions(variants, layers, random_seeds, overlap, windowing)
    encoders = [load_encoders(source, options) for source in sources]
    roots = [Path(root) for root in _comma_list(data)]
    datasets = [load_task(task, roots, table_kind) for task in _comma_list(tasks)]
    _check_unique("tasks", [dataset.task.name for dataset in datasets])
    for dataset in datasets:
        chosen_preset.protocol(dataset.task)
    prepare_results(output / "results.jsonl")
    datasets = [dataset.with_train(max_train) for dataset in datasets]
    for dataset in datasets:
        check_labels(dataset)
    sweeps = _select_sweeps(robustness, noise)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def new_probe(one: ProbeEncoder, dataset: ProbeData) -> _Probe:
        settings = (tuple(seeds), sweeps, batch_seconds, device, one.poolings(poolings))
        return _Probe(one, dataset, chosen_preset, output, *settings)

    return _probe_encoders(encoders, datasets, new_probe, device, output / "results.jsonl")


def _probe_encoders(
    encoders: Sequence[Iterator[ProbeEncoder]],
    datasets: Sequence[ProbeData],
    new_probe: Callable[[ProbeEncoder, ProbeData], _Probe],
    device: str,
    results: Path,
) -> list[ProbeRow]:
    """Probe the encoders of each source on all tasks; append rows to `results`, return them."""
    rows: list[ProbeRow] = []
    sample_rates: set[int] = set()
    # Checkpoints of one run have the same random-init baseline.
    known: dict[str, tuple[_Results, list[ProbeRow]]] = {}
    for source in encoders:
        # Encoders are compared with the random-init baseline of their own source: it comes first.
        baseline: _Results = {}
        for one in _with_statistics(source, sample_rates):
            one.to(device)
            if one.variant == RANDOM_INIT and one.function_hash in known:
                baseline, rows_of_twin = known[one.function_hash]
                new_rows = [replace(row, encoder=one.name) for row in rows_of_twin]
                append_rows(results, new_rows)
                rows += new_rows
                continue
            probes = [new_probe(one, data) for data in datasets]
            for each in probes:
                each.check()
            first = len(rows)
            for pooled in (pooled for each in probes for pooled in each.of_poolings()):
                new_rows = list(pooled.rows(baseline))
                append_rows(results, new_rows)
                rows += new_rows
            if one.variant == RANDOM_INIT:
                known[one.function_hash] = baseline, rows[first:]
    return rows


@dataclass(frozen=True)
class _Probe:
    """One encoder on one task; see `probe` for the settings.

    Args:
        seeds: empty for the default of the task.
        sweeps: conditions of each degradation, from mild to severe.
    """

    encoder: ProbeEncoder
    data: ProbeData
    preset: Preset
    output: Path
    seeds: tuple[int, ...]
    sweeps: Mapping[str, tuple[Condition, ...]]
    batch_seconds: float
    device: str
    poolings: tuple[Pooling, ...]
    pooling: Pooling = field(default_factory=Pooling)

    def check(self) -> None:
        """Encode the shortest window; log where it has fewer columns than a pooling has regions.

        Raises:
            UnusableClipsError, UserError: see `FeatureStore.check`.
        """
        store = self.store()
        num_columns = min(store.check(split) for split in self.data.splits.values())
        for pooling in store.preparation.poolings:
            if self.is_first_of_source and num_columns < pooling.regions:
                log.warning(
                    "%s: the shortest window has fewer time columns (%d) than %s has regions (%d): "
                    "a column of such a window is in several regions",
                    *(self.data.task.name, num_columns, pooling.name, pooling.regions),
                )

    @property
    def is_first_of_source(self) -> bool:
        """False for the encoders of a checkpoint: their baseline has the same front end."""
        return self.encoder.variant in (RANDOM_INIT, STATISTICS, "function")

    def of_poolings(self) -> list[_Probe]:
        """This probe for each pooling; they share one store of features."""
        return [replace(self, pooling=each) for each in self.store().preparation.poolings]

    def rows(self, baseline: _Results) -> Iterator[ProbeRow]:
        """Rows for each kind of head and seed.

        The results of the random-init baseline are added to `baseline`; those of other encoders of
        a checkpoint are compared with it.
        """
        encoder, data, task, pooling = self.encoder, self.data, self.data.task, self.pooling
        features = self._features_of_splits()
        test = features["test"]
        chance = chance_score(data, features["train"].rows, test.rows)
        num_padded = sum(each.num_padded for each in features.values())
        is_first = pooling == self.store().preparation.poolings[0]
        if num_padded and is_first and self.is_first_of_source:
            log.warning(
                "%s: %d windows are shorter than one token (%d samples at %d Hz): zero padding",
                *(task.name, num_padded, encoder.min_samples, encoder.sample_rate),
            )
        sizes = [features[s].rows.num_units(data.splits[s], task.units[0]) for s in data.splits]
        seeds = self.seeds or tuple(range(1234, 1234 + task.num_seeds))
        description = f"{encoder.name} {encoder.variant}: {task.name}, {pooling.name}, heads"
        fit = FitContext(features, data, encoder.layer_names, seeds, self.device, description)
        for kind, heads in self.preset.fit(fit).items():
            choice = choose(heads)
            for head in choice.heads:
                logits = head.logits(test, self.device)
                scores, evidence = score_head(logits, data, data.splits["test"], test.rows)
                row = self._row(kind, choice, head, scores, sizes, chance)
                row = replace(row, num_padded=num_padded)
                key = task.name, data.checksum, pooling.name, kind, head.seed
                if encoder.variant == RANDOM_INIT:
                    baseline[key] = row.value, evidence
                elif encoder.variant in ("context", "target") and key in baseline:
                    value, draws = baseline[key][0], baseline[key][1].draws[row.metric]
                    gap = difference(row.value, value, evidence.draws[row.metric], draws)
                    row = replace(row, against_random=gap)
                if self.sweeps:
                    row = self._with_robustness(row, head)
                save_evidence(self.output / row.evidence, evidence)
                yield row

    def _features_of_splits(self) -> dict[str, Features]:
        """The features of all splits; an error names the unusable clips of all splits."""
        try:
            return {split: self._features(split) for split in self.data.splits}
        except UnusableClipsError as error:
            found = [self.store().problems(split) for split in self.data.splits.values()]
            raise UnusableClipsError(sum(found, error.problems)) from None

    def _features(self, split: str, condition: Condition | None = None) -> Features:
        description = f"{self.encoder.name} {self.encoder.variant}: {self.data.task.name}, {split}"
        return self.store(condition).features(self.data.splits[split], description, self.pooling)

    def store(self, condition: Condition | None = None) -> FeatureStore:
        """The features of the encoder for the audio of the task."""
        preparation = self.preset.preparation(self.data.task).pooled_by(self.poolings)
        preparation = replace(preparation, condition=condition)
        folder = self.output / "features"
        return FeatureStore(folder, self.encoder, preparation, self.batch_seconds)

    def _with_robustness(self, row: ProbeRow, head: Head) -> ProbeRow:
        """Add the scores of a head on degraded test clips; the head was trained on clean clips."""

        def score(condition: Condition) -> float:
            if not condition.changes(self.encoder.sample_rate):
                return row.value
            features = self._features("test", condition)
            logits = head.logits(features, self.device)
            return float(self.data.scores(logits, self.data.splits["test"], features.rows))

        curves = {
            name: tuple((condition.level, score(condition)) for condition in conditions)
            for name, conditions in self.sweeps.items()
        }
        areas = {name: area([y for _, y in curve], row.value) for name, curve in curves.items()}
        return replace(row, robustness=curves, robustness_area=areas)

    def _row(
        self,
        kind: HeadKind,
        choice: Choice,
        head: Head,
        scores: dict[str, Score],
        sizes: Sequence[int],
        chance: float,
    ) -> ProbeRow:
        encoder, data, task, preset = self.encoder, self.data, self.data.task, self.preset
        weights, names, pooling = encoder.encoder_hash, encoder.layer_names, self.pooling.name
        encoder_key = (encoder.name, encoder.variant, weights, pooling, names)
        head_key = (preset.name, preset.select, kind, head.seed)
        task_key = (task.name, data.checksum, tuple(sizes), *head_key)
        name = hashlib.sha256(repr((encoder_key, task_key)).encode()).hexdigest()[:16]
        return ProbeRow(
            encoder=encoder.name,
            variant=encoder.variant,
            encoder_hash=weights,
            pooling=pooling,
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
            scores=scores,
            chance=chance,
            valid=head.valid,
            layers=tuple(head_input.name for head_input in choice.inputs),
            settings=choice.settings,
            valid_grid=tuple(map(tuple, choice.valid.tolist())),
            num_train=sizes[0],
            num_valid=sizes[1],
            num_test=sizes[2],
            class_names=data.labels.names,
            evidence=f"evidence/{task.name}-{name}.npz",
            against_random=None,
            robustness=None,
            robustness_area=None,
            split_checksum=data.checksum,
            versions={name: version(name) for name in ("jepa-audio", "torch", "torchmetrics")},
        )


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
