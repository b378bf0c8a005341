"""The features of a batch of clips: the tokens of every layer, with their times, and means over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jepa_audio.errors import UserError


@dataclass(frozen=True)
class LayerFeatures:
    """What a frozen encoder says of a batch of clips.

    Attributes:
        layers: one tensor `[B, T, F, D]` for each layer: 0 is what enters the first block, then the
            output of every block; the last one is taken after the final norm.
        times: centre of every time column in seconds, `[B, T]`, rising along a clip.
        valid: True where a column belongs to the clip, `[B, T]`; the columns that fill up a shorter
            clip are zeros.
    """

    layers: tuple[Float[Tensor, "B T F _"], ...]
    times: Float[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]

    def pool(self, frequency: Literal["mean", "concat"] = "mean") -> list[Float[Tensor, "B _"]]:
        """The mean over time of every layer; frequency rows are averaged, or kept side by side (E = F * D)."""
        return self.pool_regions(1 if frequency == "mean" else self.layers[0].shape[2], 1)

    def over_time(
        self, frequency: Literal["mean", "concat"] = "mean"
    ) -> list[Float[Tensor, "B T _"]]:
        """One vector for each time column; frequency rows are averaged, or kept side by side (E = F * D)."""
        return [
            layer.mean(dim=2) if frequency == "mean" else layer.flatten(2) for layer in self.layers
        ]

    def pool_regions(self, freq_chunks: int, time_chunks: int) -> list[Float[Tensor, "B _"]]:
        """Partitioned region pooling, as PupuJEPA is used (Gu et al., 2026, arXiv:2606.25713).

        The plane of a clip's tokens is cut into `freq_chunks` times `time_chunks` regions (of sizes
        as equal as can be, as of `torch.nn.AdaptiveAvgPool2d`); the means of the regions stand side
        by side, E = chunks * D: all times of the lowest frequencies first. (1, 1) is the plain
        mean, (F, 1) keeps every frequency row.

        Raises:
            UserError: if there are fewer rows than `freq_chunks`, or a clip has fewer columns than
                `time_chunks`.
        """
        num_columns, num_freq = self.valid.sum(dim=1), self.layers[0].shape[2]
        if not 1 <= freq_chunks <= num_freq or not 1 <= time_chunks <= int(num_columns.min()):
            raise UserError(
                f"`freq_chunks` ({freq_chunks}) must be in [1, {num_freq}], the frequency rows, and `time_chunks` "
                f"({time_chunks}) in [1, {int(num_columns.min())}], the columns of the shortest clip"
            )
        over_time = _chunk_means(num_columns, time_chunks, self.valid.shape[1])  # [B, chunks, T]
        over_freq = _chunk_means(num_columns.new_tensor([num_freq]), freq_chunks, num_freq)[
            0
        ]  # [chunks, F]
        dtype = self.layers[0].dtype
        weights = over_freq.to(dtype), over_time.to(dtype)
        return [
            torch.einsum("btfd,gf,bct->bgcd", layer, *weights).flatten(1) for layer in self.layers
        ]


def _chunk_means(
    length: Int[Tensor, " B"], chunks: int, longest: int
) -> Float[Tensor, "B chunks L"]:
    number, place = (
        torch.arange(chunks, device=length.device),
        torch.arange(longest, device=length.device),
    )
    first = number * length[:, None] // chunks
    last = -(-(number + 1) * length[:, None] // chunks)  # rounded up: neighbours may share a column
    within = (place >= first[..., None]) & (place < last[..., None])
    return within / (last - first)[..., None]
