"""Feature rows of a split, and how they are made from audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from jepa_audio.inference.pooling import Pooling
from jepa_audio.probing.robustness import Condition
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.labels import Rows

REVISION = 2
"""Part of every cache key. It increases when the same audio gives other features than before."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the audio before the encoder, and to its features after it.

    Args:
        windows: how an item is cut into windows.
        per_frame: True for one feature row per time frame; False for one row per window.
        by_window: with `per_frame`, return `FrameFeatures`: all frames of a window are one row.
        grid_hz: frames per second to which features are interpolated; `None` keeps the times of
            the encoder.
        condition: degradation of the waveform; `None` for clean audio.
        poolings: features for each of them; with `per_frame`, only their `frequency` counts.
    """

    windows: Windows
    per_frame: bool = False
    grid_hz: float | None = None
    condition: Condition | None = None
    poolings: tuple[Pooling, ...] = (Pooling(),)
    by_window: bool = False

    def pooled_by(self, poolings: Sequence[Pooling]) -> Preparation:
        """The same with other poolings."""
        if self.per_frame:
            poolings = [pooling.frames for pooling in poolings]
        return replace(self, poolings=tuple(dict.fromkeys(poolings)))

    def key(self, pooling: Pooling) -> str:
        """Text with all settings, for cache keys."""
        condition = self.condition.key if self.condition else "clean"
        return f"revision {REVISION} {self.windows} {pooling.name} {self.grid_hz} {condition}"


@dataclass(frozen=True)
class Features:
    """Feature rows of one split.

    Attributes:
        layers: one table of rows for each layer, in memory or on disk.
        place: for each row of the split, its index in the tables.
        rows: for each row of the split, the item and the window that it comes from.
        num_padded: windows that are too short for one token and were padded.
    """

    layers: Sequence[np.ndarray]
    place: Int64[np.ndarray, " rows"]
    rows: Rows
    num_padded: int = 0

    def __len__(self) -> int:
        return len(self.place)

    def read(
        self, layer: int, rows: Int64[np.ndarray, " n"] | slice = slice(None)
    ) -> Float32[Tensor, "n D"]:
        """Rows of one layer; by default all."""
        return torch.from_numpy(self.layers[layer][self.place[rows]]).float()

    def widths(self, layers: Sequence[int]) -> list[int]:
        """Numbers of features of some layers."""
        return [self.layers[layer].shape[1] for layer in layers]


@dataclass(frozen=True)
class FrameFeatures(Features):
    """Features of one split with one row for each window, which has several time columns.

    Attributes:
        counts: number of columns of each row; `place` is the index of the first.
    """

    counts: Int64[np.ndarray, " rows"] = field(kw_only=True)

    def read_frames(
        self, layer: int, rows: Int64[np.ndarray, " n"] | slice
    ) -> tuple[Float32[Tensor, "n T D"], Bool[Tensor, "n T"]]:
        """The columns of rows, and which of them are no padding (which repeats the last)."""
        counts = self.counts[rows, None]
        column = np.arange(counts.max())
        index = self.place[rows, None] + np.minimum(column, counts - 1)
        frames = torch.from_numpy(self.layers[layer][index]).float()
        return frames, torch.from_numpy(column < counts)

    def sample_frames(self, layer: int, size: int) -> Float32[Tensor, "n D"]:
        """All columns, or `size` of them at equal distances."""
        ends = self.counts.cumsum()
        chosen = np.linspace(0, ends[-1] - 1, min(size, int(ends[-1]))).astype(np.int64)
        row = np.searchsorted(ends, chosen, side="right")
        index = self.place[row] + chosen - (ends - self.counts)[row]
        return torch.from_numpy(self.layers[layer][index]).float()
