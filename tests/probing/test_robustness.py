"""Laws of the conditions under which robustness is measured, and of the areas under their curves."""

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


def likeness(clip: Tensor, degraded: Tensor) -> float:
    """Correlation, whatever the gain."""
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
    """1 s, two channels that differ: plucked chords with overtones, a little noise, a silent start."""
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
def test_every_condition_keeps_shape_and_kind_and_leaves_its_input_alone(
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
def test_every_condition_takes_clips_of_a_few_samples_and_odd_rates(condition: Condition):
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
def test_very_soft_clips_do_not_vanish_in_rounding(condition: Condition):
    soft = 1e-25 * tone(440)
    degraded = condition(soft, RATE, 0)
    assert degraded.isfinite().all()
    assert rms(degraded) >= rms(soft) * 0.99


def test_the_same_seed_gives_the_same_and_another_seed_another(music: Tensor):
    for condition in RANDOM:
        assert torch.equal(condition(music, RATE, 5), condition(music, RATE, 5))
        assert not torch.equal(condition(music, RATE, 5), condition(music, RATE, 6))


def test_the_global_generator_has_no_influence_and_is_not_moved(music: Tensor):
    for condition in (*RANDOM, Mp3(32.0), Vorbis(3.0), Opus(16.0)):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = condition(music, RATE, 5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(condition(music, RATE, 5), first)


def test_keys_tell_conditions_apart():
    conditions = [*ALL, Reverberation(0.2, direct_db=10.0)]
    assert len({condition.key for condition in conditions}) == len(conditions)
    assert WhiteNoise(5.0).key == WhiteNoise(5.0).key


@pytest.mark.parametrize("kind", [WhiteNoise, PinkNoise])
@pytest.mark.parametrize("snr", [30.0, 5.0, -5.0])
def test_noise_has_the_ratio_that_is_asked(kind: type[Noise], snr: float, music: Tensor):
    noise = kind(level=snr)(music, RATE, 2) - music
    assert decibels(rms(music) / rms(noise)) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize("kind", [WhiteNoise, PinkNoise])
def test_along_a_sweep_the_noise_is_the_same_but_for_its_level(kind: type[Noise], music: Tensor):
    mild, hard = (kind(level=snr)(music, RATE, 2) - music for snr in (10.0, -5.0))
    torch.testing.assert_close(hard, mild * 10 ** (15 / 20), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "slope"), [(WhiteNoise, 0.0), (PinkNoise, -3.01)])
def test_noise_falls_with_frequency_as_its_colour_says(kind: type[Noise], slope: float):
    clip = 1e-3 * tone(440, 20 * RATE)
    power = torch.fft.rfft((kind(level=-40.0)(clip, RATE, 2) - clip)[0]).abs().square()
    frequency = torch.fft.rfftfreq(clip.shape[1], 1 / RATE)
    edges = [50.0 * 2**octave for octave in range(8)]
    bands = [power[(frequency >= low) & (frequency < 2 * low)].mean() for low in edges]
    fitted = np.polyfit(np.arange(8), 10 * np.log10(bands), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.1)


def test_noise_of_two_channels_is_not_the_same(music: Tensor):
    noise = WhiteNoise(0.0)(music, RATE, 2) - music
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.05


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """One at another sample rate and shorter than a clip, one with a long pause, one in a folder below."""
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    sf.write(tmp_path / "short.wav", 0.1 * rng.standard_normal(4_000), 16_000)
    paused = 0.1 * rng.standard_normal((4 * RATE, 2))
    paused[: 3 * RATE] = 0
    sf.write(tmp_path / "paused.wav", paused, RATE)
    sf.write(tmp_path / "below" / "other.flac", 0.1 * rng.standard_normal(2 * RATE), RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def test_recorded_noise_has_the_ratio_that_is_asked_wherever_it_is_cut(recordings: Path):
    clip = tone(440)
    condition = RecordedNoise(3.0, recordings)
    assert [path.name for path in condition.files] == ["other.flac", "paused.wav", "short.wav"]
    heard = [condition(clip, RATE, seed) - clip for seed in range(20)]
    assert all(decibels(rms(clip) / rms(noise)) == pytest.approx(3.0, abs=0.1) for noise in heard)
    assert len({float(noise[0, 0]) for noise in heard}) > 10
    assert torch.equal(condition(clip, RATE, 4), condition(clip, RATE, 4))


def test_recorded_noise_is_known_by_its_recordings(recordings: Path):
    sweep = noise_sweep(recordings)
    assert len({condition.key for condition in sweep}) == len(sweep) == 6
    before = RecordedNoise(3.0, recordings).key
    sf.write(recordings / "new.wav", np.ones(10), RATE)
    assert RecordedNoise(3.0, recordings).key != before


def test_folders_without_noise_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}.* holds no audio file"):
        RecordedNoise(3.0, tmp_path)
    sf.write(tmp_path / "quiet.wav", np.zeros(100), RATE)
    with pytest.raises(ValueError, match=r"quiet\.wav is silent"):
        RecordedNoise(3.0, tmp_path)(tone(440), RATE, 0)


@pytest.mark.parametrize("rt60", [0.2, 0.4, 0.8, 1.6])
def test_reverberation_falls_by_60_db_in_its_time(rt60: float):
    heard = Reverberation(rt60)(impulse(2 * RATE), RATE, 3)[0].double()
    left = heard.square().flip(0).cumsum(0).flip(0)  # backward integration (Schroeder, 1965)
    level = 10 * torch.log10(left / left[0])
    first, last = (int((level > limit).sum()) for limit in (-8.0, -38.0))
    assert (last - first) * 2 / RATE == pytest.approx(rt60, rel=0.05)


def test_reverberation_keeps_level_and_times_and_the_share_of_the_direct_path(music: Tensor):
    assert rms(Reverberation(0.8)(music, RATE, 3)) == pytest.approx(rms(music), rel=1e-4)
    for rt60, direct_db, expected in (
        (0.4, 0.0, 0.0),
        (0.4, 10.0, 10.0),
        (0.8, 0.0, -3.01),
        (0.2, 0.0, 3.01),
    ):
        heard = Reverberation(rt60, direct_db)(impulse(RATE, 1_000), RATE, 3)[0]
        assert int(heard.abs().argmax()) == 1_000
        assert heard[:1_000].abs().max() < 1e-6
        assert decibels(float(heard[1_000] / heard[1_001:].norm())) == pytest.approx(
            expected, abs=0.05
        )


def heard_direct(room: Reverberation) -> Tensor:
    return room(impulse(2 * RATE), RATE, 3)[0, 0]


def test_rooms_of_a_sweep_are_one_noise_that_decays_faster_or_slower():
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
        / heard_direct(Reverberation(0.4))
        / (long[:100].norm() / heard_direct(Reverberation(1.6)))
    )
    assert float(density) == pytest.approx(1.0, abs=0.05)


