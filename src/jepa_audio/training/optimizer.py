"""Parameter groups, learning-rate schedule and gradient clipping."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
    last = max_steps - 1
    scheduler = LambdaLR(optimizer, lambda step: schedule(min(step, last), max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def clip_gradients(module: nn.Module, max_norm: float | None, algorithm: str | None) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm`; return the norm before scaling.

    Args:
        module: the module whose gradients are scaled.
        max_norm: `None` leaves the gradients unchanged.
        algorithm: `gradient_clip_algorithm` of the Trainer; only "norm" or `None` is supported.

    Raises:
        UserError: if `algorithm` is not supported.
    """
    if algorithm not in (None, "norm"):
        raise UserError(f"`trainer.gradient_clip_algorithm` ({algorithm!r}) must be 'norm'")
    return full_tensor(nn.utils.clip_grad_norm_(module.parameters(), max_norm or float("inf")))
