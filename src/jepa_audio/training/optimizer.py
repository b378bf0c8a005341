"""Parameter groups, learning-rate schedule, gradient clipping and gradient scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRSchedulerConfig
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.training.schedules import Schedule
from jepa_audio.training.sharding import full_tensor


def parameter_groups(module: nn.Module, decay_all: bool) -> list[dict[str, Any]]:
    """Group the trained parameters into parameters without and with weight decay.

    Args:
        module: the module whose parameters are grouped.
        decay_all: True puts all parameters into one group with weight decay; otherwise norms,
            biases and learned tokens have no weight decay.
    """
    if decay_all:
        return [{"params": [p for p in module.parameters() if p.requires_grad]}]
    learned_tokens = [name for name, _ in module.named_parameters() if name.endswith("registers")]
    groups = param_groups_weight_decay(module, no_weight_decay_list=learned_tokens)
    # The second group uses the weight decay of the optimizer.
    del groups[1]["weight_decay"]
    return groups


def add_schedule(
    optimizer: Optimizer, schedule: Schedule, max_steps: int
) -> OptimizerLRSchedulerConfig:
    """Multiply the learning rate of an optimizer by `schedule` at every optimizer step.

    Raises:
        UserError: if the run has no `max_steps`.
    """
    if max_steps < 1:
        raise UserError(f"set `trainer.max_steps` (now {max_steps}): schedules depend on it")
    if resolved := schedule.resolved(max_steps):
        rank_zero_info(f"learning rate: {resolved}")
    last = max_steps - 1
    scheduler = LambdaLR(optimizer, lambda step: schedule(min(step, last), max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ScalerAwareModule(LightningModule):
    """Optimizer steps that are also right with a gradient scaler (`trainer.precision: 16-mixed`).

    A scaler multiplies the loss, and thereby the gradients, by a large factor. It skips a step
    whose gradients are not finite. Gradients are divided by the factor before they are clipped,
    also for a fused optimizer, for which Lightning does not do this. A skipped step does not move
    the learning-rate schedule.

    Attributes:
        weights_moved: whether the last optimizer step changed the weights.
        gradient_norm: norm of the gradients of the last optimizer step before they were clipped.
    """

    weights_moved = True
    gradient_norm: Tensor | None = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients and keep their norm; unlike Lightning, also of a fused optimizer."""
        # Lightning divides the gradients by the factor, except those of a fused optimizer.
        if self._scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._scaler.unscale_(optimizer)
        self.gradient_norm = clip_gradients(self, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/gradient_norm", self.gradient_norm, logger=False)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make an optimizer step, and set `weights_moved`."""
        scale = self._scaler.get_scale() if self._scaler else 1.0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # A scaler lowers its factor if and only if it skips the step.
        self.weights_moved = self._scaler is None or self._scaler.get_scale() >= scale
        if not self.weights_moved:
            rank_zero_info(
                f"step {self.trainer.global_step + 1}: the gradients are not finite at a loss "
                f"scale of {scale:g}: weights, momentum copy and learning rate do not change"
            )

    @override
    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        if self.weights_moved:
            super().lr_scheduler_step(scheduler, metric)

    @property
    def _scaler(self) -> GradScaler | None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None


def clip_gradients(module: nn.Module, limit: float | None, algorithm: str | None) -> Tensor:
    """Clip the gradients; return their total norm before.

    Args:
        module: the module whose gradients are clipped.
        limit: largest total norm, or largest absolute value of an entry; `None` or 0 leaves the
            gradients unchanged.
        algorithm: `gradient_clip_algorithm` of the Trainer: "value", or "norm" or `None` for the
            total norm.
    """
    by_value = algorithm == "value"
    max_norm = math.inf if by_value else limit or math.inf
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    if by_value and limit:
        nn.utils.clip_grad_value_(module.parameters(), limit)
    return full_tensor(norm)