def test_filters_pass_what_is_inside_their_band_and_stop_the_rest():
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
def test_filters_move_nothing_in_time(condition: Condition):
    filtered = condition(impulse(2 * RATE, RATE), RATE, 0)[0]
    assert int(filtered.abs().argmax()) == RATE
    before, after = filtered[RATE - 500 : RATE].flip(0), filtered[RATE + 1 : RATE + 501]
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-4)


def test_cut_offs_beyond_half_the_sample_rate_say_what_they_do():
    clip = tone(440, 4_000, 4_000)
    assert not LowPass(2000.0).changes(4_000)
    assert torch.equal(LowPass(2000.0)(clip, 4_000, 0), clip)
    assert LowPass(1000.0).changes(4_000)
    assert HighPass(2000.0).changes(4_000)
    assert not HighPass(2000.0)(clip, 4_000, 0).any()


@pytest.mark.parametrize("level", [-30.0, -20.0, -10.0, 10.0])
def test_gain_is_exact_and_clips_nothing(level: float, music: Tensor):
    degraded = Gain(level)(4 * music, RATE, 0)
    torch.testing.assert_close(degraded, 4 * music * 10 ** (level / 20))
    assert decibels(rms(degraded) / rms(4 * music)) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize("level", [1.0, 5.0, 10.0, 25.0, 50.0])
