"""The conditions of the robustness sweeps, and the area under their curves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.signal import chirp
from torch import Tensor

from jepa_audio.probing.robustness import SWEEPS, Condition, area, noise_sweep

RATE = 24_000
ALL = [condition for sweep in SWEEPS.values() for condition in sweep]


def at(name: str, level: float) -> Condition:
    return replace(SWEEPS[name][0], level=level)


RANDOM = [at("white_noise", 5.0), at("pink_noise", 5.0), at("reverberation", 0.4)]


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


@pytest.mark.parametrize("condition", [*RANDOM, at("clipping", 5.0)], ids=named)
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
    for condition in (*RANDOM, at("mp3", 32.0), at("vorbis", 3.0), at("opus", 16.0)):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = condition(music, RATE, 5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(condition(music, RATE, 5), first)


def test_different_conditions_have_different_keys():
    assert len({condition.key for condition in ALL}) == len(ALL)


def test_keys_are_those_of_stored_features():
    assert at("white_noise", 5.0).key == "WhiteNoise(level=5.0), revision 1"
    assert at("reverberation", 0.4).key == "Reverberation(level=0.4, direct_db=0.0), revision 1"
    library = f"libsndfile {sf.__libsndfile_version__}"
    assert at("mp3", 32.0).key == f"Mp3(level=32.0), revision 1, {library}"


@pytest.mark.parametrize("kind", ["white_noise", "pink_noise"])
@pytest.mark.parametrize("snr", [30.0, 5.0, -5.0])
def test_noise_has_the_requested_ratio(kind: str, snr: float, music: Tensor):
    noise = at(kind, level=snr)(music, RATE, 2) - music
    assert decibels(rms(music) / rms(noise)) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize("kind", ["white_noise", "pink_noise"])
def test_along_a_sweep_only_the_level_of_the_noise_changes(kind: str, music: Tensor):
    mild, hard = (at(kind, level=snr)(music, RATE, 2) - music for snr in (10.0, -5.0))
    torch.testing.assert_close(hard, mild * 10 ** (15 / 20), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "slope"), [("white_noise", 0.0), ("pink_noise", -3.01)])
def test_noise_has_the_spectral_slope_of_its_colour(kind: str, slope: float):
    clip = 1e-3 * tone(440, 20 * RATE)
    power = torch.fft.rfft((at(kind, level=-40.0)(clip, RATE, 2) - clip)[0]).abs().square()
    frequency = torch.fft.rfftfreq(clip.shape[1], 1 / RATE)
    edges = [50.0 * 2**octave for octave in range(8)]
    bands = [power[(frequency >= low) & (frequency < 2 * low)].mean() for low in edges]
    fitted = np.polyfit(np.arange(8), 10 * np.log10(bands), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.1)


def test_noise_differs_between_channels(music: Tensor):
    noise = at("white_noise", 0.0)(music, RATE, 2) - music
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
    condition = replace(noise_sweep(recordings)[0], level=3.0)
    files = condition.degrade.keywords["files"]
    assert [path.name for path in files] == ["other.flac", "paused.wav", "short.wav"]
    noises = [condition(clip, RATE, seed) - clip for seed in range(20)]
    assert all(decibels(rms(clip) / rms(noise)) == pytest.approx(3.0, abs=0.1) for noise in noises)
    assert len({float(noise[0, 0]) for noise in noises}) > 10
    assert torch.equal(condition(clip, RATE, 4), condition(clip, RATE, 4))


def test_the_key_of_recorded_noise_depends_on_its_recordings(recordings: Path):
    sweep = noise_sweep(recordings)
    assert len({condition.key for condition in sweep}) == len(sweep) == 6
    before = sweep[0].key
    sf.write(recordings / "new.wav", np.ones(10), RATE)
    assert noise_sweep(recordings)[0].key != before


def test_folders_without_noise_raise_errors(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* has no audio file"):
        noise_sweep(tmp_path)
    sf.write(tmp_path / "quiet.wav", np.zeros(100), RATE)
    with pytest.raises(ValueError, match=r"quiet\.wav is silent"):
        noise_sweep(tmp_path)[0](tone(440), RATE, 0)


@pytest.mark.parametrize("rt60", [0.2, 0.4, 0.8, 1.6])
def test_reverberation_falls_by_60_db_in_its_time(rt60: float):
    response = at("reverberation", rt60)(impulse(2 * RATE), RATE, 3)[0].double()
    # Backward integration (Schroeder, 1965).
    energy = response.square().flip(0).cumsum(0).flip(0)
    level = 10 * torch.log10(energy / energy[0])
    first, last = (int((level > limit).sum()) for limit in (-8.0, -38.0))
    assert (last - first) * 2 / RATE == pytest.approx(rt60, rel=0.05)


def test_reverberation_keeps_level_and_timing_and_has_the_requested_direct_path(music: Tensor):
    assert rms(at("reverberation", 0.8)(music, RATE, 3)) == pytest.approx(rms(music), rel=1e-4)
    for rt60, expected in ((0.4, 0.0), (0.8, -3.01), (0.2, 3.01)):
        response = at("reverberation", rt60)(impulse(RATE, 1_000), RATE, 3)[0]
        assert int(response.abs().argmax()) == 1_000
        assert response[:1_000].abs().max() < 1e-6
        assert decibels(float(response[1_000] / response[1_001:].norm())) == pytest.approx(
            expected, abs=0.05
        )


def direct_path(room: Condition) -> Tensor:
    return room(impulse(2 * RATE), RATE, 3)[0, 0]


def test_along_a_sweep_the_tail_is_the_same_noise_with_another_decay():
    short, long = (
        at("reverberation", rt60)(impulse(2 * RATE), RATE, 3)[0, 1 : RATE // 5]
        for rt60 in (0.4, 1.6)
    )
    seconds = torch.arange(1, RATE // 5) / RATE
    ratio = short / long * 10 ** (3 * seconds * (1 / 0.4 - 1 / 1.6))
    kept = long.abs() > 1e-3  # where rounding does not matter
    torch.testing.assert_close(
        ratio[kept], ratio[kept].median().expand(int(kept.sum())), rtol=2e-3, atol=0.0
    )
    density = (
        short[:100].norm()
        / direct_path(at("reverberation", 0.4))
        / (long[:100].norm() / direct_path(at("reverberation", 1.6)))
    )
    assert float(density) == pytest.approx(1.0, abs=0.05)


def test_filters_pass_their_band_and_stop_the_rest():
    middle = slice(RATE // 4, -RATE // 4)
    for condition, hertz, expected in (
        (at("low_pass", 4000.0), 3000.0, 0.0),
        (at("low_pass", 2000.0), 3000.0, None),
        (at("low_pass", 2000.0), 2000.0, -6.02),
        (at("high_pass", 500.0), 750.0, 0.0),
        (at("high_pass", 1000.0), 660.0, None),
        (at("high_pass", 125.0), 200.0, 0.0),
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
    assert not at("low_pass", 2000.0).changes(4_000)
    assert torch.equal(at("low_pass", 2000.0)(clip, 4_000, 0), clip)
    assert at("low_pass", 1000.0).changes(4_000)
    assert at("high_pass", 2000.0).changes(4_000)
    assert not at("high_pass", 2000.0)(clip, 4_000, 0).any()


@pytest.mark.parametrize("level", [-30.0, -20.0, -10.0, 10.0])
def test_gain_is_exact_without_clipping(level: float, music: Tensor):
    degraded = at("gain", level)(4 * music, RATE, 0)
    torch.testing.assert_close(degraded, 4 * music * 10 ** (level / 20))
    assert decibels(rms(degraded) / rms(4 * music)) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize("level", [1.0, 5.0, 10.0, 25.0, 50.0])
def test_the_requested_share_of_samples_is_clipped_and_the_level_kept(level: float, music: Tensor):
    degraded = at("clipping", level)(music, RATE, 0)
    num_nonzero = int((music != 0).sum())
    clipped = int((degraded.abs() >= degraded.abs().max() * (1 - 1e-6)).sum())
    assert 100 * clipped / num_nonzero == pytest.approx(level, abs=0.02)
    assert rms(degraded) == pytest.approx(rms(music), rel=1e-5)
    assert (degraded.sign() == music.sign()).all()


def test_zeros_do_not_count_for_clipping():
    sparse = torch.zeros(1, 1_000)
    sparse[0, :100] = torch.linspace(0.01, 1.0, 100)
    degraded = at("clipping", 50.0)(sparse, RATE, 0)[0]
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
    ("mild", "hard"),
    [
        (at("mp3", 128.0), at("mp3", 16.0)),
        (at("vorbis", 8.0), at("vorbis", 1.0)),
        (at("opus", 64.0), at("opus", 8.0)),
    ],
)
def test_codecs_lose_more_at_more_severe_levels(mild: Condition, hard: Condition, music: Tensor):
    lost = [1 - correlation(music, codec(music, RATE, 0)) for codec in (mild, hard)]
    assert 0 < lost[0] < 0.3 * lost[1]


@pytest.mark.parametrize("codec", [at("mp3", 64.0), at("vorbis", 5.0), at("opus", 64.0)])
def test_codecs_accept_clips_above_full_scale(codec: Condition, music: Tensor):
    full_scale = music / music.abs().max()
    torch.testing.assert_close(
        codec(8 * full_scale, RATE, 0), 8 * codec(full_scale, RATE, 0), atol=1e-3, rtol=1e-3
    )


def test_codecs_accept_minutes_of_audio():
    long = 0.1 * torch.randn(1, 8_000 * 400, generator=torch.Generator().manual_seed(0))
    assert at("vorbis", 1.0)(long, 8_000, 0).shape == long.shape


def test_invalid_levels_raise_errors():
    for name, level in (
        ("reverberation", 0.0),
        ("low_pass", 0.0),
        ("clipping", 101.0),
        ("mp3", 20.0),
        ("vorbis", 11.0),
        ("opus", 5.0),
    ):
        with pytest.raises(ValueError, match=f"`level` of {name}"):
            at(name, level)(tone(440), RATE, 0)


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
