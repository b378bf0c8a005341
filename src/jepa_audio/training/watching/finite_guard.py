"""Stop a run whose loss or weights are not finite, before a checkpoint is saved."""

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

# Largest number of files in a message.
MAX_FILES = 5
# Optimizer steps between two checks if the run logs nothing (`log_every_n_steps` is 0).
_UNLOGGED_CHECK_STEPS = 1000


class NonFiniteError(UserError):
    """A loss or a weight is not finite; the message names the step and how to reproduce it."""


@runtime_checkable
class FindsRowFiles(Protocol):
    """A data module that can name the audio files of the rows of training batches."""

    def find_row_files(self, rows: Sequence[int]) -> list[str]:
        """The audio files of the given rows; row numbers are those of `AudioBatch.row`."""


class _MicroBatch(NamedTuple):
    step: int
    rows: list[int]
    loss: float


class FiniteGuard(Callback):
    """Stop a run whose loss or weights are not finite, before a checkpoint is saved.

    Losses stay on the device until the next check. They are checked every
    `trainer.log_every_n_steps` steps, before every save and at the end of the run. The checks
    before a save and at the end include all parameters. All processes stop together.

    This callback must be the first one, because other callbacks must not use values that are not
    finite.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        # Optimizer step and rows of every loss.
        self._steps_and_rows: list[tuple[int, Tensor]] = []
        self._current_step = 0
        self._saved_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete the stored losses, and store the step of the checkpoint if the run is resumed."""
        self._clear()
        self._saved_at = trainer.global_step or None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Store the number of the optimizer step that the batch is part of."""
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
        """Check before every save, independent of the callback that saves."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer, pl_module)
            self._saved_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check at the end, because a run may end without a save."""
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
            problem = (
                f"the loss is {loss} in optimizer step {step}, "
                f"rows {_row_numbers(rows)}{_file_names(trainer, rows)}. "
                "If the audio of these rows is valid, the gradient of the previous step was not "
                "finite"
            )
        else:
            problem = (
                f"the weights are not finite after optimizer step {trainer.global_step}, "
                "but all losses are finite"
            )
        if self._saved_at is None:
            saved, command = "No checkpoint has been saved", "the same command"
        else:
            saved = f"The last checkpoint is of step {self._saved_at}"
            command = "the same command with `--ckpt_path last`"
        return (
            f"{problem}. {saved}; {command} repeats exactly the same samples and masks. "
            "Remedies: a lower `--model.optimizer.lr` or a longer warm-up, "
            "`--trainer.gradient_clip_val 1.0`, "
            "`--trainer.precision 32-true` or bf16-mixed instead of 16-mixed"
        )


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether all parameters are finite; of sharded parameters, only the shards of this process."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    finite = [parameter.isfinite().all() for parameter in local]
    return not finite or bool(torch.stack(finite).all())


def _gather(batch: _MicroBatch | None) -> Sequence[_MicroBatch | None]:
    """The micro-batch of every process, or `None` for a process without one."""
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
