"""Spectrogram front end: fixed log spectrogram, cut into patches of frames and bands."""

from __future__ import annotations

from collections.abc import Iterable
from math import log, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import FrontEnd
from jepa_audio.steps.front_ends.transforms import Spectrogram
from jepa_audio.steps.grid import Grid


class SpectrogramFrontEnd(FrontEnd):
    """Linear embedding of the patches of a log spectrogram.

    Frames that do not fill the last patch are dropped.

    Args:
        spectrogram: the transform.
        embed_dim: width of the tokens.
        patch_frames: time extent of a patch.
        patch_bands: frequency extent of a patch, a divisor of the transform's number of bands.
        mean: of the log spectrogram over the corpus, see `measure_statistics`.
        std: the same for the standard deviation.
        num_channels: audio channels, mixed by the embedding.
        norm: LayerNorm of the tokens.
    """

    def __init__(
        self,
        spectrogram: Spectrogram,
        embed_dim: int,
        patch_frames: int = 4,
        patch_bands: int = 16,
        mean: float = 0.0,
        std: float = 1.0,
        num_channels: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if patch_frames < 1 or patch_bands < 1:
            raise UserError(
                f"`patch_frames` ({patch_frames}) and `patch_bands` ({patch_bands}) must be positive"
            )
        if spectrogram.num_bands % patch_bands:
            raise UserError(
                f"`patch_bands` ({patch_bands}) must divide the number of bands ({spectrogram.num_bands}): "
                f"use e.g. {_nearest_divisors(spectrogram.num_bands, patch_bands)}"
            )
        if std <= 0:
            raise UserError(f"`std` ({std}) must be positive")
        self.sample_rate = spectrogram.sample_rate
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.patch_frames = patch_frames
        self.patch_bands = patch_bands
        self.mean = mean
        self.std = std
        self.spectrogram = spectrogram
        patch = (patch_frames, patch_bands)
        self.proj = nn.Conv2d(num_channels, embed_dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform embedding, as of a linear map on the flattened patch; zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    @property
    def stride(self) -> int:
        """Samples from one time column to the next."""
        return self.patch_frames * self.spectrogram.hop_length

    def grid(self, num_samples: int) -> Grid:
        """Rows of `patch_bands` bands, columns of `patch_frames` frames."""
        num_frames = self.spectrogram.num_frames(num_samples)
        if num_frames < self.patch_frames:
            raise UserError(
                f"a clip of {num_samples} samples is too short: one token takes `patch_frames` "
                f"({self.patch_frames}) frames of {self.spectrogram.hop_length} samples, it has {num_frames}"
            )
        return Grid(self.spectrogram.num_bands // self.patch_bands, num_frames // self.patch_frames)

    def num_time(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """See `FrontEnd`; frames that reach beyond the end of a clip are not counted."""
        own = self.spectrogram
        num_frames = 1 + (num_samples + own.padding - own.window_length) // own.hop_length
        columns = num_frames // self.patch_frames
        if int(columns.min()) < 1:
            raise UserError(
                f"a clip of {int(num_samples.min())} samples is shorter than one token: raise `min_seconds`"
            )
        return columns

    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        """See `FrontEnd`; the middles of the patches' frames."""
        frame = (torch.arange(self.grid(num_samples).num_time) + 0.5) * self.patch_frames - 0.5
        first = self.spectrogram.window_length / 2 - self.spectrogram.padding
        return (frame * self.spectrogram.hop_length + first) / self.sample_rate

    def image(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B C T F"]:
        """The normalised log spectrogram, time first."""
        return (self.spectrogram(waveform).transpose(-1, -2) - self.mean) / (self.std + 1e-8)

    def embed_patches(self, image: Float[Tensor, "B C T F"]) -> Float[Tensor, "B N D"]:
        """Tokens of the patches, time-major."""
        return self.norm(self.proj(image).flatten(2).transpose(1, 2)).float()

    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        """Tokens in the order of `Grid`, float32 also under autocast."""
        self.grid(waveform.shape[-1])
        return self.embed_patches(self.image(waveform))


@torch.no_grad()
def measure_statistics(
    spectrogram: Spectrogram, waveforms: Iterable[Tensor]
) -> tuple[float, float]:
    """Mean and standard deviation of the log spectrogram over a corpus of batches `[B, C, S]`.

    Batches are merged in float64 by the pairwise update of Chan, Golub & LeVeque (1983), so that
    neither their sizes nor their order matter.
    """
    count, mean, squares = 0, 0.0, 0.0
    for waveform in waveforms:
        values = spectrogram(waveform).double()
        total, difference = count + values.numel(), float(values.mean()) - mean
        squares += (
            float(values.var(correction=0)) * values.numel()
            + difference**2 * count * values.numel() / total
        )
        mean += difference * values.numel() / total
        count = total
    if count == 0:
        raise UserError("`waveforms` must hold at least one clip to measure")
    return mean, sqrt(squares / count)


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    nearest = sorted(sorted(divisors, key=lambda divisor: abs(log(divisor / wanted)))[:3])
    return " or ".join(", ".join(map(str, nearest)).rsplit(", ", 1))
