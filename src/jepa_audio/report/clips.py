"""Clips for pictures: slices of audio files at the rate and channels of an encoder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import soundfile as sf
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.clips import read_header


@lru_cache(maxsize=10_000)
def open_audio(path: Path) -> IndexedFile:
    """The length, rate and channels of an audio file.

    Raises:
        MissingFileError: if there is no file.
        AudioReadError: if it cannot be decoded.
    """
    if not path.is_file():
        raise MissingFileError(f"no audio file at {path}")
    num_frames, rate, channels = read_header(path)
    try:
        sf.info(path)
        decoder = "libsndfile"
    except sf.LibsndfileError:
        decoder = ""  # `read` finds one
    return IndexedFile(path, path.stat().st_size, num_frames, rate, channels, decoder)


def read_clip(
    path: Path,
    sample_rate: int,
    num_channels: int = 1,
    start_seconds: float = 0.0,
    max_seconds: float = float("inf"),
) -> Float32[Tensor, "C S"]:
    """A slice of a file; one channel is the mean of all, several channels get a mono file each.

    Raises:
        UserError: if the slice starts after the end of the file, or the file has a number of
            channels that is neither 1 nor `num_channels`.
    """
    file = open_audio(path)
    seconds = file.num_frames / file.sample_rate
    if not 0 <= start_seconds < seconds:
        raise UserError(f"{path} has {seconds:.3g} s: no clip starts at {start_seconds:g} s")
    if num_channels != 1 and file.num_channels not in (1, num_channels):
        raise UserError(
            f"{path} has {file.num_channels} channels, the encoder takes {num_channels}: convert "
            f"the file to 1 or {num_channels}"
        )
    start = round(start_seconds * sample_rate)
    end = round(min(seconds, start_seconds + max_seconds) * sample_rate)
    mix: Literal["mean"] | None = "mean" if num_channels == 1 else None
    clip = file.read_slice(start, max(1, end - start), sample_rate, mix)
    return clip.expand(num_channels, -1)
