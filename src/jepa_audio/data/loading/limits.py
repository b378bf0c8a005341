"""Trainer settings that limit the batches of a loader: `overfit_batches`, `limit_*_batches`."""

from __future__ import annotations

import logging
import math

from lightning.pytorch import Trainer

from jepa_audio.data.loading.order import GlobalOrderSampler
from jepa_audio.errors import UserError

log = logging.getLogger(__name__)


def limit_order(order: GlobalOrderSampler, trainer: Trainer | None) -> int:
    """Repeat the first batches if `trainer.overfit_batches` is set.

    Returns:
        The micro-batches of an epoch on each process: those of `max_steps` optimizer steps, or
        about one pass over the files without `max_steps` and with `overfit_batches`.

    Raises:
        UserError: see `_count_repeated_batches`.
    """
    order.num_repeated = _count_repeated_batches(trainer, order.batches_per_pass)
    if order.num_repeated:
        return order.batches_per_pass
    if trainer and trainer.max_steps > 0:
        return trainer.max_steps * order.accumulated
    return math.ceil(order.batches_per_pass / order.accumulated) * order.accumulated


def _count_repeated_batches(trainer: Trainer | None, batches_per_pass: int) -> int | None:
    """Micro-batches of each process that `trainer.overfit_batches` repeats; `None` for none.

    A fraction is a share of one pass over the files, and there are at most as many as in a pass.

    Raises:
        UserError: if this is no multiple of the micro-batches of an optimizer step above 0.
    """
    overfit = trainer.overfit_batches if trainer else 0  # type: ignore[attr-defined]
    if not (trainer and overfit):
        return None
    is_fraction = isinstance(overfit, float)
    number = int(overfit * batches_per_pass) if is_fraction else min(overfit, batches_per_pass)
    accumulated = trainer.accumulate_grad_batches
    one_pass = f"one pass over the files has {batches_per_pass} micro-batches on each process"
    if number < 1 or number % accumulated:
        raise UserError(
            f"`trainer.overfit_batches` ({overfit}) gives {number} micro-batches, which must be a "
            f"multiple of `trainer.accumulate_grad_batches` ({accumulated}) above 0; {one_pass}"
        )
    if not is_fraction and number < overfit:
        log.warning("`trainer.overfit_batches` (%d): %s", overfit, one_pass)
    return number


def check_evaluation_limit(trainer: Trainer | None, part: str, num_batches: int) -> None:
    """Refuse a fraction of the validation or test batches that is less than one batch.

    Args:
        trainer: the trainer.
        part: "valid" or "test".
        num_batches: batches of this process.

    Raises:
        UserError: if nothing would remain.
    """
    name = "limit_val_batches" if part == "valid" else "limit_test_batches"
    limit = getattr(trainer, name, 1.0)
    if isinstance(limit, float) and limit > 0 and int(limit * num_batches) < 1:
        raise UserError(
            f"`trainer.{name}` ({limit}) of {num_batches} batches is less than one batch: give a "
            "number of batches"
        )
