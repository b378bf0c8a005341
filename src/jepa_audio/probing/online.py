"""Watching a JEPA learn something: a small probe against the random-init twin, while training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from jepa_audio.encode import FrozenEncoder
from jepa_audio.grid import AudioBatch
from jepa_audio.jepa import JEPA
from jepa_audio.probing.encoders import PooledEncoder, state_hash
from jepa_audio.probing.features import features_of, load_waveforms
from jepa_audio.probing.intervals import Difference, paired_difference
from jepa_audio.probing.tasks import TASKS
from jepa_audio.sharding import is_sharded

_RIDGE = tuple(10.0**exponent for exponent in range(5))


class OnlineProbe(Callback):
    """Scores the encoder on a few labelled clips while training: does it beat its random-init twin?

    The twin is the same network with weights drawn anew from the run's seed: what the encoder was before
    step 0. The head is a ridge classifier on the standardised mean over time and frequency of one layer.
    Layer and ridge are those of the least leave-one-out error on the `num_train` training clips, so nothing
    is chosen on the `num_valid` validation clips that are reported. Clips of the test split are never
    heard.

    Copies of the weights are probed, by the process of rank zero alone: training goes on as if nobody looked.

    Args:
        corpus: folder of the labelled corpus; see the command `probe`.
        task: its name.
        every_n_steps: optimizer steps between two looks; one is also taken before the first step.
        num_train: clips on which the head is fitted.
        num_valid: clips on which it is scored.
        seed: of the choice of clips and of the intervals.
        which: "context" or "target" encoder. In runs of a few minutes the target encoder lags behind; it is
            seen before the momentum update of the step.
        batch_size: clips encoded at once.
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
    ) -> None:
        if min(every_n_steps, num_train, num_valid, batch_size) < 1:
            raise ValueError(
                f"`every_n_steps` ({every_n_steps}), `num_train` ({num_train}), `num_valid` ({num_valid}) "
                f"and `batch_size` ({batch_size}) must be at least 1"
            )
        if task not in TASKS:
            raise ValueError(f"`task` is {task!r}, must be one of {', '.join(TASKS)}")
        self.corpus, self.task, self.every_n_steps = Path(corpus), task, every_n_steps
        self.num_train, self.num_valid = num_train, num_valid
        self.seed, self.which, self.batch_size = seed, which, batch_size
        self.differences: dict[int, Difference] = {}
        self._waveforms: list[Tensor] = []
        self._labels = np.empty(0, dtype=np.int64)
        self._twin: Bool[np.ndarray, " n"] | None = None
        self._twin_hash = ""
        self._looked_at = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the labelled clips; `ValueError` if no process holds the weights that it would copy."""
        assert isinstance(pl_module, JEPA)
        if is_sharded(pl_module):
            raise ValueError("`OnlineProbe` cannot copy sharded weights: leave it out, `jepa-audio probe` checkpoints")
        self._twin, self._looked_at = None, trainer.global_step
        if not trainer.is_global_zero:
            return
        task = TASKS[self.task].load(self.corpus)
        train, valid = (
            task.train.subset(self.num_train, self.seed),
            task.valid.subset(self.num_valid, self.seed),
        )
        front_end = pl_module.front_end
        self._waveforms = load_waveforms(train.paths + valid.paths, front_end.sample_rate, front_end.num_channels)
        self._labels = np.concatenate([train.labels, valid.labels])
        self.num_train = len(train)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Score the twin before the first step, and the encoder too if the run begins here."""
        if trainer.is_global_zero and self._twin is None:
            assert isinstance(pl_module, JEPA)
            frozen = FrozenEncoder.from_jepa(pl_module, batch.waveform.shape[-1])
            twin = frozen.random_twin(pl_module.seed)
            self._twin, self._twin_hash = self._correct(twin.to(pl_module.device)), state_hash(twin)
            if trainer.global_step == 0:
                self._look(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Look, if an optimizer step has just made the count full."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._looked_at and step % self.every_n_steps == 0:
            self._look(trainer, pl_module, batch)
        self._looked_at = step

    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch) -> None:
        assert isinstance(pl_module, JEPA)
        assert self._twin is not None
        frozen = FrozenEncoder.from_jepa(pl_module, batch.waveform.shape[-1], self.which)
        correct = self._twin if state_hash(frozen) == self._twin_hash else self._correct(frozen)
        difference = paired_difference(correct, self._twin, seed=self.seed)
        self.differences[trainer.global_step] = difference
        metrics = {"accuracy": correct.mean(), "twin": self._twin.mean(), "difference": difference.value}
        for logger in trainer.loggers:
            named = {f"probe/{self.task}/{name}": float(value) for name, value in metrics.items()}
            logger.log_metrics(named, step=trainer.global_step)
        pl_module.print(
            f"step {trainer.global_step}: {self.task} {correct.mean():.3f}, "
            f"random-init twin {self._twin.mean():.3f}: {difference}"
        )

    def _correct(self, frozen: FrozenEncoder) -> Bool[np.ndarray, " n"]:
        """Which of the validation clips the head names rightly."""
        encoder = PooledEncoder(frozen, self.task, self.which)
        starts = range(0, len(self._waveforms), self.batch_size)
        batches = [features_of(encoder, self._waveforms[start : start + self.batch_size]) for start in starts]
        layers = [np.concatenate(layer) for layer in zip(*batches, strict=True)]
        train, labels = slice(self.num_train), self._labels
        heads = [
            make_pipeline(StandardScaler(), RidgeClassifierCV(_RIDGE)).fit(layer[train], labels[train])
            for layer in layers
        ]
        best = max(range(len(heads)), key=lambda layer: heads[layer][-1].best_score_)
        return heads[best].predict(layers[best][self.num_train :]) == labels[self.num_train :]
