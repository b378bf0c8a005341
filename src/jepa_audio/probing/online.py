"""Watching a JEPA learn something: a small probe against the random-init twin, while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.probing.encoders import JEPAEncoder, state_hash
from jepa_audio.probing.features import load_waveform
from jepa_audio.probing.intervals import Difference, difference, draw_counts
from jepa_audio.probing.metrics import Metric
from jepa_audio.probing.tasks import TASKS, ProbeData, load_task
from jepa_audio.probing.tasks.labels import ClipLabels, Labels
from jepa_audio.probing.tasks.table import LabelKind
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.sharding import is_sharded

_RIDGE = tuple(10.0**exponent for exponent in range(5))


class OnlineProbe(Callback):
    """Scores the encoder on a few labelled clips while training: does it beat its random-init twin?

    The twin is the same network with weights drawn anew from the run's seed: what the encoder was
    before step 0. The head is a ridge classifier (for tags and numbers a ridge regression) on the
    standardised mean over time and frequency of one layer. Layer and ridge are those of the least
    leave-one-out error on the `num_train` training clips, so nothing is chosen on the `num_valid`
    validation clips that are reported. Clips of the test split are never heard.

    Copies of the weights are probed, by the process of rank zero alone: training goes on as if
    nobody looked.

    Args:
        corpus: folder of the labelled corpus; see `data` of the command `probe`.
        task: its name, or a table of your own (.csv, .tsv).
        every_n_steps: optimizer steps between two looks; one is also taken before the first step.
        num_train: clips on which the head is fitted.
        num_valid: clips on which it is scored.
        seed: of the choice of clips and of the intervals.
        which: "context" or "target" encoder. In runs of a few minutes the target encoder lags
            behind; it is seen before the momentum update of the step.
        batch_size: clips encoded at once.
        table_kind: of the labels in a table of your own.
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
        if min(every_n_steps, num_train, num_valid, batch_size) < 1:
            raise UserError(
                f"`every_n_steps` ({every_n_steps}), `num_train` ({num_train}), `num_valid` ({num_valid}) "
                f"and `batch_size` ({batch_size}) must be at least 1"
            )
        if (known := TASKS.get(task)) is not None and known.grid_hz is not None:
            raise UserError(
                f"`task` is {task!r}, of annotations in time; one that labels whole clips is needed"
            )
        if known is None and not task.endswith((".csv", ".tsv")):
            raise UserError(
                f"`task` is {task!r}, must be one of {', '.join(TASKS)}, or a table (.csv, .tsv)"
            )
        self.table_kind = table_kind
        self.corpus, self.task, self.every_n_steps = Path(corpus), task, every_n_steps
        self.num_train, self.num_valid = num_train, num_valid
        self.seed, self.which, self.batch_size = seed, which, batch_size
        self.differences: dict[int, Difference] = {}
        self._clips: _Clips | None = None
        self._twin: _Score | None = None
        self._twin_hash = ""
        self._looked_at = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the labelled clips; `ValueError` if no process holds the weights that it would copy."""
        assert isinstance(pl_module, JEPA)
        if is_sharded(pl_module):
            raise UserError(
                "`OnlineProbe` cannot copy sharded weights: leave it out, `jepa-audio probe` checkpoints"
            )
        self._twin, self._looked_at = None, trainer.global_step
        if not trainer.is_global_zero:
            return
        data = load_task(self.task, [self.corpus], self.table_kind)
        self._clips = _Clips.of(
            data, self.num_train, self.num_valid, pl_module.front_end, self.seed
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Score the twin before the first step, and the encoder too if the run begins here."""
        if trainer.is_global_zero and self._twin is None:
            assert isinstance(pl_module, JEPA)
            frozen = Encoder.from_jepa(pl_module, batch.waveform.shape[-1])
            twin = frozen.random_twin(pl_module.seed)
            self._twin, self._twin_hash = self._score(twin.to(pl_module.device)), state_hash(twin)
            if trainer.global_step == 0:
                self._look(trainer, pl_module, batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Look, if an optimizer step has just made the count full."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._looked_at and step % self.every_n_steps == 0:
            self._look(trainer, pl_module, batch)
        self._looked_at = step

    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch) -> None:
        assert isinstance(pl_module, JEPA)
        assert self._twin is not None
        frozen = Encoder.from_jepa(pl_module, batch.waveform.shape[-1], self.which)
        score = self._twin if state_hash(frozen) == self._twin_hash else self._score(frozen)
        gap = difference(score.value, self._twin.value, score.draws, self._twin.draws)
        self.differences[trainer.global_step] = gap
        assert self._clips is not None
        metrics = {
            self._clips.metric.name: score.value,
            "twin": self._twin.value,
            "difference": gap.value,
        }
        for logger in trainer.loggers:
            named = {f"probe/{self.task}/{name}": value for name, value in metrics.items()}
            logger.log_metrics(named, step=trainer.global_step)
        pl_module.print(
            f"step {trainer.global_step}: {self.task} {score.value:.3f}, random-init twin {self._twin.value:.3f}: {gap}"
        )

    def _score(self, frozen: Encoder) -> _Score:
        """What the best head says of the validation clips."""
        clips = self._clips
        assert clips is not None
        encoder = JEPAEncoder(frozen, self.task, self.which)
        parts = [
            [
                layer.cpu().numpy()
                for layer in encoder.clip_vectors(pad_sequence(some, batch_first=True).mT, lengths)
            ]
            for some, lengths in clips.batches(self.batch_size)
        ]
        layers = [np.concatenate(layer) for layer in zip(*parts, strict=True)]
        train, valid = slice(clips.num_train), slice(clips.num_train, None)
        ridge = RidgeClassifierCV if clips.labels.kind == "class" else RidgeCV
        heads = [
            make_pipeline(StandardScaler(), ridge(_RIDGE)).fit(layer[train], clips.targets[train])
            for layer in layers
        ]
        best = max(range(len(heads)), key=lambda layer: heads[layer][-1].best_score_)
        said = heads[best].predict(layers[best][valid])
        if clips.labels.kind == "class":
            said = np.eye(clips.labels.num_outputs)[said]
        answers, truth = said.reshape(len(said), -1).astype(np.float32), clips.targets[valid]
        value = float(clips.metric(torch.from_numpy(answers)[:, None], truth)[0])
        return _Score(value, clips.metric.resampled(answers, truth, clips.counts))


