"""Beats are found in activations: the model of tempo against its literal writing, and against mere peaks."""

import math

import mir_eval
import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.probing.tasks import beats
from jepa_audio.probing.tasks.beats import decode_beats_dbn, decode_beats_peaks

RATE = 100.0
BEATS = (55.0, 215.0)


def impulses(frames: np.ndarray, num_frames: int, high: float = 0.9, low: float = 0.01) -> Tensor:
    activations = torch.full((1, num_frames), low)
    activations[0, torch.from_numpy(frames[frames < num_frames])] = high
    return activations


def every(bpm: float, seconds: float = 30.0, first: float = 0.2) -> np.ndarray:
    """Frames of a steady pulse."""
    return np.rint(np.arange(first, seconds, 60 / bpm) * RATE).astype(np.int64)


def f_measure(reference: np.ndarray, frames: np.ndarray) -> float:
    return mir_eval.beat.f_measure(reference / RATE, frames / RATE)


def literal_viterbi(
    activations: np.ndarray, intervals: range, change: float, observation: int
) -> list[int]:
    """First frames of the beats of the best path: every state, every frame, the whole matrix of transitions."""
    states = [(interval, position) for interval in intervals for position in range(interval)]
    transition = np.full((len(states), len(states)), -np.inf)
    for i, (interval, position) in enumerate(states):
        if position + 1 < interval:
            transition[i, states.index((interval, position + 1))] = 0
            continue
        weights = {to: math.exp(-change * abs(to / interval - 1)) for to in intervals}
        for to, weight in weights.items():
            transition[i, states.index((to, 0))] = math.log(weight / sum(weights.values()))
    in_beat = np.array([position / interval < 1 / observation for interval, position in states])
    scores, back = np.full(len(states), -math.log(len(states))), []
    for frame, activation in enumerate(activations):
        if frame:
            steps = scores[:, None] + transition
            back.append(steps.argmax(axis=0))
            scores = steps.max(axis=0)
        scores = scores + np.where(
            in_beat, math.log(activation), math.log((1 - activation) / (observation - 1))
        )
    path = [int(scores.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return [frame for frame, state in enumerate(reversed(path)) if states[state][1] == 0]


@pytest.mark.parametrize("change", [1.0, 20.0])
@pytest.mark.parametrize("num_frames", [1, 3, 6, 40])
def test_the_best_path_is_that_of_a_literal_viterbi(num_frames: int, change: float):
    generator = torch.Generator().manual_seed(num_frames)
    activations = torch.rand(30, num_frames, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    found = decode_beats_dbn(
        activations,
        10.0,
        600 / 7,
        600 / 3,
        transition_lambda=change,
        observation_lambda=4,
        correct=False,
    )
    for track, frames in zip(activations, found, strict=True):
        assert frames.tolist() == literal_viterbi(track.numpy(), range(3, 8), change, 4)


@pytest.mark.parametrize("bpm", [55, 61.3, 90, 120, 147.7, 180, 214])  # 215 is rounded to 28 frames
def test_a_steady_pulse_is_found_within_a_frame(bpm: float):
    truth = every(bpm)
    (found,) = decode_beats_dbn(impulses(truth, 3000), RATE, *BEATS)
    assert len(found) == len(truth)
    assert np.abs(found - truth).max() <= 1


@pytest.mark.parametrize("bpm", [18, 30, 72])
def test_downbeats_are_found_among_slow_tempi(bpm: float):
    truth = every(bpm)
    # Lower, and the twenty frames that a slow beat has to explain would cost more than one impulse
    # gains.
    (found,) = decode_beats_dbn(impulses(truth, 3000, low=0.05), RATE, 18.0, 72.0)
    assert found.tolist() == truth.tolist()


def test_what_noise_hides_the_tempo_finds():
    generator = torch.Generator().manual_seed(1)
    truth = every(100)
    kept = truth[torch.rand(len(truth), generator=generator).numpy() > 0.4]
    activations = impulses(kept, 3000, high=0.7)
    activations += torch.rand(activations.shape, generator=generator) * 0.05
    strays = torch.randint(0, 3000, (20,), generator=generator)
    activations[0, strays] = 0.6
    (by_model,) = decode_beats_dbn(activations, RATE, *BEATS)
    (by_peaks,) = decode_beats_peaks(activations, RATE, 0.5, BEATS[1])
    assert f_measure(truth, by_model) > 0.95
    assert f_measure(truth, by_peaks) < 0.85


def test_a_change_of_tempo_is_followed():
    slow, fast = every(80, seconds=15.0), every(130, seconds=30.0, first=15.1)
    truth = np.concatenate([slow, fast])
    (found,) = decode_beats_dbn(impulses(truth, 3000), RATE, *BEATS)
    assert f_measure(truth, found) > 0.97


def test_silence_has_no_beats_and_does_no_harm_beside_a_pulse():
    truth = every(120)
    both = torch.cat([torch.zeros(1, 3000), impulses(truth, 3000)])
    silent, heard = decode_beats_dbn(both, RATE, *BEATS)
    assert silent.tolist() == []
    assert heard.tolist() == truth.tolist()
    assert [track.tolist() for track in decode_beats_dbn(torch.zeros(2, 1), RATE, *BEATS)] == [
        [],
        [],
    ]
    assert decode_beats_peaks(both, RATE, 0.5, BEATS[1])[0].tolist() == []


def test_a_threshold_cuts_what_comes_before_and_after():
    truth = every(120, seconds=20.0, first=10.0)
    (whole,) = decode_beats_dbn(impulses(truth, 3000), RATE, *BEATS)
    (cut,) = decode_beats_dbn(impulses(truth, 3000), RATE, *BEATS, threshold=0.5)
    assert cut.tolist() == truth.tolist()
    assert len(whole) > len(cut)


def test_many_tracks_are_decoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(2)
    lengths = np.array([900, 31, 640, 1, 899, 27])
    activations = torch.rand(len(lengths), 900, generator=generator) ** 4
    alone = [
        decode_beats_dbn(track[None, :length], RATE, *BEATS)[0].tolist()
        for track, length in zip(activations, lengths, strict=True)
    ]
    together = decode_beats_dbn(activations, RATE, *BEATS, lengths=lengths)
    assert [track.tolist() for track in together] == alone
    monkeypatch.setattr(beats, "_MAX_SCORES", 250_000)  # two tracks at a time
    assert [
        track.tolist() for track in decode_beats_dbn(activations, RATE, *BEATS, lengths=lengths)
    ] == alone
    peaks = decode_beats_peaks(activations, RATE, 0.5, BEATS[1], lengths=lengths)
    assert [
        len(track) > 0 and track.max() >= length
        for track, length in zip(peaks, lengths, strict=True)
    ] == [0] * 6


def test_half_precision_is_good_enough():
    truth = every(120)
    (found,) = decode_beats_dbn(impulses(truth, 1000).bfloat16(), RATE, *BEATS)
    assert found.tolist() == truth[truth < 1000].tolist()


def test_of_near_peaks_the_highest_stays_and_a_flat_one_has_its_middle():
    activations = torch.zeros(1, 200)
    activations[0, 0] = 0.9
    activations[0, [50, 60]] = torch.tensor([0.6, 0.8])
    activations[0, 119:122] = 0.7
    activations[0, 160] = 0.4
    activations[0, 199] = 0.9
    (found,) = decode_beats_peaks(activations, RATE, 0.5, BEATS[1])
    assert found.tolist() == [0, 60, 120, 199]


@pytest.mark.parametrize("change", [{"min_bpm": 0.0}, {"min_bpm": 300.0}, {"max_bpm": 4000.0}])
def test_tempi_without_an_interval_are_refused(change: dict[str, float]):
    with pytest.raises(ValueError, match="`min_bpm`"):
        decode_beats_dbn(torch.rand(1, 10), RATE, **{"min_bpm": 55.0, "max_bpm": 215.0} | change)
