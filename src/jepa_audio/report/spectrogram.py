"""The spectrogram of a clip in figures: that of the front end, or log-mel for a waveform."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.steps.front_ends.transforms import LogMel

LABELLED_HZ = (125, 500, 1000, 2000, 4000, 8000, 16000)


@dataclass(frozen=True, eq=False)
class ClipSpectrogram:
    """The log spectrogram of the part of a clip that the tokens cover.

    Attributes:
        log_magnitude: natural logarithm, lowest band first.
        seconds: duration.
        band_hz: rising centre frequencies of the bands; `None` if they are not known.
    """

    log_magnitude: Float[np.ndarray, "bands frames"]
    seconds: float
    band_hz: Float[np.ndarray, " bands"] | None


@torch.no_grad()
@torch.no_grad()
def clip_spectrogram(front_end: FrontEnd, waveform: Float[Tensor, "C S"]) -> ClipSpectrogram:
    """The front end's spectrogram up to the last token, or a log-mel one; of the first channel."""
    num_samples, sample_rate = waveform.shape[-1], front_end.sample_rate
    if isinstance(front_end, SpectrogramFrontEnd):
        transform = front_end.spectrogram
        num_frames = front_end.grid(num_samples).num_time * front_end.patch_frames
        seconds = num_frames * transform.hop_length / sample_rate
    else:
        transform = log_mel(num_samples, sample_rate)
        num_frames, seconds = transform.num_frames(num_samples), num_samples / sample_rate
    shown = transform(waveform[None, :1].to(_device(transform)))[0, 0, :, :num_frames].cpu().numpy()
    if not isinstance(transform, LogMel):
        return ClipSpectrogram(shown, seconds, None)
    bank = transform.bank.cpu()
    bins_hz = torch.linspace(0, sample_rate / 2, bank.shape[1])
    band_hz = bank @ bins_hz / bank.sum(dim=1)
    return ClipSpectrogram(shown, seconds, band_hz.numpy())


def log_mel(num_samples: int, sample_rate: int) -> LogMel:
    """A log-mel spectrogram of any clip: windows of about 64 ms, 100 frames a second.

    Windows are shorter for a clip that is shorter, and low sample rates have fewer bands.
    """
    longest = max(16, min(num_samples, round(0.066 * sample_rate)))
    window = 2 ** int(math.log2(longest))
    hop, bands = max(1, sample_rate // 100), min(64, max(4, window // 8))
    return LogMel(sample_rate, n_fft=window, hop_length=min(hop, window), n_mels=bands)


def _device(transform: torch.nn.Module) -> torch.device:
    return next((buffer.device for buffer in transform.buffers()), torch.device("cpu"))


def label_bands(ax: Axes, band_hz: Float[np.ndarray, " bands"] | None, label: str = "kHz") -> None:
    """Label the frequency axis of an image with one row for each band, or number the bands."""
    ax.set_ylabel("band" if band_hz is None else label)
    if band_hz is not None:
        shown = [hz for hz in LABELLED_HZ if band_hz[0] <= hz <= band_hz[-1]]
        positions = np.interp(shown, band_hz, np.arange(len(band_hz)) + 0.5)
        ax.set_yticks(positions, [f"{hz / 1000:g}" for hz in shown])
