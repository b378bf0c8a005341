"""Step 1 of a JEPA: the interfaces of a front end, waveform → tokens, and of a spectrogram."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import ColumnCount, Grid


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

    @property
    @abstractmethod
    def columns(self) -> ColumnCount:
        """For padded clips, the number of time columns that do not depend on the padding.

        Raises:
            UserError: if all columns depend on the padding.
        """

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip that has a token."""

        def has_token(num_samples: int) -> bool:
            try:
                return self.grid(num_samples).num_time > 0
            except UserError:
                return False

        return bisect_left(range(1 << 31), True, lo=1, key=has_token)

    @abstractmethod
    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        """The centres of the receptive fields of the columns, in seconds from the first sample."""

    @abstractmethod
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        """Tokens in the order of `Grid`, `N == grid(S).num_tokens`; float32 even under autocast."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all initial weights again from torch's global generator."""


class Spectrogram(nn.Module, ABC):
    """Log magnitudes of frequency bands over frames.

    A subclass sets the attributes and implements `log_magnitude`. Kernels that are not trained are
    buffers outside the `state_dict`.

    Attributes:
        num_bands: number of frequency bands F, lowest first.
        hop_length: samples from one frame to the next.
        window_length: samples that one frame covers.
        padding: samples of reflect padding at each end of the clip.
        min_samples: length of the shortest possible clip.
        first_end: number of samples at the start of the clip that the first frame depends on; frame
            t depends on no sample after the first `first_end` + t * `hop_length`.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        num_bands: int,
        hop_length: int,
        window_length: int,
        padding: int,
        min_samples: int,
        first_end: int,
    ) -> None:
        super().__init__()
        if min(sample_rate, num_bands, hop_length) < 1:
            raise UserError(
                f"`sample_rate` ({sample_rate}), `hop_length` ({hop_length}) and the number of "
                f"bands ({num_bands}) must be positive"
            )
        self.sample_rate = sample_rate
        self.num_bands = num_bands
        self.hop_length = hop_length
        self.window_length = window_length
        self.padding = padding
        self.min_samples = min_samples
        self.first_end = first_end

    def num_frames(self, num_samples: int) -> int:
        """Number of frames T of a clip, from a formula without a forward pass.

        Raises:
            UserError: if the clip is shorter than `min_samples`.
        """
        if num_samples < self.min_samples:
            raise UserError(
                f"a clip of {num_samples} samples is too short for {type(self).__name__}: its "
                f"window and reflect padding need at least {self.min_samples} samples "
                f"({1e3 * self.min_samples / self.sample_rate:.4g} ms at {self.sample_rate} Hz)"
            )
        return 1 + (num_samples + 2 * self.padding - self.window_length) // self.hop_length

    def reset_parameters(self) -> None:
        """Set trained kernels to their first values; without trained kernels, do nothing."""

    @abstractmethod
    def log_magnitude(self, waveform: Float[Tensor, "R S"]) -> Float[Tensor, "R F T"]:
        """Natural logarithm of the magnitudes of R float32 waveforms."""

    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B C F T"]:
        """Log magnitudes of every channel, `T == num_frames(S)`."""
        self.num_frames(waveform.shape[-1])  # raises `UserError` if the clip is too short
        with torch.autocast(device_type=waveform.device.type, enabled=False):
            spectrum = self.log_magnitude(waveform.flatten(0, 1).float())
        return spectrum.unflatten(0, waveform.shape[:2])
