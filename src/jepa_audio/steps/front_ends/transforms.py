"""Spectrograms with fixed kernels: waveform → log magnitudes, in float32 even under autocast."""

from __future__ import annotations

from math import ceil, log2
from typing import Literal

import torch
from jaxtyping import Float
from nnAudio.features.cqt import CQT1992v2, CQT2010v2
from nnAudio.features.vqt import VQT as NNAudioVQT  # noqa: N811
from nnAudio.librosa_functions import get_gammatone
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import Spectrogram

# nnAudio's filter before each halving of the sample rate has 256 taps, 128 for later samples.
_HALF_BAND_REACH = 128
# 1 GB of kernels.
_MAX_KERNEL_VALUES = 2**28


class _FilterBank(Spectrogram):
    """A spectrogram with bands that are weighted sums of bins of a Fourier transform."""

    bank: Tensor
    window: Tensor

    def __init__(
        self,
        bank: Float[Tensor, "F bins"],
        sample_rate: int,
        n_fft: int,
        win_length: int | None,
        hop_length: int,
        power: float,
        floor: float,
        magnitude_eps: float,
        center: bool,
    ) -> None:
        win_length = n_fft if win_length is None else win_length
        if not 1 <= hop_length <= win_length <= n_fft:
            raise UserError(
                f"`hop_length` ({hop_length}) must be in [1, `win_length` ({win_length})] and "
                f"`win_length` at most `n_fft` ({n_fft})"
            )
        if power <= 0 or floor <= 0:
            raise UserError(f"`power` ({power}) and `floor` ({floor}) must be positive")
        padding = n_fft // 2 if center else (n_fft - hop_length) // 2
        super().__init__(
            sample_rate=sample_rate,
            num_bands=len(bank),
            hop_length=hop_length,
            window_length=n_fft,
            padding=padding,
            min_samples=max(padding + 1, n_fft - 2 * padding),
            first_end=(n_fft - win_length) // 2 + win_length - padding,
        )
        self.win_length = win_length
        self.power = power
        self.floor = floor
        self.magnitude_eps = magnitude_eps
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)

    @override
    def log_magnitude(self, waveform: Float[Tensor, "R S"]) -> Float[Tensor, "R F T"]:
        padded = F.pad(waveform, (self.padding, self.padding), mode="reflect")
        sizes = (self.window_length, self.hop_length, self.win_length)
        spectrum = torch.stft(padded, *sizes, self.window, center=False, return_complex=True)
        energy = spectrum.real.square() + spectrum.imag.square() + self.magnitude_eps
        return (self.bank @ energy.pow(self.power / 2)).clamp(min=self.floor).log()


