"""A loss that is not finite ends the run before the weights are saved, and says how to have it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch

MAX_FILES = 5  # that a message names
_LOOK_AT_LEAST = 1000  # steps, where nothing is logged


class NonFiniteError(UserError):
    """A loss, or the weights, are no longer numbers; the message says of which step and how to have it again."""


class _MicroBatch(NamedTuple):
    step: int
    rows: list[int]
    loss: float


class FiniteGuard(Callback):
    """Stops a run whose loss or weights are not finite, before they are saved.

    Losses stay on the device; they are looked at together whenever logging is due
    (`trainer.log_every_n_steps`), at the end of the run, and before every save, then beside all
    parameters. All processes stop together.

    It wants to be the first callback: then it looks before others use what is not finite.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._trained_on: list[tuple[int, Tensor]] = []  # optimizer step and rows, of every loss
        self._running_step = 0
        self._saved_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run stands: 0, or the step of the checkpoint."""
        self._forget()
        self._saved_at = trainer.global_step or None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Remember which optimizer step the batch belongs to."""
        self._running_step = trainer.global_step + 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Keep the loss; look at the losses kept if logging is due."""
        self._losses.append(outputs["loss"].detach())
        self._trained_on.append((self._running_step, batch.row))
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._running_step and step % (every or _LOOK_AT_LEAST) == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Whoever saves, and whenever: only what is finite."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._look(trainer, pl_module)
            self._saved_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that saves nothing at its end is looked at too."""
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: nn.Module | None = None) -> None:
        finite = module is None or all_finite(module)
        first = self._first_bad()
        if trainer.strategy.reduce_boolean_decision(first is not None or not finite, all=False):
            raise NonFiniteError(self._sentence(trainer, first))
        self._forget()

    def _forget(self) -> None:
        self._losses, self._trained_on = [], []

    def _first_bad(self) -> _MicroBatch | None:
        if not self._losses:
            return None
        losses = torch.stack(self._losses).tolist()  # the one wait for the device
        for loss, (step, rows) in zip(losses, self._trained_on, strict=True):
            if not -float("inf") < loss < float("inf"):
                return _MicroBatch(step, rows.tolist(), loss)
        return None

    def _sentence(self, trainer: Trainer, own: _MicroBatch | None) -> str:
        found = [bad for bad in _of_all_processes(own) if bad is not None]
        if found:
            step, rows, loss = min(found)
            what = (
                f"the loss of rows {_ranges(rows)} of the run{_files(trainer, rows)} in optimizer step {step} is {loss}"
                "; if those rows are sound, the gradient of the step before was not finite"
            )
        else:
            what = f"the weights are not finite after optimizer step {trainer.global_step}, although every loss was"
        if self._saved_at is None:
            again = "Nothing has been saved yet; the same command trains on exactly the same samples and masks again"
        else:
            again = (
                f"Nothing since step {self._saved_at} was saved; the same command with `--ckpt_path last` goes on from "
                "there with exactly the same samples and masks"
            )
        return (
            f"{what}. {again}. Remedies: a lower `--model.optimizer.lr` or a longer warm-up, "
            "`--trainer.gradient_clip_val 1.0`, `--trainer.precision 32-true` or bf16-mixed instead of 16-mixed"
        )


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter of a module is finite; of a sharded module, what this process holds of it."""
    own = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    finite = [parameter.isfinite().all() for parameter in own]
    return not finite or bool(torch.stack(finite).all())


def _of_all_processes(own: _MicroBatch | None) -> Sequence[_MicroBatch | None]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    everyones: list[_MicroBatch | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones


def _ranges(rows: list[int]) -> str:
    whole = rows == list(range(rows[0], rows[0] + len(rows)))
    return f"{rows[0]} to {rows[-1]}" if whole and len(rows) > 1 else ", ".join(map(str, rows))


def _files(trainer: Trainer, rows: list[int]) -> str:
    find_row_files = getattr(trainer.datamodule, "find_row_files", None)  # type: ignore[attr-defined]
    if find_row_files is None:
        return ""
    files = list(dict.fromkeys(find_row_files(rows)))
    more = f" and {len(files) - MAX_FILES} more" if len(files) > MAX_FILES else ""
    return f" ({', '.join(files[:MAX_FILES])}{more})"
