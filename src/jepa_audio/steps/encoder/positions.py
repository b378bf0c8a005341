"""Where a token lies, told to a transformer: additive sin-cos tables and rotary embeddings, from grid coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import build_rotary_pos_embed
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid


class Positions(ABC):
    """Tells a transformer where tokens lie, by an additive table, a rotation of queries and keys, or both."""

    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"] | None:
        """What is added to the tokens of width `dim`; `None` for nothing."""
        return None

    def rotary(
        self, grid: Grid, head_dim: int, device: torch.device
    ) -> Float[Tensor, "N H"] | None:
        """Sines and cosines (H = 2 * `head_dim`) that rotate queries and keys of one head; `None` for nothing."""
        return None

    @abstractmethod
    def check_width(self, dim: int, num_heads: int) -> None:
        """Raise `ValueError` if a transformer of this width cannot use these positions."""


@dataclass(frozen=True)
class SinCosPositions(Positions):
    """Fixed sines and cosines (Vaswani et al., 2017, arXiv:1706.03762, section 3.5), first all sines, then all cosines.

    On a grid of one frequency row the whole width tells the time, as in WavJEPA (Yuksel et al.,
    2025, arXiv:2509.23238); on a 2-D grid one half tells the time, the other half the frequency.

    Args:
        temperature: wavelengths go from 2π to `temperature` * 2π tokens.
    """

    temperature: float = 10_000.0

    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"]:
        """See `Positions`."""
        coordinates = grid.coordinates(device).float()
        axes = [coordinates[:, 0]] if grid.num_freq == 1 else [coordinates[:, 0], coordinates[:, 1]]
        width = dim // len(axes)
        exponent = torch.arange(width // 2, device=device, dtype=torch.float64) / (width // 2)
        frequency = self.temperature**-exponent
        angles = [axis.double()[:, None] * frequency for axis in axes]  # [N, width / 2]
        return torch.cat(
            [table for angle in angles for table in (angle.sin(), angle.cos())], dim=-1
        ).float()

    def check_width(self, dim: int, num_heads: int) -> None:
        """See `Positions`."""
        if dim % 4:
            raise UserError(
                f"`embed_dim` ({dim}) must be a multiple of 4 for {type(self).__name__}"
            )


@dataclass(frozen=True)
class BinauralPositions(SinCosPositions):
    """Additive positions of two ears (WavJEPA-Nat): half of the width tells the time, the other half the ear.

    The time's half is that of `SinCosPositions`; the ear's half is all zeros for the first row of
    the grid, and zeros, then ones for the second, as the published code has it.
    """

    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"]:
        """See `Positions`; `ValueError` for a grid of other than two rows."""
        if grid.num_freq != 2:
            raise UserError(
                f"BinauralPositions need a grid of two rows, one for each ear, got {grid}"
            )
        time = super().additive(Grid(1, grid.num_time), dim // 2, device)
        ear = torch.zeros(2, dim // 2, device=device)
        ear[1, dim // 4 :] = 1
        return torch.cat([time.repeat_interleave(2, dim=0), ear.repeat(grid.num_time, 1)], dim=-1)


@dataclass(frozen=True)
class RotaryPositions(Positions):
    """Rotary embeddings (Su et al., 2021, arXiv:2104.09864), over time alone or axial over time and frequency.

    Args:
        axes: "time" rotates the whole head by the time column; "time_freq" gives each axis half of
            the head.
        normalized: True stretches every axis to [-1, 1] and takes `max_resolution`, as the
            published PupuJEPA
            does: another clip length then means other coordinates. False counts tokens and takes
                `temperature`.
        temperature: of the frequencies of counted coordinates.
        max_resolution: highest frequency of normalised coordinates, in half-turns.
    """

    axes: Literal["time", "time_freq"] = "time_freq"
    normalized: bool = True
    temperature: float = 10_000.0
    max_resolution: int = 224

    def rotary(self, grid: Grid, head_dim: int, device: torch.device) -> Float[Tensor, "N H"]:
        """See `Positions`."""
        time_only = self.axes == "time"
        table = build_rotary_pos_embed(
            feat_shape=[grid.num_time] if time_only else [grid.num_time, grid.num_freq],
            dim=2 * head_dim if time_only else head_dim,
            max_res=self.max_resolution,
            temperature=self.temperature,
            in_pixels=self.normalized,
            device=device,
        )
        sin_cos = torch.cat(table, dim=-1)
        return sin_cos.repeat_interleave(grid.num_freq, dim=0) if time_only else sin_cos

    def check_width(self, dim: int, num_heads: int) -> None:
        """See `Positions`."""
        head_dim = dim // num_heads
        multiple = 2 if self.axes == "time" else 4
        if head_dim % multiple:
            raise UserError(
                f"`embed_dim` / `num_heads` ({dim} / {num_heads} = {head_dim}) must be a multiple of {multiple} "
                f"for RotaryPositions over {self.axes}"
            )
