"""Decode by torchcodec what libsndfile cannot read, or reads short."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float32

INSTALL = "install torchcodec with `pip install 'jepa-audio[codec]'` (it needs FFmpeg 4 or newer)"

# torchcodec decodes all samples of these codecs, as `ffmpeg` does; it leaves out the last samples
# of others, for example of Windows Media.
_CODECS = frozenset({"aac", "alac", "flac", "mp1", "mp2", "mp3", "opus", "vorbis", "wavpack"})
_MAX_BYTES = 1 << 30
_MIN_BITS_PER_SECOND = 32_000


class CodecError(Exception):
    """torchcodec is not installed, or cannot decode a file."""


@cache
def is_installed() -> bool:
    """Whether torchcodec is installed."""
    return find_spec("torchcodec") is not None


def torchcodec_decode(source: Path | bytes) -> tuple[Float32[np.ndarray, "C S"], int]:
    """Decode a complete file, or its bytes; return the samples and the sample rate in Hz.

    Times in a container are not exact, so a slice is cut from the complete decoded file.

    Raises:
        CodecError: if torchcodec is not installed, if the file cannot be decoded completely, or if
            its samples need more than 1 GiB.
    """
    if not is_installed():
        raise CodecError(INSTALL)
    try:
        from torchcodec.decoders import AudioDecoder  # noqa: PLC0415 (2 s)
    except (ImportError, OSError, RuntimeError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise CodecError(f"torchcodec cannot be used: {problem}; {INSTALL}") from error
    try:
        decoder = AudioDecoder(source if isinstance(source, bytes) else str(source))
        about = decoder.metadata
        num_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        seconds = about.duration_seconds_from_header or 8 * num_bytes / _MIN_BITS_PER_SECOND
        rate, num_channels = about.sample_rate or 0, about.num_channels or 0
        if about.codec not in _CODECS and not str(about.codec).startswith("pcm_"):
            raise CodecError(f"torchcodec can lose samples of the codec {about.codec}: convert it")
        if 4 * seconds * rate * num_channels > _MAX_BYTES:
            raise CodecError(f"too long ({seconds:.0f} s) for torchcodec: convert it to flac")
        samples = decoder.get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise CodecError(f"torchcodec cannot decode it: {_problem(error)}") from error
    return samples.data.numpy(), samples.sample_rate


def _problem(error: Exception) -> str:
    """The end of a message of torchcodec, which begins with names of functions and files."""
    return str(error).strip().splitlines()[-1].rpartition(".cpp:")[2].partition(", ")[2]
