"""Watching a JEPA learn: does it collapse, does it beat trivial predictors, does it wait for data."""

from __future__ import annotations

import logging
import time

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch, Grid, Masks, TokenSet
from jepa_audio.training.ema import tensor_pairs
from jepa_audio.training.jepa import JEPA, JEPAOutput
from jepa_audio.training.sharding import whole

log = logging.getLogger(__name__)

MAX_TOKENS = 2048  # tokens that enter a singular value decomposition


def rank_me(latents: Float[Tensor, "n D"]) -> float:
    """Effective rank: the exponential of the entropy of the singular values (Garrido et al., 2023, arXiv:2210.02885).

    Between 1 (all latents lie on one line) and min(n, D); at most `MAX_TOKENS` latents, evenly
    taken, are looked at. Not a number if one of them is not finite.
    """
    stride = -(-len(latents) // MAX_TOKENS)
    latents = latents[::stride].float()
    if not latents.isfinite().all():
        return float("nan")
    singular = torch.linalg.svdvals(latents)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.special.entr(share).sum().exp())


def mean_std(latents: Float[Tensor, "n D"]) -> float:
    """Standard deviation of each dimension over the latents, mean over the dimensions."""
    return float(latents.float().std(dim=0).mean())


def clip_cosine(latents: Float[Tensor, "B K D"], valid: Tensor | None) -> float:
    """Mean cosine between the time-averaged latents of different clips; 1 when every clip looks the same."""
    if len(latents) < 2:
        return float("nan")
    weight = (
        torch.ones_like(latents[..., :1]) if valid is None else valid[..., None].to(latents.dtype)
    )
    clips = F.normalize(((latents * weight).sum(1) / weight.sum(1)).float(), dim=-1)
    cosines = clips @ clips.T
    return float((cosines.sum() - cosines.diagonal().sum()) / (len(clips) * (len(clips) - 1)))


def nearest_context(masks: Masks, grid: Grid) -> TokenSet:
    """For every target token the context token of the same clip that lies nearest on the grid, `[B, M, T]`."""
    coordinates = grid.coordinates(masks.context.index.device).float()
    here, there = coordinates[masks.targets.index.flatten(1)], coordinates[masks.context.index]
    distance = torch.cdist(here, there)  # [B, M * T, K]
    if masks.context.valid is not None:
        distance = distance.masked_fill(~masks.context.valid[:, None], float("inf"))
    nearest = torch.gather(masks.context.index, 1, distance.argmin(dim=-1))
    return TokenSet(nearest.unflatten(1, masks.targets.index.shape[1:]), masks.targets.valid)


