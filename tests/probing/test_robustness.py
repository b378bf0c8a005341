"""The conditions of the robustness sweeps, and the area under their curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.signal import chirp
from torch import Tensor

from jepa_audio.probing.robustness import SWEEPS, area, noise_sweep
from jepa_audio.probing.robustness.codecs import Mp3, Opus, Vorbis
from jepa_audio.probing.robustness.conditions import (
    Clipping,
    Condition,
    Gain,
    HighPass,
    LowPass,
    Noise,
    PinkNoise,
    RecordedNoise,
    Reverberation,
    WhiteNoise,
)

RATE = 24_000
ALL = [condition for sweep in SWEEPS.values() for condition in sweep]
RANDOM = [WhiteNoise(5.0), PinkNoise(5.0), Reverberation(0.4)]


def named(condition: Condition) -> str:
    return f"{condition.name} {condition.level:g} {condition.unit}"


def decibels(ratio: float) -> float:
    return 20 * math.log10(ratio)


def rms(waveform: Tensor) -> float:
    return float(waveform.double().square().mean().sqrt())


def correlation(clip: Tensor, degraded: Tensor) -> float:
    """Correlation, which does not depend on the gain."""
    return float(torch.corrcoef(torch.stack([clip.flatten(), degraded.flatten()]).double())[0, 1])


def tone(hertz: float, num_samples: int = RATE, rate: int = RATE) -> Tensor:
    return (
        0.5
        * torch.sin(
            2 * torch.pi * hertz * torch.arange(num_samples, dtype=torch.float64) / rate
        ).float()[None]
    )


def impulse(num_samples: int, place: int = 0) -> Tensor:
    clip = torch.zeros(1, num_samples)
    clip[0, place] = 1.0
    return clip


@pytest.fixture(scope="module")
def music() -> Tensor:
    """1 s of plucked chords in two different channels, with noise and a silent start."""
    rng = torch.Generator().manual_seed(3)
    time = torch.arange(RATE) / RATE
    clip = 0.002 * torch.randn(2, len(time), generator=rng)
    for onset, root in ((0.2, 220.0), (0.4, 277.2), (0.7, 164.8)):
        since = (time - onset).clamp_min(0)
        for channel, ratio in enumerate((1.0, 1.5)):
            for overtone in range(1, 9):
                phase = 2 * torch.pi * root * ratio * overtone * since
                clip[channel] += (
                    0.2 / overtone * torch.sin(phase) * torch.exp(-4 * since) * (time >= onset)
                )
    return clip * (time >= 0.1)


@pytest.mark.parametrize("condition", ALL, ids=named)
def test_conditions_keep_shape_and_type_and_do_not_modify_the_input(
    condition: Condition, music: Tensor
):
    before = music.clone()
    degraded = condition(music, RATE, 1)
    assert degraded.shape == music.shape
    assert degraded.dtype == torch.float32
    assert degraded.isfinite().all()
    assert torch.equal(music, before)
    assert not torch.equal(degraded, music)


@pytest.mark.parametrize("condition", ALL, ids=named)
def test_conditions_accept_short_clips_and_odd_sample_rates(condition: Condition):
    rng = torch.Generator().manual_seed(0)
    for num_samples, rate in (
        (1, 24_000),
        (10, 24_000),
        (100, 24_000),
        (10, 1_000),
        (100, 11_025),
        (1, 96_000),
    ):
        clip = 2.5 * torch.randn(2, num_samples, generator=rng)
        degraded = condition(clip, rate, 7)
        assert degraded.shape == clip.shape
        assert degraded.isfinite().all(), (num_samples, rate)


@pytest.mark.parametrize("condition", ALL, ids=named)
def test_silence_stays_silence(condition: Condition):
    for num_samples in (1, 2_000):
        silence = torch.zeros(2, num_samples)
        assert torch.equal(condition(silence, RATE, 0), silence)


@pytest.mark.parametrize("condition", [*RANDOM, Clipping(5.0)], ids=named)
def test_very_soft_clips_do_not_underflow(condition: Condition):
    soft = 1e-25 * tone(440)
    degraded = condition(soft, RATE, 0)
    assert degraded.isfinite().all()
    assert rms(degraded) >= rms(soft) * 0.99


def test_random_draws_depend_on_the_seed_alone(music: Tensor):
    for condition in RANDOM:
        assert torch.equal(condition(music, RATE, 5), condition(music, RATE, 5))
        assert not torch.equal(condition(music, RATE, 5), condition(music, RATE, 6))


def test_the_global_generator_is_not_used(music: Tensor):
    for condition in (*RANDOM, Mp3(32.0), Vorbis(3.0), Opus(16.0)):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = condition(music, RATE, 5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(condition(music, RATE, 5), first)


def test_different_conditions_have_different_keys():
    conditions = [*ALL, Reverberation(0.2, direct_db=10.0)]
    assert len({condition.key for condition in conditions}) == len(conditions)
    assert WhiteNoise(5.0).key == WhiteNoise(5.0).key


@pytest.mark.parametrize("kind", [WhiteNoise, PinkNoise])
@pytest.mark.parametrize("snr", [30.0, 5.0, -5.0])
def test_noise_has_the_requested_ratio(kind: type[Noise], snr: float, music: Tensor):
    noise = kind(level=snr)(music, RATE, 2) - music
    assert decibels(rms(music) / rms(noise)) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize("kind", [WhiteNoise, PinkNoise])
def test_along_a_sweep_only_the_level_of_the_noise_changes(kind: type[Noise], music: Tensor):
    mild, hard = (kind(level=snr)(music, RATE, 2) - music for snr in (10.0, -5.0))
    torch.testing.assert_close(hard, mild * 10 ** (15 / 20), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "slope"), [(WhiteNoise, 0.0), (PinkNoise, -3.01)])
def test_noise_has_the_spectral_slope_of_its_colour(kind: type[Noise], slope: float):
    clip = 1e-3 * tone(440, 20 * RATE)
    power = torch.fft.rfft((kind(level=-40.0)(clip, RATE, 2) - clip)[0]).abs().square()
    frequency = torch.fft.rfftfreq(clip.shape[1], 1 / RATE)
    edges = [50.0 * 2**octave for octave in range(8)]
    bands = [power[(frequency >= low) & (frequency < 2 * low)].mean() for low in edges]
    fitted = np.polyfit(np.arange(8), 10 * np.log10(bands), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.1)


def test_noise_differs_between_channels(music: Tensor):
    noise = WhiteNoise(0.0)(music, RATE, 2) - music
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.05


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """One short and at another sample rate, one with a long pause, one in a subfolder."""
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    sf.write(tmp_path / "short.wav", 0.1 * rng.standard_normal(4_000), 16_000)
    paused = 0.1 * rng.standard_normal((4 * RATE, 2))
    paused[: 3 * RATE] = 0
    sf.write(tmp_path / "paused.wav", paused, RATE)
    sf.write(tmp_path / "below" / "other.flac", 0.1 * rng.standard_normal(2 * RATE), RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def test_recorded_noise_has_the_requested_ratio_at_every_position(recordings: Path):
    clip = tone(440)
    condition = RecordedNoise(3.0, recordings)
    assert [path.name for path in condition.files] == ["other.flac", "paused.wav", "short.wav"]
    noises = [condition(clip, RATE, seed) - clip for seed in range(20)]
    assert all(decibels(rms(clip) / rms(noise)) == pytest.approx(3.0, abs=0.1) for noise in noises)
    assert len({float(noise[0, 0]) for noise in noises}) > 10
    assert torch.equal(condition(clip, RATE, 4), condition(clip, RATE, 4))


def test_the_key_of_recorded_noise_depends_on_its_recordings(recordings: Path):
    sweep = noise_sweep(recordings)
    assert len({condition.key for condition in sweep}) == len(sweep) == 6
    before = RecordedNoise(3.0, recordings).key
    sf.write(recordings / "new.wav", np.ones(10), RATE)
    assert RecordedNoise(3.0, recordings).key != before


def test_folders_without_noise_raise_errors(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* has no audio file"):
        RecordedNoise(3.0, tmp_path)
    sf.write(tmp_path / "quiet.wav", np.zeros(100), RATE)
    with pytest.raises(ValueError, match=r"quiet\.wav is silent"):
        RecordedNoise(3.0, tmp_path)(tone(440), RATE, 0)


@pytest.mark.parametrize("rt60", [0.2, 0.4, 0.8, 1.6])
def test_reverberation_falls_by_60_db_in_its_time(rt60: float):
    response = Reverberation(rt60)(impulse(2 * RATE), RATE, 3)[0].double()
    # Backward integration (Schroeder, 1965).
    energy = response.square().flip(0).cumsum(0).flip(0)
    level = 10 * torch.log10(energy / energy[0])
    first, last = (int((level > limit).sum()) for limit in (-8.0, -38.0))
    assert (last - first) * 2 / RATE == pytest.approx(rt60, rel=0.05)


def test_reverberation_keeps_level_and_timing_and_has_the_requested_direct_path(music: Tensor):
    assert rms(Reverberation(0.8)(music, RATE, 3)) == pytest.approx(rms(music), rel=1e-4)
    for rt60, direct_db, expected in (
        (0.4, 0.0, 0.0),
        (0.4, 10.0, 10.0),
        (0.8, 0.0, -3.01),
        (0.2, 0.0, 3.01),
    ):
        response = Reverberation(rt60, direct_db)(impulse(RATE, 1_000), RATE, 3)[0]
        assert int(response.abs().argmax()) == 1_000
        assert response[:1_000].abs().max() < 1e-6
        assert decibels(float(response[1_000] / response[1_001:].norm())) == pytest.approx(
            expected, abs=0.05
        )


def direct_path(room: Reverberation) -> Tensor:
    return room(impulse(2 * RATE), RATE, 3)[0, 0]


def test_along_a_sweep_the_tail_is_the_same_noise_with_another_decay():
    short, long = (
        Reverberation(rt60)(impulse(2 * RATE), RATE, 3)[0, 1 : RATE // 5] for rt60 in (0.4, 1.6)
    )
    seconds = torch.arange(1, RATE // 5) / RATE
    ratio = short / long * 10 ** (3 * seconds * (1 / 0.4 - 1 / 1.6))
    kept = long.abs() > 1e-3  # where rounding does not matter
    torch.testing.assert_close(
        ratio[kept], ratio[kept].median().expand(int(kept.sum())), rtol=2e-3, atol=0.0
    )
    density = (
        short[:100].norm()
        / direct_path(Reverberation(0.4))
        / (long[:100].norm() / direct_path(Reverberation(1.6)))
    )
    assert float(density) == pytest.approx(1.0, abs=0.05)


def test_filters_pass_their_band_and_stop_the_rest():
    middle = slice(RATE // 4, -RATE // 4)
    for condition, hertz, expected in (
        (LowPass(4000.0), 3000.0, 0.0),
        (LowPass(2000.0), 3000.0, None),
        (LowPass(2000.0), 2000.0, -6.02),
        (HighPass(500.0), 750.0, 0.0),
        (HighPass(1000.0), 660.0, None),
        (HighPass(125.0), 200.0, 0.0),
    ):
        clip = tone(hertz)
        change = decibels(rms(condition(clip, RATE, 0)[:, middle]) / rms(clip[:, middle]))
        if expected is None:
            assert change < -40, (condition, hertz)
        else:
            assert change == pytest.approx(expected, abs=0.5), (condition, hertz)


@pytest.mark.parametrize("condition", [*SWEEPS["low_pass"], *SWEEPS["high_pass"]], ids=named)
def test_filters_have_no_delay(condition: Condition):
    filtered = condition(impulse(2 * RATE, RATE), RATE, 0)[0]
    assert int(filtered.abs().argmax()) == RATE
    before, after = filtered[RATE - 500 : RATE].flip(0), filtered[RATE + 1 : RATE + 501]
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-4)


def test_cut_offs_above_half_the_sample_rate():
    clip = tone(440, 4_000, 4_000)
    assert not LowPass(2000.0).changes(4_000)
    assert torch.equal(LowPass(2000.0)(clip, 4_000, 0), clip)
    assert LowPass(1000.0).changes(4_000)
    assert HighPass(2000.0).changes(4_000)
    assert not HighPass(2000.0)(clip, 4_000, 0).any()


@pytest.mark.parametrize("level", [-30.0, -20.0, -10.0, 10.0])
def test_gain_is_exact_without_clipping(level: float, music: Tensor):
    degraded = Gain(level)(4 * music, RATE, 0)
    torch.testing.assert_close(degraded, 4 * music * 10 ** (level / 20))
    assert decibels(rms(degraded) / rms(4 * music)) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize("level", [1.0, 5.0, 10.0, 25.0, 50.0])
def test_the_requested_share_of_samples_is_clipped_and_the_level_kept(level: float, music: Tensor):
    degraded = Clipping(level)(music, RATE, 0)
    num_nonzero = int((music != 0).sum())
    clipped = int((degraded.abs() >= degraded.abs().max() * (1 - 1e-6)).sum())
    assert 100 * clipped / num_nonzero == pytest.approx(level, abs=0.02)
    assert rms(degraded) == pytest.approx(rms(music), rel=1e-5)
    assert (degraded.sign() == music.sign()).all()


def test_zeros_do_not_count_for_clipping():
    sparse = torch.zeros(1, 1_000)
    sparse[0, :100] = torch.linspace(0.01, 1.0, 100)
    degraded = Clipping(50.0)(sparse, RATE, 0)[0]
    assert degraded.unique().numel() == 51  # zero, 49 below the threshold, and the threshold


def sweep_of_tones(rate: int) -> Tensor:
    """A chirp in the pass band of the most severe settings."""
    time = np.arange(rate) / rate
    return torch.from_numpy((0.4 * chirp(time, 100, 1, 1_500)).astype(np.float32))[None]


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
@pytest.mark.parametrize("codec", [*SWEEPS["mp3"], *SWEEPS["vorbis"], *SWEEPS["opus"]], ids=named)
def test_codecs_keep_length_and_alignment(codec: Condition, rate: int):
    clip = sweep_of_tones(rate)[:, : rate - 17]
    decoded = codec(clip, rate, 0)
    assert decoded.shape == clip.shape
    length = 2 * clip.shape[1]
    spectra = (
        torch.fft.rfft(decoded[0].double(), length)
        * torch.fft.rfft(clip[0].double(), length).conj()
    )
    lag = int(torch.fft.irfft(spectra, length).roll(100).argmax()) - 100
    assert abs(lag) <= (1e-4 * rate if codec.name == "opus" else 0)
    assert correlation(clip, decoded) > 0.8


@pytest.mark.parametrize(
    ("mild", "hard"), [(Mp3(128.0), Mp3(16.0)), (Vorbis(8.0), Vorbis(1.0)), (Opus(64.0), Opus(8.0))]
)
def test_codecs_lose_more_at_more_severe_levels(mild: Condition, hard: Condition, music: Tensor):
    lost = [1 - correlation(music, codec(music, RATE, 0)) for codec in (mild, hard)]
    assert 0 < lost[0] < 0.3 * lost[1]


@pytest.mark.parametrize("codec", [Mp3(64.0), Vorbis(5.0), Opus(64.0)])
def test_codecs_accept_clips_above_full_scale(codec: Condition, music: Tensor):
    full_scale = music / music.abs().max()
    torch.testing.assert_close(
        codec(8 * full_scale, RATE, 0), 8 * codec(full_scale, RATE, 0), atol=1e-3, rtol=1e-3
    )


def test_codecs_accept_minutes_of_audio():
    long = 0.1 * torch.randn(1, 8_000 * 400, generator=torch.Generator().manual_seed(0))
    assert Vorbis(1.0)(long, 8_000, 0).shape == long.shape


def test_invalid_levels_raise_errors():
    for wrong in (
        lambda: Reverberation(0.0),
        lambda: LowPass(0.0),
        lambda: Clipping(101.0),
        lambda: Mp3(20.0),
        lambda: Vorbis(11.0),
        lambda: Opus(5.0),
    ):
        with pytest.raises(ValueError, match="`level`"):
            wrong()


def test_sweeps_go_from_mild_to_severe(music: Tensor):
    """The correlation with the clean clip falls at every step; gain does not change it."""
    for name, sweep in SWEEPS.items():
        assert {condition.name for condition in sweep} == {name}
        left = np.array([correlation(music, condition(music, RATE, 1)) for condition in sweep])
        if name == "gain":
            assert (left > 1 - 1e-6).all()
        else:
            assert (np.diff(left) < 0).all(), (name, left)


def test_the_area_of_a_constant_curve_is_the_clean_score():
    assert area([0.8, 0.8, 0.8], 0.8) == pytest.approx(0.8)


def test_the_area_follows_the_trapezoidal_rule():
    assert area([0.6, 0.2], 1.0) == pytest.approx((0.5 + 0.6 + 0.1) / 2)
    assert area([0.0], 1.0) == pytest.approx(0.5)


def test_the_area_includes_scores_below_zero():
    assert area([-0.5, -1.5], 0.5) == pytest.approx((0.25 - 0.5 - 0.75) / 2)
    with pytest.raises(ValueError, match="at least one level"):
        area([], 0.5)
