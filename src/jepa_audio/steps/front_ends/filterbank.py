"""A learned filterbank: waveform → log energies of bands, with kernels that are trained."""

from __future__ import annotations

from math import log, log10, pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import Spectrogram

# Height of the first kernels. Adam moves every weight by about the learning rate, in a direction
# of its own: this adds noise to the kernels, and noise lets all frequencies into all bands. With
# height 1, low frequencies were attenuated by only 45 dB in the high bands after 1,500 steps.
_HEIGHT = 32.0


class LearnedFilterbank(Spectrogram):
    """Log energies of trained band-pass filters (Zeghidour et al., 2018, arXiv:1711.01161).

    Each band has a pair of kernels, the real and the imaginary part of a complex filter. Its
    energy is the squared modulus of the filtered waveform. The energy of a frame is a mean over two
    hops, weighted by a Hann window, of `energies_per_hop` energies in each hop: filters of high
    frequencies are shorter than a hop, and one energy alone depends on its place in the period of a
    voice. The first kernels are Gabor filters (a Gaussian times a complex exponential) with the
    centre frequencies and the widths of mel filters, so training starts from an approximation of a
    mel spectrogram. The paper also trains the weights of the mean; here they are fixed.

    Args:
        sample_rate: sample rate in Hz.
        num_bands: number of filters.
        window_length: samples of a kernel.
        hop_length: samples from one frame to the next.
        energies_per_hop: a divisor of `hop_length`; 1 for frames of one energy, without a mean.
        f_min_hz: lower edge of the lowest filter at the start of the training.
        f_max_hz: upper edge of the highest filter; `None` for half of `sample_rate`.
        floor: added to the energies before the logarithm.
        trained: False keeps the first kernels.
    """

    scale: Tensor
    weights: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        num_bands: int = 64,
        window_length: int = 400,
        hop_length: int = 160,
        energies_per_hop: int = 2,
        f_min_hz: float = 60.0,
        f_max_hz: float | None = None,
        floor: float = 1e-12,
        trained: bool = True,
    ) -> None:
        f_max_hz = sample_rate / 2 if f_max_hz is None else f_max_hz
        if not 0 <= f_min_hz < f_max_hz <= sample_rate / 2:
            raise UserError(
                f"`f_min_hz` ({f_min_hz:g}) must be at least 0 and below `f_max_hz` "
                f"({f_max_hz:g}), which must be at most half of `sample_rate` ({sample_rate})"
            )
        if not 1 <= hop_length <= window_length <= 65_536 or not 1 <= num_bands <= 4096:
            raise UserError(
                f"`hop_length` ({hop_length}) must be in [1, `window_length` ({window_length})], "
                f"`window_length` at most 65536 and `num_bands` ({num_bands}) in [1, 4096]"
            )
        if energies_per_hop < 1 or hop_length % energies_per_hop:
            raise UserError(
                f"`energies_per_hop` ({energies_per_hop}) must be a divisor of `hop_length` "
                f"({hop_length})"
            )
        if floor <= 0:
            raise UserError(f"`floor` ({floor:g}) must be positive")
        self.stride = hop_length // energies_per_hop
        frame_length = window_length + 2 * (hop_length - self.stride)
        padding = (frame_length - hop_length) // 2
        super().__init__(
            sample_rate=sample_rate,
            num_bands=num_bands,
            hop_length=hop_length,
            window_length=frame_length,
            padding=padding,
            min_samples=max(padding + 1, frame_length - 2 * padding),
            first_end=frame_length - padding,
        )
        self.kernel_length = window_length
        self.f_min_hz, self.f_max_hz, self.floor = f_min_hz, f_max_hz, floor
        gabor = self._gabor_kernels()
        self.weight = nn.Parameter(_HEIGHT * gabor, requires_grad=trained)
        # With this factor, a sine of amplitude 1 at the centre of a first kernel has energy 1/4.
        scale = 1 / (_HEIGHT * gabor.square().sum(0).sqrt().sum(-1, keepdim=True))
        self.register_buffer("scale", scale, persistent=False)
        hann = torch.hann_window(2 * energies_per_hop)[1:] / energies_per_hop
        self.register_buffer("weights", hann[None, None], persistent=False)

    def _gabor_kernels(self) -> Float[Tensor, "2 F window"]:
        low, high = _to_mel(self.f_min_hz), _to_mel(self.f_max_hz)
        edges = _from_mel(torch.linspace(low, high, self.num_bands + 2))
        half_width = (edges[2:] - edges[:-2]) / 2  # of a mel filter, at half of its height
        deviation_hz = half_width / (2 * sqrt(2 * log(2)))
        # A kernel that is cut at 2.5 deviations has a smooth end.
        longest = self.kernel_length / self.sample_rate / 5
        deviation = (1 / (2 * pi * deviation_hz)).clamp(max=longest)[:, None]
        time = (torch.arange(self.kernel_length) - (self.kernel_length - 1) / 2) / self.sample_rate
        envelope = torch.exp(-time.square() / (2 * deviation.square()))
        phase = 2 * pi * edges[1:-1, None] * time
        return torch.stack([envelope * phase.cos(), envelope * phase.sin()])

    @override
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(_HEIGHT * self._gabor_kernels())

    @override
    def log_magnitude(self, waveform: Float[Tensor, "R S"]) -> Float[Tensor, "R F T"]:
        padded = F.pad(waveform, (self.padding, self.padding), mode="reflect")
        kernels = (self.weight * self.scale).flatten(0, 1)[:, None]
        filtered = F.conv1d(padded[:, None], kernels, stride=self.stride).unflatten(1, (2, -1))
        energies = filtered.square().sum(1).flatten(0, 1)[:, None]  # [R * F, 1, T']
        means = F.conv1d(energies, self.weights, stride=self.hop_length // self.stride)
        # `len(waveform)` would fix the number of clips of an exported program.
        means = means[:, 0].unflatten(0, (-1, self.num_bands))
        # log(means + floor), in a form in which the optimiser of ONNX does not remove the floor.
        return (means / self.floor).log1p() + log(self.floor)


def _to_mel(frequency_hz: float) -> float:
    return 2595 * log10(1 + frequency_hz / 700)


def _from_mel(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return 700 * (10 ** (mel / 2595) - 1)
