"""The learned filterbank, compared with complex filters in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.front_ends.filterbank import LearnedFilterbank

RATE = 8000
SIZES = {"sample_rate": RATE, "num_bands": 12, "window_length": 200, "hop_length": 80}


def clips(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def centres_hz() -> np.ndarray:
    """Centres of 12 mel filters between 60 Hz and 4 kHz (O'Shaughnessy's formula)."""
    low, high = (1127 * np.log(1 + f / 700) for f in (60, RATE / 2))
    return 700 * (np.exp(np.linspace(low, high, 14)[1:-1] / 1127) - 1)


@pytest.mark.parametrize("per_hop", [1, 4])
def test_energies_equal_complex_filters(per_hop: int):
    filterbank = LearnedFilterbank(**SIZES, energies_per_hop=per_hop, floor=1e-7)
    torch.nn.init.normal_(filterbank.weight, generator=torch.Generator().manual_seed(1))
    waveform = clips(2, 1, 1000)
    stride = 80 // per_hop
    padding = (200 + 2 * (80 - stride) - 80) // 2
    padded = np.pad(waveform[:, 0].double().numpy(), ((0, 0), (padding, padding)), mode="reflect")
    kernels = (filterbank.weight * filterbank.scale).detach().double().numpy()
    filters = kernels[0] + 1j * kernels[1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, 200, axis=1)[:, ::stride]
    energies = np.abs(np.einsum("btw,fw->bft", frames, filters)) ** 2
    hann = [np.sin(np.pi * i / (2 * per_hop)) ** 2 for i in range(1, 2 * per_hop)]
    means = [
        np.average(energies[..., first : first + len(hann)], axis=-1, weights=hann)
        for first in range(0, energies.shape[-1] - len(hann) + 1, per_hop)
    ]
    expected = np.log(np.stack(means, axis=-1) + 1e-7)
    actual = filterbank(waveform)[:, 0].detach().numpy()
    assert actual.shape == (2, 12, filterbank.num_frames(1000))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.parametrize("band", [0, 3, 8, 11])
def test_a_sine_at_the_centre_of_a_first_kernel_has_energy_one_quarter_in_its_band(band: int):
    time = torch.arange(RATE) / RATE
    sine = torch.sin(2 * torch.pi * float(centres_hz()[band]) * time)[None, None]
    energies = LearnedFilterbank(**SIZES)(sine).detach()[0, 0, :, 50].exp()
    assert int(energies.argmax()) == band
    assert float(energies[band]) == pytest.approx(0.25, rel=0.02)


def test_steps_of_adam_in_random_directions_do_not_let_low_frequencies_into_high_bands():
    filterbank = LearnedFilterbank(**SIZES)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([filterbank.weight], lr=5e-4, betas=(0.9, 0.98))
    for _ in range(300):
        filterbank.weight.grad = torch.randn(filterbank.weight.shape, generator=generator)
        optimizer.step()
    time = torch.arange(RATE) / RATE
    low = 0.5 * torch.sin(2 * torch.pi * 200 * time)[None, None]
    log_energies = filterbank(low).detach()[0, 0, :, 50]
    decibels = (log_energies - log_energies.max()) * 10 / np.log(10)
    assert (decibels[-4:] < -55).all()


@pytest.mark.parametrize("side", [-1, 1])
def test_first_kernels_are_as_wide_as_mel_filters_at_half_of_their_height(side: int):
    edges = np.concatenate([[60.0], centres_hz(), [RATE / 2]])
    band = 8
    quarter = (edges[band + 2] - edges[band]) / 4  # of the base of the triangle of this band
    time = torch.arange(RATE) / RATE
    frequency_hz = float(edges[band + 1] + side * quarter)
    sine = torch.sin(2 * torch.pi * frequency_hz * time)[None, None]
    energy = LearnedFilterbank(**SIZES)(sine).detach()[0, 0, band, 50].exp()
    assert float((4 * energy).sqrt()) == pytest.approx(0.5, rel=0.03)


def test_only_trained_kernels_get_a_gradient_and_a_reset_restores_the_first_ones():
    for trained in (True, False):
        filterbank = LearnedFilterbank(**SIZES, trained=trained)
        front_end = SpectrogramFrontEnd(
            filterbank, 16, patch_frames=2, patch_bands=12, mean=0.0, std=1.0
        )
        front_end(clips(1, 1, 2000)).square().sum().backward()
        assert (filterbank.weight.grad is not None) == trained
        first = filterbank.weight.detach().clone()
        with torch.no_grad():
            filterbank.weight.mul_(2)
        front_end.reset_parameters()
        assert torch.equal(filterbank.weight, first)
        assert "spectrogram.weight" in front_end.state_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"energies_per_hop": 3}, {"energies_per_hop": 0},
        {"f_min_hz": 5000.0}, {"f_max_hz": 4001.0}, {"f_min_hz": -1.0}, {"hop_length": 201},
        {"hop_length": 0}, {"num_bands": 0}, {"floor": 0.0}, {"window_length": 65_537},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LearnedFilterbank(**SIZES | wrong)
