"""The fixed spectrograms, compared with librosa and nnAudio."""

import json
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from nnAudio.features.cqt import CQT1992v2
from nnAudio.features.gammatone import Gammatonegram
from safetensors import safe_open
from torch import Tensor, nn

from jepa_audio.steps.front_ends.base import Spectrogram
from jepa_audio.steps.front_ends.filterbank import LearnedFilterbank
from jepa_audio.steps.front_ends.transforms import CQT, VQT, Gammatone, LogMel, exclude_from_state

DATA = Path(__file__).parents[2] / "data"
RATE = 8000
TRANSFORMS: dict[str, Callable[[], Spectrogram]] = {
    "mel": lambda: LogMel(RATE, n_fft=256, hop_length=80, n_mels=20),
    "mel, odd hop": lambda: LogMel(RATE, n_fft=256, win_length=200, hop_length=77, n_mels=20),
    "mel, centred": lambda: LogMel(RATE, n_fft=256, hop_length=80, n_mels=20, center=True),
    "gammatone": lambda: Gammatone(RATE, n_fft=256, hop_length=80, n_bins=16),
    "cqt 1992v2": lambda: CQT(RATE, 77, f_min_hz=220.0, n_bins=40),
    "cqt 2010v2": lambda: CQT(RATE, 96, f_min_hz=220.0, n_bins=40, algorithm="2010v2"),
    "learned filterbank": lambda: LearnedFilterbank(RATE, 16, 200, 80),
    "vqt": lambda: VQT(RATE, 96, f_min_hz=220.0, n_bins=40, gamma=12.0),
}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tone(frequency_hz: float, num_samples: int = RATE) -> Tensor:
    return torch.sin(2 * torch.pi * frequency_hz * torch.arange(num_samples) / RATE)[None, None]


@every_transform
def test_number_of_frames_equals_the_formula(make: Callable[[], Spectrogram]) -> None:
    spectrogram = make()
    shortest, hop = spectrogram.min_samples, spectrogram.hop_length
    for num_samples in [
        *range(shortest, shortest + 3),
        *range(4 * hop - 1, 4 * hop + 2),
        2011,
        4095,
        8000,
    ]:
        if num_samples >= shortest:
            expected = (2, 1, spectrogram.num_bands, spectrogram.num_frames(num_samples))
            assert spectrogram(noise(2, 1, num_samples)).shape == expected


@every_transform
# nnAudio warns and pads with zeros where reflect padding is not possible.
@pytest.mark.filterwarnings("error::UserWarning")
def test_min_samples_is_the_shortest_clip_with_reflect_padding(
    make: Callable[[], Spectrogram],
) -> None:
    spectrogram = make()
    spectrogram.log_magnitude(noise(1, spectrogram.min_samples))
    with pytest.raises((RuntimeError, UserWarning)):
        spectrogram.log_magnitude(noise(1, spectrogram.min_samples - 1))


@every_transform
def test_too_short_clip_raises_an_error_in_num_frames_and_forward(
    make: Callable[[], Spectrogram],
) -> None:
    spectrogram = make()
    samples = spectrogram.min_samples
    message = rf"{samples - 1} samples is too short .* at least {samples} samples"
    with pytest.raises(ValueError, match=message):
        spectrogram.num_frames(samples - 1)
    with pytest.raises(ValueError, match=message):
        spectrogram(noise(1, 1, samples - 1))


@every_transform
def test_autocast_changes_nothing(make: Callable[[], Spectrogram]) -> None:
    spectrogram, waveform = make(), noise(2, 1, 2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = spectrogram(waveform)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, spectrogram(waveform))
    assert spectrogram(waveform.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "make", [make for name, make in TRANSFORMS.items() if "learned" not in name]
)
def test_kernels_are_buffers_that_are_not_saved(make: Callable[[], Spectrogram]) -> None:
    spectrogram = make()
    assert not spectrogram.state_dict()
    assert not list(spectrogram.parameters())
    assert list(spectrogram.buffers()), "kernels must move with the module"


@every_transform
def test_channels_are_transformed_separately(make: Callable[[], Spectrogram]) -> None:
    spectrogram, waveform = make(), noise(2, 3, 2000)
    batched = spectrogram(waveform)
    for channel in range(3):
        single = spectrogram(waveform[:, channel : channel + 1])
        torch.testing.assert_close(batched[:, channel : channel + 1], single, rtol=1e-4, atol=1e-4)


