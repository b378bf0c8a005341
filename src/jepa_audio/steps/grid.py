"""The words every room shares: the grid of tokens, a choice of tokens, the masks of a batch.

Letters of shapes, here and everywhere: B batch, C channels, S samples, F frequency rows, T time
columns, N = F * T tokens, K tokens kept, M target groups, D dimensions.
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
    """The plane on which the tokens of one clip lie.

    Its rows are the frequency bands of a spectrogram. A raw waveform is a grid with one row, or
    with one for each channel, where the channels have tokens of their own.

    Tokens are counted time-major: token `i` lies at time column `i // num_freq`, frequency row `i %
    num_freq`.
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
        """(time column, frequency row) of every token."""
        index = torch.arange(self.num_tokens, device=device)
        return torch.stack([index // self.num_freq, index % self.num_freq], dim=-1)


@dataclass(frozen=True)
class TokenSet:
    """Some of the tokens of each row: the one way in which that is said.

    Attributes:
        index: positions on the grid, `[..., K]`. A row shorter than the longest is filled up with
            other tokens of the clip, so that every index can be gathered.
        valid: `[..., K]`, False at such filling; `None` when every row is full.
    """

    index: Int[Tensor, "*rows K"]
    valid: Bool[Tensor, "*rows K"] | None = None

    @staticmethod
    def from_mask(mask: Bool[Tensor, "*rows N"]) -> TokenSet:
        """The tokens at which `mask` is True, in grid order, padded to the longest row."""
        count = mask.sum(dim=-1)
        longest = int(count.max())
        index = torch.argsort(mask.logical_not().to(torch.uint8), dim=-1, stable=True)[
            ..., :longest
        ]
        if bool((count == longest).all()):
            return TokenSet(index)
        return TokenSet(index, torch.arange(longest, device=mask.device) < count[..., None])

    def to_mask(self, num_tokens: int) -> Bool[Tensor, "*rows N"]:
        """True at the tokens of the set."""
        mask = torch.zeros(
            *self.index.shape[:-1], num_tokens, dtype=torch.bool, device=self.index.device
        )
        return mask.scatter(
            -1,
            self.index,
            torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid,
        )

    @property
    def counts(self) -> Int[Tensor, "*rows"]:
        """Number of valid tokens in every row."""
        if self.valid is not None:
            return self.valid.sum(dim=-1)
        return torch.full(self.index.shape[:-1], self.index.shape[-1], device=self.index.device)

    def gather(self, tokens: Float[Tensor, "*rows N D"]) -> Float[Tensor, "*rows K D"]:
        """The tokens of the set; filling is gathered too and has to be masked by `valid`."""
        return torch.gather(
            tokens, -2, self.index[..., None].expand(*self.index.shape, tokens.shape[-1])
        )

    def rows(self, rows: Tensor | slice) -> TokenSet:
        """The same set for some rows of the batch."""
        return TokenSet(self.index[rows], None if self.valid is None else self.valid[rows])

    def to(self, device: torch.device) -> TokenSet:
        """The same set on another device."""
        return TokenSet(
            self.index.to(device, non_blocking=True),
            None if self.valid is None else self.valid.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Masks:
    """What a masker draws for a batch: who is seen, and what has to be predicted.

    Attributes:
        context: the tokens that the context encoder sees, `[B, K]`.
        targets: the tokens to predict, in M groups that the predictor handles each on its own, `[B,
            M, K']`.
        targets_per_clip: mean number of target tokens of a clip in the draw that these rows come
            from. The loss of some rows of a draw divides by it, so that micro-batches and ranks add
            up to the whole draw's mean. Of clips with padding it is the mean of these rows alone:
            what others lose to theirs is not known here.
        present: all tokens of the grid, those in the padding of a shorter clip as filling, `[B,
            N]`; `None` if the clips fill the grid.
    """

    context: TokenSet
    targets: TokenSet
    targets_per_clip: float
    present: TokenSet | None = None

    @staticmethod
    def from_bool(context: Bool[Tensor, "B N"], targets: Bool[Tensor, "B M N"]) -> Masks:
        """Masks from boolean planes, True where a token is context or target."""
        return Masks(
            TokenSet.from_mask(context),
            TokenSet.from_mask(targets),
            float(targets.sum()) / targets.shape[0],
        )

    def rows(self, rows: Tensor | slice) -> Masks:
        """The same masks for some rows of the batch."""
        present = None if self.present is None else self.present.rows(rows)
        return Masks(
            self.context.rows(rows), self.targets.rows(rows), self.targets_per_clip, present
        )

    def to(self, device: torch.device) -> Masks:
        """The same masks on another device."""
        present = None if self.present is None else self.present.to(device)
        return Masks(
            self.context.to(device), self.targets.to(device), self.targets_per_clip, present
        )


class AudioBatch(NamedTuple):
    """What the data loader hands to the model.

    Attributes:
        waveform: float32, at the front end's sample rate.
        row: the place of every row in the order of the whole run, counted over all ranks and all
            micro-batches: clip position times crops per clip, plus the crop's number. Masks are
            drawn by it, so that they belong to the sample and not to the process that happens to
            train on it.
        num_samples: of every row, what follows is padding that the model must not hear; `None` if
            all of it is sound, or padding that counts as silence.
    """

    waveform: Float[Tensor, "B C S"]
    row: Int[Tensor, " B"]
    num_samples: Int[Tensor, " B"] | None = None

    def to(self, device: torch.device) -> AudioBatch:
        """The waveform on another device; the rows are read on the CPU, without waiting for the device."""
        return self._replace(waveform=self.waveform.to(device, non_blocking=True))
