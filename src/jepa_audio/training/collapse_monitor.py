"""Metrics during training: signs of collapse, losses of two simple predictors, speed."""

from __future__ import annotations

import logging
import time

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch, Grid, Masks, TokenSet
from jepa_audio.steps.losses import JEPAOutput
from jepa_audio.training.ema import tensor_pairs
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.sharding import full_tensor

log = logging.getLogger(__name__)

# Largest number of latents in a singular value decomposition.
MAX_LATENTS = 2048


def rank_me(latents: Float[Tensor, "n D"]) -> float:
    """Effective rank (RankMe): the exponential of the entropy of the singular values.

    Source: Garrido et al., 2023, arXiv:2210.02885. The rank is between 1 (all latents are parallel)
    and min(n, D). It is computed from at most `MAX_LATENTS` evenly spaced latents. It is NaN if one
    of these is not finite.
    """
    stride = -(-len(latents) // MAX_LATENTS)
    latents = latents[::stride].float()
    if not latents.isfinite().all():
        return float("nan")
    singular = torch.linalg.svdvals(latents)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.special.entr(share).sum().exp())


def mean_std(latents: Float[Tensor, "n D"]) -> float:
    """Standard deviation of each dimension over the latents, averaged over the dimensions."""
    return float(latents.float().std(dim=0).mean())


def clip_cosine(latents: Float[Tensor, "B K D"], valid: Tensor | None) -> float:
    """Mean cosine similarity between the mean latents of different clips; 1 if all are parallel."""
    if len(latents) < 2:
        return float("nan")
    if valid is None:
        valid = torch.ones_like(latents[..., 0], dtype=torch.bool)
    weight = valid[..., None].to(latents.dtype)
    clips = F.normalize(((latents * weight).sum(1) / weight.sum(1)).float(), dim=-1)
    cosines = clips @ clips.T
    return float((cosines.sum() - cosines.diagonal().sum()) / (len(clips) * (len(clips) - 1)))


def nearest_context(masks: Masks, grid: Grid) -> TokenSet:
    """The context token that is nearest on the grid to each target token, `[B, M, L]`."""
    coordinates = grid.coordinates(masks.context.index.device).float()
    targets, context = (coordinates[s.index.flatten(1)] for s in (masks.targets, masks.context))
    distance = torch.cdist(targets, context)  # [B, M * L, K]
    if masks.context.valid is not None:
        distance = distance.masked_fill(~masks.context.valid[:, None], float("inf"))
    nearest = torch.gather(masks.context.index, 1, distance.argmin(dim=-1))
    return TokenSet(nearest.unflatten(1, masks.targets.index.shape[1:]), masks.targets.valid)


