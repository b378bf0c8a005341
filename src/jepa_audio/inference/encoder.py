"""A pretrained encoder: audio of any length → the tokens of every layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.errors import MAX_SECONDS, UserError
from jepa_audio.inference.features import LayerFeatures, pad_features
from jepa_audio.inference.windows import Windows, cut_as_wavjepa, cut_exact, pad_to_one_token
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import TokenSet
from jepa_audio.training.initialization import draw_weights
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.load import load_jepa, read_checkpoint


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
                f"`overlap` ({overlap}) must be in [0, 1) and `max_windows` ({max_windows}) at "
                "least 1"
            )
        if windowing not in ("exact", "wavjepa") or (windowing == "wavjepa" and overlap):
            raise UserError(
                f"`windowing` ({windowing!r}) must be 'exact', or 'wavjepa' with `overlap` 0"
            )
        self.front_end, self.encoder, self.window_samples = front_end, encoder, window_samples
        self.overlap, self.windowing, self.max_windows = overlap, windowing, max_windows
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
        jepa: JEPA, window_samples: int, which: Literal["context", "target"] = "context"
    ) -> Encoder:
        """A copy of the context encoder or of the target encoder of a model."""
        return Encoder(*copy.deepcopy(_parts(jepa, which)), window_samples)

    def random_twin(self, seed: int) -> Encoder:
        """The random-init baseline: the same network, initialised as by `JEPA.reset_parameters`."""
        twin = copy.deepcopy(self).cpu()
        draw_weights((twin.front_end, twin.encoder), seed)
        return twin

    @torch.inference_mode()
    def encode(
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


def _parts(jepa: JEPA, which: Literal["context", "target"]) -> tuple[FrontEnd, Transformer]:
    if which == "target":
        return jepa.target_front_end or jepa.front_end, jepa.target_encoder
    return jepa.front_end, jepa.encoder


def num_crop_samples(checkpoint: Path, jepa: JEPA, trust: Sequence[str] = ()) -> int:
    """Samples of a training crop of the run that wrote a checkpoint.

    Raises:
        UserError: if the checkpoint does not contain `crop_seconds`, or an impossible value.
    """
    settings = read_checkpoint(checkpoint, trust).get("datamodule_hyper_parameters", {})
    seconds = settings.get("crop_seconds") if isinstance(settings, dict) else None
    if seconds is None:
        raise UserError(
            f"{checkpoint} does not contain `crop_seconds`, the length of a training crop: "
            "use a checkpoint of `jepa-audio fit` or `jepa-audio import`"
        )
    if not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise UserError(
            f"{checkpoint}: `crop_seconds` ({seconds!r}) must be a number in (0, {MAX_SECONDS}]"
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
    trust: Sequence[str] = (),
) -> Encoder:
    """The encoder of a checkpoint, or its random-init baseline.

    Args:
        checkpoint: a `.ckpt` file that `jepa-audio fit` or `jepa-audio import` wrote.
        which: "context" for the context encoder, "target" for the target encoder, "random" for the
            context encoder with its weights of step 0.
        random_seed: seed of the random weights; `None` for the seed of the run.
        overlap: see `Encoder`.
        windowing: see `Encoder`.
        max_windows: see `Encoder`.
        trust: modules whose classes the checkpoint may name, besides jepa_audio and torch.optim.

    Raises:
        UserError: if the file does not exist, is not a checkpoint of a run, or names other classes.
    """
    if which not in ("context", "target", "random"):
        raise UserError(f"`which` ({which!r}) must be 'context', 'target' or 'random'")
    jepa = load_jepa(checkpoint, trust)
    encoder = Encoder(
        *_parts(jepa, "target" if which == "target" else "context"),
        num_crop_samples(checkpoint, jepa, trust),
        overlap=overlap,
        windowing=windowing,
        max_windows=max_windows,
    )
    if which != "random":
        return encoder
    return encoder.random_twin(jepa.seed if random_seed is None else random_seed)
