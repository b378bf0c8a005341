"""Learned front end: a convolution stack over the raw waveform."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import FrontEnd
from jepa_audio.steps.grid import Grid


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a sequence that carries them before time."""

    def forward(self, input: Float[Tensor, "B D T"]) -> Float[Tensor, "B D T"]:  # noqa: A002
        """Normalise every time step on its own."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class WaveformFrontEnd(FrontEnd):
    """Convolutions over the samples, as in wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477).

    Each layer is convolution, norm, GELU; then LayerNorm and a linear map to the tokens. No layer
    pads, so a token depends on `receptive_field` samples, but for `norm="group"` and `standardize`,
    whose statistics run over the whole clip: there padding changes every token, and a clip has to
    be given at its true length.

    Args:
        conv_layers: (channels, kernel, stride) of every layer.
        embed_dim: width of the tokens.
        sample_rate: in Hz.
        num_channels: audio channels.
        separate_channels: False mixes the channels in the first layer; True gives every channel a
            stack of its own and tokens of its own, a row of the grid each (WavJEPA-Nat's two ears).
        norm: `group` normalises every channel over time, after the first layer alone (wav2vec 2.0
            base, WavJEPA); `layer` every time step over the channels, after each layer (wav2vec 2.0
            large).
        bias: of the convolutions.
        standardize: bring every clip to mean 0 and deviation 1, jointly over channels and time,
            which keeps the level differences between the channels.
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
        if not conv_layers or any(min(layer) < 1 for layer in conv_layers):
            raise UserError(
                f"`conv_layers` ({conv_layers}) must hold at least one layer, "
                "each as [channels, kernel, stride], all of them positive"
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

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions; norms and the linear map as torch draws them."""
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

    def grid(self, num_samples: int) -> Grid:
        """One row, or one for each separate channel; samples that do not fill another token are dropped."""
        if num_samples < self.receptive_field:
            raise UserError(
                f"a clip of {num_samples} samples is too short: one token takes {self.receptive_field} "
                f"({1e3 * self.receptive_field / self.sample_rate:g} ms at {self.sample_rate} Hz)"
            )
        return Grid(
            num_freq=len(self.stacks),
            num_time=1 + (num_samples - self.receptive_field) // self.stride,
        )

    def num_time(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """See `FrontEnd`; `ValueError` if statistics over the whole clip would hear the padding."""
        if self.standardize or any(isinstance(module, nn.GroupNorm) for module in self.modules()):
            raise UserError(
                "`data.mask_padding` needs a front end that hears one token at a time: set its `norm` to 'layer' and "
                "`standardize` to false; `data.loudness_dbfs` sets the level instead"
            )
        return super().num_time(num_samples)

    def times(self, num_samples: int) -> Float[Tensor, " T"]:
        """See `FrontEnd`; the middles of the receptive fields."""
        first = torch.arange(self.grid(num_samples).num_time) * self.stride
        return (first + self.receptive_field / 2) / self.sample_rate

    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        """Tokens in the order of `Grid`, float32 also under autocast."""
        self.grid(waveform.shape[-1])
        features = waveform.float()
        if self.standardize:
            deviation = features.std(dim=(1, 2), keepdim=True)
            features = (features - features.mean(dim=(1, 2), keepdim=True)) / (deviation + 1e-5)
        heard = features.chunk(
            len(self.stacks), dim=1
        )  # each stack its channel, or one stack all of them
        rows = [stack(channels) for stack, channels in zip(self.stacks, heard, strict=True)]
        features = rearrange(rows, "f b d t -> b (t f) d")
        return self.projection(self.norm(features)).float()


def _norm(norm: str, layer: int, channels: int) -> nn.Module:
    if norm == "layer":
        return ChannelLayerNorm(channels)
    if norm == "group" and layer == 0:
        return nn.GroupNorm(channels, channels)
    return nn.Identity()
