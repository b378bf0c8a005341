"""Draw the masks of batches, in the processes that load them or in the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import derive_seed

# A redrawn row has other random numbers: this is added to its index.
_REDRAWN = 1 << 62
# Samples of clips before their padding → number of columns that do not depend on the padding.
Columns = Callable[[Int[Tensor, " B"]], Int[Tensor, " B"]]


class MaskStream(IntEnum):
    """What masks are drawn for; each purpose has its own random numbers."""

    TRAINING = 0
    EVALUATION = 1


@runtime_checkable
class HasGrid(Protocol):
    """The part of a front end that masks depend on."""

    def grid(self, num_samples: int) -> Grid:
        """The grid of a clip."""


class HasMasker(ABC):
    """A model whose masks the processes that load its batches can draw.

    It is no protocol: from Python 3.12 on, a protocol does not find the modules of a module.

    Attributes:
        masker: draws the masks.
        masks_per_clip: number of masks of each clip.
        seed: seed of the model.
        front_end: the front end, of which masks need the grid.
        row_multiple: rows of unequal length are padded to a multiple of so many tokens.
    """

    masker: Masker
    masks_per_clip: int
    seed: int
    front_end: HasGrid
    row_multiple: int = 1

    @abstractmethod
    def columns(self, num_samples: int) -> Columns:
        """The columns that do not depend on the padding of clips of `num_samples` with padding."""

    @abstractmethod
    def mask_step(self) -> int:
        """The optimizer step that masks are drawn for now."""


@dataclass(frozen=True)
class MaskSource:
    """Draws masks of batches; small and without tensors, for other processes.

    Attributes:
        masker: the masker of the model.
        grid: the grid of a clip with its padding.
        columns: the columns of shorter clips that do not depend on the padding; `None` if the
            model treats padding as silence.
        seed: seed of the model.
        stream: what the masks are drawn for.
        masks_per_clip: number of masks of each clip.
        row_multiple: rows of unequal length are padded to a multiple of so many tokens, so that
            there are few lengths; the masks do not change.
    """

    masker: Masker
    grid: Grid
    columns: Columns | None = None
    seed: int = 0
    stream: MaskStream = MaskStream.TRAINING
    masks_per_clip: int = 1
    row_multiple: int = 1

    @staticmethod
    def of(
        model: HasMasker, num_samples: int, stream: MaskStream, has_padding: bool = False
    ) -> MaskSource:
        """The masks of a model for clips of `num_samples`, with or without padding.

        Raises:
            UserError: if the clips are too short, or their padding cannot be hidden.
        """
        grid = model.front_end.grid(num_samples)
        columns = model.columns(num_samples) if has_padding else None
        per_clip, multiple = model.masks_per_clip, model.row_multiple
        return MaskSource(model.masker, grid, columns, model.seed, stream, per_clip, multiple)

    def draw(
        self, rows: Int[Tensor, " B"], step: int, num_samples: Int[Tensor, " B"] | None = None
    ) -> Masks:
        """Draw the masks of a batch; those of a clip at row r are R draws of the masker.

        The masker draws the rows r * R to r * R + R - 1 for it, with R = `masks_per_clip`.
        For an evaluation, `step` determines the curriculum and no random number, so that masks
        differ from one evaluation to the next only by the curriculum. What the rows of a step
        share, the rows of an evaluation batch share.

        Args:
            rows: indices in the order of the run, see `AudioBatch.row`.
            step: the optimizer step.
            num_samples: samples of each clip before its padding. Tokens in the padding are neither
                context nor target. If a clip loses all context tokens or all tokens of a target
                group, its masks are drawn again for its shorter grid.

        Raises:
            UserError: if a clip is too short to be masked.
        """
        masker, draw_step = self.masker, step
        if self.stream == MaskStream.EVALUATION:
            masker, draw_step = masker.at(step), int(rows[0])
        seed = derive_seed(self.seed, self.stream)
        per_clip = self.masks_per_clip
        rows = (rows[:, None] * per_clip + torch.arange(per_clip)).flatten()
        masks = masker(self.grid, rows, seed, draw_step)
        if self.columns is not None and num_samples is not None:
            num_time = self.columns(num_samples)
            if bool((num_time < self.grid.num_time).any()):
                masks = self._without_padding(masks, masker, rows, num_time, seed, draw_step)
        context, targets = (
            part.pad_rows(self.row_multiple, self.grid.num_tokens)
            for part in (masks.context, masks.targets)
        )
        return replace(masks, context=context, targets=targets, step=step, per_clip=per_clip)

    def _without_padding(
        self,
        masks: Masks,
        masker: Masker,
        rows: Int[Tensor, " Q"],
        num_time: Int[Tensor, " B"],
        seed: int,
        step: int,
    ) -> Masks:
        grid, index = self.grid, torch.arange(self.grid.num_tokens)
        present = index // grid.num_freq < num_time[:, None]  # [B, N]
        visible = present.repeat_interleave(self.masks_per_clip, dim=0)  # [Q, N]
        context = masks.context.to_mask(grid.num_tokens) & visible
        targets = masks.targets.to_mask(grid.num_tokens) & visible[:, None]
        is_empty = ~(context.any(-1) & targets.any(-1).all(-1))
        for mask in is_empty.nonzero()[:, 0].tolist():
            short_grid = Grid(grid.num_freq, int(num_time[mask // self.masks_per_clip]))
            num_tokens = short_grid.num_tokens
            try:
                redrawn = masker(short_grid, rows[mask : mask + 1] + _REDRAWN, seed, step)
            except UserError as error:
                raise UserError(
                    f"a clip of {short_grid.num_time} time columns is too short to be masked, "
                    f"raise `data.min_seconds`: {error}"
                ) from error
            context[mask, :num_tokens] = redrawn.context.to_mask(num_tokens)[0]
            targets[mask, :, :num_tokens] = redrawn.targets.to_mask(num_tokens)[0]
        part = Masks.from_bool(context, targets, masks.targets_per_clip)
        everywhere = index.expand(len(present), -1)
        return replace(part, present=TokenSet(everywhere, present, int(present.sum())))
