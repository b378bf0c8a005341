"""Step 1 of a JEPA: the interface of a front end, waveform → tokens on a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.steps.grid import Grid


class FrontEnd(nn.Module, ABC):
    """Converts a waveform to tokens on a grid.

    Attributes:
        sample_rate: sample rate of the input, in Hz.
        num_channels: number of audio channels C of the input.
        embed_dim: width D of the tokens.
    """

    sample_rate: int
    num_channels: int
    embed_dim: int

    @abstractmethod
    def grid(self, num_samples: int) -> Grid:
        """The grid of a clip of `num_samples`, from a formula without a forward pass.

        Raises:
            UserError: if the clip is shorter than one token.
        """

    def num_time(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """For padded clips, the number of time columns that do not depend on the padding.

        `num_samples` is the number of samples of each clip before its padding.

        Raises:
            UserError: if a clip has no such column, or if all columns depend on the padding.
        """
        return torch.tensor([self.grid(length).num_time for length in num_samples.tolist()])

    @abstractmethod
    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        """The centres of the receptive fields of the columns, in seconds from the first sample."""

    @abstractmethod
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        """Tokens in the order of `Grid`, `N == grid(S).num_tokens`; float32 even under autocast."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all initial weights again from torch's global generator."""
