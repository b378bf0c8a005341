"""Waveform front end: a stack of learned convolutions over the samples."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import FrontEnd
from jepa_audio.steps.grid import ColumnCount, Grid


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[B, D, T]`, separately at every time step."""

    @override
    def forward(self, input: Float[Tensor, "B D T"]) -> Float[Tensor, "B D T"]:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class WaveformFrontEnd(FrontEnd):
    """Convolutions over the samples, as in wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477).

    Each layer is a convolution, a norm and GELU. LayerNorm and a linear map follow. The layers do
    not pad, so a token depends on `receptive_field` samples. However, with `norm="group"` or
    `standardize`, a token depends on statistics of the complete clip. Padding then changes every
    token, so clips must be encoded at their true length.

    Args:
        conv_layers: (channels, kernel, stride) of every layer.
        embed_dim: width of the tokens.
        sample_rate: sample rate in Hz.
        separate_channels: False mixes the channels in the first layer. True uses a separate stack
            for each channel; the tokens of a channel are one row of the grid (the two ears of
            WavJEPA-Nat).
        norm: `group` normalises every channel over time, only after the first layer (wav2vec 2.0
            base, WavJEPA). `layer` normalises every time step over the channels, after each layer
            (wav2vec 2.0 large).
        bias: use a bias in the convolutions.
        standardize: scale every clip to mean 0 and standard deviation 1. The statistics are over
            channels and time together, which keeps the level differences between the channels.
    """

    def __init__(
        self,
        conv_layers: list[tuple[int, int, int]],
        embed_dim: int,
        sample_rate: int = 16000,
        num_channels: int = 1,
        separate_channels: bool = False,
        norm: Literal["group", "layer", "none"] = "group",
        bias: bool = False,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        numbers = [number for layer in conv_layers for number in layer]
        if not 1 <= len(conv_layers) <= 100 or not 1 <= min(numbers) <= max(numbers) <= 65_536:
            shown = str(conv_layers[:8]) + (" ..." if len(conv_layers) > 8 else "")
            raise UserError(
                f"`conv_layers` ({shown}) must have 1 to 100 layers, each one [channels, kernel, "
                "stride] with numbers in [1, 65536]"
            )
        if norm not in {"group", "layer", "none"}:
            raise UserError(f"`norm` ({norm!r}) must be 'group', 'layer' or 'none'")
        self.conv_layers = conv_layers
        self.embed_dim = embed_dim
        self.sample_rate = sample_rate
        self.num_channels = num_channels
        self.standardize = standardize

        num_stacks = num_channels if separate_channels else 1
        widths = [num_channels // num_stacks, *(channels for channels, _, _ in conv_layers)]
        self.stacks = nn.ModuleList()
        for _ in range(num_stacks):
            stack = nn.Sequential()
            for i, (channels, kernel, stride) in enumerate(conv_layers):
                conv = nn.Conv1d(widths[i], channels, kernel, stride, bias=bias)
                stack.append(nn.Sequential(conv, _norm(norm, i, channels), nn.GELU()))
            self.stacks.append(stack)
        self.norm = nn.LayerNorm(widths[-1])
        self.projection = nn.Linear(widths[-1], embed_dim)
        self.reset_parameters()

    @override
    def reset_parameters(self) -> None:
        """Draw Kaiming-normal convolutions; the norms and the linear map use torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.GroupNorm | nn.LayerNorm | nn.Linear):
                module.reset_parameters()
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)

    @property
    def stride(self) -> int:
        """Samples from one token to the next."""
        return prod(stride for _, _, stride in self.conv_layers)

    @property
    def receptive_field(self) -> int:
        """Samples that one token covers."""
        samples = 1
        for _, kernel, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + kernel
        return samples

    @override
    def grid(self, num_samples: int) -> Grid:
        """The grid has one row, or one row per separate channel; it ignores remaining samples."""
        if num_samples < self.receptive_field:
            raise UserError(
                f"a clip of {num_samples} samples is too short: one token needs "
                f"{self.receptive_field} samples "
                f"({1e3 * self.receptive_field / self.sample_rate:g} ms at {self.sample_rate} Hz)"
            )
        num_time = 1 + (num_samples - self.receptive_field) // self.stride
        return Grid(num_freq=len(self.stacks), num_time=num_time)

    @property
    @override
    def columns(self) -> ColumnCount:
        if self.standardize or any(isinstance(module, nn.GroupNorm) for module in self.modules()):
            raise UserError(
                "`data.mask_padding` needs a front end without statistics over complete clips: set "
                "its `norm` to 'layer' and `standardize` to false; `data.loudness_dbfs` can set "
                "the level instead"
            )
        return ColumnCount(self.receptive_field, self.stride)

    @override
    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        first = torch.arange(self.grid(num_samples).num_time) * self.stride
        return (first + self.receptive_field / 2) / self.sample_rate

    @override
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        self.grid(waveform.shape[-1])  # raises `UserError` if the clip is too short
        features = waveform.float()
        if self.standardize:
            deviation = features.std(dim=(1, 2), keepdim=True)
            features = (features - features.mean(dim=(1, 2), keepdim=True)) / (deviation + 1e-5)
        # A single stack gets all channels; each of several stacks gets one channel.
        inputs = features.chunk(len(self.stacks), dim=1)
        rows = [stack(channels) for stack, channels in zip(self.stacks, inputs, strict=True)]
        features = rearrange(torch.stack(rows), "f b d t -> b (t f) d")
        return self.projection(self.norm(features)).float()


def _norm(norm: str, layer: int, channels: int) -> nn.Module:
    if norm == "layer":
        return ChannelLayerNorm(channels)
    if norm == "group" and layer == 0:
        return nn.GroupNorm(channels, channels)
    return nn.Identity()