class CollapseMonitor(Callback):
    """Log metrics of collapse and speed at the first step and at every multiple of `every_n_steps`.

    The metrics are measured on the last training batch, with the weights after the step and with
    masks that are drawn only for the measurement:

    - standard deviation and RankMe of context, target and prediction;
    - mean cosine similarity between clips;
    - the loss of the model, and the losses of two simple predictors that do not learn: the mean
      target, and a copy of the target encoder's latent at the nearest context token;
    - distance between the weights of the target encoder and those of the encoder;
    - seconds of audio per second, and the share of time spent waiting for data.

    An alarm is logged if the standard deviation or the rank of the context latents is far below the
    first measurement, or if the context latents of all clips are nearly parallel. The alarm does
    not use the targets, because their normalisation gives even collapsed targets unit variance. A
    high rank does not show that the model learns; use `OnlineProbe` to measure what it learns.

    Args:
        every_n_steps: optimizer steps between two measurements.
        min_std_share: alarm below this share of the first standard deviation of the context.
        min_rank_share: alarm below this share of the first RankMe of the context.
        max_clip_cosine: alarm above this mean cosine between clips, unless the first measurement
            was also above this bound.
        stop_after: stop the run after this many alarms in a row; 0 never stops the run.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        min_std_share: float = 0.1,
        min_rank_share: float = 0.1,
        max_clip_cosine: float = 0.995,
        stop_after: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"`every_n_steps` ({every_n_steps}) must be at least 1")
        self.every_n_steps, self.stop_after = every_n_steps, stop_after
        self.min_std_share, self.min_rank_share = min_std_share, min_rank_share
        self.max_clip_cosine = max_clip_cosine
        self.first_metrics: dict[str, float] = {}
        self.alarms_in_a_row = 0
        self._measured_at = 0
        self._start_clocks()

    @override
    def state_dict(self) -> dict[str, object]:
        return {"first_look": self.first_metrics, "alarms_in_a_row": self.alarms_in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.first_metrics = state_dict["first_look"]  # type: ignore[assignment]
        self.alarms_in_a_row = state_dict["alarms_in_a_row"]  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = trainer.global_step
        self._start_clocks()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clocks, so that the time of validation is not counted."""
        self._start_clocks()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Add the time since the last batch to the waiting time."""
        self._seconds_waiting += time.perf_counter() - self._last_batch_end

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
        clip_seconds = batch.waveform.shape[-1] / pl_module.front_end.sample_rate
        self._seconds_of_audio += len(batch.waveform) * clip_seconds * trainer.world_size
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or not self.first_metrics
        if step != self._measured_at and due:
            self._measured_at = step
            metrics = self._speed() | measure(pl_module, batch)
            self._check(metrics, trainer)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
            self._start_clocks()
        self._last_batch_end = time.perf_counter()

    def _start_clocks(self) -> None:
        self._seconds_of_audio = self._seconds_waiting = 0.0
        self._clocks_started = self._last_batch_end = time.perf_counter()

    def _speed(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._clocks_started
        return {
            "speed/audio_seconds_per_second": self._seconds_of_audio / elapsed,
            "speed/data_wait": self._seconds_waiting / elapsed,
        }

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
        return reasons


@torch.no_grad()
def measure(jepa: JEPA, batch: AudioBatch) -> dict[str, float]:
    """The collapse metrics of a model on a batch; the model and the random state do not change."""
    training = jepa.training
    jepa.eval()
    with torch.random.fork_rng(devices=[batch.waveform.device] if batch.waveform.is_cuda else []):
        masks = jepa.draw_masks(batch, len(batch.waveform), stream=2)
        output = jepa.forward(batch.waveform, masks)
        metrics = _latent_statistics(output, masks) | _losses(jepa, batch, masks, output)
    jepa.train(training)
    return metrics | {"collapse/ema_distance": _ema_distance(jepa)}


def _ema_distance(jepa: JEPA) -> float:
    """Norm of (weights of the momentum copies - weights of the modules) / norm of the latter."""
    pairs = list(tensor_pairs(jepa))
    difference = sum(float(full_tensor((t.float() - o.float()).square().sum())) for t, o in pairs)
    size = sum(float(full_tensor(o.float().square().sum())) for _, o in pairs)
    return (difference / max(size, 1e-30)) ** 0.5


def _latent_statistics(output: JEPAOutput, masks: Masks) -> dict[str, float]:
    metrics = {"collapse/clip_cosine": clip_cosine(output.context, masks.context.valid)}
    for name, latents, valid in (
        ("context", output.context, masks.context.valid),
        ("target", output.target, masks.targets.valid),
        ("prediction", output.prediction, masks.targets.valid),
    ):
        flat = latents.flatten(0, -2) if valid is None else latents[valid]
        metrics[f"collapse/{name}_std"] = mean_std(flat)
        metrics[f"collapse/{name}_rank"] = rank_me(flat)
    return metrics


def _losses(jepa: JEPA, batch: AudioBatch, masks: Masks, output: JEPAOutput) -> dict[str, float]:
    """The loss of the model, and the losses of the two simple predictors."""
    valid = masks.targets.valid
    if valid is None:
        valid = torch.ones_like(masks.targets.index, dtype=torch.bool)
    mean = output.target[valid].mean(dim=0).expand_as(output.target)
    copied = _copy_of_nearest_context(jepa, batch, masks)
    return {
        "collapse/loss": float(output.loss),
        "collapse/loss_mean_target": float(jepa.distance(mean, output.target)[valid].mean()),
        "collapse/loss_nearest_context": float(jepa.distance(copied, output.target)[valid].mean()),
    }


def _copy_of_nearest_context(
    jepa: JEPA, batch: AudioBatch, masks: Masks
) -> Float[Tensor, "B M L D"]:
    """The target encoder's latent at the context token that is nearest to each target token."""
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    tokens = jepa.front_end(batch.waveform)
    index, valid = masks.context.index, masks.context.valid
    context = TokenSet(index[:, None], None if valid is None else valid[:, None])
    latents = jepa.target_latents(batch.waveform, tokens, grid, context, masks.present)
    latents = latents[:, 0]  # [B, K, D]
    on_grid = latents.new_zeros(len(latents), grid.num_tokens, latents.shape[-1])
    on_grid.scatter_(1, index[..., None].expand_as(latents), latents)
    num_groups = masks.targets.index.shape[1]
    return nearest_context(masks, grid).gather(on_grid[:, None].expand(-1, num_groups, -1, -1))
