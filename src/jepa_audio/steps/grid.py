"""The shared data types: the grid of tokens, a subset of tokens, the masks of a batch, a batch.

In `steps`, a clip is one row of a batch: a crop during training, a window during inference.
Letters of shapes: B batch, C channels, S samples, F frequency rows, T time columns,
N = F * T tokens, K selected tokens, M target groups, L target tokens of a group, D width,
Q = B * masks per clip: the masks of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jepa_audio.errors import UserError


@dataclass(frozen=True)
class Grid:
    """The arrangement of the tokens of one clip: time columns × frequency rows.

    The rows are the frequency bands of a spectrogram. A raw waveform has one row, or one row for
    each channel if the channels have separate tokens.

    Tokens are in time-major order: token `i` is at time column `i // num_freq` and frequency row
    `i % num_freq`.
    """

    num_freq: int
    num_time: int

    def __post_init__(self) -> None:
        if self.num_freq < 1 or self.num_time < 1:
            raise UserError(f"a grid needs at least one row and one column, got {self}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens N of one clip."""
        return self.num_freq * self.num_time

    def coordinates(self, device: torch.device | None = None) -> Int[Tensor, "N 2"]:
        """The (time column, frequency row) of every token."""
        index = torch.arange(self.num_tokens, device=device)
        return torch.stack([index // self.num_freq, index % self.num_freq], dim=-1)


@dataclass(frozen=True)
class ColumnCount:
    """For padded clips, the number of time columns that do not depend on the padding.

    Attributes:
        first_end: number of samples that the first column depends on.
        stride: samples from one column to the next.
    """

    first_end: int
    stride: int

    def __call__(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The number for clips of `num_samples` before their padding.

        Raises:
            UserError: if a clip has no such column.
        """
        columns = (num_samples - self.first_end) // self.stride + 1
        if int(columns.min()) < 1:
            clip = f"a clip of {int(num_samples.min())} samples"
            raise UserError(f"{clip} is shorter than one token: raise `data.min_seconds`")
        return columns


@dataclass(frozen=True)
class TokenSet:
    """A subset of the tokens of each row of a batch.

    Attributes:
        index: indices of the tokens on the grid, `[..., K]`. Shorter rows are padded with other
            tokens of the clip, so that every index can be gathered.
        valid: `[..., K]`, False at the padding; `None` if no row is padded.
        num_valid: number of valid tokens of all rows, which is then known without waiting for a
            GPU; `None` if it was not counted.
    """

    index: Int[Tensor, "*rows K"]
    valid: Bool[Tensor, "*rows K"] | None = None
    num_valid: int | None = None

    @staticmethod
    def from_mask(mask: Bool[Tensor, "*rows N"], min_length: int = 0) -> TokenSet:
        """The tokens at which `mask` is True, in grid order, padded to the longest row.

        Rows are padded to `min_length` tokens, at most N, if this is more. The result is on the
        CPU, where masks are drawn.
        """
        from jepa_audio.steps import kernels  # noqa: PLC0415

        flat = np.ascontiguousarray(mask.cpu().numpy()).reshape(-1, mask.shape[-1])
        index, count = kernels.token_indices(flat, min_length)
        longest = index.shape[-1]
        valid = np.arange(longest) < count[:, None] if (count < longest).any() else None
        shape = (*mask.shape[:-1], longest)
        tokens, num_valid = torch.from_numpy(index).view(shape), int(count.sum())
        padding = None if valid is None else torch.from_numpy(valid).view(shape)
        return TokenSet(tokens, padding, num_valid)

    def pad_rows(self, multiple: int, num_tokens: int) -> TokenSet:
        """The set with rows of unequal length padded to a multiple of tokens, at most the grid."""
        length = min(-(-self.index.shape[-1] // multiple) * multiple, num_tokens)
        if self.valid is None or length == self.index.shape[-1]:
            return self
        return TokenSet.from_mask(self.to_mask(num_tokens), length)

    def to_mask(self, num_tokens: int) -> Bool[Tensor, "*rows N"]:
        """A mask that is True at the valid tokens of the set."""
        mask = self.valid_or_true.new_zeros(*self.index.shape[:-1], num_tokens)
        return mask.scatter(-1, self.index, self.valid_or_true)

    @property
    def valid_or_true(self) -> Bool[Tensor, "*rows K"]:
        """`valid`, or all True if it is `None`."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    @property
    def counts(self) -> Int[Tensor, "*rows"]:
        """Number of valid tokens of every row."""
        return self.valid_or_true.sum(dim=-1)

    def gather(self, tokens: Float[Tensor, "*rows N D"]) -> Float[Tensor, "*rows K D"]:
        """Select the tokens of the set; where `valid` is False, the result contains padding."""
        index = self.index[..., None].expand(*self.index.shape, tokens.shape[-1])
        return torch.gather(tokens, -2, index)

    def rows(self, rows: Tensor | slice) -> TokenSet:
        """The tokens of the selected rows of the batch."""
        return TokenSet(self.index[rows], None if self.valid is None else self.valid[rows])

    def to(self, device: torch.device) -> TokenSet:
        """Copy the set to a device."""
        valid = None if self.valid is None else self.valid.to(device, non_blocking=True)
        return TokenSet(self.index.to(device, non_blocking=True), valid, self.num_valid)

    def pin_memory(self) -> TokenSet:
        """Copy the set to pinned memory, from which a copy to a GPU does not block."""
        valid = None if self.valid is None else self.valid.pin_memory()
        return TokenSet(self.index.pin_memory(), valid, self.num_valid)


@dataclass(frozen=True)
class Masks:
    """The context and the target groups of a batch, of one or several masks of each clip.

    Attributes:
        context: the tokens that the context encoder sees, `[Q, K]`. The masks of clip b are the
            rows b * `per_clip` to (b + 1) * `per_clip` - 1.
        targets: the tokens to predict, `[Q, M, L]`; the predictor predicts each of the M groups
            separately.
        targets_per_clip: expected number of target tokens of one mask of a clip without padding,
            see `Masker.expected_targets`. The loss is the sum over all targets, divided by this
            number and by the number of masks Q. It is the same for all micro-batches and ranks of a
            step, so the average of their losses is exactly the loss of the global batch.
        present: all tokens of the grid, with `valid` False in the padding of shorter clips,
            `[B, N]`; `None` if all clips fill the grid.
        step: the optimizer step that the masks are drawn for; `None` if it is not known.
        per_clip: number of masks of each clip.
    """

    context: TokenSet
    targets: TokenSet
    targets_per_clip: float
    present: TokenSet | None = None
    step: int | None = None
    per_clip: int = 1

    @staticmethod
    def from_bool(
        context: Bool[Tensor, "B N"],
        targets: Bool[Tensor, "B M N"],
        targets_per_clip: float | None = None,
    ) -> Masks:
        """Masks from boolean masks that are True at context and target tokens.

        Without `targets_per_clip`, it is the mean number of targets of these rows.

        Raises:
            UserError: if the shapes are not [B, N] and [B, M, N]: M groups of targets of each row.
        """
        if context.ndim != 2 or targets.ndim != 3 or targets.shape[::2] != context.shape:
            raise UserError(
                f"a masker gave a context of shape {list(context.shape)} and targets of shape "
                f"{list(targets.shape)}; they must be [B, N] and [B, M, N], with M groups of "
                "targets of each row: for one group, use `targets[:, None]`"
            )
        if targets_per_clip is None:
            targets_per_clip = float(targets.sum()) / len(targets)
        return Masks(TokenSet.from_mask(context), TokenSet.from_mask(targets), targets_per_clip)

    @property
    def num_masks(self) -> int:
        """Number Q of masks of all clips."""
        return len(self.context.index)

    def repeat(self, clips: Float[Tensor, "B N D"]) -> Float[Tensor, "Q N D"]:
        """Repeat every clip for each of its masks."""
        return clips if self.per_clip == 1 else clips.repeat_interleave(self.per_clip, dim=0)

    def rows(self, rows: Tensor | slice) -> Masks:
        """All masks of the selected clips of the batch."""
        index = torch.arange(self.num_masks).view(-1, self.per_clip)[rows].flatten()
        present = None if self.present is None else self.present.rows(rows)
        context, targets = self.context.rows(index), self.targets.rows(index)
        return replace(self, context=context, targets=targets, present=present)

    def to(self, device: torch.device) -> Masks:
        """Copy the masks to a device."""
        return self._map(lambda tokens: tokens.to(device))

    def pin_memory(self) -> Masks:
        """Copy the masks to pinned memory; `DataLoader` calls this method."""
        return self._map(TokenSet.pin_memory)

    def _map(self, function: Callable[[TokenSet], TokenSet]) -> Masks:
        present = None if self.present is None else function(self.present)
        context, targets = function(self.context), function(self.targets)
        return replace(self, context=context, targets=targets, present=present)


class AudioBatch(NamedTuple):
    """A batch from the data loader.

    Attributes:
        waveform: float32, at the sample rate of the front end.
        row: index of every row in the order of the complete run, over all ranks and micro-batches:
            position of the sample * crops per clip + index of the crop. Masks depend on this
            index, and not on the process that trains on the row.
        num_samples: number of audio samples of every row before its padding; the model ignores the
            padding. `None` if no row is padded, or if the model treats padding as silence.
        masks: the masks of the rows, if they were drawn where the batch was loaded; `None` lets the
            model draw the same masks.
    """

    waveform: Float[Tensor, "B C S"]
    row: Int[Tensor, " B"]
    num_samples: Int[Tensor, " B"] | None = None
    masks: Masks | None = None

    def to(self, device: torch.device) -> AudioBatch:
        """Copy waveform and masks; `row` stays on the CPU, so that no read waits for the device."""
        masks = None if self.masks is None else self.masks.to(device)
        return self._replace(waveform=self.waveform.to(device, non_blocking=True), masks=masks)
