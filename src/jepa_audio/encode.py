"""Frozen features: a waveform of any length → every layer's tokens, with their times."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jepa_audio.front_ends import FrontEnd
from jepa_audio.jepa import JEPA
from jepa_audio.transformer import Encoder


@dataclass(frozen=True)
class LayerFeatures:
    """What a frozen encoder says of a batch of clips.

    Attributes:
        layers: one tensor `[B, T, F, D]` for each layer: 0 is what enters the first block, then the output of every
            block; the last one is taken after the final norm.
        times: centre of every time column in seconds, `[B, T]`, rising along a clip.
        valid: True where a column belongs to the clip, `[B, T]`; the columns that fill up a shorter clip are zeros.
    """

    layers: tuple[Float[Tensor, "B T F D"], ...]
    times: Float[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]

    def pool(self, frequency: Literal["mean", "concat"] = "mean") -> list[Float[Tensor, "B E"]]:
        """The mean over time of every layer; frequency rows are averaged, or kept side by side (E = F * D)."""
        weight = self.valid / self.valid.sum(dim=1, keepdim=True)  # [B, T]
        pooled = [torch.einsum("btfd,bt->bfd", layer, weight.to(layer.dtype)) for layer in self.layers]
        return [rows.mean(dim=1) if frequency == "mean" else rows.flatten(1) for rows in pooled]


class FrozenEncoder(nn.Module):
    """Front end and encoder, ready for use: no gradient, evaluation mode.

    Args:
        front_end: waveform → tokens.
        encoder: tokens → latents.
        window_samples: longest stretch encoded at once, the crop length of the training: positions mean what they
            meant then. Longer clips are cut into windows of that length, one after the other; the last one ends with
            the clip, and of its columns those are dropped whose time the window before it has told already.
    """

    def __init__(self, front_end: FrontEnd, encoder: Encoder, window_samples: int) -> None:
        super().__init__()
        self.front_end, self.encoder, self.window_samples = front_end, encoder, window_samples
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
    def from_jepa(jepa: JEPA, window_samples: int, which: Literal["context", "target"] = "context") -> FrozenEncoder:
        """A copy of the context encoder, or of the target encoder, of a model in memory."""
        parts = (jepa.front_end, jepa.encoder)
        if which == "target":
            parts = (jepa.target_front_end or jepa.front_end, jepa.target_encoder)
        return FrozenEncoder(*copy.deepcopy(parts), window_samples)

    def random_twin(self, seed: int) -> FrozenEncoder:
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
    ) -> LayerFeatures:
        """Features of clips of `lengths` samples (all of S, if `None`); samples beyond a clip's length change nothing.

        Raises:
            ValueError: if a clip is shorter than one token.
        """
        if lengths is None or bool((lengths == waveform.shape[-1]).all()):
            layers, times = self._encode_equal(waveform)
            times = times.expand(len(waveform), -1).to(waveform.device)
            return LayerFeatures(layers, times, torch.ones_like(times, dtype=torch.bool))
        return self._encode_ragged(waveform, lengths)

    def _encode_ragged(self, waveform: Tensor, lengths: Tensor) -> LayerFeatures:
        """Clips of one length at a time: no front end ever sees padding."""
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
        parts = [self._encode_equal(waveform[rows, :, : int(lengths[rows[0]])]) for rows in groups]
        shape = (len(waveform), max(len(times) for _, times in parts))
        layers = tuple(layer.new_zeros(*shape, *layer.shape[2:]) for layer in parts[0][0])
        times = torch.zeros(shape, device=waveform.device)
        valid = torch.zeros(shape, dtype=torch.bool, device=waveform.device)
        for rows, (part, own_times) in zip(groups, parts, strict=True):
            columns = len(own_times)
            times[rows, :columns], valid[rows, :columns] = own_times.to(times), True
            for whole, layer in zip(layers, part, strict=True):
                whole[rows, :columns] = layer
        return LayerFeatures(layers, times, valid)

    def _encode_equal(self, waveform: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        num_samples = waveform.shape[-1]
        window = min(self.window_samples, num_samples)
        starts = [*range(0, num_samples - window, window), num_samples - window]
        grid = self.front_end.grid(window)
        windows = rearrange([waveform[..., s : s + window] for s in starts], "w b c s -> (b w) c s")
        tokens = self.front_end(windows)
        blocks = self.encoder.layers(tokens, grid)
        layers = (self.encoder.embed(tokens, grid), *blocks[:-1], self.encoder.norm(blocks[-1]))
        centres = (torch.arange(grid.num_time) + 0.5) * (window / self.sample_rate / grid.num_time)
        times = torch.cat([centres + start / self.sample_rate for start in starts])
        new = torch.ones_like(times, dtype=torch.bool)
        new[-grid.num_time :] = times[-grid.num_time :] > times[: -grid.num_time].max() if len(starts) > 1 else True
        shape = {"w": len(starts), "t": grid.num_time}
        return tuple(rearrange(x, "(b w) (t f) d -> b (w t) f d", **shape)[:, new] for x in layers), times[new]


def load_frozen(
    checkpoint: Path,
    which: Literal["context", "target", "random"] = "context",
    random_seed: int | None = None,
) -> FrozenEncoder:
    """The frozen encoder of a checkpoint, or its random-init twin.

    Args:
        checkpoint: a `.ckpt` written by `jepa-audio fit`.
        which: "context" or "target" encoder, or "random": the same network with the weights it had before step 0.
        random_seed: seed of the twin's weights; `None` for the seed of the run itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no training crop length.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    jepa = JEPA.load_from_checkpoint(checkpoint, map_location="cpu")
    data = torch.load(checkpoint, map_location="cpu", weights_only=True).get("datamodule_hyper_parameters", {})
    if "crop_seconds" not in data:
        raise ValueError(f"{checkpoint} does not tell `crop_seconds`, the clip length it was trained on")
    window_samples = round(data["crop_seconds"] * jepa.front_end.sample_rate)
    frozen = FrozenEncoder.from_jepa(jepa, window_samples, "target" if which == "target" else "context")
    return frozen.random_twin(jepa.seed if random_seed is None else random_seed) if which == "random" else frozen
