"""`OnlineProbe`: scores of the encoder against its random-init baseline during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.inference.encoder import Encoder
from jepa_audio.probing.clips import load_waveform
from jepa_audio.probing.encoders import state_hash
from jepa_audio.probing.intervals import Difference, difference, draw_counts
from jepa_audio.probing.tasks import TASKS, load_task
from jepa_audio.probing.tasks.labels import ClipLabels
from jepa_audio.probing.tasks.table import LabelKind
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.sharding import is_sharded

_PENALTIES = tuple(10.0**exponent for exponent in range(5))


class OnlineProbe(Callback):
    """Compare the encoder with its random-init baseline on a few labelled clips during training.

    The baseline is the same network with the weights of step 0, drawn from the seed of the run. The
    head is a ridge classifier (ridge regression for tags and numbers) on the standardised mean over
    time and frequency of one layer. The layer and the penalty have the least leave-one-out error on
    the `num_train` training clips, so nothing is chosen on the `num_valid` validation clips that
    are scored. The test split is not read.

    The process of rank zero probes copies of the weights: training is the same with and without
    this callback.

    Args:
        corpus: folder of the labelled corpus; see `data` of the command `probe`.
        task: name of a task, or a table with your own labels (.csv, .tsv).
        every_n_steps: optimizer steps between two probes; one more is before the first step.
        num_train: clips on which the head is fitted.
        num_valid: clips on which the head is scored.
        seed: seed of the choice of clips and of the intervals.
        which: "context" or "target" encoder. In runs of a few minutes the target encoder lags
            behind. It is probed before the momentum update of the step.
        batch_size: clips that are encoded at once.
        table_kind: kind of the labels in your own table.
    """

    def __init__(
        self,
        corpus: str,
        *,
        task: str = "nsynth_instrument",
        every_n_steps: int = 200,
        num_train: int = 400,
        num_valid: int = 300,
        seed: int = 0,
        which: Literal["context", "target"] = "context",
        batch_size: int = 50,
        table_kind: LabelKind = "multiclass",
    ) -> None:
        known = TASKS.get(task)
        if known is None and not task.endswith((".csv", ".tsv")):
            raise UserError(
                f"`task` is {task!r}, must be one of {', '.join(TASKS)}, or a table (.csv, .tsv)"
            )
        if known is not None and known.grid_hz is not None:
            raise UserError(f"`task` is {task!r}, must be a task with labels of whole clips")
        self.corpus, self.task, self.table_kind = Path(corpus), task, table_kind
        self.every_n_steps, self.num_train, self.num_valid = every_n_steps, num_train, num_valid
        self.seed, self.which, self.batch_size = seed, which, batch_size
        check_bounds(self, 1, math.inf, "every_n_steps", "num_train", "num_valid", "batch_size")
        self.differences: dict[int, Difference] = {}
        self._baseline: tuple[float, Float[np.ndarray, " draws"]] | None = None
        self._baseline_hash = ""
        self._last_step = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the labelled clips.

        Raises:
            UserError: if the weights are sharded, so no process can copy them.
        """
        assert isinstance(pl_module, JEPA)
        if is_sharded(pl_module):
            raise UserError(
                "`OnlineProbe` cannot copy sharded weights: remove it, and use `jepa-audio probe` "
                "on checkpoints"
            )
        self._baseline, self._last_step = None, trainer.global_step
        if not trainer.is_global_zero:
            return
        data = load_task(self.task, [self.corpus], self.table_kind)
        assert isinstance(data.labels, ClipLabels)
        train = data.splits["train"].subset(self.num_train, self.seed).unit_items
        valid = data.splits["val"].subset(self.num_valid, self.seed).unit_items
        rate, channels = pl_module.front_end.sample_rate, pl_module.front_end.num_channels
        # Training clips come first.
        self._waveforms = [load_waveform(item, rate, channels).T for item in train + valid]
        self._targets = np.split(data.labels.encode(train + valid), [len(train)])
        self._labels, self._metric = data.labels, data.task.metrics[0]
        self._counts = draw_counts(len(valid), seed=self.seed)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Score the baseline before the first step, and the encoder if the run starts here."""
        if trainer.is_global_zero and self._baseline is None:
            assert isinstance(pl_module, JEPA)
            frozen = self._frozen(trainer, pl_module, batch, "context")
            baseline = frozen.random_twin(pl_module.seed)
            self._baseline_hash = state_hash(baseline)
            self._baseline = self._score(baseline.to(pl_module.device))
            if trainer.global_step == 0:
                self._probe(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Probe after every `every_n_steps` optimizer steps."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last_step and step % self.every_n_steps == 0:
            self._probe(trainer, pl_module, batch)
        self._last_step = step

    @staticmethod
    def _frozen(
        trainer: Trainer, jepa: JEPA, batch: AudioBatch, which: Literal["context", "target"]
    ) -> Encoder:
        data = getattr(trainer, "datamodule", None)
        dbfs = None if data is None else data.hparams.get("loudness_dbfs")
        return Encoder.from_jepa(jepa, batch.waveform.shape[-1], which, dbfs)

    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch) -> None:
        """Score the encoder, and log and print the comparison."""
        assert isinstance(pl_module, JEPA)
        assert self._baseline is not None
        frozen = self._frozen(trainer, pl_module, batch, self.which)
        is_baseline = state_hash(frozen) == self._baseline_hash
        value, draws = self._baseline if is_baseline else self._score(frozen)
        baseline, baseline_draws = self._baseline
        gap = difference(value, baseline, draws, baseline_draws)
        step = trainer.global_step
        self.differences[step] = gap
        values = {self._metric.name: value, "twin": baseline, "difference": gap.value}
        for logger in trainer.loggers:
            metrics = {f"probe/{self.task}/{name}": value for name, value in values.items()}
            logger.log_metrics(metrics, step=step)
        pl_module.print(
            f"step {step}: {self.task} {value:.3f}, random-init twin {baseline:.3f}: {gap}"
        )

    def _score(self, frozen: Encoder) -> tuple[float, Float[np.ndarray, " draws"]]:
        """Metric of the best layer's head on the validation clips, and on their resamples."""
        # Every `fit` imports this module, and scikit-learn takes a tenth of its imports.
        from sklearn.linear_model import RidgeClassifierCV, RidgeCV  # noqa: PLC0415
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

        targets, truth = self._targets
        is_class = self._labels.kind == "class"
        ridge = RidgeClassifierCV if is_class else RidgeCV
        layers = [np.split(layer, [len(targets)]) for layer in self._encode(frozen)]
        heads = [
            make_pipeline(StandardScaler(), ridge(_PENALTIES)).fit(train, targets)
            for train, _ in layers
        ]
        best = max(range(len(heads)), key=lambda layer: heads[layer][-1].best_score_)
        predictions = heads[best].predict(layers[best][1])
        if is_class:
            predictions = np.eye(self._labels.num_outputs)[predictions]
        predictions = predictions.reshape(len(predictions), -1).astype(np.float32)
        value = float(self._metric(torch.from_numpy(predictions)[:, None], truth)[0])
        return value, self._metric.resampled(predictions, truth, self._counts)

    def _encode(self, frozen: Encoder) -> list[Float[np.ndarray, "clips _"]]:
        """Mean over time and frequency of every layer, for all clips."""
        device = next(frozen.parameters()).device
        batches = []
        for start in range(0, len(self._waveforms), self.batch_size):
            batch = self._waveforms[start : start + self.batch_size]
            lengths = torch.tensor([len(waveform) for waveform in batch])
            padded = pad_sequence(batch, batch_first=True).mT.to(device)
            batches.append(frozen.encode_batch(padded, lengths).pool())
        return [torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True)]
