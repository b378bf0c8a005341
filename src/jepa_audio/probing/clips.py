"""The audio of labelled items, with the rate and channels of an encoder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import soundfile as sf
import torch
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.errors import UserError
from jepa_audio.inference.audio import convert
from jepa_audio.probing.tasks.records import Item

# A FLAC file without a length has 2^63 - 1 frames.
_UNKNOWN_FRAMES = 2**40


def load_waveform(item: Item, sample_rate: int, num_channels: int) -> Float32[Tensor, "C S"]:
    """The audio of an item with the rate and channels of an encoder.

    An encoder with one channel gets the mean of all channels of the file. An encoder with several
    channels gets a mono file in every channel.

    Raises:
        AudioReadError: if the file cannot be read.
        UserError: if the file has a number of channels that is neither 1 nor `num_channels`, or if
            the item starts after the end of the file.
    """
    samples, rate = read(item.path)
    segment = item_segment(item, samples.shape[1], rate, len(samples), num_channels)
    waveform = torch.from_numpy(samples[:, segment.start : segment.stop])
    return convert(waveform, rate, sample_rate, num_channels, str(item.path))


def item_segment(
    item: Item, num_frames: int, rate: int, file_channels: int, num_channels: int
) -> range:
    """The samples of a file that belong to an item; raises the `UserError`s of `load_waveform`."""
    stop = num_frames if item.end_seconds is None else round(item.end_seconds * rate)
    segment = range(num_frames)[round(item.start_seconds * rate) : stop]
    if not segment:
        raise UserError(
            f"{item.where}: starts at {item.start_seconds} s, after the end of {item.path}"
        )
    if num_channels != 1 and file_channels not in (1, num_channels):
        raise UserError(
            f"{item.path} has {file_channels} channels, the encoder takes {num_channels}: "
            f"convert the file to 1 or {num_channels}"
        )
    return segment


@lru_cache(maxsize=1_000_000)
def read_header(path: Path) -> tuple[int, int, int]:
    """Frames, sample rate and channels of a file; from its header, if libsndfile can read it."""
    try:
        info = sf.info(path)
        if 0 < info.frames < _UNKNOWN_FRAMES:
            return info.frames, info.samplerate, info.channels
    except (sf.LibsndfileError, OSError):
        pass  # `read` has other decoders, and names the file in its error
    samples, rate = read(path)
    return samples.shape[1], rate, len(samples)
