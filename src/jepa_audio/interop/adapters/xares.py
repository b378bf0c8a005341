"""X-ARES (arXiv:2505.16369): `python -m xares.run jepa_audio/interop/adapters/xares.py TASK.py`.

X-ARES uses the only name of a module that ends in "Encoder", so that this module has one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.inference.features import Frequency
from jepa_audio.inference.load import Which
from jepa_audio.interop.adapters.features import EncoderFeatures, as_clips, frame_pooling


class JEPAEncoder(EncoderFeatures):
    """An encoder for X-ARES; without arguments, it is that of `JEPA_AUDIO_ENCODER`.

    X-ARES stores features and scores under the name of the class, and uses them again for a class
    of the same name. The class of an object is therefore a subclass, whose name depends on the
    weights, the layers and the pooling.

    Attributes:
        sampling_rate: rate of the encoder in Hz; X-ARES itself resamples audio to it.
        output_dim: width of the vector of a time column.
        hop_size_in_ms: time from one time column to the next in milliseconds.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        layers: int | Sequence[int] | None = -1,
        frequency: Frequency = "mean",
        which: Which = "context",
    ) -> None:
        super().__init__(encoder, layers=layers, pool=frame_pooling(frequency), which=which)
        self.sampling_rate = self.encoder.sample_rate
        self.output_dim = self.num_frame_features
        self.hop_size_in_ms = 1000 * self.encoder.frame_seconds
        self.__class__ = type(f"JEPA_{self.key}_Encoder", (type(self),), {})

    def forward(self, audio: Float[Tensor, "*B S"]) -> Float[Tensor, "B T D"]:
        """The nearest time column at regular times, for mono clips at `sampling_rate`.

        X-ARES pads the clips of a batch with zeros and gives no lengths: the encoder gets the
        zeros as part of the clips.
        """
        with torch.no_grad():
            features = self.frames(as_clips(audio), self.sampling_rate, self.encoder.frame_seconds)
        return self.pooling.frames.vectors(features)
