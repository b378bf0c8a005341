"""A pretrained encoder: audio of any length → the tokens of every layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.inference.features import LayerFeatures, pad_features
from jepa_audio.inference.windows import Windows, cut_as_wavjepa, cut_exact, pad_to_one_token
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import TokenSet
from jepa_audio.training.initialization import draw_weights


class Encoder(nn.Module):
    """Front end and encoder of a JEPA, without gradients and in evaluation mode.

    A clip longer than a training crop is encoded in windows as long as a crop. The position
    encodings are therefore the same as during training.

    Args:
        front_end: waveform → tokens.
        encoder: tokens → latents.
        window_samples: largest length of a window in samples: the length of a training crop.
        overlap: share of a window that overlaps with the next window, in [0, 1).
        windowing: "exact" for windows without padding (`cut_exact`), "wavjepa" for the windows of
            the published WavJEPA code (`cut_as_wavjepa`).
        max_windows: largest number of windows in one forward pass; it limits the memory.
        settings: class paths and arguments of `front_end` and `encoder`; `save_encoder` needs them.
        source: the run or the file of the weights, for messages.
        which: "context", "target" or "random": which encoder of a model it is.
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
        settings: Mapping[str, Any] | None = None,
        source: str = "",
        which: Literal["context", "target", "random"] = "context",
    ) -> None:
        super().__init__()
        if not 0 <= overlap < 1 or max_windows < 1:
            raise UserError(
                f"`overlap` ({overlap}) must be in [0, 1) and `max_windows` ({max_windows}) at "
                "least 1"
            )
        if windowing not in ("exact", "wavjepa") or (windowing == "wavjepa" and overlap):
            raise UserError(
                f"`windowing` ({windowing!r}) must be 'exact', or 'wavjepa' with `overlap` 0"
            )
        self.front_end, self.encoder, self.window_samples = front_end, encoder, window_samples
        self.overlap, self.windowing, self.max_windows = overlap, windowing, max_windows
        self.settings, self.source, self.which = settings, source, which
        self.requires_grad_(False).eval()

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms, in Hz."""
        return self.front_end.sample_rate

    @property
    def num_channels(self) -> int:
        """Audio channels of the waveforms."""
        return self.front_end.num_channels

    @cached_property
    def min_samples(self) -> int:
        """Samples of the shortest clip that is encoded without padding."""
        return self.front_end.min_samples

    @staticmethod
    def from_jepa(
        jepa: nn.Module, window_samples: int, which: Literal["context", "target"] = "context"
    ) -> Encoder:
        """A copy of the context encoder or of the target encoder of a `JEPA`."""
        parts = jepa.front_end, jepa.encoder
        if which == "target":
            parts = jepa.target_front_end or jepa.front_end, jepa.target_encoder
        stored = {name: jepa.hparams[name] for name in ("front_end", "encoder")}
        # Modules that were made without a configuration have no settings.
        settings = stored if all(isinstance(each, dict) for each in stored.values()) else None
        return Encoder(
            *copy.deepcopy(parts), window_samples, settings=copy.deepcopy(settings), which=which
        )

    def random_twin(self, seed: int) -> Encoder:
        """The random-init baseline: the same network, initialised as by `JEPA.reset_parameters`."""
        twin = copy.deepcopy(self).cpu()
        draw_weights((twin.front_end, twin.encoder), seed)
        twin.source, twin.which = f"random weights of seed {seed}, as in {self.source}", "random"
        return twin

    @torch.inference_mode()
    def encode_batch(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        layers: Sequence[int] | None = None,
    ) -> LayerFeatures:
        """Features of a batch of clips; samples after the end of a clip have no influence.

        A clip that is too short for one token (shorter than `min_samples`) is padded with zeros at
        its end, as in training, and has one column; see `pad_to_one_token`.

        Args:
            waveform: the clips, at `sample_rate`.
            lengths: number of samples of each clip; `None` if all clips have S samples.
            layers: indices of the layers to return, such as `[-1]` for the last; `None` for all.

        Raises:
            UserError: if a clip has no samples.
        """
        if lengths is None:
            lengths = torch.full((len(waveform),), waveform.shape[-1])
        if int(lengths.min()) < 1:
            raise UserError("a clip of 0 samples cannot be encoded: remove it")
        # Clips of equal length are encoded together: the front end then never gets padding.
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
        parts = [
            self._encode_equal(waveform[rows, :, : int(lengths[rows[0]])], layers)
            for rows in groups
        ]
        if len(groups) > 1:
            return pad_features(groups, parts)
        ((all_layers, times),) = parts
        times = times.to(waveform.device).expand(len(waveform), -1)
        return LayerFeatures(all_layers, times, torch.ones_like(times, dtype=torch.bool))

    def _encode_equal(
        self, clips: Float[Tensor, "B C S"], layers: Sequence[int] | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Layers `[B, T, F, D]` and times `[T]` of clips of equal length."""
        if len(clips) > self.max_windows:
            parts = [self._encode_equal(part, layers) for part in clips.split(self.max_windows)]
            by_layer = zip(*(part_layers for part_layers, _ in parts), strict=True)
            return tuple(map(torch.cat, by_layer)), parts[0][1]
        if self.windowing == "wavjepa":
            windows = cut_as_wavjepa(clips, self.front_end, self.window_samples)
        elif clips.shape[-1] < self.min_samples:
            windows = pad_to_one_token(clips, self.front_end, self.min_samples)
        else:
            windows = cut_exact(clips, self.front_end, self.window_samples, self.overlap)
        return self._encode_windows(windows, layers), windows.times

    def _encode_windows(
        self, windows: Windows, layers: Sequence[int] | None
    ) -> tuple[Float[Tensor, "B _ F D"], ...]:
        """The kept columns of all windows, concatenated in time."""
        batch_size = len(windows.waveforms[0])
        chunk_size = max(1, self.max_windows // batch_size)
        joined: list[Tensor] = []
        done = 0
        for first in range(0, len(windows.waveforms), chunk_size):
            chunk = slice(first, first + chunk_size)
            parts = self._encode_chunk(windows, chunk, layers)
            if not joined:
                # Allocate the result once; `torch.cat` at the end would need twice the memory.
                size = batch_size, len(windows.times)
                joined = [part.new_empty(*size, *part.shape[2:]) for part in parts]
            end = done + int(windows.kept[chunk].sum())
            for layer, part in zip(joined, parts, strict=True):
                layer[:, done:end] = part
            done = end
        return tuple(joined)

    def _encode_chunk(
        self, windows: Windows, chunk: slice, layers: Sequence[int] | None
    ) -> list[Float[Tensor, "B _ F D"]]:
        """The kept columns of the windows in `chunk`, encoded in one forward pass."""
        waveforms, kept = windows.waveforms[chunk], windows.kept[chunk]
        stacked = torch.stack(list(waveforms)).flatten(0, 1)  # [W * B, C, S]
        grid = self.front_end.grid(stacked.shape[-1])
        tokens = self.front_end(stacked)
        attended = None
        if windows.mask_dropped:
            index = torch.arange(grid.num_tokens).expand(len(stacked), -1)
            valid = repeat(kept, "w t -> (w b) (t f)", b=len(waveforms[0]), f=grid.num_freq)
            attended = TokenSet(index, valid).to(stacked.device)
        blocks = self.encoder.forward_layers(tokens, grid, attended)
        first, last = self.encoder.add_positions(tokens, grid), self.encoder.norm(blocks[-1])
        outputs = [first, *blocks[:-1], last]
        chosen = outputs if layers is None else [outputs[layer] for layer in layers]
        columns = kept.flatten().to(stacked.device)
        shape = {"w": len(waveforms), "t": grid.num_time}
        joined = (rearrange(x, "(w b) (t f) d -> b (w t) f d", **shape) for x in chosen)
        return [layer[:, columns] for layer in joined]
