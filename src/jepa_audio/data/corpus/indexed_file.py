"""One file of a corpus, as its table describes it: where it is, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from jepa_audio.data.audio.location import AudioLocation, AudioReadError, audio_location
from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample, source_slice


class IndexedFile(NamedTuple):
    """The columns of a table row that are needed to read the file; see `SCHEMA` in `table`."""

    audio: AudioLocation
    num_bytes: int
    num_frames: int
    sample_rate: int
    num_channels: int
    decoder: str

    @classmethod
    def from_row(cls, root: Path, row: Mapping[str, Any]) -> IndexedFile:
        """The file in a row of a table whose sources are relative to `root`."""
        path = root / row["source"]
        audio = audio_location(path, row["member"], row["offset"], row["num_bytes"])
        return cls(audio, *(row[name] for name in cls._fields[1:]))

    def read_slice(
        self,
        start: int,
        num_samples: int,
        sample_rate: int,
        channel: int | Literal["mean"] | None = None,
    ) -> Float32[Tensor, "C S"]:
        """Read a slice of the file at another sample rate.

        Args:
            start: first sample of the slice, at `sample_rate`.
            num_samples: length of the slice, at `sample_rate`; the slice must end within the file.
            sample_rate: sample rate of the slice in Hz.
            channel: index of a channel, or "mean" for the average of all; `None` for all channels.

        Raises:
            AudioReadError: if the file cannot be read, or has another size, sample rate or number
                of channels than in the table.
        """
        begin, num_frames, skip = source_slice(
            start, num_samples, self.num_frames, self.sample_rate, sample_rate
        )
        samples, rate = read(self.audio, begin, num_frames, self.decoder)
        # For a tar member, `read` has already compared this size with the header in the tar.
        if isinstance(self.audio, Path) and self.audio.stat().st_size != self.num_bytes:
            raise AudioReadError(self.audio, "changed since it was indexed: other size")
        if (rate, len(samples)) != (self.sample_rate, self.num_channels):
            reason = "changed since it was indexed: other sample rate or channels"
            raise AudioReadError(self.audio, reason)
        waveform = torch.from_numpy(samples)
        if channel == "mean" and len(waveform) > 1:
            waveform = waveform.mean(0, keepdim=True)
        elif isinstance(channel, int):
            waveform = waveform[channel : channel + 1]
        return resample(waveform, rate, sample_rate)[:, skip : skip + num_samples]
