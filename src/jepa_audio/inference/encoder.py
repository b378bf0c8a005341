"""Frozen features: a waveform of any length → every layer's tokens, with their times."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import Grid, TokenSet
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.load import load_jepa, read_checkpoint


class Encoder(nn.Module):
    """Front end and encoder, ready for use: no gradient, evaluation mode.

    Clips longer than the crops of the training are cut into windows of that length, in which
    positions mean what they meant then.

    Args:
        front_end: waveform → tokens.
        encoder: tokens → latents.
        window_samples: longest stretch encoded at once, the crop length of the training.
        overlap: share of a window that the next one hears again, in [0, 1).
        windowing: "exact": the last window ends with the clip, where windows overlap a column is
            taken from the one in which it lies farther from the border, and padding never changes a
            value. "wavjepa": as the published WavJEPA is used: level -14 dBFS, the last window
            filled up with zeros that its normalisation sees (a whole window of them where the clip
            ends with one), their tokens attended by nobody, and cut.
        max_windows: windows encoded at the same time, which bounds the memory.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        encoder: Transformer,
        window_samples: int,
        *,
        overlap: float = 0.0,
        windowing: Literal["exact", "wavjepa"] = "exact",
        max_windows: int = 64,
    ) -> None:
        super().__init__()
        if not 0 <= overlap < 1 or max_windows < 1:
            raise UserError(
                f"`overlap` ({overlap}) must be in [0, 1) and `max_windows` ({max_windows}) at least 1"
            )
        if windowing not in ("exact", "wavjepa") or (windowing == "wavjepa" and overlap):
            raise UserError(
                f"`windowing` ({windowing!r}) must be 'exact' or 'wavjepa', the latter with `overlap` 0"
            )
        self.front_end, self.encoder, self.window_samples = front_end, encoder, window_samples
        self.overlap, self.windowing, self.max_windows = overlap, windowing, max_windows
        self.requires_grad_(False).eval()

    @property
    def sample_rate(self) -> int:
        """In Hz, of the waveforms it takes."""
        return self.front_end.sample_rate

    @property
    def num_channels(self) -> int:
        """Audio channels that it takes."""
        return self.front_end.num_channels

    @staticmethod
    def from_jepa(
        jepa: JEPA, window_samples: int, which: Literal["context", "target"] = "context"
    ) -> Encoder:
        """A copy of the context encoder, or of the target encoder, of a model in memory."""
        return Encoder(*copy.deepcopy(_parts(jepa, which)), window_samples)

    def random_twin(self, seed: int) -> Encoder:
        """The same network with the weights that `JEPA.reset_parameters(seed)` gives."""
        twin = copy.deepcopy(self).cpu()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            twin.front_end.reset_parameters()  # in the module's order
            twin.encoder.reset_parameters()
        return twin

    @torch.inference_mode()
    def encode(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        layers: Sequence[int] | None = None,
    ) -> LayerFeatures:
        """Features of clips of `lengths` samples (all of S, if `None`); samples beyond a clip's length change nothing.

        Args:
            waveform: at `sample_rate`.
            lengths: samples of each clip.
            layers: places of the layers to keep, such as `[-1]` for the last one; all if `None`.

        Raises:
            UserError: if a clip is shorter than one token.
        """
        if lengths is None:
            lengths = torch.full((len(waveform),), waveform.shape[-1])
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
        parts = [
            self._encode_equal(waveform[rows, :, : int(lengths[rows[0]])], layers)
            for rows in groups
        ]
        if len(groups) == 1:
            ((whole, times),) = parts
            times = times.to(waveform.device).expand(len(waveform), -1)
            return LayerFeatures(whole, times, torch.ones_like(times, dtype=torch.bool))
        return _filled_up(groups, parts)

    def _encode_equal(
        self, waveform: Tensor, layers: Sequence[int] | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Clips of one length: no front end sees padding, unless it is asked to."""
        if len(waveform) > self.max_windows:
            parts = [
                self._encode_equal(clips, layers) for clips in waveform.split(self.max_windows)
            ]
            return tuple(map(torch.cat, zip(*(part for part, _ in parts), strict=True))), parts[0][
                1
            ]
        if self.windowing == "wavjepa":
            return self._encode_as_wavjepa(waveform, layers)
        num_samples = waveform.shape[-1]
        window = min(self.window_samples, num_samples)
        hop = max(1, round(window * (1 - self.overlap)))
        starts = [*range(0, num_samples - window, hop), num_samples - window]
        start = torch.tensor(starts)[:, None] / self.sample_rate
        times = start + self.front_end.times(window)  # [windows, T]
        border = (
            start[1:] + start[:-1] + window / self.sample_rate
        ) / 2  # the middle of what two windows both hear
        own = torch.ones_like(times, dtype=torch.bool)
        own[1:] &= times[1:] >= border
        own[:-1] &= times[:-1] < border
        windows = (waveform[..., first : first + window] for first in starts)
        kept = self._encode_windows(windows, len(waveform), layers, own)
        return kept, times[own]

    def _encode_windows(
        self,
        windows: Iterable[Float[Tensor, "B C S"]],
        batch: int,
        layers: Sequence[int] | None,
        own: Bool[Tensor, "W T"],
        attended: Bool[Tensor, "W T"] | None = None,
    ) -> tuple[Float[Tensor, "B _ F D"], ...]:
        """The columns of every window that are its own, one window after the other."""
        whole: list[Tensor] = []
        windows, done, filled = iter(windows), 0, 0
        while chunk := list(islice(windows, max(1, self.max_windows // batch))):
            some = slice(done, done + len(chunk))
            done += len(chunk)
            stacked = torch.stack(chunk).flatten(0, 1)  # [windows * B, C, S]
            grid = self.front_end.grid(stacked.shape[-1])
            keep = (
                None
                if attended is None
                else _with_valid(attended[some], grid, batch, stacked.device)
            )
            outputs = self._layers(self.front_end(stacked), grid, keep)
            columns = own[some].flatten().to(stacked.device)
            shape = {"w": len(chunk), "t": grid.num_time}
            chosen = outputs if layers is None else [outputs[layer] for layer in layers]
            parts = [
                rearrange(x, "(w b) (t f) d -> b (w t) f d", **shape)[:, columns] for x in chosen
            ]
            if (
                not whole
            ):  # all of it at once: to put parts together at the end would take the room twice
                whole = [part.new_empty(batch, int(own.sum()), *part.shape[2:]) for part in parts]
            for layer, part in zip(whole, parts, strict=True):
                layer[:, filled : filled + part.shape[1]] = part
            filled += int(own[some].sum())
        return tuple(whole)

    def _layers(self, tokens: Tensor, grid: Grid, keep: TokenSet | None) -> list[Tensor]:
        blocks = self.encoder.forward_layers(tokens, grid, keep)
        return [
            self.encoder.add_positions(tokens, grid),
            *blocks[:-1],
            self.encoder.norm(blocks[-1]),
        ]

    def _encode_as_wavjepa(
        self, waveform: Tensor, layers: Sequence[int] | None
    ) -> tuple[tuple[Tensor, ...], Float[Tensor, " T"]]:
        num_samples, window = waveform.shape[-1], self.window_samples
        rms = waveform.square().mean(dim=(1, 2), keepdim=True).sqrt()
        padding = window - num_samples % window  # never 0
        padded = F.pad(waveform * (10 ** (-14 / 20) / rms.clamp(min=1e-8)), (0, padding))
        windows = padded.unfold(-1, window, window).unbind(2)
        seconds, per_window = window / self.sample_rate, self.front_end.grid(window).num_time
        surplus = int(padding / self.sample_rate * int(per_window / seconds))
        num_columns = len(windows) * per_window - surplus
        own = (torch.arange(len(windows) * per_window) < num_columns).unflatten(
            0, (len(windows), per_window)
        )
        kept = self._encode_windows(windows, len(waveform), layers, own, attended=own)
        return kept, torch.arange(num_columns) * (num_samples / self.sample_rate / num_columns)


def _filled_up(
    groups: list[Tensor], parts: list[tuple[tuple[Tensor, ...], Tensor]]
) -> LayerFeatures:
    """Clips of different lengths in one batch, the shorter ones filled up with zeros."""
    first = parts[0][0]
    shape = (sum(map(len, groups)), max(len(times) for _, times in parts))
    layers = tuple(layer.new_zeros(*shape, *layer.shape[2:]) for layer in first)
    times = torch.zeros(shape, device=first[0].device)
    valid = torch.zeros(shape, dtype=torch.bool, device=first[0].device)
    for rows, (part, own_times) in zip(groups, parts, strict=True):
        columns = len(own_times)
        times[rows, :columns], valid[rows, :columns] = own_times.to(times), True
        for whole, layer in zip(layers, part, strict=True):
            whole[rows, :columns] = layer
    return LayerFeatures(layers, times, valid)


def _with_valid(
    columns: Bool[Tensor, "W T"], grid: Grid, batch: int, device: torch.device
) -> TokenSet:
    """All tokens of some windows of a batch of clips, those in other columns as filling."""
    valid = columns.repeat_interleave(grid.num_freq, dim=1).repeat_interleave(batch, dim=0)
    index = torch.arange(grid.num_tokens).expand(len(valid), -1)
    return TokenSet(index.to(device), valid.to(device))


def _parts(jepa: JEPA, which: Literal["context", "target"]) -> tuple[FrontEnd, Transformer]:
    if which == "target":
        return jepa.target_front_end or jepa.front_end, jepa.target_encoder
    return jepa.front_end, jepa.encoder


def num_crop_samples(checkpoint: Path, jepa: JEPA) -> int:
    """Samples of a crop of the run that a checkpoint is of; `ValueError` if it does not tell."""
    stored = read_checkpoint(checkpoint)
    seconds = stored.get("datamodule_hyper_parameters", {}).get("crop_seconds")
    if seconds is None:
        raise UserError(
            f"{checkpoint} does not tell `crop_seconds`, the clip length it was trained on"
        )
    return round(seconds * jepa.front_end.sample_rate)


def load_encoder(
    checkpoint: Path,
    which: Literal["context", "target", "random"] = "context",
    random_seed: int | None = None,
    *,
    overlap: float = 0.0,
    windowing: Literal["exact", "wavjepa"] = "exact",
    max_windows: int = 64,
) -> Encoder:
    """The frozen encoder of a checkpoint, or its random-init twin.

    Args:
        checkpoint: a `.ckpt` written by `jepa-audio fit`.
        which: "context" or "target" encoder, or "random": the same network with the weights it had
            before step 0.
        random_seed: seed of the twin's weights; `None` for the seed of the run itself.
        overlap: see `Encoder`.
        windowing: see `Encoder`.
        max_windows: see `Encoder`.

    Raises:
        UserError: if there is no such file.
        UserError: if the file holds no training crop length.
    """
    if which not in ("context", "target", "random"):
        raise UserError(f"`which` ({which!r}) must be 'context', 'target' or 'random'")
    jepa = load_jepa(checkpoint)
    frozen = Encoder(
        *_parts(jepa, "target" if which == "target" else "context"),
        num_crop_samples(checkpoint, jepa),
        overlap=overlap,
        windowing=windowing,
        max_windows=max_windows,
    )
    return (
        frozen.random_twin(jepa.seed if random_seed is None else random_seed)
        if which == "random"
        else frozen
    )
