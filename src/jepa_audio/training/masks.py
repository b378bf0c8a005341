"""The masks of training and evaluation batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.front_ends.alignment import AlignedColumns
from jepa_audio.steps.grid import AudioBatch, ColumnCount, Masks
from jepa_audio.steps.masking.source import HasMasker, MaskSource, MaskStream

# Attention with a key mask needs rows of a multiple of 8 tokens; torch copies other masks.
_GPU_MULTIPLE = 8


class MaskingModule(LightningModule, HasMasker):
    """A module whose batches usually have masks; if a batch has none, it draws the same masks.

    The processes that load the batches draw the masks, see `MaskSource`.
    """

    front_end: FrontEnd
    fixed_front_end: FrontEnd | None
    _loaded_step = 0

    @override
    def mask_step(self) -> int:
        """The optimizer step that masks are drawn for; without `fit`, that of the checkpoint."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            return self.trainer.global_step
        return max(self.trainer.global_step, self._loaded_step)

    @override
    def columns(self, num_samples: int) -> ColumnCount | AlignedColumns:
        if self.fixed_front_end is None:
            return self.front_end.columns
        return AlignedColumns.of(self.fixed_front_end, self.front_end, num_samples)

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        """On a GPU, masked attention is faster if the rows have few and even lengths."""
        device = self._trainer.strategy.root_device.type if self._trainer else "cpu"
        return _GPU_MULTIPLE if device == "cuda" else 1

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A checkpoint of `jepa-audio import` has no step.
        self._loaded_step = checkpoint.get("global_step", 0)

    def draw_masks(
        self, batch: AudioBatch, step: int = 0, stream: MaskStream = MaskStream.TRAINING
    ) -> Masks:
        """Draw the masks of a batch for an optimizer step, on the device of the batch."""
        has_padding = batch.num_samples is not None
        source = MaskSource.of(self, batch.waveform.shape[-1], stream, has_padding)
        return source.draw(batch.row, step, batch.num_samples).to(batch.waveform.device)

    def masks_of(self, batch: AudioBatch, stream: MaskStream = MaskStream.TRAINING) -> Masks:
        """The masks that a batch has; they are drawn here if it has none for the current step.

        The step can differ after an epoch that ended within an optimizer step, for example with
        `trainer.limit_train_batches`.
        """
        step = self.mask_step()
        if batch.masks is not None and batch.masks.step in (step, None):
            return batch.masks
        return self.draw_masks(batch, step, stream)
