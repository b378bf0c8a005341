"""Front ends: waveform → tokens on a grid."""

from jepa_audio.steps.front_ends.base import FrontEnd
from jepa_audio.steps.front_ends.spectrogram import (
    PatchedSpectrogram,
    SpectrogramFrontEnd,
    SpectrogramPatches,
)
from jepa_audio.steps.front_ends.waveform import WaveformFrontEnd

__all__ = [
    "FrontEnd",
    "PatchedSpectrogram",
    "SpectrogramFrontEnd",
    "SpectrogramPatches",
    "WaveformFrontEnd",
]
