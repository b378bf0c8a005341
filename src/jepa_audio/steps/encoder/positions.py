"""Position encodings of a transformer, computed from grid coordinates: sin-cos tables and RoPE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import build_rotary_pos_embed
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid

# Types of devices that compute in float64.
FLOAT64_DEVICES = ("cpu", "cuda", "meta")


class Positions(ABC):
    """A position encoding: an additive table, a rotation of queries and keys, or both."""

    @property
    def depend_on_length(self) -> bool:
        """Whether the encoding of a token depends on the number of time columns of the grid."""
        return True

    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"] | None:
        """The table to add to the tokens of width `dim`; `None` for no table."""
        return None

    def rotary(
        self, grid: Grid, head_dim: int, device: torch.device
    ) -> Float[Tensor, "N H"] | None:
        """Sines and cosines that rotate the queries and keys of one head (H = 2 * `head_dim`)."""
        return None

    @abstractmethod
    def check_width(self, dim: int, num_heads: int) -> None:
        """Raise `UserError` if a transformer of this width cannot use these positions."""


@dataclass(frozen=True)
class SinCosPositions(Positions):
    """Fixed sines and cosines (Vaswani et al., 2017, arXiv:1706.03762, section 3.5).

    All sines come first, then all cosines. On a grid with one frequency row, all channels
    encode time, as in WavJEPA (Yuksel et al., 2025, arXiv:2509.23238). On a 2-D grid, the first
    half encodes time and the second half encodes frequency.

    Args:
        temperature: the wavelengths are between 2π and `temperature` * 2π tokens.
    """

    temperature: float = 10_000.0

    @property
    @override
    def depend_on_length(self) -> bool:
        return False

    @override
    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"]:
        # Apple's GPUs, among others, have no float64: the table is then computed on the CPU.
        computed_on = device if device.type in FLOAT64_DEVICES else torch.device("cpu")
        num_axes = 1 if grid.num_freq == 1 else 2
        axes = grid.coordinates(computed_on).double()[:, :num_axes].unbind(dim=1)
        width = dim // num_axes
        exponent = torch.arange(width // 2, device=computed_on, dtype=torch.float64) / (width // 2)
        frequency = self.temperature**-exponent
        angles = [axis[:, None] * frequency for axis in axes]  # [N, width / 2]
        tables = [table for angle in angles for table in (angle.sin(), angle.cos())]
        return torch.cat(tables, dim=-1).float().to(device)

    @override
    def check_width(self, dim: int, num_heads: int) -> None:
        if dim % 4:
            name = type(self).__name__
            raise UserError(f"`embed_dim` ({dim}) must be a multiple of 4 for {name}")


@dataclass(frozen=True)
class BinauralPositions(SinCosPositions):
    """Additive positions for two ears (WavJEPA-Nat): half of the width for time, half for the ear.

    The time half is the table of `SinCosPositions`. In the first row of the grid, the ear half has
    only zeros. In the second row, it has zeros followed by ones, as in the published code.
    """

    @override
    def additive(self, grid: Grid, dim: int, device: torch.device) -> Float[Tensor, "N D"]:
        """The table for a grid of two rows; `UserError` for any other grid."""
        if grid.num_freq != 2:
            raise UserError(f"BinauralPositions need a grid with two rows, one per ear, got {grid}")
        time = super().additive(Grid(1, grid.num_time), dim // 2, device)
        ear = torch.zeros(2, dim // 2, device=device)
        ear[1, dim // 4 :] = 1
        return torch.cat([time.repeat_interleave(2, dim=0), ear.repeat(grid.num_time, 1)], dim=-1)


@dataclass(frozen=True)
class RotaryPositions(Positions):
    """RoPE (Su et al., 2021, arXiv:2104.09864) over time, or axial over time and frequency.

    Args:
        axes: "time" rotates the complete head by the time column; "time_freq" uses half of the head
            for each axis.
        normalized: True scales every axis to [-1, 1] and uses `max_resolution`, as the published
            PupuJEPA does; the coordinates then change with the clip length. False uses token
            indices as coordinates and `temperature`.
        temperature: base of the rotation frequencies for token indices.
        max_resolution: highest rotation frequency for normalised coordinates, in half-turns.
    """

    axes: Literal["time", "time_freq"] = "time_freq"
    normalized: bool = True
    temperature: float = 10_000.0
    max_resolution: int = 224

    @property
    @override
    def depend_on_length(self) -> bool:
        return self.normalized

    @override
    def rotary(self, grid: Grid, head_dim: int, device: torch.device) -> Float[Tensor, "N H"]:
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

    @override
    def check_width(self, dim: int, num_heads: int) -> None:
        head_dim = dim // num_heads
        divisor = 2 if self.axes == "time" else 4
        if head_dim % divisor:
            raise UserError(
                f"`embed_dim` / `num_heads` ({dim} / {num_heads} = {head_dim}) must be a multiple "
                f"of {divisor} for RotaryPositions with `axes: {self.axes}`"
            )
