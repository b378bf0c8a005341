"""The momentum update of the target encoder, once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.training.schedules import Schedule
from jepa_audio.training.watching.loss_log import log_now


@runtime_checkable
class HasMomentumCopies(Protocol):
    """A module that contains modules and their momentum copies."""

    @property
    def online_modules(self) -> Mapping[str, nn.Module]:
        """The trained modules, by name."""

    @property
    def target_modules(self) -> Mapping[str, nn.Module]:
        """The momentum copies of `online_modules`, by the same names."""


class TargetEncoderEMA(Callback):
    """Move every momentum copy towards its module: target = m * target + (1 - m) * online.

    The copies are updated once after each *optimizer* step that changed the weights, independent
    of gradient accumulation.
    The momentum m is a function of `trainer.global_step` and `max_steps` alone. The callback
    therefore has no state, and a resumed run equals an uninterrupted run. Floating-point buffers
    are averaged like parameters; other buffers are copied.

    Args:
        momentum: m as a function of the optimizer step, within [0, 1].
    """

    def __init__(self, momentum: Schedule) -> None:
        self.momentum = momentum
        self._updated_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the current step: 0, or that of the checkpoint; log a momentum in shares."""
        self._updated_at = trainer.global_step
        if resolved := self.momentum.resolved(trainer.max_steps):
            rank_zero_info(f"momentum: {resolved}")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Update if this batch ended with an optimizer step that changed the weights."""
        if trainer.global_step == self._updated_at:
            return
        self._updated_at = trainer.global_step
        # A gradient scaler skips steps whose gradients are not finite.
        if not getattr(pl_module, "weights_moved", True):
            return
        momentum = self.momentum(trainer.global_step - 1, trainer.max_steps)
        self.update(cast(HasMomentumCopies, pl_module), momentum)
        trainer.callback_metrics["train/momentum"] = torch.tensor(momentum)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            log_now(trainer, {"train/momentum": momentum})

    @staticmethod
    @torch.no_grad()
    def update(module: HasMomentumCopies, momentum: float) -> None:
        """Update all momentum copies once.

        Raises:
            UserError: if `momentum` is not within [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise UserError(
                f"the momentum ({momentum}) must be within [0, 1]: "
                "correct the schedule `model.ema.momentum`"
            )
        targets: list[Tensor] = []
        onlines: list[Tensor] = []
        for target, online in tensor_pairs(module):
            if target.is_floating_point():
                targets.append(target)
                onlines.append(online.to(target.dtype))
            else:
                target.copy_(online)
        torch._foreach_lerp_(targets, onlines, 1.0 - momentum)


def tensor_pairs(module: HasMomentumCopies) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (target, online) for every parameter and every buffer of the momentum copies."""
    for name, target in module.target_modules.items():
        online = module.online_modules[name]
        yield from zip(target.parameters(), online.parameters(), strict=True)
        yield from zip(target.buffers(), online.buffers(), strict=True)
