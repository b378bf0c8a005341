"""Waveforms at the rate of an encoder → the tokens of every layer, in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import groupby, islice
from numbers import Integral, Real
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from jepa_audio.errors import UserError
from jepa_audio.inference.features import LayerFeatures, pad_features
from jepa_audio.inference.windows import (
    Windows,
    exact_windows,
    padded_window,
    windows_as_wavjepa,
)
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import Grid, TokenSet

Windowing = Literal["exact", "wavjepa"]
# Clips below this RMS level are not scaled, as in training.
_SILENCE_RMS = 1e-5
# Windows of clips that are kept in memory: number of clips, and columns of a clip.
_NUM_PLANS, _MAX_COLUMNS = 256, 100_000


class WindowedEncoder(nn.Module):
    """Front end and encoder; a clip longer than a training crop is encoded in windows.

    See `Encoder` for the arguments.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        encoder: Transformer,
        window_samples: int,
        *,
        overlap: float,
        windowing: Windowing,
        max_windows: int,
        loudness_dbfs: float | None = None,
    ) -> None:
        super().__init__()
        is_number = isinstance(overlap, Real) and isinstance(max_windows, Integral)
        if not is_number or not 0 <= overlap < 1 or max_windows < 1:
            raise UserError(
                f"`overlap` ({overlap!r}) must be a number in [0, 1) and `max_windows` "
                f"({max_windows!r}) a whole number of at least 1"
            )
        if windowing not in ("exact", "wavjepa") or (windowing == "wavjepa" and overlap):
            raise UserError(
                f"`windowing` ({windowing!r}) must be 'exact', or 'wavjepa' with `overlap` 0"
            )
        self.front_end, self.encoder, self.window_samples = front_end, encoder, window_samples
        self.overlap, self.windowing, self.max_windows = overlap, windowing, max_windows
        self.loudness_dbfs = loudness_dbfs
        # The windows of some lengths of clips: during `torch.export`, they cannot be computed.
        self._plans: dict[tuple[object, ...], Windows] = {}

    @cached_property
    def min_samples(self) -> int:
        """Samples of the shortest clip that is encoded without padding."""
        return self.front_end.min_samples

    @property
    def is_frozen(self) -> bool:
        """Whether no weight gets gradients."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def encode_batch(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        layers: Sequence[int] | None = None,
    ) -> LayerFeatures:
        """Features of a batch of clips; samples after the end of a clip have no influence.

        A clip that is too short for one token (shorter than `min_samples`) is padded with zeros at
        its end, as in training, and has one column; see `padded_window`. `torch.export` needs
        `lengths` `None`, and one earlier call with the same number of samples.

        Args:
            waveform: the clips, at the sample rate of the encoder.
            lengths: number of samples of each clip; `None` if all clips have S samples.
            layers: indices of the layers to return, such as `[-1]` for the last; `None` for all.

        Raises:
            UserError: if a clip has no samples.
        """
        if waveform.shape[-1] < 1 or (lengths is not None and int(lengths.min()) < 1):
            raise UserError("a clip of 0 samples cannot be encoded: remove it")
        if lengths is None:
            return self._encode_equal(waveform, layers)
        clips = [clip[:, :length] for clip, length in zip(waveform, lengths.tolist(), strict=True)]
        return pad_features(list(self.encode_clips(clips, layers)))

    def encode_clips(
        self, clips: Sequence[Float[Tensor, "C _"]], layers: Sequence[int] | None
    ) -> Iterator[tuple[list[int], LayerFeatures]]:
        """Groups of clips, as indices, and their features.

        The front end never gets padding. Windows without padding are equally long for all clips
        that are longer than a window, so these clips are encoded together. The tokens of clips that
        fit into a window are padded and encoded together, and attention excludes the padding;
        without positions that depend on the length of the clip, nothing else connects the tokens.
        """
        by_length: dict[int, list[int]] = {}
        for row, clip in enumerate(clips):
            by_length.setdefault(clip.shape[-1], []).append(row)
        longest = max(self.window_samples, self.min_samples - 1)
        long = [length for length in by_length if length > longest]
        if self.windowing == "exact" and len(long) > 1:
            rows = sorted(row for length in long for row in by_length.pop(length))
            features = self._encode_mixed([clips[row] for row in rows], layers)
            yield from zip(([row] for row in rows), features, strict=True)
        short = sorted(length for length in by_length if self.min_samples <= length <= longest)
        is_exact = self.windowing == "exact" and not self.encoder.positions.depend_on_length
        if is_exact and len(short) > 1:
            rows = [row for length in short for row in by_length.pop(length)]
            for first in range(0, len(rows), self.max_windows):
                group = rows[first : first + self.max_windows]
                yield group, self._encode_padded([clips[row] for row in group], layers)
        for _, rows in sorted(by_length.items()):
            yield rows, self._encode_equal(torch.stack([clips[row] for row in rows]), layers)

    def stream(
        self,
        read: Callable[[int, int], Float[Tensor, "B C _"]],
        num_samples: int,
        layers: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> Iterator[tuple[list[Float[Tensor, "B _ F D"]], Float[np.ndarray, " _"]]]:
        """Layers and times of clips of equal length in parts, which together are all features.

        Args:
            read: returns the samples from one number up to another.
            num_samples: length of the clips.
            layers: see `encode_batch`.
            batch_size: number of clips.
        """
        windows = self._windows(num_samples)
        gain = None
        if windows.rms_dbfs is not None:
            gain = _gain(_mean_square(read, num_samples), windows.rms_dbfs)
        elif self.loudness_dbfs is not None:
            gain = _gain(_mean_square(read, num_samples), self.loudness_dbfs, _SILENCE_RMS)
        size, done = max(1, self.max_windows // batch_size), 0
        for first in range(0, len(windows.starts), size):
            starts, kept = windows.starts[first : first + size], windows.kept[first : first + size]
            if not kept.any():
                continue
            begin, end = starts[0], starts[-1] + windows.num_samples
            waveform = read(begin, min(end, num_samples))
            if gain is not None:
                waveform = waveform * gain
            waveform = F.pad(waveform, (0, end - begin - waveform.shape[-1]))
            slices = [waveform[..., s - begin : s - begin + windows.num_samples] for s in starts]
            stacked = torch.stack(slices).flatten(0, 1)  # [W * B, C, S]
            outputs = self._encode_stacked(stacked, kept if windows.mask_dropped else None, layers)
            parts = [rearrange(x, "(w b) t f d -> b (w t) f d", w=len(starts)) for x in outputs]
            if not kept.all():
                columns = torch.tensor(np.flatnonzero(kept).tolist(), device=stacked.device)
                parts = [part[:, columns] for part in parts]
            last = done + int(kept.sum())
            yield parts, windows.times[done:last]
            done = last

    def num_columns(self, num_samples: int) -> int:
        """Number of time columns of a clip."""
        return len(self._windows(num_samples).times)

    def _encode_equal(
        self, clips: Float[Tensor, "B C S"], layers: Sequence[int] | None
    ) -> LayerFeatures:
        """The features of clips of equal length."""
        num_samples = clips.shape[-1]
        times = self._windows(num_samples).times
        groups: list[list[Tensor]] = []
        for group in clips.split(self.max_windows):
            joined: list[Tensor] = []
            done = 0

            def read(start: int, stop: int, group: Tensor = group) -> Tensor:
                return group[..., start:stop]

            for parts, part_times in self.stream(read, num_samples, layers, len(group)):
                if len(part_times) == len(times):
                    joined = parts
                    break
                if not joined:
                    # Allocate the result once; `torch.cat` at the end would need twice the memory.
                    size = len(group), len(times)
                    joined = [part.new_empty(*size, *part.shape[2:]) for part in parts]
                for layer, part in zip(joined, parts, strict=True):
                    layer[:, done : done + len(part_times)] = part
                done += len(part_times)
            groups.append(joined)
        joined = groups[0] if len(groups) == 1 else list(map(torch.cat, zip(*groups, strict=True)))
        return _features(joined, times)

    def _encode_mixed(
        self, clips: Sequence[Float[Tensor, "C _"]], layers: Sequence[int] | None
    ) -> Iterator[LayerFeatures]:
        """The features of each clip; every clip is longer than a window."""
        clips = [scale_loudness(clip[None], self.loudness_dbfs)[0] for clip in clips]
        plans = [self._windows(clip.shape[-1]) for clip in clips]
        windows = (
            (clip[:, start : start + plan.num_samples], kept)
            for clip, plan in zip(clips, plans, strict=True)
            for start, kept in zip(plan.starts, plan.kept, strict=True)
        )
        pieces: list[list[Tensor]] = []
        number = 0
        while batch := list(islice(windows, self.max_windows)):
            outputs = self._encode_stacked(torch.stack([each for each, _ in batch]), None, layers)
            for row, (_, kept) in enumerate(batch):
                columns = np.flatnonzero(kept)
                first, end = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
                pieces.append([output[row, first:end] for output in outputs])
                if len(pieces) == len(plans[number].starts):
                    joined = [torch.cat(layer)[None] for layer in zip(*pieces, strict=True)]
                    yield _features(joined, plans[number].times)
                    pieces, number = [], number + 1

    def _encode_padded(
        self, clips: Sequence[Float[Tensor, "C _"]], layers: Sequence[int] | None
    ) -> LayerFeatures:
        """The features of clips in the order of their lengths; each fits into one window."""
        clips = [scale_loudness(clip[None], self.loudness_dbfs)[0] for clip in clips]
        times = [torch.from_numpy(self._windows(clip.shape[-1]).times).float() for clip in clips]
        with self._gradients(*clips):
            equal = [torch.stack(list(each)) for _, each in groupby(clips, lambda c: c.shape[-1])]
            tokens = [row for each in equal for row in self.front_end(each)]
            padded = pad_sequence(tokens, batch_first=True)
            grid = self.front_end.grid(clips[-1].shape[-1])
            columns = torch.tensor([len(each) for each in times], device=padded.device)
            valid = torch.arange(grid.num_time, device=padded.device) < columns[:, None]
            index = torch.arange(grid.num_tokens, device=padded.device).expand(len(clips), -1)
            keep = TokenSet(index, repeat(valid, "r t -> r (t f)", f=grid.num_freq))
            outputs = self._encode_tokens(padded, grid, keep, layers)
            zero = ~valid[..., None, None]
            outputs = [output.masked_fill(zero, 0) for output in outputs]
        padded_times = pad_sequence(times, batch_first=True).to(padded.device)
        return LayerFeatures(tuple(outputs), padded_times, valid)

    def _encode_stacked(
        self,
        waveforms: Float[Tensor, "R C S"],
        attended: Bool[np.ndarray, "W T"] | None,
        layers: Sequence[int] | None,
    ) -> list[Float[Tensor, "R T F D"]]:
        """The layers of equally long windows, in one forward pass.

        Row w * B + b is window w of clip b; only the `attended` columns of the windows take part.
        """
        with self._gradients(waveforms):
            grid = self.front_end.grid(waveforms.shape[-1])
            keep = None
            if attended is not None:
                index = torch.arange(grid.num_tokens).expand(len(waveforms), -1)
                clips = len(waveforms) // len(attended)
                shape = {"b": clips, "f": grid.num_freq}
                valid = repeat(torch.from_numpy(attended), "w t -> (w b) (t f)", **shape)
                keep = TokenSet(index, valid).to(waveforms.device)
            return self._encode_tokens(self.front_end(waveforms), grid, keep, layers)

    def _encode_tokens(
        self,
        tokens: Float[Tensor, "R N D"],
        grid: Grid,
        keep: TokenSet | None,
        layers: Sequence[int] | None,
    ) -> list[Float[Tensor, "R T F D"]]:
        # The blocks of an exported model can have half precision.
        tokens = tokens.to(self.encoder.norm.weight.dtype)
        blocks = self.encoder.forward_layers(tokens, grid, keep)
        first, last = self.encoder.add_positions(tokens, grid), self.encoder.norm(blocks[-1])
        outputs = [first, *blocks[:-1], last]
        chosen = outputs if layers is None else [outputs[layer] for layer in layers]
        return [rearrange(x, "r (t f) d -> r t f d", t=grid.num_time) for x in chosen]

    def _gradients(self, *waveforms: Tensor) -> AbstractContextManager[object]:
        """Without a need for gradients, the blocks also keep nothing for activation checkpoints."""
        is_needed = any(each.requires_grad for each in waveforms) or not self.is_frozen
        return nullcontext() if is_needed or not torch.is_grad_enabled() else torch.no_grad()

    def _windows(self, num_samples: int) -> Windows:
        key = num_samples, self.window_samples, self.overlap, self.windowing
        plan = self._plans.get(key)
        if plan is None:
            if self.windowing == "wavjepa":
                plan = windows_as_wavjepa(num_samples, self.front_end, self.window_samples)
            elif num_samples < self.min_samples:
                plan = padded_window(num_samples, self.front_end, self.min_samples)
            else:
                plan = exact_windows(num_samples, self.front_end, self.window_samples, self.overlap)
            while len(self._plans) >= _NUM_PLANS:
                self._plans.pop(next(iter(self._plans)))
            if len(plan.times) <= _MAX_COLUMNS:
                self._plans[key] = plan
        return plan


def _features(layers: Sequence[Float[Tensor, "B T F D"]], times: np.ndarray) -> LayerFeatures:
    on_device = torch.tensor(times.tolist(), device=layers[0].device).expand(len(layers[0]), -1)
    return LayerFeatures(tuple(layers), on_device, torch.ones_like(on_device, dtype=torch.bool))


def scale_loudness(clips: Float[Tensor, "B C S"], dbfs: float | None) -> Float[Tensor, "B C S"]:
    """Scale each clip to an RMS level, as in training with `data.loudness_dbfs`.

    Silence (an RMS below 1e-5) is not scaled; `None` scales nothing.
    """
    if dbfs is None:
        return clips
    mean_square = clips.square().mean(dim=(1, 2), keepdim=True)
    return clips * _gain(mean_square, dbfs, _SILENCE_RMS)


def _mean_square(
    read: Callable[[int, int], Float[Tensor, "B C _"]], num_samples: int
) -> Float[Tensor, "B 1 1"]:
    """The mean square of all samples of each clip, read in parts."""
    step = 1 << 22
    if num_samples <= step:
        return read(0, num_samples).square().mean(dim=(1, 2), keepdim=True)
    squares = [
        read(start, min(start + step, num_samples)).square().sum(dim=(1, 2), keepdim=True)
        / num_samples
        for start in range(0, num_samples, step)
    ]
    return torch.stack(squares).sum(dim=0) / read(0, 1).shape[1]


def _gain(
    mean_square: Float[Tensor, "B 1 1"], dbfs: float, silence_rms: float = 0.0
) -> Float[Tensor, "B 1 1"]:
    """The factor that scales each clip to a level; 1 for silence."""
    rms = mean_square.sqrt()
    gain = 10 ** (dbfs / 20) / rms.clamp(min=1e-8)
    return torch.where(rms < silence_rms, torch.ones_like(gain), gain)
