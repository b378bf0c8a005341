"""Ends a run whose loss or weights are not finite, before they are saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch

# Files that a message names at most.
MAX_FILES = 5
# Optimizer steps between two checks of a run that logs nothing.
_UNLOGGED_CHECK_STEPS = 1000


class NonFiniteError(UserError):
    """A loss or a weight is not finite; the message names the step and how to reproduce it."""


@runtime_checkable
class FindsRowFiles(Protocol):
    """A data module that knows from which files it made the rows of training batches."""

    def find_row_files(self, rows: Sequence[int]) -> list[str]:
        """The files of some rows, numbered as in `AudioBatch.row`."""


class _MicroBatch(NamedTuple):
    step: int
    rows: list[int]
    loss: float


class FiniteGuard(Callback):
    """Ends a run whose loss or weights are not finite, before they are saved.

    Losses stay on the device. They are checked together whenever logging is due
    (`trainer.log_every_n_steps`), at the end of the run and before every save; the last two checks
    include all parameters. All processes stop together.

    It must be the first callback, to run before other callbacks use values that are not finite.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        # Optimizer step and rows of every loss.
        self._steps_and_rows: list[tuple[int, Tensor]] = []
        self._current_step = 0
        self._saved_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the current step: 0, or the step of the checkpoint."""
        self._clear()
        self._saved_at = trainer.global_step or None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Store the optimizer step to which the batch belongs."""
        self._current_step = trainer.global_step + 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Store the loss; check the stored losses if logging is due."""
        self._losses.append(outputs["loss"].detach())
        self._steps_and_rows.append((self._current_step, batch.row))
        every = trainer.log_every_n_steps or _UNLOGGED_CHECK_STEPS  # type: ignore[attr-defined]
        if trainer.global_step == self._current_step and trainer.global_step % every == 0:
            self._check(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check before every save, by whichever callback."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer, pl_module)
            self._saved_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check also a run that saves nothing at its end."""
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, module: nn.Module | None = None) -> None:
        finite_weights = module is None or all_finite(module)
        first = self._first_non_finite()
        stop = first is not None or not finite_weights
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            raise NonFiniteError(self._message(trainer, first))
        self._clear()

    def _clear(self) -> None:
        self._losses, self._steps_and_rows = [], []

    def _first_non_finite(self) -> _MicroBatch | None:
        if not self._losses:
            return None
        # The only synchronisation with the device.
        losses = torch.stack(self._losses).tolist()
        for loss, (step, rows) in zip(losses, self._steps_and_rows, strict=True):
            if not math.isfinite(loss):
                return _MicroBatch(step, rows.tolist(), loss)
        return None

    def _message(self, trainer: Trainer, first: _MicroBatch | None) -> str:
        batches = [batch for batch in _gather(first) if batch is not None]
        if batches:
            step, rows, loss = min(batches)
            what = (
                f"the loss of rows {_row_numbers(rows)} of the run{_file_names(trainer, rows)} "
                f"in optimizer step {step} is {loss}; if those files are intact, "
                "the gradient of the previous step was not finite"
            )
        else:
            what = (
                f"the weights are not finite after optimizer step {trainer.global_step}, "
                "although every loss is"
            )
        if self._saved_at is None:
            again = "Nothing has been saved yet; the same command trains again"
        else:
            again = (
                f"Nothing since step {self._saved_at} was saved; the same command with "
                "`--ckpt_path last` resumes from there"
            )
        return (
            f"{what}. {again} on exactly the same samples and masks. "
            "Remedies: a lower `--model.optimizer.lr` or a longer warm-up, "
            "`--trainer.gradient_clip_val 1.0`, "
            "`--trainer.precision 32-true` or bf16-mixed instead of 16-mixed"
        )


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter is finite; of a sharded module, the shards of this process."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    finite = [parameter.isfinite().all() for parameter in local]
    return not finite or bool(torch.stack(finite).all())


def _gather(batch: _MicroBatch | None) -> Sequence[_MicroBatch | None]:
    """The micro-batches of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [batch]
    batches: list[_MicroBatch | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(batches, batch)
    return batches


def _row_numbers(rows: list[int]) -> str:
    consecutive = rows == list(range(rows[0], rows[0] + len(rows)))
    if consecutive and len(rows) > 1:
        return f"{rows[0]} to {rows[-1]}"
    return ", ".join(map(str, rows))


def _file_names(trainer: Trainer, rows: list[int]) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, FindsRowFiles):
        return ""
    files = list(dict.fromkeys(data.find_row_files(rows)))
    more = f" and {len(files) - MAX_FILES} more" if len(files) > MAX_FILES else ""
    return f" ({', '.join(files[:MAX_FILES])}{more})"
