"""Step 1 of a JEPA: waveform → tokens on a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.steps.grid import Grid


class FrontEnd(nn.Module, ABC):
    """Turns a waveform into tokens on a grid.

    Attributes:
        sample_rate: in Hz, of the waveforms it takes.
        num_channels: audio channels C that it takes.
        embed_dim: width D of the tokens it gives.
    """

    sample_rate: int
    num_channels: int
    embed_dim: int

    @abstractmethod
    def grid(self, num_samples: int) -> Grid:
        """The grid of a clip of `num_samples`: a formula, never a forward pass.

        Raises:
            UserError: if the clip is shorter than one token.
        """

    def num_time(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Time columns of clips padded to one length that hear nothing of the padding.

        Raises:
            UserError: as `grid`, or if no column is free of it.
        """
        return torch.tensor([self.grid(length).num_time for length in num_samples.tolist()])

    @abstractmethod
    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        """Middle of what the tokens of every time column hear, in seconds from the clip's first sample."""

    @abstractmethod
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        """Tokens in the order of `Grid`, `N == grid(S).num_tokens`, float32 also under autocast."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
