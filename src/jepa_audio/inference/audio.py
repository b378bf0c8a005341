"""Audio in any form that a user has, as waveforms with the rate and channels of an encoder."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import MAX_RATE, MissingFileError, UserError, did_you_mean

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16)
# The largest magnitude of files, too. Full scale is 1.
_MAX_PEAK = 1e3
# More rows than this are clips and not channels.
_MAX_CHANNELS = 128


@dataclass(frozen=True)
class Clips:
    """Clips of equal length, or one file, that are not yet converted for an encoder.

    Attributes:
        name: name in messages.
        audio: a file, or samples `[B, C, S]`.
        rate: sample rate in Hz; `None` for a file if the user has given none.
        notes: what was done to the samples.
    """

    name: str
    audio: Path | Tensor
    rate: int | None
    notes: tuple[str, ...] = ()

    def convert(
        self, sample_rate: int, num_channels: int
    ) -> tuple[Float32[Tensor, "B C S"], list[str]]:
        """The clips with the rate and channels of an encoder, and what was done to them.

        Raises:
            UserError: if a file cannot be read or has another rate than the user has given, or if
                the channels do not fit.
        """
        notes, rate = list(self.notes), self.rate
        if isinstance(self.audio, Path):
            waveform, rate = read_file(self.audio, self.rate)
        else:
            waveform = self.audio
        assert rate is not None
        return convert(waveform, rate, sample_rate, num_channels, self.name, notes.append), notes


def convert(
    waveform: Float32[Tensor, "*B C S"],
    from_rate: int,
    to_rate: int,
    num_channels: int,
    name: str,
    note: Callable[[str], object] = lambda _: None,
) -> Float32[Tensor, "*B num_channels R"]:
    """A waveform with another rate and number of channels; `note` gets what was done.

    An encoder with one channel gets the mean of all channels. An encoder with several channels gets
    a mono waveform in every channel. Channels are converted first, as for training.

    Raises:
        UserError: if the number of channels is neither 1 nor `num_channels`.
    """
    channels = waveform.shape[-2]
    if channels not in (1, num_channels) and num_channels > 1:
        raise UserError(
            f"{name} has {channels} channels, the encoder takes {num_channels}: convert the audio "
            f"to 1 or {num_channels}"
        )
    if channels > num_channels:
        waveform = waveform.mean(dim=-2, keepdim=True)
        note(f"the mean of {channels} channels is used")
    if from_rate != to_rate:
        if waveform.requires_grad:
            raise UserError(
                f"{name} needs gradients and has {from_rate} Hz instead of {to_rate} Hz: resample "
                "it before, because the resampler has no gradients"
            )
        rows = resample(waveform.reshape(-1, waveform.shape[-1]).cpu(), from_rate, to_rate)
        waveform = rows.reshape(*waveform.shape[:-1], -1)
        note(f"{from_rate} Hz is resampled to {to_rate} Hz")
    if channels < num_channels:
        waveform = waveform.expand(*waveform.shape[:-2], num_channels, -1)
        note(f"the one channel is copied to {num_channels} channels")
    return waveform


def read_file(path: Path, stated_rate: int | None) -> tuple[Float32[Tensor, "1 C S"], int]:
    """The samples of a file and its sample rate in Hz; raises `UserError` as `Clips.convert`."""
    if not path.exists():
        folder = path.parent
        names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
        raise MissingFileError(f"there is no audio file {path}{did_you_mean(path.name, names)}")
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, not an audio file: `jepa-audio embed ENCODER {path}` embeds all "
            "of its files"
        )
    try:
        samples, rate = read(path)
    except AudioReadError as error:
        raise UserError(f"{error}: repair or remove the file") from error
    if stated_rate not in (None, rate):
        raise UserError(
            f"{path} has {rate} Hz, but `sample_rate` is {stated_rate}: leave it out for files, or "
            "give a list of rates with None for files"
        )
    return torch.from_numpy(samples)[None], rate


def list_clips(
    audio: Any, sample_rate: int | Sequence[int | None] | None, channels: int
) -> list[Clips]:
    """The clips of audio in one of the forms of `Encoder.encode`.

    Args:
        audio: see `Encoder.encode`.
        sample_rate: see `Encoder.encode`.
        channels: number of channels of the encoder.

    Raises:
        UserError: if the form is another one or ambiguous, or if samples are not finite; the
            message names the clip.
    """
    if not isinstance(audio, list | tuple):
        return [_clips(audio, _rate(sample_rate, "audio"), "audio", channels)]
    if not audio:
        raise UserError("`audio` is an empty list: give at least one clip")
    rates: Sequence[Any] = [sample_rate] * len(audio)
    rate_or_rates: Any = sample_rate
    if not isinstance(sample_rate, str) and np.shape(rate_or_rates) == (len(audio),):
        rates = list(rate_or_rates)
    clips = []
    for number, (value, rate) in enumerate(zip(audio, rates, strict=True)):
        name = f"clip {number}"
        if isinstance(value, int | float | complex | np.generic):
            raise UserError(
                f"{name} of the list is a number ({value!r}): a list contains clips; give the "
                "samples of one clip as an array, and the rate as `sample_rate`"
            )
        clips.append(_clips(value, _rate(rate, name), name, channels, is_in_list=True))
    return clips


def count_notes(notes: Sequence[Sequence[str]]) -> Counter[str]:
    """How often each conversion was done."""
    return Counter(note for each in notes for note in each)


def _clips(
    value: Any, rate: int | None, name: str, channels: int, is_in_list: bool = False
) -> Clips:
    if isinstance(value, str | os.PathLike):
        path = Path(os.fspath(value)).expanduser()
        return Clips(str(path), path, rate)
    samples = _to_tensor(value, name)
    if rate is None:
        raise UserError(f"`sample_rate` of {name} is missing: give the rate of the samples in Hz")
    notes = []
    if not samples.is_floating_point():
        notes.append(f"{str(samples.dtype)[6:]} is divided by its full scale")
    samples = _check_values(_scale(samples, name), name)
    return Clips(name, _to_batch(samples, name, channels, is_in_list), rate, tuple(notes))


def _rate(value: Any, name: str) -> int | None:
    if value is None:
        return None
    try:
        whole: Any = value.item() if isinstance(value, np.generic | np.ndarray | Tensor) else value
        whole = int(whole) if isinstance(whole, float) and whole.is_integer() else whole
        rate = operator.index(whole)
    except (TypeError, ValueError, RuntimeError):
        rate = 0
    if isinstance(value, bool) or not 1 <= rate <= MAX_RATE:
        raise UserError(
            f"`sample_rate` of {name} ({value!r}) must be a whole number of Hz in [1, {MAX_RATE}], "
            "or for a list one number for each clip"
        )
    return rate


def _to_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__array__"):
        hint = ": give its samples and their `sample_rate`" if isinstance(value, dict) else ""
        if isinstance(value, list | tuple):
            hint = ": give the samples of a clip as an array, numpy.array(clip)"
        raise UserError(
            f"{name} is a {type(value).__name__}, not a path, an array or a tensor{hint}"
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise UserError(f"{name} has the type {array.dtype}, which are no samples of audio")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # A copy in the byte order of this machine, because torch warns of memory that is read-only.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def _scale(samples: Tensor, name: str) -> Float32[Tensor, "*shape"]:
    if samples.is_floating_point():
        return samples.float()
    if samples.dtype not in _INTEGERS:
        raise UserError(
            f"{name} has the type {str(samples.dtype)[6:]}, whose full scale is not known: convert "
            "it to int16, int32 or float (full scale 1)"
        )
    limits = torch.iinfo(samples.dtype)
    full_scale = (limits.max - limits.min + 1) // 2
    middle = 0 if limits.min else full_scale
    return (samples.double() - middle).div(full_scale).float()


def _check_values(samples: Tensor, name: str) -> Tensor:
    if not samples.numel():
        raise UserError(f"{name} has no samples (shape {list(samples.shape)}): remove it")
    peak = float(samples.detach().abs().amax())
    if not np.isfinite(peak):
        raise UserError(f"{name} has samples that are NaN or infinite: repair or remove it")
    if peak > _MAX_PEAK:
        raise UserError(
            f"{name} has a peak of {peak:g}, but full scale is 1: divide it by its full scale, "
            "which is 32768 for 16 bits"
        )
    return samples


def _to_batch(
    samples: Tensor, name: str, channels: int, is_in_list: bool
) -> Float32[Tensor, "B C S"]:
    """Samples `[S]`, `[C, S]` or `[B, C, S]` as a batch."""
    shape = list(samples.shape)
    allowed = "[S] or [C, S]" if is_in_list else "[S], [C, S] or [B, C, S]"
    if samples.ndim not in ((1, 2) if is_in_list else (1, 2, 3)):
        raise UserError(f"{name} has the shape {shape}, must be {allowed}")
    if samples.ndim == 1:
        return samples[None, None]
    rows, length = shape[-2:]
    if rows > length:
        raise UserError(
            f"{name} has the shape {shape}: {rows} channels of {length} samples? It must be "
            f"{allowed}: transpose it, so that the samples are the last axis"
        )
    limit = _MAX_CHANNELS if is_in_list or samples.ndim == 3 else 2
    if rows > limit and rows != channels:
        raise UserError(
            f"{name} has the shape {shape}, which is ambiguous: give {rows} clips as "
            f"[{rows}, 1, {length}], or one clip of {rows} channels as [1, {rows}, {length}]"
        )
    return samples if samples.ndim == 3 else samples[None]
