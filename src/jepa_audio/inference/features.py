"""Features of a batch of clips: the tokens of every layer, their times, and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError

Frequency = Literal["mean", "concat"]


@dataclass(frozen=True)
class LayerFeatures:
    """The tokens of every layer of an encoder for a batch of clips.

    Attributes:
        layers: one tensor `[B, T, F, D]` for each layer. Layer 0 is the input of the first block.
            The other layers are the outputs of the blocks. The final norm is applied to the last
            layer only.
        times: centre of every time column in seconds, `[B, T]`, increasing along a clip.
        valid: True where a column belongs to the clip, `[B, T]`; all features of padding columns
            are zero.
    """

    layers: tuple[Float[Tensor, "B T F _"], ...]
    times: Float[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]

    @override
    def __repr__(self) -> str:
        clips, columns, rows, width = self.layers[0].shape
        return (
            f"LayerFeatures(layers: {len(self.layers)} of [B={clips}, T={columns}, F={rows}, "
            f"D={width}], times: {list(self.times.shape)}, valid: {list(self.valid.shape)})"
        )

    def pool(
        self,
        frequency: Frequency = "mean",
        regions: int = 1,
        *,
        deviation: bool = False,
        change: bool = False,
    ) -> list[Float[Tensor, "B _"]]:
        """One vector for each clip and layer: statistics of its time columns.

        The frequency rows of a column are averaged or concatenated first, to E values. The columns
        of a clip are divided into `regions` of nearly equal length, as in
        `torch.nn.AdaptiveAvgPool1d`: neighbouring regions share a column where the number of
        columns is no multiple of `regions`, and a clip with fewer columns than regions has every
        column in one region or more. The vector has the means of the regions in time order, then
        the statistics of the complete clip: E values for each.

        Args:
            frequency: "mean" or "concat".
            regions: number of regions in time.
            deviation: add the standard deviation of the columns (of the population: 0 for one).
            change: add the mean absolute difference of neighbouring columns (0 for one column).
        """
        if regions < 1:
            raise UserError(f"`regions` ({regions}) must be at least 1")
        valid, counts = self.valid[..., None], self.valid.sum(dim=1)
        weights = _mean_weights(counts, regions, self.valid.shape[1])
        pooled = []
        for columns in self.over_time(frequency):
            parts = [(weights.to(columns) @ columns).flatten(1)]
            if deviation:
                mean = (columns * valid).sum(dim=1, keepdim=True) / counts[:, None, None]
                squares = ((columns - mean) * valid).square().sum(dim=1)
                parts.append((squares / counts[:, None]).sqrt())
            if change:
                steps = (columns.diff(dim=1) * valid[:, 1:]).abs().sum(dim=1)
                parts.append(steps / (counts[:, None] - 1).clamp_min(1))
            pooled.append(torch.cat(parts, dim=1))
        return pooled

    def over_time(self, frequency: Frequency = "mean") -> list[Float[Tensor, "B T _"]]:
        """One vector for each time column, with frequency rows averaged or concatenated."""
        mean = frequency == "mean"
        return [layer.mean(dim=2) if mean else layer.flatten(2) for layer in self.layers]

    def at_regular_times(
        self, frame_seconds: float, num_frames: Sequence[int] | None = None
    ) -> LayerFeatures:
        """The nearest time column at regular times, for clients that need a regular grid.

        A column may be repeated or left out.

        Args:
            frame_seconds: seconds from one time to the next; `Encoder.frame_seconds` keeps the rate
                of the encoder.
            num_frames: number of times of each clip, which are then the middle of each interval of
                `frame_seconds` from the start of the clip. `None`: the first time is that of the
                first column, the last is at most half a frame away from the last column.

        Raises:
            UserError: if `frame_seconds` is not positive, or a number of frames is below 1.
        """
        if not isinstance(frame_seconds, Real) or not 0 < frame_seconds < float("inf"):
            raise UserError(f"`frame_seconds` ({frame_seconds!r}) must be a positive number")
        counts = self.valid.sum(dim=1).tolist()
        if num_frames is not None and (min(num_frames) < 1 or len(num_frames) != len(counts)):
            raise UserError(
                f"`num_frames` ({list(num_frames)}) must be a number of at least 1 for each of "
                f"{len(counts)} clips"
            )
        groups = []
        for row, count in enumerate(counts):
            seconds = self.times[row, :count].double()
            if num_frames is None:
                first = float(seconds[0])
                number = int((float(seconds[-1]) - first) / frame_seconds + 0.5) + 1
            else:
                first, number = 0.5 * frame_seconds, num_frames[row]
            grid = first + torch.arange(number, device=seconds.device).double() * frame_seconds
            index, times = _nearest(seconds, grid), grid.to(self.times)
            layers = tuple(layer[row : row + 1, index] for layer in self.layers)
            valid = torch.ones_like(times, dtype=torch.bool)
            groups.append(([row], LayerFeatures(layers, times[None], valid[None])))
        return pad_features(groups)

    def pool_regions(self, freq_chunks: int, time_chunks: int) -> list[Float[Tensor, "B _"]]:
        """Partitioned region pooling, as for PupuJEPA (Gu et al., 2026, arXiv:2606.25713).

        The tokens of a clip are divided into `freq_chunks` times `time_chunks` regions of nearly
        equal size, as in `torch.nn.AdaptiveAvgPool2d`. The means of the regions are concatenated to
        a vector of width `freq_chunks` * `time_chunks` * D. The vector begins with all time chunks
        of the lowest frequencies. (1, 1) gives the mean of all tokens, (F, 1) keeps every frequency
        row.

        Raises:
            UserError: if there are fewer rows than `freq_chunks`, or if a clip has fewer columns
                than `time_chunks`.
        """
        num_columns, num_freq = self.valid.sum(dim=1), self.layers[0].shape[2]
        shortest = int(num_columns.min())
        if not 1 <= freq_chunks <= num_freq or not 1 <= time_chunks <= shortest:
            raise UserError(
                f"`freq_chunks` ({freq_chunks}) must be in [1, {num_freq}] (frequency rows) and "
                f"`time_chunks` ({time_chunks}) in [1, {shortest}] (columns of the shortest clip)"
            )
        dtype = self.layers[0].dtype
        time = _mean_weights(num_columns, time_chunks, self.valid.shape[1]).to(dtype)
        freq = _mean_weights(num_columns.new_tensor([num_freq]), freq_chunks, num_freq)[0].to(dtype)
        return [
            torch.einsum("btfd,gf,bct->bgcd", layer, freq, time).flatten(1) for layer in self.layers
        ]


def _mean_weights(
    length: Int[Tensor, " B"], chunks: int, longest: int
) -> Float[Tensor, "B chunks L"]:
    """Divide the first `length` of `longest` entries into chunks: weights of each chunk's mean."""
    chunk = torch.arange(chunks, device=length.device)
    index = torch.arange(longest, device=length.device)
    first = chunk * length[:, None] // chunks
    # Rounded up: the last entry of a chunk can also be the first entry of the next chunk.
    end = -(-(chunk + 1) * length[:, None] // chunks)
    within = (index >= first[..., None]) & (index < end[..., None])
    return within / (end - first)[..., None]


def pad_features(groups: Sequence[tuple[Sequence[int], LayerFeatures]]) -> LayerFeatures:
    """Combine the features of clips of different lengths into one batch, padded with zeros.

    Args:
        groups: for each group of clips, the rows of its clips in the batch, and their features.
    """
    if len(groups) == 1 and list(groups[0][0]) == sorted(groups[0][0]):
        return groups[0][1]
    first = groups[0][1].layers
    num_columns = max(part.times.shape[1] for _, part in groups)
    shape = (sum(len(rows) for rows, _ in groups), num_columns)
    layers = tuple(layer.new_zeros(*shape, *layer.shape[2:]) for layer in first)
    times = torch.zeros(shape, device=first[0].device)
    valid = torch.zeros(shape, dtype=torch.bool, device=first[0].device)
    for part_rows, part in groups:
        rows, end = list(part_rows), part.times.shape[1]
        times[rows, :end] = part.times.to(times)
        valid[rows, :end] = part.valid
        for layer, part_layer in zip(layers, part.layers, strict=True):
            layer[rows, :end] = part_layer
    return LayerFeatures(layers, times, valid)


def _nearest(seconds: Float[Tensor, " T"], grid: Float[Tensor, " G"]) -> Int[Tensor, " G"]:
    """Indices of the columns, which are in time order, that are nearest to the times of a grid."""
    right = torch.searchsorted(seconds, grid).clamp(0, len(seconds) - 1)
    left = (right - 1).clamp_min(0)
    is_left = grid - seconds[left] <= (seconds[right] - grid).abs()
    return torch.where(is_left, left, right)