class CollapseMonitor(Callback):
    """Logs, every few optimizer steps, what a loss alone does not tell.

    On the batch just trained on, with the weights after the step and masks of its own: standard
    deviation and RankMe of context, target and prediction; the mean cosine between clips; the loss
    beside those of two predictors that need no learning (the mean target, and a copy of what the
    target encoder says of the nearest context token); how far the target encoder is from the
    encoder; seconds of audio per second and the share of time spent waiting for data.

    The alarm is raised when the context latents have lost most of the spread or of the rank that
    the same network had when the run began, or point the same way for every clip. Targets are no
    evidence: normalisation gives a collapsed target unit variance again. A rank that stays high is
        no proof of learning either; `OnlineProbe` is for that.

    Args:
        every_n_steps: optimizer steps between two looks.
        min_std_share: alarm below this share of the first look's context standard deviation.
        min_rank_share: alarm below this share of the first look's context RankMe.
        max_clip_cosine: alarm above this mean cosine between clips, if it was below it at the first
            look.
        stop_after: stop the run after this many alarms in a row; 0 never stops it.
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
        self.every_n_steps = every_n_steps
        self.min_std_share, self.min_rank_share, self.max_clip_cosine = (
            min_std_share,
            min_rank_share,
            max_clip_cosine,
        )
        self.stop_after = stop_after
        self.first_look: dict[str, float] = {}
        self.alarms_in_a_row = 0
        self._looked_at = 0
        self._seconds_of_audio = self._seconds_waiting = 0.0
        self._window_start = self._last_batch_end = time.perf_counter()

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs: the first look, and the alarms so far."""
        return {"first_look": self.first_look, "alarms_in_a_row": self.alarms_in_a_row}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """See `state_dict`."""
        self.first_look = state_dict["first_look"]  # type: ignore[assignment]
        self.alarms_in_a_row = state_dict["alarms_in_a_row"]  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._looked_at = trainer.global_step
        self._start_clocks()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is neither training nor waiting."""
        self._start_clocks()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """The time since the last batch was spent waiting for this one."""
        self._seconds_waiting += time.perf_counter() - self._last_batch_end

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Look, if an optimizer step has just made the count full (or is the first)."""
        assert isinstance(pl_module, JEPA)
        clip_seconds = batch.waveform.shape[-1] / pl_module.front_end.sample_rate
        self._seconds_of_audio += len(batch.waveform) * clip_seconds * trainer.world_size
        step = trainer.global_step
        if step != self._looked_at and (step % self.every_n_steps == 0 or not self.first_look):
            self._looked_at = step
            metrics = self._speed() | measure(pl_module, batch)
            self._judge(metrics, trainer)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
            trainer.callback_metrics.update(
                {name: torch.tensor(value) for name, value in metrics.items()}
            )
            self._start_clocks()
        self._last_batch_end = time.perf_counter()

    def _start_clocks(self) -> None:
        self._seconds_of_audio = self._seconds_waiting = 0.0
        self._window_start = self._last_batch_end = time.perf_counter()

    def _speed(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._window_start
        return {
            "speed/audio_seconds_per_second": self._seconds_of_audio / elapsed,
            "speed/data_wait": self._seconds_waiting / elapsed,
        }

    def _judge(self, metrics: dict[str, float], trainer: Trainer) -> None:
        if not self.first_look:
            self.first_look = dict(metrics)
        reasons = []
        for name, share in (("std", self.min_std_share), ("rank", self.min_rank_share)):
            now, first = (
                metrics[f"collapse/context_{name}"],
                self.first_look[f"collapse/context_{name}"],
            )
            if not now >= share * first:  # also when not a number
                reasons.append(f"context {name} {now:.3g}, at first {first:.3g}")
        cosine = metrics["collapse/clip_cosine"]
        if cosine > self.max_clip_cosine >= self.first_look["collapse/clip_cosine"]:
            reasons.append(f"mean cosine between clips {cosine:.4f}")
        metrics["collapse/alarm"] = float(bool(reasons))
        self.alarms_in_a_row = self.alarms_in_a_row + 1 if reasons else 0
        if self.alarms_in_a_row == 1:
            log.warning(
                "step %d: the encoder looks collapsed: %s", trainer.global_step, "; ".join(reasons)
            )
        stop = bool(self.stop_after) and self.alarms_in_a_row >= self.stop_after
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            log.error(
                "stopped at step %d after %d looks at a collapsed encoder",
                trainer.global_step,
                self.stop_after,
            )
            trainer.should_stop = True


@torch.no_grad()
def measure(jepa: JEPA, batch: AudioBatch) -> dict[str, float]:
    """The collapse statistics of a model on a batch; leaves the model and the random state as they were."""
    training = jepa.training
    jepa.eval()
    with torch.random.fork_rng(devices=[batch.waveform.device] if batch.waveform.is_cuda else []):
        masks = jepa.draw_masks(batch, len(batch.waveform), stream=2)
        output = jepa.forward(batch.waveform, masks)
        metrics = _spread(output, masks) | _losses(jepa, batch, masks, output)
    jepa.train(training)
    pairs = list(tensor_pairs(jepa))
    moved = sum(float(whole((t.float() - o.float()).square().sum())) for t, o in pairs)
    size = sum(float(whole(o.float().square().sum())) for _, o in pairs)
    return metrics | {"collapse/ema_distance": (moved / max(size, 1e-30)) ** 0.5}


def _spread(output: JEPAOutput, masks: Masks) -> dict[str, float]:
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
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    valid = masks.targets.valid
    if valid is None:
        valid = torch.ones_like(masks.targets.index, dtype=torch.bool)
    mean = output.target[valid].mean(dim=0)
    seen = TokenSet(
        masks.context.index[:, None],
        None if masks.context.valid is None else masks.context.valid[:, None],
    )
    tokens = jepa.front_end(batch.waveform)
    seen_latents = jepa.target_latents(batch.waveform, tokens, grid, seen, masks.present)[
        :, 0
    ]  # [B, K, D]
    plane = seen_latents.new_zeros(len(seen_latents), grid.num_tokens, seen_latents.shape[-1])
    plane.scatter_(1, masks.context.index[..., None].expand_as(seen_latents), seen_latents)
    copied = nearest_context(masks, grid).gather(
        plane[:, None].expand(-1, masks.targets.index.shape[1], -1, -1)
    )
    return {
        "collapse/loss": float(output.loss),
        "collapse/loss_mean_target": float(
            jepa.distance(mean.expand_as(output.target), output.target)[valid].mean()
        ),
        "collapse/loss_nearest_context": float(jepa.distance(copied, output.target)[valid].mean()),
    }
