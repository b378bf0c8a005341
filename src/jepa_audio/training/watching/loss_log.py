"""Losses in the logs: means over all target tokens, micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class LossLog(Callback):
    """Log `train/loss`, `valid/loss` and `test/loss`, and the regularizers by their names.

    Each loss is a sum of distances divided by the number of target tokens. The sums and numbers of
    all micro-batches and processes are added before the division, so that a loss does not depend
    on how a batch is divided.

    `train/loss` is the loss of all micro-batches of one optimizer step. It is logged every
    `trainer.log_every_n_steps` steps, and in steps that `CollapseMonitor` measures. In the latter,
    `train/loss_mean_target` and `train/loss_nearest_context` are logged with it: the losses of the
    simple predictors (see `simple_predictors`) on the same batches.

    A regularizer is logged as the mean over micro-batches and processes, without its weight. The
    norm of the gradients and the learning rates of a step are logged with its loss. The step of all
    of them, and of the losses of an evaluation, is the number of optimizer steps so far.

    Args:
        regularizers: names of the regularizers in the sums of each batch.
    """

    def __init__(self, regularizers: Sequence[str] = ()) -> None:
        self.regularizers = tuple(regularizers)
        self._step, self._is_first = 0, True
        # Of each micro-batch of a step: sums of the distances, number of target tokens.
        self._trained: list[dict[str, Tensor]] = []
        self._learning_rates: dict[str, float] = {}
        self._evaluated: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier batches; the progress bar shows the loss from the first step on."""
        self._step, self._trained, self._is_first = trainer.global_step, [], True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the learning rates: at the end of a batch, they are those of the next step."""
        self._learning_rates = learning_rates(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss if this batch ended with an optimizer step and logging is due."""
        self._trained.append(outputs["sums"])
        if trainer.global_step == self._step:
            return
        sums, self._trained = self._trained, []
        self._step, is_first, self._is_first = trainer.global_step, self._is_first, False
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_logged = (every > 0 and self._step % every == 0) or "loss_mean_target" in sums[0]
        if not (is_logged or is_first):
            return
        losses = {
            f"train/{name}": loss
            for name, loss in mean_losses(trainer, sums, self.regularizers).items()
        }
        if is_logged and trainer.loggers:
            norm = getattr(pl_module, "gradient_norm", None)
            others = {} if norm is None else {"train/gradient_norm": float(norm)}
            log_now(trainer, losses | others | self._learning_rates)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in losses.items()})
        # Lightning would copy a number to the device, and read it there again in every step.
        shown = torch.tensor(losses["train/loss"])
        pl_module.log("train/loss", shown, prog_bar=True, logger=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batches of an earlier evaluation."""
        self._evaluated = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the sums of a batch, unless it is a repetition."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, Sequence) else loaders
        if batch_idx < getattr(loader, "num_own_batches", math.inf):
            self._evaluated.append(outputs["sums"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the loss of the evaluation."""
        stage = "test" if trainer.testing else "valid"
        losses = mean_losses(trainer, self._evaluated, self.regularizers)
        # `Trainer.validate` and `test` return what Lightning logs.
        is_training = trainer.state.fn == TrainerFn.FITTING
        for name, loss in losses.items():
            shown = name == "loss"
            pl_module.log(f"{stage}/{name}", loss, prog_bar=shown, logger=not is_training)
        if is_training and not trainer.sanity_checking:
            log_now(trainer, {f"{stage}/{name}": loss for name, loss in losses.items()})

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def log_now(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log metrics with the number of optimizer steps so far; Lightning's own step is one less."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """The learning rate of every group of parameters, with the names of `LearningRateMonitor`."""
    rates: dict[str, float] = {}
    for optimizer in trainer.optimizers:
        name, groups = f"lr-{type(optimizer).__name__}", optimizer.param_groups
        for number, group in enumerate(groups, start=1):
            rates[f"{name}/pg{number}" if len(groups) > 1 else name] = group["lr"]
    return rates


def mean_losses(
    trainer: Trainer, sums: Sequence[dict[str, Tensor]], per_batch: Sequence[str] = ()
) -> dict[str, float]:
    """The mean losses of some batches, over all processes, which must all call this function.

    Args:
        trainer: the trainer whose processes add their sums, in a single all-reduce.
        sums: of each batch of this process, the sums of distances, "num_targets" and the values of
            `per_batch`. A process without a batch gives an empty list; the sums of the other
            processes must then have no other names, and this order.
        per_batch: values of a batch that are averaged over batches, not over target tokens.
    """
    names = list(sums[0]) if sums else ["loss", "num_targets", *per_batch]
    total = torch.zeros(len(names), dtype=torch.float64)
    if sums:  # one copy from the device for each name, not for each micro-batch
        copies = [torch.stack([batch[name].detach() for batch in sums]).cpu() for name in names]
        total = torch.stack([copy.double().sum() for copy in copies])
    total = torch.cat([total, torch.tensor([len(sums)], dtype=torch.float64)])
    if trainer.world_size > 1:
        total = trainer.strategy.reduce(total.to(trainer.strategy.root_device), reduce_op="sum")
    *totals, num_batches = total.tolist()
    values = dict(zip(names, totals, strict=True))
    num_targets = values.pop("num_targets")
    counts = {name: num_batches if name in per_batch else num_targets for name in values}
    return {name: value / n if (n := counts[name]) else math.nan for name, value in values.items()}