@dataclass(frozen=True)
class _Score:
    """The first metric, and the same on resamplings."""

    value: float
    draws: Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class _Clips:
    """Labelled clips in memory, those of the training split first."""

    waveforms: list[Tensor]
    targets: Shaped[np.ndarray, "clips ..."]
    num_train: int
    labels: Labels
    metric: Metric
    counts: Shaped[np.ndarray, "draws valid"]

    @staticmethod
    def of(
        data: ProbeData, num_train: int, num_valid: int, front_end: FrontEnd, seed: int
    ) -> _Clips:
        """Some clips of the training and validation splits."""
        splits = (
            data.splits["train"].subset(num_train, seed),
            data.splits["val"].subset(num_valid, seed),
        )
        assert isinstance(data.labels, ClipLabels)
        leaders = splits[0].unit_items + splits[1].unit_items
        rate, num_channels = front_end.sample_rate, front_end.num_channels
        return _Clips(
            [load_waveform(item, rate, num_channels).T for item in leaders],
            data.labels.encode(leaders),
            len(splits[0].unit_items),
            data.labels,
            data.task.metrics[0],
            draw_counts(len(splits[1].unit_items), seed=seed),
        )

    def batches(self, size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Waveforms `[S, C]` and how long they are."""
        for start in range(0, len(self.waveforms), size):
            some = self.waveforms[start : start + size]
            yield some, torch.tensor([len(waveform) for waveform in some])
