"""A module that records which samples it received, for tests of resumed runs."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from jepa_audio.steps.grid import AudioBatch


class Recorder(pl.LightningModule):
    """Records the row and the first sample of each crop, in buffers of its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long))
        self.register_buffer("values", torch.zeros(0))
        self.rows_at_steps: list[int] = []

    def training_step(self, batch: AudioBatch, batch_idx: int) -> torch.Tensor:
        self.rows = torch.cat([self.rows, batch.row])
        self.values = torch.cat([self.values, batch.waveform[:, 0, 0]])
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rows_at_steps.append(len(self.rows))

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        self.log("valid/rows", float(len(batch.row)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.rows = torch.zeros_like(state_dict["rows"])
        self.values = torch.zeros_like(state_dict["values"])
        return super().load_state_dict(state_dict, strict, assign)


def make_trainer(max_steps: int, validate_every: int | None, *callbacks: Callback) -> pl.Trainer:
    """A Trainer with two micro-batches per optimizer step."""
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=validate_every,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
