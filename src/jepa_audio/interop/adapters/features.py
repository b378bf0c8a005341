"""Encoder, layers and pooling of an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import state_hash
from jepa_audio.inference.features import Frequency, LayerFeatures
from jepa_audio.inference.load import Which, load_encoder
from jepa_audio.inference.pooling import parse_pooling

VARIABLE = "JEPA_AUDIO_ENCODER"
"""Environment variable with the encoder of an adapter that gets none."""


class EncoderFeatures(nn.Module):
    """A frozen encoder, and which of its features an adapter gives.

    Audio of another sample rate is resampled. An encoder with one channel gets the mean of all
    channels, an encoder with several channels gets a mono clip in each of them. Each kind of
    conversion is logged once.

    Args:
        encoder: a run, a checkpoint, an exported folder or a name on the Hub, as for
            `load_encoder`; `None` or "" for the value of the variable `JEPA_AUDIO_ENCODER`.
        layers: indices of the layers, whose vectors are concatenated; `None` for all.
        pool: pooling of a clip as in `Encoder.embed`; time columns use its part for frequency rows.
        which: "context", "target" or "random", as for `load_encoder`.

    Attributes:
        num_features: width of the vector of a clip.
        num_frame_features: width of the vector of a time column.

    Raises:
        UserError: if no encoder is named or can be loaded, or if a layer or pooling does not exist.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        layers: int | Sequence[int] | None = -1,
        pool: str = "mean",
        which: Which = "context",
    ) -> None:
        super().__init__()
        what = encoder or os.environ.get(VARIABLE)
        if not what:
            raise UserError(
                "no encoder is given: name a run, a checkpoint or an exported folder, or set the "
                f"environment variable {VARIABLE}"
            )
        self.pooling = parse_pooling(pool, "pool")
        if self.pooling.regions == 0:
            raise UserError("`pool` is 'frames', which is no vector of a clip: use 'mean'")
        self.encoder = load_encoder(what, which)
        self.layers = self.encoder.layer_indices(layers)
        example = torch.zeros(1, self.encoder.num_channels, self.encoder.min_samples)
        features = self.encoder.encode_batch(example, layers=self.layers)
        self.num_features = self.pooling.vectors(features).shape[-1]
        self.num_frame_features = self.pooling.frames.vectors(features).shape[-1]

    @property
    def key(self) -> str:
        """A name for caches of features: it depends on weights, layers and pooling."""
        chosen = "all" if self.layers is None else "_".join(map(str, self.layers))
        pooling = self.pooling.name.replace("/", "_")
        return f"{state_hash(self.encoder)[:12]}_layers_{chosen}_{pooling}"

    def vectors(
        self, audio: Any, sample_rate: int | Sequence[int | None] | None
    ) -> Float[Tensor, "B _"]:
        """One vector for each clip; audio as for `Encoder.encode`."""
        return self.encoder.embed(audio, sample_rate, layers=self.layers, pool=self.pooling.name)

    def frames(
        self,
        audio: Any,
        sample_rate: int,
        frame_seconds: float,
        num_frames: Sequence[int] | None = None,
    ) -> LayerFeatures:
        """The time columns at regular times, see `LayerFeatures.at_regular_times`."""
        features = self.encoder.encode(audio, sample_rate, layers=self.layers)
        return features.at_regular_times(frame_seconds, num_frames)


def frame_pooling(frequency: Frequency) -> str:
    """The name of the pooling that averages or concatenates the frequency rows of a column."""
    return f"mean/{frequency}"


def as_clips(audio: Float[Tensor, "*B S"]) -> Float[Tensor, "B 1 S"]:
    """Mono clips of a client as a batch with one channel."""
    return torch.atleast_2d(audio)[:, None]
