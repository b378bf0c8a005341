"""The shared data types: the grid of tokens, a subset of tokens, the masks of a batch, a batch.

In `steps`, a clip is one row of a batch: a crop during training, a window during inference.
Letters of shapes: B batch, C channels, S samples, F frequency rows, T time columns,
N = F * T tokens, K selected tokens, M target groups, L target tokens of a group, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
class TokenSet:
    """A subset of the tokens of each row of a batch.

    Attributes:
        index: indices of the tokens on the grid, `[..., K]`. Shorter rows are padded with other
            tokens of the clip, so that every index can be gathered.
        valid: `[..., K]`, False at the padding; `None` if no row is padded.
    """

    index: Int[Tensor, "*rows K"]
    valid: Bool[Tensor, "*rows K"] | None = None

    @staticmethod
    def from_mask(mask: Bool[Tensor, "*rows N"]) -> TokenSet:
        """The tokens at which `mask` is True, in grid order, padded to the longest row."""
        count = mask.sum(dim=-1)
        longest = int(count.max())
        order = torch.argsort(mask.logical_not().to(torch.uint8), dim=-1, stable=True)
        index = order[..., :longest]
        if bool((count == longest).all()):
            return TokenSet(index)
        return TokenSet(index, torch.arange(longest, device=mask.device) < count[..., None])

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
        return TokenSet(self.index.to(device, non_blocking=True), valid)


@dataclass(frozen=True)
class Masks:
    """The context and the target groups of a batch.

    Attributes:
        context: the tokens that the context encoder sees, `[B, K]`.
        targets: the tokens to predict, `[B, M, L]`; the predictor predicts each of the M groups
            separately.
        targets_per_clip: mean number of target tokens per clip, over all rows whose masks are drawn
            together. The loss is divided by this number. The average of the losses of all
            micro-batches and ranks is then the mean over all target tokens of these rows. With
            padding, the number is the mean over the rows of this process, because the process does
            not know the padding of the other rows.
        present: all tokens of the grid, with `valid` False in the padding of shorter clips,
            `[B, N]`; `None` if all clips fill the grid.
    """

    context: TokenSet
    targets: TokenSet
    targets_per_clip: float
    present: TokenSet | None = None

    @staticmethod
    def from_bool(context: Bool[Tensor, "B N"], targets: Bool[Tensor, "B M N"]) -> Masks:
        """Masks from boolean masks that are True at context and target tokens."""
        per_clip = float(targets.sum()) / len(targets)
        return Masks(TokenSet.from_mask(context), TokenSet.from_mask(targets), per_clip)

    def rows(self, rows: Tensor | slice) -> Masks:
        """The masks of the selected rows of the batch."""
        present = None if self.present is None else self.present.rows(rows)
        context, targets = self.context.rows(rows), self.targets.rows(rows)
        return Masks(context, targets, self.targets_per_clip, present)

    def to(self, device: torch.device) -> Masks:
        """Copy the masks to a device."""
        present = None if self.present is None else self.present.to(device)
        context, targets = self.context.to(device), self.targets.to(device)
        return Masks(context, targets, self.targets_per_clip, present)


class AudioBatch(NamedTuple):
    """A batch from the data loader.

    Attributes:
        waveform: float32, at the sample rate of the front end.
        row: index of every row in the order of the complete run, over all ranks and micro-batches:
            position of the sample * crops per clip + index of the crop. Masks depend on this
            index, and not on the process that trains on the row.
        num_samples: number of audio samples of every row before its padding; the model ignores the
            padding. `None` if no row is padded, or if the model treats padding as silence.
    """

    waveform: Float[Tensor, "B C S"]
    row: Int[Tensor, " B"]
    num_samples: Int[Tensor, " B"] | None = None

    def to(self, device: torch.device) -> AudioBatch:
        """Copy the waveform; `row` stays on the CPU, so that no read waits for the device."""
        return self._replace(waveform=self.waveform.to(device, non_blocking=True))
