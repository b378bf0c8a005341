"""HEAR 2021, the benchmark of audio representations (arXiv:2203.03022), through its common API.

See `docs/adapters.md` for the command of the validator.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.inference.load import Which
from jepa_audio.interop.adapters.features import EncoderFeatures, as_clips

SAMPLE_RATES = (16_000, 22_050, 32_000, 44_100, 48_000)
"""Sample rates in Hz that HEAR accepts."""


class HearModel(EncoderFeatures):
    """An encoder for HEAR.

    Args:
        encoder: see `EncoderFeatures`.
        frame_seconds: see `load_model`.
        options: `layers`, `pool` and `which` of `EncoderFeatures`.

    Attributes:
        sample_rate: rate of the waveforms in Hz: that of the encoder if HEAR accepts it, otherwise
            the next higher accepted rate. The waveforms are then resampled.
        scene_embedding_size: width of the vector of a clip.
        timestamp_embedding_size: width of the vector of a time column.
        frame_seconds: time from one time column to the next.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        frame_seconds: float | None = None,
        **options: Any,
    ) -> None:
        if frame_seconds is not None and not 0 < frame_seconds < inf:
            raise UserError(f"`frame_seconds` ({frame_seconds}) must be a positive number, or None")
        super().__init__(encoder, **options)
        rate = self.encoder.sample_rate
        self.sample_rate = min((r for r in SAMPLE_RATES if r >= rate), default=SAMPLE_RATES[-1])
        self.frame_seconds = self.encoder.frame_seconds if frame_seconds is None else frame_seconds
        self.scene_embedding_size = self.num_features
        self.timestamp_embedding_size = self.num_frame_features


def load_model(
    model_file_path: str = "",
    layers: int | Sequence[int] | None = -1,
    pool: str = "mean",
    which: Which = "context",
    frame_seconds: float | None = None,
) -> HearModel:
    """The model of HEAR; the kit of HEAR takes these options as `--model-options '{"layers": 6}'`.

    Args:
        model_file_path: see `EncoderFeatures`; "" for the variable `JEPA_AUDIO_ENCODER`.
        layers: see `EncoderFeatures`.
        pool: see `EncoderFeatures`.
        which: see `EncoderFeatures`.
        frame_seconds: time from one timestamp to the next; `None` for that of the encoder.

    Raises:
        UserError: if `frame_seconds` is not positive; see also `EncoderFeatures`.
    """
    return HearModel(
        model_file_path, layers=layers, pool=pool, which=which, frame_seconds=frame_seconds
    )


def get_timestamp_embeddings(
    audio: Float[Tensor, "B S"], model: HearModel
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """The nearest time column at regular times, and these times in milliseconds.

    Args:
        audio: mono clips in [-1, 1] at `model.sample_rate`.
        model: the model of `load_model`.
    """
    with torch.no_grad():
        features = model.frames(as_clips(audio), model.sample_rate, model.frame_seconds)
    return model.pooling.frames.vectors(features), 1000 * features.times


def get_scene_embeddings(audio: Float[Tensor, "B S"], model: HearModel) -> Float[Tensor, "B D"]:
    """One vector for each clip; arguments as for `get_timestamp_embeddings`."""
    with torch.no_grad():
        return model.vectors(as_clips(audio), model.sample_rate)
