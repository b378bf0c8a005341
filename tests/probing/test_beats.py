"""The beat decoder equals a literal Viterbi search, and finds steady, noisy and changing tempi."""

import math

import mir_eval
import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.probing.tasks import beat_decoder
from jepa_audio.probing.tasks.beat_decoder import BarPointer, beat_starts, decode_beats

RATE = 100.0
MODEL = BarPointer(RATE, 55.0, 215.0)


def impulses(frames: np.ndarray, num_frames: int, high: float = 0.9, low: float = 0.01) -> Tensor:
    activations = torch.full((1, num_frames), low)
    activations[0, torch.from_numpy(frames[frames < num_frames])] = high
    return activations


def steady_pulse(bpm: float, seconds: float = 30.0, first: float = 0.2) -> np.ndarray:
    """Frames of the beats."""
    return np.rint(np.arange(first, seconds, 60 / bpm) * RATE).astype(np.int64)


def f_measure(reference: np.ndarray, frames: np.ndarray) -> float:
    return mir_eval.beat.f_measure(reference / RATE, frames / RATE)


def literal_viterbi(
    activations: np.ndarray, intervals: range, change: float, observation: int
) -> list[int]:
    """First frames of the beats of the best path, with every state, frame and transition."""
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
def test_the_best_path_equals_that_of_a_literal_viterbi_search(num_frames: int, change: float):
    generator = torch.Generator().manual_seed(num_frames)
    activations = torch.rand(30, num_frames, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    model = BarPointer(10.0, 600 / 7, 600 / 3, change, observation_lambda=4)
    found = beat_starts(activations, torch.full((30,), num_frames), model)
    for track, starts in zip(activations, found, strict=True):
        frames = [start for start, _ in starts if 0 <= start < num_frames]
        assert frames == literal_viterbi(track.numpy(), range(3, 8), change, 4)


@pytest.mark.parametrize("bpm", [55, 61.3, 90, 120, 147.7, 180, 214])  # 215 is rounded to 28 frames
def test_a_steady_pulse_is_found_within_a_frame(bpm: float):
    pulse = steady_pulse(bpm)
    (found,) = decode_beats(impulses(pulse, 3000), MODEL)
    assert len(found) == len(pulse)
    assert np.abs(found - pulse).max() <= 1


@pytest.mark.parametrize("bpm", [18, 30, 72])
def test_downbeats_are_found_at_slow_tempi(bpm: float):
    pulse = steady_pulse(bpm)
    # With a lower `low` the twenty frames of a slow beat cost more than one impulse gains.
    (found,) = decode_beats(impulses(pulse, 3000, low=0.05), BarPointer(RATE, 18.0, 72.0))
    assert found.tolist() == pulse.tolist()


def test_missing_and_spurious_activations_are_corrected_by_the_tempo():
    generator = torch.Generator().manual_seed(1)
    pulse = steady_pulse(100)
    kept = pulse[torch.rand(len(pulse), generator=generator).numpy() > 0.4]
    activations = impulses(kept, 3000, high=0.7)
    activations += torch.rand(activations.shape, generator=generator) * 0.05
    activations[0, torch.randint(0, 3000, (20,), generator=generator)] = 0.6
    (found,) = decode_beats(activations, MODEL)
    assert f_measure(pulse, found) > 0.95
    assert f_measure(pulse, np.flatnonzero(activations[0] > 0.5)) < 0.85


def test_a_change_of_tempo_is_followed():
    slow, fast = steady_pulse(80, seconds=15.0), steady_pulse(130, seconds=30.0, first=15.1)
    pulse = np.concatenate([slow, fast])
    (found,) = decode_beats(impulses(pulse, 3000), MODEL)
    assert f_measure(pulse, found) > 0.97


def test_silence_has_no_beats_and_does_not_affect_other_tracks():
    pulse = steady_pulse(120)
    both = torch.cat([torch.zeros(1, 3000), impulses(pulse, 3000)])
    silence, track = decode_beats(both, MODEL)
    assert silence.tolist() == []
    assert track.tolist() == pulse.tolist()
    assert [frames.tolist() for frames in decode_beats(torch.zeros(2, 1), MODEL)] == [[], []]


def test_many_tracks_are_decoded_like_each_alone(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([900, 31, 640, 1, 899, 27])
    activations = torch.rand(len(lengths), 900, generator=generator) ** 4
    alone = [
        decode_beats(track[None, :length], MODEL)[0].tolist()
        for track, length in zip(activations, lengths, strict=True)
    ]
    batch = decode_beats(activations, MODEL, lengths)
    assert [track.tolist() for track in batch] == alone
    monkeypatch.setattr(beat_decoder, "_MAX_SCORES", 250_000)  # two tracks at a time
    assert [track.tolist() for track in decode_beats(activations, MODEL, lengths)] == alone


def test_half_precision_is_accurate_enough():
    pulse = steady_pulse(120)
    (found,) = decode_beats(impulses(pulse, 1000).bfloat16(), MODEL)
    assert found.tolist() == pulse[pulse < 1000].tolist()


def test_features_with_fewer_than_two_frames_per_beat_are_an_error():
    BarPointer(7.2, 55.0, 215.0)
    with pytest.raises(ValueError, match=r"215 BPM need at least 7\.17 frames per second, .* 7\.1"):
        BarPointer(7.1, 55.0, 215.0)
