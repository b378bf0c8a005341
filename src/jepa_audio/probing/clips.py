"""The audio of labelled items, with the rate and channels of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import soundfile as sf
import torch
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.errors import UserError
from jepa_audio.inference.audio import convert
from jepa_audio.parallel import map_threads
from jepa_audio.probing.tasks.records import Item

# A FLAC file without a length has 2^63 - 1 frames.
_UNKNOWN_FRAMES = 2**40
# Threads decode and resample in parallel, because both release the interpreter's lock.
_NUM_READERS = 4
_MAX_SHOWN = 20

T = TypeVar("T")


class UnusableClipsError(UserError):
    """Clips of a task that cannot be used, in one message; `problems` has a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        count, shown = len(self.problems), self.problems[:_MAX_SHOWN]
        clips = "1 clip" if count == 1 else f"{count} clips"
        more = [f"and {count - len(shown)} more"] if count > len(shown) else []
        super().__init__(
            "\n  ".join(
                [
                    f"{clips} cannot be used: replace the files, or remove their lines",
                    *shown,
                    *more,
                ]
            )
        )


def try_items(function: Callable[[Item], T], items: Iterable[Item]) -> Iterable[T | str]:
    """The results of a function in the order of the items, a text for an item it refuses.

    The function is called in threads. A refusal is a `UserError`.
    """

    def result(item: Item) -> T | str:
        try:
            return function(item)
        except UserError as error:
            text = str(error)
            return text if text.startswith(item.where) else f"{item.where}: {text}"

    return map_threads(result, items, _NUM_READERS, num_submitted=64)


def map_items(function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    """The results of a function for items, in their order.

    Raises:
        UnusableClipsError: if the function raises a `UserError`; names all such items.
    """
    results = list(try_items(function, items))
    if problems := [result for result in results if isinstance(result, str)]:
        raise UnusableClipsError(problems)
    return results  # type: ignore[return-value]  # no texts


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
