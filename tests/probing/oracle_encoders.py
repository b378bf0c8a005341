"""Oracle encoders for end-to-end probes: fixed analyses that find the labels of `tiny_sets`.

Each gives two layers: "nothing", which is the same for every sound, and the analysis. The encoder
`constant` gives the first one alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.probing.encoders import FunctionEncoder

RATE = 8000
LOWEST, HIGHEST = 57, 96
"""Notes (MIDI) that `spectrum` separates; the lowest two differ by 13 Hz."""


def spectrum() -> FunctionEncoder:
    """Share of the power at each note, on a logarithmic scale from 0 (0.1 %) to 1 (100 %)."""
    return _encoder("spectrum", lambda waveform: _note_shares(_frames(waveform, 4000, 4000)))


def loudness() -> FunctionEncoder:
    """Level in tens of dB, and the centre of the spectrum in octaves."""
    return _encoder("loudness", _loudness_and_centroid)


def onsets() -> FunctionEncoder:
    """Level at 1 kHz and 2.5 kHz in columns of 10 ms, with two columns of context on each side."""
    return _encoder("onsets", _onsets)


def triads() -> FunctionEncoder:
    """Level of the weakest of the three notes of each of 24 triads, every 50 ms."""
    return _encoder("triads", _triads)


def constant() -> FunctionEncoder:
    """The same output for every sound, at 100 columns per second."""
    return FunctionEncoder(_ones, "constant", RATE, layer_names=("nothing",))


def _encoder(name: str, analysis: Callable[[Tensor], Tensor]) -> FunctionEncoder:
    def layers(waveform: Tensor) -> list[Tensor]:
        output = analysis(waveform[:, 0])
        return [torch.ones_like(output), output]

    return FunctionEncoder(layers, name, RATE, layer_names=("nothing", name))


def _ones(waveform: Tensor) -> Tensor:
    return torch.ones(len(waveform), max(1, waveform.shape[-1] // 80), 3)


def _frames(waveform: Tensor, length: int, hop: int) -> Tensor:
    """Power spectra [B, T, bins] of complete frames; clips shorter than one frame are padded."""
    padded = F.pad(waveform, (0, max(0, length - waveform.shape[-1])))
    return torch.fft.rfft(padded.unfold(-1, length, hop) * torch.hann_window(length)).abs().square()


def _at_notes(power: Tensor, notes: range) -> Tensor:
    """Power at each note, within a quarter tone."""
    hz = torch.arange(power.shape[-1]) * (RATE / 2 / (power.shape[-1] - 1))
    note = 69 + 12 * torch.log2(hz.clamp_min(1) / 440)
    return torch.stack([power[..., (note - at).abs() <= 0.5].sum(-1) for at in notes], dim=-1)


def _note_shares(power: Tensor) -> Tensor:
    share = _at_notes(power, range(LOWEST, HIGHEST + 1)) / power.sum(-1, keepdim=True).clamp_min(
        1e-12
    )
    return (share + 1e-3).log10() / 3 + 1


def _loudness_and_centroid(waveform: Tensor) -> Tensor:
    power = _frames(waveform, 4000, 4000)
    total = power.sum(-1).clamp_min(1e-12)
    hz = torch.arange(power.shape[-1]) * 2.0
    centroid = (power * hz).sum(-1) / total
    return torch.stack([total.log10() - 5, (centroid / 1000).clamp_min(1e-3).log2()], dim=-1)


def _onsets(waveform: Tensor) -> Tensor:
    power = _frames(waveform, 80, 80)[..., [10, 25]]  # 100 Hz a bin
    level = (power + 1e-4).log10() / 4 + 1
    padded = F.pad(level, (0, 0, 2, 2))
    return torch.cat([padded[:, i : i + level.shape[1]] for i in range(5)], dim=-1)


def _triads(waveform: Tensor) -> Tensor:
    # Frames of 0.25 s, centred on their columns.
    padded = F.pad(waveform, (800, 800))
    level = (_at_notes(_frames(padded, 2000, 400), range(60, 84)) + 1e-2).log10()
    octaves = level.unflatten(-1, (2, 12)).amax(dim=-2)  # [B, T, 12]
    triads = [
        torch.stack([octaves.roll(-up, dims=-1) for up in (0, third, 7)], dim=-1).amin(dim=-1)
        for third in (4, 3)
    ]
    return torch.cat(triads, dim=-1) / 4