class LogMel(_FilterBank):
    """Log-mel spectrogram; the defaults are those of PupuJEPA (Gu et al., 2026, arXiv:2606.25713).

    Args:
        sample_rate: sample rate in Hz.
        n_fft: samples of the Fourier transform.
        win_length: samples of the Hann window; `None` for `n_fft`.
        hop_length: samples from one frame to the next.
        n_mels: number of bands.
        f_min_hz: lower edge of the lowest band.
        f_max_hz: upper edge of the highest band; `None` for half of `sample_rate`.
        mel_scale: `slaney` is linear below 1 kHz (librosa's default), `htk` is logarithmic.
        norm: `slaney` gives every filter the same area, `None` the same height.
        power: exponent of the magnitudes that the filters sum, 1 or 2.
        floor: lower limit of the sums before the logarithm.
        magnitude_eps: added to the energy of every bin to keep the gradient finite on silence.
        center: True pads n_fft / 2 samples at each end: frame t is centred on sample t * hop
            (librosa). False pads (n_fft - hop) / 2 samples: the clip has S / hop frames.
    """

    def __init__(
        self,
        sample_rate: int = 24000,
        n_fft: int = 1024,
        win_length: int | None = None,
        hop_length: int = 240,
        n_mels: int = 128,
        f_min_hz: float = 0.0,
        f_max_hz: float | None = None,
        mel_scale: Literal["slaney", "htk"] = "slaney",
        norm: Literal["slaney"] | None = "slaney",
        power: float = 1.0,
        floor: float = 1e-5,
        magnitude_eps: float = 1e-9,
        center: bool = False,
    ) -> None:
        _check_sizes(n_mels, n_fft, n_mels=n_mels, n_fft=n_fft)
        band = (f_min_hz, _checked_f_max(sample_rate, f_min_hz, f_max_hz))
        # torchaudio reads the values of the filters, so the filters cannot be on the meta device.
        with torch.device("cpu"):
            filters = melscale_fbanks(n_fft // 2 + 1, *band, n_mels, sample_rate, norm, mel_scale)
        bank = filters.T.contiguous()
        sizes = (n_fft, win_length, hop_length)
        super().__init__(bank, sample_rate, *sizes, power, floor, magnitude_eps, center)
        self.f_min_hz, self.f_max_hz = band


class Gammatone(_FilterBank):
    """Log spectrogram of fourth-order gammatone filters, spaced on the ERB scale.

    ERB is the equivalent rectangular bandwidth.

    Args:
        sample_rate: sample rate in Hz.
        n_fft: samples of the Fourier transform.
        win_length: samples of the Hann window; `None` for `n_fft`.
        hop_length: samples from one frame to the next.
        n_bins: number of bands.
        f_min_hz: centre of the lowest band.
        f_max_hz: frequency just above the centre of the highest band; `None` for half of
            `sample_rate`.
        power: exponent of the magnitudes that the filters sum, 1 or 2.
        floor: lower limit of the sums before the logarithm.
        magnitude_eps: added to the energy of every bin to keep the gradient finite on silence.
        center: as in `LogMel`.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        win_length: int | None = None,
        hop_length: int = 160,
        n_bins: int = 64,
        f_min_hz: float = 20.0,
        f_max_hz: float | None = None,
        power: float = 1.0,
        floor: float = 1e-5,
        magnitude_eps: float = 1e-9,
        center: bool = False,
    ) -> None:
        _check_sizes(n_bins, n_fft, n_bins=n_bins, n_fft=n_fft)
        band = (f_min_hz, _checked_f_max(sample_rate, f_min_hz, f_max_hz))
        bank = torch.from_numpy(get_gammatone(sample_rate, n_fft, n_bins, *band)).float()
        sizes = (n_fft, win_length, hop_length)
        super().__init__(bank, sample_rate, *sizes, power, floor, magnitude_eps, center)


class _ConstantQ(Spectrogram):
    """A spectrogram with a constant frequency ratio between neighbouring bands.

    The window of a band depends on its frequency.
    `kernels` has the kernels `[bands, 1, width]` of each octave, highest octave first. Octave i
    uses the clip at 1 / 2^i of its sample rate; the reduced clip must be longer than half the
    kernel.
    """

    def __init__(
        self,
        transform: nn.Module,
        kernels: list[Tensor],
        sample_rate: int,
        hop_length: int,
        n_bins: int,
        floor: float,
    ) -> None:
        if floor <= 0:
            raise UserError(f"`floor` ({floor}) must be positive")
        widths = [kernel.shape[-1] for kernel in kernels]
        super().__init__(
            sample_rate=sample_rate,
            num_bands=n_bins,
            hop_length=hop_length,
            window_length=widths[0],
            padding=widths[0] // 2,
            min_samples=max((width // 2 + 1) << octave for octave, width in enumerate(widths)),
            first_end=max(_support_end(kernel, octave) for octave, kernel in enumerate(kernels)),
        )
        self.transform = exclude_from_state(transform)
        self.floor = floor

    @override
    def log_magnitude(self, waveform: Float[Tensor, "R S"]) -> Float[Tensor, "R F T"]:
        # The logarithm is computed from the energy: the gradient of the magnitude is NaN at 0.
        energy = self.transform(waveform, output_format="Complex").square().sum(dim=-1)
        return energy.clamp(min=self.floor**2).log() / 2


class CQT(_ConstantQ):
    """Log constant-Q transform (Brown, 1991), with the scaling of librosa.

    Args:
        sample_rate: sample rate in Hz.
        hop_length: samples from one frame to the next.
        f_min_hz: centre of the lowest band; 32.703 is the note C1.
        n_bins: number of bands.
        bins_per_octave: number of bands per octave.
        algorithm: `1992v2` applies all kernels at the full rate and is exact at any hop. `2010v2`
            applies the kernels of one octave and halves the sample rate for each lower octave
            (Schörkhuber & Klapuri, 2010). It is faster for many octaves; the hop must be divisible
            by 2^(octaves - 1).
        floor: lower limit of the magnitudes before the logarithm.
    """

    def __init__(
        self,
        sample_rate: int,
        hop_length: int,
        f_min_hz: float = 32.703,
        n_bins: int = 84,
        bins_per_octave: int = 12,
        algorithm: Literal["1992v2", "2010v2"] = "1992v2",
        floor: float = 1e-5,
    ) -> None:
        bands = _checked_bands(sample_rate, f_min_hz, n_bins, bins_per_octave)
        octaves = 1
        if algorithm == "1992v2":
            transform = CQT1992v2(sample_rate, hop_length, **bands)
        elif algorithm == "2010v2":
            octaves = _checked_octaves(n_bins, bins_per_octave, hop_length)
            # With early downsampling, the magnitudes of nnAudio are wrong by the square root of the
            # downsampling factor.
            transform = CQT2010v2(sample_rate, hop_length, **bands, earlydownsample=False)
        else:
            raise UserError(f"`algorithm` ({algorithm!r}) must be '1992v2' or '2010v2'")
        kernels = [transform.get_buffer("cqt_kernels_real")] * octaves
        super().__init__(transform, kernels, sample_rate, hop_length, n_bins, floor)


class VQT(_ConstantQ):
    """Log variable-Q transform: a constant-Q transform with shorter windows for the low bands.

    Args:
        sample_rate: sample rate in Hz.
        hop_length: samples from one frame to the next, divisible by 2^(octaves - 1).
        f_min_hz: centre of the lowest band; 32.703 is the note C1.
        n_bins: number of bands.
        bins_per_octave: number of bands per octave.
        gamma: added to every bandwidth, in Hz; 0 gives the constant-Q transform.
        floor: lower limit of the magnitudes before the logarithm.
    """

    def __init__(
        self,
        sample_rate: int,
        hop_length: int,
        f_min_hz: float = 32.703,
        n_bins: int = 84,
        bins_per_octave: int = 12,
        gamma: float = 0.0,
        floor: float = 1e-5,
    ) -> None:
        bands = _checked_bands(sample_rate, f_min_hz, n_bins, bins_per_octave)
        if gamma < 0:
            raise UserError(f"`gamma` ({gamma}) must not be negative; 0 gives the CQT")
        # At other hops, nnAudio interpolates complex values between frames, which gives wrong
        # magnitudes.
        octaves = _checked_octaves(n_bins, bins_per_octave, hop_length)
        # With early downsampling, nnAudio would still use the kernels of the full rate.
        transform = NNAudioVQT(sample_rate, hop_length, **bands, gamma=gamma, earlydownsample=False)
        kernels = [transform.get_buffer(f"cqt_kernels_real_{i}") for i in range(octaves)]
        super().__init__(transform, kernels, sample_rate, hop_length, n_bins, floor)


def _support_end(kernels: Float[Tensor, "bands 1 width"], octave: int) -> int:
    """Samples at the start of the clip that the first frame of an octave depends on.

    The kernels are centred on the first sample, and nnAudio pads short ones with zeros.
    """
    last = int(kernels.abs().amax(dim=(0, 1)).nonzero().max()) - kernels.shape[-1] // 2
    # Each halving of the rate uses up to `_HALF_BAND_REACH` later samples at the higher rate.
    return (last << octave) + _HALF_BAND_REACH * ((1 << octave) - 1) + 1


def exclude_from_state(module: nn.Module) -> nn.Module:
    """Turn all parameters and buffers of a module tree into buffers outside the `state_dict`."""
    for part in module.modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)
    return module


def _check_sizes(num_bands: int, kernel_length: int | float, **sizes: int | float) -> None:
    """Refuse kernels that would take all memory; the message names the settings in `sizes`."""
    if not 1 <= num_bands * kernel_length <= _MAX_KERNEL_VALUES:
        shown = ", ".join(f"`{name}` ({value:g})" for name, value in sizes.items())
        raise UserError(
            f"{shown} give {num_bands * kernel_length:.2g} values of kernels, but must give 1 to "
            f"{_MAX_KERNEL_VALUES:.2g}"
        )


def _checked_f_max(sample_rate: int, f_min_hz: float, f_max_hz: float | None) -> float:
    nyquist = sample_rate / 2
    f_max_hz = nyquist if f_max_hz is None else f_max_hz
    if f_max_hz > nyquist:
        raise UserError(
            f"`f_max_hz` ({f_max_hz:g}) must not exceed {nyquist:g}, "
            f"the Nyquist frequency of `sample_rate` ({sample_rate})"
        )
    if not 0 <= f_min_hz < f_max_hz:
        raise UserError(f"`f_min_hz` ({f_min_hz:g}) must be in [0, `f_max_hz` ({f_max_hz:g}))")
    return f_max_hz


def _checked_bands(
    sample_rate: int, f_min_hz: float, n_bins: int, bins_per_octave: int
) -> dict[str, float]:
    """The nnAudio arguments of valid bands; `UserError` for bands above the Nyquist frequency."""
    nyquist = sample_rate / 2
    if not 0 < f_min_hz <= nyquist or n_bins < 1 or bins_per_octave < 1:
        raise UserError(
            f"`f_min_hz` ({f_min_hz:g}) must be in (0, {nyquist:g}], `n_bins` ({n_bins}) and "
            f"`bins_per_octave` ({bins_per_octave}) must be positive"
        )
    f_max_hz = f_min_hz * 2 ** min((n_bins - 1) / bins_per_octave, 900)
    if f_max_hz > nyquist:
        max_bins = 1 + int(bins_per_octave * log2(nyquist / f_min_hz))
        raise UserError(
            f"the top band ({f_max_hz:.0f} Hz) must not exceed the Nyquist frequency of "
            f"`sample_rate` ({sample_rate}), {nyquist:g} Hz: lower `n_bins` ({n_bins}) to "
            f"{max_bins}, or lower `f_min_hz`"
        )
    # The kernel of the lowest band, which is the longest.
    length = sample_rate / f_min_hz / (2 ** (1 / bins_per_octave) - 1)
    _check_sizes(n_bins, length, n_bins=n_bins, f_min_hz=f_min_hz, bins_per_octave=bins_per_octave)
    bands = {"fmin": f_min_hz, "n_bins": n_bins, "bins_per_octave": bins_per_octave}
    return {**bands, "verbose": False}


def _checked_octaves(n_bins: int, bins_per_octave: int, hop_length: int) -> int:
    """The number of octaves of an algorithm that halves the sample rate for each octave."""
    remedy = "CQT with `algorithm`='1992v2', which accepts any"
    if n_bins < bins_per_octave:
        raise UserError(
            f"`n_bins` ({n_bins}) must be at least one octave (`bins_per_octave`, "
            f"{bins_per_octave}), because the kernels cover one octave: increase `n_bins`, or use "
            f"{remedy} number"
        )
    octaves = ceil(n_bins / bins_per_octave)
    divisor = 2 ** (octaves - 1)
    if hop_length % divisor:
        nearest = divisor * max(1, round(hop_length / divisor))
        raise UserError(
            f"`hop_length` ({hop_length}) must be a multiple of {divisor}, because the hop is "
            f"halved for each of the {octaves} octaves except the first: use {nearest}, or "
            f"{remedy} hop"
        )
    return octaves
