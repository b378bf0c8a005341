"""Spectrogram front ends: a log spectrogram, divided into patches of frames and bands."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, log, sqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import FrontEnd, Spectrogram
from jepa_audio.steps.grid import ColumnCount, Grid


class PatchedSpectrogram(FrontEnd):
    """A front end whose tokens are patches of a log spectrogram.

    Frames after the last complete patch are ignored.

    Args:
        spectrogram: the transform.
        embed_dim: width of the tokens.
        patch_frames: number of frames of a patch.
        patch_bands: number of bands of a patch; must divide the number of bands of the transform.
        mean: mean of the log spectrogram over the corpus, see `measure_statistics`; `None` if it is
            unknown. A run measures it before its first step, see `MeasureNormalization`.
        std: standard deviation of the log spectrogram over the corpus; `None` if `mean` is `None`.
        num_channels: number of audio channels; a token contains all of them.
    """

    def __init__(
        self,
        spectrogram: Spectrogram,
        embed_dim: int,
        patch_frames: int,
        patch_bands: int,
        mean: float | None,
        std: float | None,
        num_channels: int,
    ) -> None:
        super().__init__()
        if patch_frames < 1 or patch_bands < 1:
            sizes = f"`patch_frames` ({patch_frames}) and `patch_bands` ({patch_bands})"
            raise UserError(f"{sizes} must be positive")
        num_bands = spectrogram.num_bands
        if num_bands % patch_bands:
            raise UserError(
                f"`patch_bands` ({patch_bands}) must divide the number of bands ({num_bands}): "
                f"use {_nearest_divisors(num_bands, patch_bands)}"
            )
        if (mean is None) != (std is None) or (std is not None and not 0 < std < inf):
            raise UserError(
                f"`std` ({std}) must be positive, and None only if `mean` ({mean}) is None"
            )
        self.sample_rate = spectrogram.sample_rate
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.patch_frames = patch_frames
        self.patch_bands = patch_bands
        self.mean = mean
        self.std = std
        self.spectrogram = spectrogram

    @property
    def stride(self) -> int:
        """Samples from one time column to the next."""
        return self.patch_frames * self.spectrogram.hop_length

    @override
    def grid(self, num_samples: int) -> Grid:
        """The grid of patches: `patch_bands` bands per row and `patch_frames` frames per column."""
        num_frames = self.spectrogram.num_frames(num_samples)
        if num_frames < self.patch_frames:
            raise UserError(
                f"a clip of {num_samples} samples is too short: it has {num_frames} frames of "
                f"{self.spectrogram.hop_length} samples, one token needs `patch_frames` "
                f"({self.patch_frames})"
            )
        return Grid(self.spectrogram.num_bands // self.patch_bands, num_frames // self.patch_frames)

    @property
    @override
    def columns(self) -> ColumnCount:
        first_frame, hop_length = self.spectrogram.first_end, self.spectrogram.hop_length
        first_column = first_frame + (self.patch_frames - 1) * hop_length
        return ColumnCount(first_column, self.patch_frames * hop_length)

    @override
    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        frame = (torch.arange(self.grid(num_samples).num_time) + 0.5) * self.patch_frames - 0.5
        first = self.spectrogram.window_length / 2 - self.spectrogram.padding
        return (frame * self.spectrogram.hop_length + first) / self.sample_rate

    def image(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B C T F"]:
        """The normalised log spectrogram; the time axis is before the frequency axis.

        Raises:
            UserError: if `mean` and `std` are unknown.
        """
        if self.mean is None or self.std is None:
            raise UserError(
                "`mean` and `std` of the front end are unknown: `jepa-audio fit` measures them at "
                "the start of a run, `jepa-audio data stats` prints them"
            )
        return (self.spectrogram(waveform).transpose(-1, -2) - self.mean) / (self.std + 1e-8)


class SpectrogramFrontEnd(PatchedSpectrogram):
    """Linear embedding of the patches of a log spectrogram.

    Args:
        spectrogram: see `PatchedSpectrogram`, as for the other arguments.
        embed_dim: width of the tokens.
        patch_frames: number of frames of a patch.
        patch_bands: number of bands of a patch; must divide the number of bands of the transform.
        mean: mean of the log spectrogram over the corpus; `None` if it is unknown.
        std: standard deviation of the log spectrogram over the corpus.
        num_channels: number of audio channels; the embedding mixes them.
        norm: apply LayerNorm to the tokens.
    """

    def __init__(
        self,
        spectrogram: Spectrogram,
        embed_dim: int,
        patch_frames: int = 4,
        patch_bands: int = 16,
        mean: float | None = None,
        std: float | None = None,
        num_channels: int = 1,
        norm: bool = True,
    ) -> None:
        patch = (patch_frames, patch_bands)
        super().__init__(spectrogram, embed_dim, *patch, mean, std, num_channels)
        self.proj = nn.Conv2d(num_channels, embed_dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.reset_parameters()

    @override
    def reset_parameters(self) -> None:
        """Initialise the embedding Xavier-uniform over the flattened patch, with zero bias."""
        self.spectrogram.reset_parameters()
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def embed_patches(self, image: Float[Tensor, "B C T F"]) -> Float[Tensor, "B N D"]:
        """The tokens of the patches in time-major order, float32."""
        return self.norm(self.proj(image).flatten(2).transpose(1, 2)).float()

    @override
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        self.grid(waveform.shape[-1])  # raises `UserError` if the clip is too short
        return self.embed_patches(self.image(waveform))


class SpectrogramPatches(PatchedSpectrogram):
    """The patches of a log spectrogram themselves, without an embedding.

    It serves as `target_front_end` of a `JEPA` with `targets.top_k: 0`: the predictor then predicts
    the normalised log spectrogram. A token has width C * `patch_frames` * `patch_bands`.

    Args:
        spectrogram: see `PatchedSpectrogram`, as for the other arguments.
        patch_frames: number of frames of a patch.
        patch_bands: number of bands of a patch; `None` for all bands.
        mean: mean of the log spectrogram over the corpus; `None` if it is unknown.
        std: standard deviation of the log spectrogram over the corpus.
        num_channels: number of audio channels C.
    """

    def __init__(
        self,
        spectrogram: Spectrogram,
        patch_frames: int = 1,
        patch_bands: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        num_channels: int = 1,
    ) -> None:
        bands = spectrogram.num_bands if patch_bands is None else patch_bands
        width = num_channels * patch_frames * bands
        super().__init__(spectrogram, width, patch_frames, bands, mean, std, num_channels)

    @override
    def reset_parameters(self) -> None:
        """Reset the transform; a patch itself has no weights."""
        self.spectrogram.reset_parameters()

    @override
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        num_frames = self.grid(waveform.shape[-1]).num_time * self.patch_frames
        patch = {"p": self.patch_frames, "q": self.patch_bands}
        image = self.image(waveform)[:, :, :num_frames]
        return rearrange(image, "b c (t p) (f q) -> b (t f) (c p q)", **patch)


@torch.no_grad()
def measure_statistics(
    spectrogram: Spectrogram, waveforms: Iterable[Tensor]
) -> tuple[float, float]:
    """Measure mean and standard deviation of the log spectrogram over batches `[B, C, S]`.

    Batches are merged in float64 with the pairwise update of Chan, Golub & LeVeque (1983).
    Therefore, the result does not depend on the sizes and the order of the batches.
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
        raise UserError("`waveforms` must contain at least one clip")
    return mean, sqrt(squares / count)


def _nearest_divisors(number: int, value: int) -> str:
    """The three divisors of `number` with the smallest ratio to `value`, as text."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    nearest = sorted(sorted(divisors, key=lambda divisor: abs(log(divisor / value)))[:3])
    return " or ".join(", ".join(map(str, nearest)).rsplit(", ", 1))