def test_the_share_of_samples_that_is_asked_is_clipped_and_the_level_kept(
    level: float, music: Tensor
):
    degraded = Clipping(level)(music, RATE, 0)
    sounding = int((music != 0).sum())
    clipped = int((degraded.abs() >= degraded.abs().max() * (1 - 1e-6)).sum())
    assert 100 * clipped / sounding == pytest.approx(level, abs=0.02)
    assert rms(degraded) == pytest.approx(rms(music), rel=1e-5)
    assert (degraded.sign() == music.sign()).all()


def test_clips_that_are_mostly_zeros_are_clipped_where_they_sound():
    sparse = torch.zeros(1, 1_000)
    sparse[0, :100] = torch.linspace(0.01, 1.0, 100)
    degraded = Clipping(50.0)(sparse, RATE, 0)[0]
    assert degraded.unique().numel() == 51  # zero, 49 below the threshold, and the threshold


def sweep_of_tones(rate: int) -> Tensor:
    """A chirp that stays below what the hardest settings pass."""
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
    assert likeness(clip, decoded) > 0.8


@pytest.mark.parametrize(
    ("mild", "hard"), [(Mp3(128.0), Mp3(16.0)), (Vorbis(8.0), Vorbis(1.0)), (Opus(64.0), Opus(8.0))]
)
def test_codecs_lose_more_at_harder_levels(mild: Condition, hard: Condition, music: Tensor):
    lost = [1 - likeness(music, codec(music, RATE, 0)) for codec in (mild, hard)]
    assert 0 < lost[0] < 0.3 * lost[1]


@pytest.mark.parametrize("codec", [Mp3(64.0), Vorbis(5.0), Opus(64.0)])
def test_codecs_take_loud_clips_for_their_shape(codec: Condition, music: Tensor):
    full_scale = music / music.abs().max()
    torch.testing.assert_close(
        codec(8 * full_scale, RATE, 0), 8 * codec(full_scale, RATE, 0), atol=1e-3, rtol=1e-3
    )


def test_codecs_take_minutes_of_audio():
    long = 0.1 * torch.randn(1, 8_000 * 400, generator=torch.Generator().manual_seed(0))
    assert Vorbis(1.0)(long, 8_000, 0).shape == long.shape


def test_settings_that_mean_nothing_are_refused():
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


def test_sweeps_go_from_mild_to_hard(music: Tensor):
    """Every step leaves less of the clip, by the correlation with what it was; gain leaves its shape alone."""
    for name, sweep in SWEEPS.items():
        assert {condition.name for condition in sweep} == {name}
        left = np.array([likeness(music, condition(music, RATE, 1)) for condition in sweep])
        if name == "gain":
            assert (left > 1 - 1e-6).all()
        else:
            assert (np.diff(left) < 0).all(), (name, left)


def test_a_curve_that_never_falls_has_the_clean_score_as_its_area():
    assert area([0.8, 0.8, 0.8], 0.8) == pytest.approx(0.8)


def test_the_area_is_that_of_trapezoids():
    assert area([0.6, 0.2], 1.0) == pytest.approx((0.5 + 0.6 + 0.1) / 2)
    assert area([0.0], 1.0) == pytest.approx(0.5)


def test_scores_below_zero_count():
    assert area([-0.5, -1.5], 0.5) == pytest.approx((0.25 - 0.5 - 0.75) / 2)
    with pytest.raises(ValueError, match="at least one level"):
        area([], 0.5)
