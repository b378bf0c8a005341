"""Resampling: pitch, passband and aliases; a slice equals that slice of the complete file."""

import math

import numpy as np
import pytest
import torch

from jepa_audio.data.audio.resample import rate_ratio, resample, resampled_length, source_slice

PAIRS = [
    (44_100, 16_000),
    (16_000, 44_100),
    (48_000, 24_000),
    (22_050, 16_000),
    (44_101, 16_000),
    (11_025, 32_000),
]


def noise(num_frames: int, num_channels: int = 1) -> torch.Tensor:
    return torch.randn(num_channels, num_frames, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_a_sine_keeps_its_frequency_and_level(from_rate: int, to_rate: int):
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(from_rate) / from_rate)[None].float()
    spectrum = torch.fft.rfft(
        resample(sine, from_rate, to_rate)[0, : to_rate - 100] * torch.hann_window(to_rate - 100)
    )
    frequency = spectrum.abs().argmax() * to_rate / (to_rate - 100)
    assert 1200 * abs(math.log2(frequency / 1000)) < 2.5  # cents; one bin is 1.7 cents
    assert resample(sine, from_rate, to_rate)[0, 200:-200].abs().max() == pytest.approx(1, abs=0.02)


def level_after(from_rate: int, to_rate: int, share: float) -> float:
    """Level in dB of a sine at `share` of the lower Nyquist frequency after resampling."""
    frequency = share * min(from_rate, to_rate) / 2
    time = torch.arange(from_rate, dtype=torch.float64) / from_rate
    sine = torch.sin(2 * math.pi * frequency * time)[None]
    middle = resample(sine.float(), from_rate, to_rate)[0, to_rate // 4 : -to_rate // 4]
    return 20 * math.log10(float(middle.square().mean().mul(2).sqrt()) + 1e-12)


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(44_100, 16_000), (48_000, 24_000), (22_050, 16_000)]
)
def test_the_passband_is_flat_and_nothing_aliases(from_rate: int, to_rate: int):
    assert level_after(from_rate, to_rate, 0.5) == pytest.approx(0, abs=0.02)
    assert level_after(from_rate, to_rate, 0.9) == pytest.approx(0, abs=0.02)
    for share in (1.02, 1.1, 1.2):
        assert level_after(from_rate, to_rate, share) < -120


def test_a_higher_rate_adds_no_image_of_the_band():
    spectrum = torch.fft.rfft(resample(noise(8000), 8000, 16_000)[0] * torch.hann_window(16_000))
    below, above = spectrum[:3600].abs().mean(), spectrum[4200:].abs().max()
    assert 20 * torch.log10(above / below) < -100


def test_a_constant_stays_constant_at_the_approximated_ratios_too():
    for from_rate, to_rate in PAIRS:
        level = resample(torch.ones(2, from_rate), from_rate, to_rate)[:, 2000:-2000]
        torch.testing.assert_close(level, torch.ones_like(level), atol=1e-6, rtol=0)


def test_equal_rates_return_the_waveform_itself():
    waveform = noise(100)
    assert resample(waveform, 8000, 8000) is waveform


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [*PAIRS, (44_056, 16_000), (47_999, 48_000), (16_001, 44_100)]
)
def test_the_ratio_is_within_one_cent_and_its_period_small(from_rate: int, to_rate: int):
    ratio = rate_ratio(from_rate, to_rate)
    assert 1200 * abs(math.log2(ratio * to_rate / from_rate)) < 1
    assert ratio.denominator <= 1280


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
@pytest.mark.parametrize("num_frames", [1, 2000, 2003])
def test_resampled_length_predicts_the_length(from_rate: int, to_rate: int, num_frames: int):
    assert resample(noise(num_frames), from_rate, to_rate).shape[1] == resampled_length(
        num_frames, from_rate, to_rate
    )


@pytest.mark.parametrize(("from_rate", "to_rate"), [*PAIRS, (16_000, 16_000)])
def test_a_resampled_source_slice_equals_that_slice_of_the_resampled_file(
    from_rate: int, to_rate: int
):
    waveform = noise(from_rate // 2, num_channels=2)
    full = resample(waveform, from_rate, to_rate)
    draws = np.random.default_rng(0)
    for num_samples in (1, 37, 900):
        last_start = full.shape[1] - num_samples
        for start in [0, 1, last_start, *draws.integers(last_start, size=10).tolist()]:
            begin, num_frames, skip = source_slice(
                start, num_samples, waveform.shape[1], from_rate, to_rate
            )
            frames = waveform[:, begin : begin + num_frames]
            assert frames.shape[1] == num_frames
            samples = resample(frames, from_rate, to_rate)[:, skip:][:, :num_samples]
            expected = full[:, start : start + num_samples]
            torch.testing.assert_close(samples, expected, atol=1e-6, rtol=0)


def test_a_short_slice_needs_a_short_source_slice():
    _, num_frames, _ = source_slice(100_000, 32_000, 44_100 * 60, 44_100, 16_000)
    assert num_frames < 44_100 * 2 + 2000


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="0"):
        resample(noise(10), 0, 16_000)
