"""The network that is fine-tuned: front end and encoder with gradients, and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import Frequency
from jepa_audio.inference.windowed import scale_loudness
from jepa_audio.inference.windows import exact_windows, padded_window
from jepa_audio.probing.feature_store import interpolate
from jepa_audio.probing.finetuning.augmentations import SpecAugment
from jepa_audio.probing.heads.attentive import AttentivePooling
from jepa_audio.probing.heads.linear import Standardisation
from jepa_audio.steps.grid import TokenSet

# Windows in one forward pass without gradients; it limits the memory.
_MAX_WINDOWS = 64


class Backbone(nn.Module):
    """Front end and encoder of a pretrained `Encoder`, with gradients.

    A clip longer than a training crop is encoded in windows as long as a crop, as by `Encoder`.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.front_end, self.encoder = encoder.front_end, encoder.encoder
        self.window_samples, self.min_samples = encoder.window_samples, encoder.min_samples
        self.loudness_dbfs = encoder.loudness_dbfs
        self.requires_grad_(True)

    def forward(
        self,
        clips: Float[Tensor, "B C S"],
        augment: SpecAugment | None = None,
        seeds: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "B T F D"], Float[Tensor, " T"]]:
        """Latents of clips of equal length after the final norm, and the times of their columns.

        Args:
            clips: at the sample rate of the front end.
            augment: masks of the spectrogram or of the tokens; `None` for none.
            seeds: of the masks, one for each clip.
        """
        num_samples = clips.shape[-1]
        if num_samples < self.min_samples:
            windows = padded_window(num_samples, self.front_end, self.min_samples)
        else:
            windows = exact_windows(num_samples, self.front_end, self.window_samples, 0.0)
        clips = scale_loudness(clips, self.loudness_dbfs)
        clips = F.pad(clips, (0, windows.end - num_samples))
        number = len(windows.starts)
        size = number if torch.is_grad_enabled() else max(1, _MAX_WINDOWS // len(clips))
        parts = []
        for first in range(0, number, size):
            starts = windows.starts[first : first + size]
            kept = torch.from_numpy(windows.kept[first : first + size])
            # Row w * B + b is window w of clip b.
            stacked = torch.cat([clips[..., s : s + windows.num_samples] for s in starts])
            grid = self.front_end.grid(stacked.shape[-1])
            if augment is None:
                tokens = self.front_end(stacked)
            else:
                of_windows = [seed + window for window in range(len(starts)) for seed in seeds]
                tokens = augment.tokens(self.front_end, stacked, of_windows)
            attended = None
            if windows.mask_dropped:
                index = torch.arange(grid.num_tokens).expand(len(stacked), -1)
                valid = repeat(kept, "w t -> (w b) (t f)", b=len(clips), f=grid.num_freq)
                attended = TokenSet(index, valid).to(stacked.device)
            latents = self.encoder(tokens, grid, attended)
            shape = {"w": len(starts), "t": grid.num_time}
            columns = rearrange(latents, "(w b) (t f) d -> b (w t) f d", **shape)
            parts.append(columns[:, kept.flatten().to(columns.device)])
        return torch.cat(parts, dim=1), torch.from_numpy(windows.times).float()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the names of parameters, from the first layer to the last, for timm.

        Parameters without a match, those of the final norm, are in the last layer.
        """
        return {"stem": r"front_end|encoder\.registers", "blocks": r"encoder\.blocks\.(\d+)"}


class LinearPooling(nn.Module):
    """The mean over time of a clip, standardised, then a linear map; all weights start at 0."""

    mean: Tensor
    factor: Tensor

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("factor", torch.ones(width))

    def forward(
        self, frames: Float[Tensor, "n T D"], valid: Bool[Tensor, "n T"]
    ) -> Float[Tensor, "n C"]:
        """Logits of clips from their columns, of which all are valid."""
        return (frames.mean(dim=1) - self.mean) * self.factor @ self.weight + self.bias


class ClipNetwork(nn.Module):
    """Clips → logits: one row for each clip, or `grid_hz` rows per second for labels in time.

    Args:
        backbone: front end and encoder.
        kind: "linear": a linear map of the mean over time; "attentive": see `AttentivePooling`.
        num_outputs: number of logits of a row.
        frequency: how the frequency rows of a time column become one vector.
        grid_hz: rows per second; `None` for one row per clip.
        generator: draws the weights of an attentive head; all other weights of heads start at 0.

    Attributes:
        is_measured: whether the standardisation of the head has been measured.
    """

    is_measured: Tensor

    def __init__(
        self,
        backbone: Backbone,
        kind: Literal["linear", "attentive"],
        num_outputs: int,
        frequency: Frequency,
        grid_hz: float | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.backbone, self.frequency, self.grid_hz = backbone, frequency, grid_hz
        grid = backbone.front_end.grid(max(backbone.window_samples, backbone.min_samples))
        width = backbone.encoder.embed_dim * (grid.num_freq if frequency == "concat" else 1)
        if kind == "linear":
            self.head: nn.Module = LinearPooling(width, num_outputs)
        else:
            ones = torch.ones(width)
            identity = Standardisation(torch.stack([ones, -ones]))
            self.head = AttentivePooling(identity, num_outputs, generator)
        self.register_buffer("is_measured", torch.tensor(False))

    def forward(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Sequence[int],
        augment: SpecAugment | None = None,
        seeds: Sequence[int] = (),
    ) -> list[Float[Tensor, "_ O"]]:
        """The rows of each clip; samples after the end of a clip have no influence.

        Args:
            waveform: the clips, padded to S samples.
            lengths: number of samples of each clip.
            augment: see `Backbone`.
            seeds: see `Backbone`.
        """
        rows: dict[int, Tensor] = {}
        for clips, columns in self._columns(waveform, lengths, augment, seeds):
            if self.grid_hz is None:
                logits = self._logits(columns)[:, None]
            else:  # each frame is a clip of one column
                frames = columns.flatten(0, 1)[:, None]
                logits = self._logits(frames).unflatten(0, columns.shape[:2])
            rows |= dict(zip(clips, logits, strict=True))
        return [rows[clip] for clip in range(len(lengths))]

    def _logits(self, columns: Float[Tensor, "n T E"]) -> Float[Tensor, "n C"]:
        valid = torch.ones(columns.shape[:2], dtype=torch.bool, device=columns.device)
        return self.head(columns.float(), valid).float()

    def _columns(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Sequence[int],
        augment: SpecAugment | None,
        seeds: Sequence[int],
    ) -> list[tuple[list[int], Float[Tensor, "b T E"]]]:
        """Columns of the clips of each length, on the grid of the labels if they are in time.

        Clips of equal length are encoded together: the front end then never gets padding.
        """
        parts = []
        for length in sorted(set(lengths)):
            same = [clip for clip, of_clip in enumerate(lengths) if of_clip == length]
            size = len(same) if torch.is_grad_enabled() else _MAX_WINDOWS
            for clips in (same[first : first + size] for first in range(0, len(same), size)):
                of_clips = [seeds[clip] for clip in clips] if augment else []
                latents, times = self.backbone(waveform[clips, :, :length], augment, of_clips)
                columns = latents.mean(dim=2) if self.frequency == "mean" else latents.flatten(2)
                if self.grid_hz is not None:
                    grid = frame_times(length, self.backbone.front_end.sample_rate, self.grid_hz)
                    columns = interpolate(columns, times.float(), grid)
                parts.append((clips, columns))
        return parts

    @torch.no_grad()
    def measure(self, waveform: Float[Tensor, "B C S"], lengths: Sequence[int]) -> Tensor:
        """What the head standardises: the columns of clips, or for a linear head their means."""
        columns = [columns for _, columns in self._columns(waveform, lengths, None, ())]
        if isinstance(self.head, LinearPooling) and self.grid_hz is None:
            columns = [each.mean(dim=1, keepdim=True) for each in columns]
        return torch.cat([each.flatten(0, 1) for each in columns]).float().cpu()

    def standardise(self, rows: Float[Tensor, "n E"]) -> None:
        """Give the head the mean and the deviation of `rows`."""
        scale = Standardisation(rows)
        self.head.mean.copy_(scale.mean)  # type: ignore[operator]
        self.head.factor.copy_(scale.factor)  # type: ignore[operator]
        self.is_measured.fill_(True)


def frame_times(num_samples: int, sample_rate: int, grid_hz: float) -> Float[Tensor, " G"]:
    """Centres of the label frames of a clip in seconds; a clip has at least one."""
    num_frames = max(1, int(num_samples / sample_rate * grid_hz))
    return (torch.arange(num_frames) + 0.5) / grid_hz