@every_transform
def test_silence_gives_the_floor_and_a_finite_gradient(make: Callable[[], Spectrogram]) -> None:
    spectrogram = make()
    waveform = torch.zeros(1, 1, 2000, requires_grad=True)
    spectrum = spectrogram(waveform)
    spectrum.sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()
    assert spectrum.isfinite().all()
    if isinstance(spectrogram, CQT | VQT):
        torch.testing.assert_close(spectrum, torch.full_like(spectrum, np.log(1e-5)))


@pytest.mark.parametrize("band", [5, 20, 33])
def test_tone_has_its_maximum_in_the_right_band_and_frames(band: int) -> None:
    waveform = tone(220.0 * 2 ** (band / 12))
    waveform[..., : RATE // 2] = 0
    for name in ("cqt 1992v2", "cqt 2010v2", "vqt"):
        spectrogram = TRANSFORMS[name]()
        spectrum = spectrogram(waveform)[0, 0]
        frames = spectrum.shape[1]
        assert (spectrum[:, 3 * frames // 5 : 9 * frames // 10].argmax(dim=0) == band).all(), name
        onset = int((spectrum[band] > spectrum[band].max() - np.log(2)).nonzero()[0])
        assert abs(onset * spectrogram.hop_length - RATE // 2) <= spectrogram.hop_length, name


def test_log_mel_equals_the_published_pupujepa() -> None:
    with safe_open(DATA / "pupujepa.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["mel"])
        audio, log_mel, normalised = (
            file.get_tensor(f"mel/{name}") for name in ("audio", "log_mel", "normalised")
        )
    spectrogram = LogMel()
    assert spectrogram.sample_rate == sizes["sample_rate"]
    assert (spectrogram.window_length, spectrogram.hop_length) == (sizes["n_fft"], sizes["hop"])
    assert (spectrogram.num_bands, spectrogram.padding) == (sizes["n_mels"], sizes["pad"])
    ours = spectrogram(audio[:, None])[:, 0]
    torch.testing.assert_close(ours, log_mel, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (ours - sizes["mean"]) / (sizes["std"] + 1e-8), normalised, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("mel_scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", None])
def test_log_mel_equals_librosa(power: float, mel_scale: str, norm: str | None) -> None:
    waveform = noise(1, 1, 8000)
    ours = LogMel(
        RATE,
        n_fft=512,
        win_length=400,
        hop_length=100,
        n_mels=32,
        f_min_hz=60.0,
        f_max_hz=3500.0,
        mel_scale=mel_scale,
        norm=norm,
        power=power,
        magnitude_eps=0.0,
        center=True,
    )(waveform)
    reference = librosa.feature.melspectrogram(
        y=waveform[0, 0].numpy(),
        sr=RATE,
        n_fft=512,
        win_length=400,
        hop_length=100,
        power=power,
        pad_mode="reflect",
        n_mels=32,
        fmin=60,
        fmax=3500,
        htk=mel_scale == "htk",
        norm=norm,
    )
    expected = torch.from_numpy(np.log(np.maximum(reference, 1e-5)))[None, None]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_cqt_1992v2_equals_librosa_except_at_the_ends() -> None:
    waveform = noise(1, 1, RATE)
    ours = CQT(RATE, 64, f_min_hz=220.0, n_bins=36)(waveform)[0, 0]
    reference = np.abs(
        librosa.cqt(waveform[0, 0].numpy(), sr=RATE, hop_length=64, fmin=220.0, n_bins=36)
    )
    difference = (ours - torch.from_numpy(np.log(reference)))[:, 20:-20]
    assert difference.abs().median() < 0.02


@pytest.mark.parametrize("n_bins", [36, 40])
@pytest.mark.parametrize("f_min_hz", [55.0, 220.0])
def test_transform_by_octaves_equals_all_kernels_at_the_full_rate(
    n_bins: int, f_min_hz: float
) -> None:
    """At 55 Hz the top band is low: nnAudio would reduce the rate first, with wrong results."""
    waveform = noise(1, 1, 2 * RATE)
    direct = CQT(RATE, 64, f_min_hz=f_min_hz, n_bins=n_bins)(waveform).exp()
    for spectrogram in (
        CQT(RATE, 64, f_min_hz=f_min_hz, n_bins=n_bins, algorithm="2010v2"),
        VQT(RATE, 64, f_min_hz=f_min_hz, n_bins=n_bins, gamma=0.0),
    ):
        assert (spectrogram(waveform).exp() - direct).abs().mean() < 0.01 * direct.mean()


def test_gamma_shortens_low_bands_more_than_high_bands() -> None:
    click = torch.zeros(1, 1, RATE)
    click[..., RATE // 2] = 1

    def spread(spectrogram: Spectrogram) -> Tensor:
        magnitude = spectrogram(click)[0, 0].exp()
        return (magnitude > magnitude.amax(dim=1, keepdim=True) / 2).sum(dim=1)

    constant, variable = (spread(VQT(RATE, 4, 110.0, 36, gamma=gamma)) for gamma in (0.0, 20.0))
    # The bandwidth is alpha * f + gamma: the window shrinks by alpha * f / (alpha * f + gamma).
    alpha = 2 ** (1 / 12) - 1
    for band, f in ((0, 110.0), (35, 110.0 * 2 ** (35 / 12))):
        assert variable[band] / constant[band] == pytest.approx(
            alpha * f / (alpha * f + 20), rel=0.1
        )


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gammatone_equals_nnaudio(power: float) -> None:
    waveform = noise(2, 1, 3000)
    ours = Gammatone(
        RATE, 256, None, 80, 16, power=power, floor=1e-12, magnitude_eps=0.0, center=True
    )
    reference = Gammatonegram(
        RATE,
        n_fft=256,
        n_bins=16,
        hop_length=80,
        fmin=20.0,
        power=power,
        verbose=False,
        trainable_STFT=False,
    )
    torch.testing.assert_close(
        ours(waveform)[:, 0], reference(waveform).log(), rtol=1e-4, atol=1e-4
    )


def test_log_magnitude_equals_nnaudio() -> None:
    waveform = noise(2, 1, 3000)
    reference = CQT1992v2(RATE, 77, 220.0, n_bins=40, verbose=False)(waveform)
    torch.testing.assert_close(
        TRANSFORMS["cqt 1992v2"]()(waveform)[:, 0], reference.log(), rtol=1e-4, atol=1e-4
    )


def test_exclude_from_state_converts_nested_parameters_to_buffers() -> None:
    inner = nn.Linear(3, 2).requires_grad_(False)
    module = nn.Sequential(nn.Sequential(inner), nn.BatchNorm1d(2).requires_grad_(False)).eval()
    x, before = noise(4, 3), len([*module.parameters(), *module.buffers()])
    expected = module(x)
    assert exclude_from_state(module) is module
    assert not module.state_dict()
    assert not list(module.parameters())
    assert len(list(module.buffers())) == before
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogMel(RATE, f_max_hz=4001.0), r"`f_max_hz` \(4001\) must not exceed 4000"),
        (lambda: LogMel(RATE, f_min_hz=3000.0, f_max_hz=3000.0), r"`f_min_hz` \(3000\)"),
        (
            lambda: LogMel(RATE, n_fft=256, hop_length=257),
            r"`hop_length` \(257\) must be in \[1, `win_length`",
        ),
        (
            lambda: LogMel(RATE, n_fft=256, win_length=300),
            r"`win_length` \(300\).* at most `n_fft` \(256\)",
        ),
        (lambda: LogMel(RATE, hop_length=0), r"`hop_length` \(0\)"),
        (lambda: LogMel(RATE, power=0.0), r"`power` \(0.0\)"),
        (lambda: LogMel(RATE, floor=0.0), r"`floor` \(0.0\)"),
        (lambda: Gammatone(RATE, f_max_hz=5000.0), r"`f_max_hz` \(5000\) must not exceed 4000"),
        (
            lambda: CQT(RATE, 80, f_min_hz=220.0, n_bins=60),
            r"top band \(6645 Hz\).*lower `n_bins` \(60\) to 51",
        ),
        (lambda: CQT(RATE, 80, f_min_hz=0.0), r"`f_min_hz` \(0\)"),
        (lambda: CQT(RATE, 0, f_min_hz=220.0, n_bins=12), r"`hop_length` \(0\)"),
        (lambda: CQT(RATE, 80, f_min_hz=220.0, n_bins=12, floor=0.0), r"`floor` \(0.0\)"),
        (
            lambda: CQT(16000, 160, algorithm="2010v2"),
            r"`hop_length` \(160\) must be a multiple of 64.* 7 octaves.* use 128, or .*'1992v2'",
        ),
        (
            lambda: VQT(16000, 160),
            r"`hop_length` \(160\) must be a multiple of 64.*use 128, or .*'1992v2'",
        ),
        (
            lambda: VQT(RATE, 80, f_min_hz=220.0, n_bins=7),
            r"`n_bins` \(7\) must be at least one octave",
        ),
        (lambda: VQT(RATE, 80, f_min_hz=220.0, n_bins=12, gamma=-1.0), r"`gamma` \(-1.0\)"),
    ],
)
def test_invalid_settings_raise_errors(make: Callable[[], Spectrogram], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_number_of_bands_in_the_error_message_is_valid() -> None:
    assert CQT(RATE, 80, f_min_hz=220.0, n_bins=51).num_bands == 51
