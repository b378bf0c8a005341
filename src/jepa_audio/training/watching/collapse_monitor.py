"""Metrics during training: signs of collapse, losses of two simple predictors, speed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.classes import Codebook
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.steps.losses import CrossEntropy, JEPAOutput
from jepa_audio.training.ema import tensor_pairs
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.sharding import full_tensor
from jepa_audio.training.watching.latent_statistics import (
    clip_cosine,
    clip_share,
    mean_std,
    rank_me,
)
from jepa_audio.training.watching.loss_log import log_now
from jepa_audio.training.watching.simple_predictors import baseline_sums
from jepa_audio.training.watching.speed import SpeedMeter

log = logging.getLogger(__name__)

# Largest number of complete clips that are encoded to compare clips.
MAX_CLIPS = 16


class CollapseMonitor(Callback):
    """Log metrics of collapse and speed at the first step and at every multiple of `every_n_steps`.

    The latents are those of the first micro-batch of the step, on each process:

    - standard deviation and RankMe of context, target and prediction;
    - mean cosine similarity between complete clips at the same position, and the share of the
      variance of their latents that is between clips at the same position (`clip_share`);
    - distance between the weights of the target encoder and those of the encoder;
    - if the targets are classes: how many classes they distinguish (`Codebook.perplexity`), and
      their entropy as a share of the largest possible one;
    - seconds of audio per second, the share of time spent waiting for data, and MFU (`SpeedMeter`).

    In these steps, the training loss of all micro-batches is logged with the losses of two simple
    predictors on the same batches: the mean target, and a copy of the target encoder's latent at
    the nearest context token. See `LossLog` and `baseline_sums`.

    An alarm is logged if the standard deviation or the rank of the context latents is far below the
    first measurement, if the latents of all clips are nearly parallel, or if they depend almost
    only on the position. The alarm does not use target latents, because their normalisation gives
    even collapsed targets unit variance. It does use the classes of targets. A high rank does not
    show that the model learns; use `OnlineProbe` to measure what it learns.

    Args:
        every_n_steps: optimizer steps between two measurements.
        min_std_share: alarm below this share of the first standard deviation of the context.
        min_rank_share: alarm below this share of the first RankMe of the context.
        max_clip_cosine: alarm above this mean cosine between clips, unless the first measurement
            was also above this bound.
        min_clip_share: alarm below this share of variance between clips, also at the first
            measurement. Healthy encoders of all recipes have shares above 0.1 (`docs/watching.md`).
        min_class_entropy: alarm if the entropy of the classes of the targets is below this share of
            the largest possible one, also at the first measurement.
        stop_after: stop the run after this many alarms in a row; 0 never stops the run.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        min_std_share: float = 0.1,
        min_rank_share: float = 0.1,
        max_clip_cosine: float = 0.995,
        min_clip_share: float = 0.01,
        min_class_entropy: float = 0.15,
        stop_after: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"`every_n_steps` ({every_n_steps}) must be at least 1")
        self.every_n_steps, self.stop_after = every_n_steps, stop_after
        self.min_std_share, self.min_rank_share = min_std_share, min_rank_share
        self.max_clip_cosine, self.min_clip_share = max_clip_cosine, min_clip_share
        self.min_class_entropy = min_class_entropy
        self.first_metrics: dict[str, float] = {}
        self.alarms_in_a_row = 0
        # The statistics of the latents of this step; empty in steps without a measurement.
        self._latents: dict[str, float] = {}
        self._step_before = 0
        self._speed = SpeedMeter()
        # The first step of a start, which waits for the worker processes, has no speed.
        self._has_speed = False

    @override
    def state_dict(self) -> dict[str, object]:
        return {"first_look": self.first_metrics, "alarms_in_a_row": self.alarms_in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.first_metrics = state_dict["first_look"]  # type: ignore[assignment]
        self.alarms_in_a_row = state_dict["alarms_in_a_row"]  # type: ignore[assignment]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute the operations of a crop, before parameters are sharded."""
        if stage == "fit":
            assert isinstance(pl_module, JEPA)
            if missing := self._speed.prepare(trainer, pl_module):
                log.info("`speed/mfu` is not logged: %s", missing)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, JEPA)
        self._latents, self._has_speed = {}, False
        distance, accumulated = pl_module.distance, trainer.accumulate_grad_batches
        if (
            isinstance(distance, CrossEntropy)
            and distance.codebook.has_batch_statistics
            and accumulated > 1
            and trainer.is_global_zero
        ):
            log.warning(
                "`trainer.accumulate_grad_batches` (%d): the classes of %s are computed for each "
                "micro-batch over all processes, not for the %d micro-batches of a step",
                accumulated,
                type(distance.codebook).__name__,
                accumulated,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clocks, so that the time of validation is not counted."""
        self._speed.restart()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Measure this batch if a measurement is due; count the time since the last batch."""
        assert isinstance(pl_module, JEPA)
        self._speed.start_batch()
        is_due = (trainer.global_step + 1) % self.every_n_steps == 0 or not self.first_metrics
        pl_module.observe = self._observe if is_due else None
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Measure if an optimizer step has just ended and a measurement is due."""
        assert isinstance(pl_module, JEPA)
        self._speed.count(batch, pl_module.front_end.sample_rate, trainer.world_size)
        if self._latents and trainer.global_step != self._step_before:
            metrics = (self._speed.read() if self._has_speed else {}) | self._latents
            metrics["collapse/ema_distance"] = ema_distance(pl_module)
            if isinstance(pl_module.distance, CrossEntropy):
                metrics |= class_metrics(pl_module.distance.codebook)
            self._latents = {}
            self._check(metrics, trainer)
            log_now(trainer, metrics)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
            self._speed.restart()
        if not self._has_speed and trainer.global_step != self._step_before:
            self._has_speed = True
            self._speed.restart()
        self._speed.end_batch()

    @torch.no_grad()
    def _observe(
        self, jepa: JEPA, batch: AudioBatch, masks: Masks, output: JEPAOutput
    ) -> dict[str, Tensor]:
        """The sums of the losses of the simple predictors; keep the statistics of the latents."""
        if not self._latents:
            self._latents = latent_metrics(jepa, batch, masks, output)
        return baseline_sums(jepa, batch.waveform, masks, output.target)

    def _check(self, metrics: dict[str, float], trainer: Trainer) -> None:
        """Add `collapse/alarm` to the metrics; log a new alarm; stop after `stop_after` alarms."""
        if not self.first_metrics:
            self.first_metrics = dict(metrics)
        reasons = self._alarm_reasons(metrics)
        metrics["collapse/alarm"] = float(bool(reasons))
        self.alarms_in_a_row = self.alarms_in_a_row + 1 if reasons else 0
        step = trainer.global_step
        if self.alarms_in_a_row == 1:
            log.warning("step %d: the encoder may have collapsed: %s", step, "; ".join(reasons))
        stop = 0 < self.stop_after <= self.alarms_in_a_row
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            log.error("stopped at step %d after %d collapse alarms in a row", step, self.stop_after)
            trainer.should_stop = True

    def _alarm_reasons(self, metrics: dict[str, float]) -> list[str]:
        reasons = []
        for name, min_share in (("std", self.min_std_share), ("rank", self.min_rank_share)):
            key = f"collapse/context_{name}"
            now, first = metrics[key], self.first_metrics[key]
            # `now < ...` would be false for NaN, and would raise no alarm.
            if not now >= min_share * first:
                reasons.append(f"the context {name} fell from {first:.3g} to {now:.3g}")
        cosine = metrics["collapse/clip_cosine"]
        if cosine > self.max_clip_cosine >= self.first_metrics["collapse/clip_cosine"]:
            reasons.append(f"the mean cosine between clips is {cosine:.4f}")
        share = metrics["collapse/clip_share"]
        if share < self.min_clip_share:
            reasons.append(
                f"only {share:.2g} of the variance of the latents is between clips at the same "
                "position: the latents depend almost only on the position"
            )
        if metrics.get("collapse/class_entropy", 1.0) < self.min_class_entropy:
            perplexity = metrics["collapse/class_perplexity"]
            reasons.append(f"the targets distinguish only {perplexity:.3g} classes")
        return reasons


def class_metrics(codebook: Codebook) -> dict[str, float]:
    """Metrics of the classes of the training so far.

    How many classes the targets distinguish; the logarithm of this number as a share of the largest
    possible one: 0 for one class, 1 for all classes of the codebook, or for as many classes as
    there were target tokens; the loss that trains the codebook, if there is one.
    """
    perplexity = codebook.perplexity
    possible = min(codebook.num_classes, int(codebook.num_tokens))
    entropy = math.log(perplexity) / math.log(possible) if possible > 1 else math.nan
    metrics = {"collapse/class_perplexity": perplexity, "collapse/class_entropy": entropy}
    is_trained = any(True for _ in codebook.parameters())
    return metrics | ({"train/codebook_loss": float(codebook.own_loss)} if is_trained else {})


def latent_metrics(
    jepa: JEPA, batch: AudioBatch, masks: Masks, output: JEPAOutput
) -> dict[str, float]:
    """Statistics of the latents of a training batch, and of complete clips of the batch."""
    latents, valid = encode_complete_clips(jepa, batch, masks)
    metrics = {
        "collapse/clip_cosine": clip_cosine(latents, valid),
        "collapse/clip_share": clip_share(latents, valid),
    }
    for name, tensor, where in (
        ("context", output.context, masks.context.valid),
        ("target", output.target, masks.targets.valid),
        ("prediction", output.prediction, masks.targets.valid),
    ):
        flat = tensor.flatten(0, -2) if where is None else tensor[where]
        metrics[f"collapse/{name}_std"] = mean_std(flat)
        metrics[f"collapse/{name}_rank"] = rank_me(flat)
    return metrics


def encode_complete_clips(
    jepa: JEPA, batch: AudioBatch, masks: Masks
) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
    """Latents of the encoder for at most `MAX_CLIPS` evenly spaced clips, without masks.

    All clips then have the same positions, and the same tokens as context of each token. The
    second value is False at the padding of shorter clips.
    """
    rows = slice(0, None, -(-len(batch.waveform) // MAX_CLIPS))
    waveform = batch.waveform[rows]
    latents = encode_all_tokens(jepa, waveform)
    present = None if masks.present is None else masks.present.rows(rows)
    if present is None:
        return latents, torch.ones_like(latents[..., 0], dtype=torch.bool)
    return latents, present.to_mask(latents.shape[1])


def encode_all_tokens(jepa: JEPA, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
    """Latents of the encoder without masks and in evaluation mode."""
    with evaluation_mode(jepa.front_end, jepa.encoder):
        return jepa.encoder(jepa.front_end(waveform), jepa.front_end.grid(waveform.shape[-1]))


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode; their modes are then restored."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


@torch.no_grad()
def ema_distance(jepa: JEPA) -> float:
    """Norm of (weights of the momentum copies - weights of the modules) / norm of the latter."""
    pairs = list(tensor_pairs(jepa))
    difference = sum(float(full_tensor((t.float() - o.float()).square().sum())) for t, o in pairs)
    size = sum(float(full_tensor(o.float().square().sum())) for _, o in pairs)
    return (difference / max(size, 1e-30)) ** 0.5
