"""Chord labels: triads of frames, and scores equal to those of mir_eval."""

from typing import Any

import mir_eval
import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.probing.tasks.chords import CHORDS, CHORDS1217, Chords
from jepa_audio.probing.tasks.labels import UNKNOWN
from tests.probing.frame_data import rows_of, split_of


def region(start: Any, end: Any, chord: Any) -> dict[str, Any]:
    return {"start_time": start, "end_time": end, "chord_str": chord}


SONG = [
    region(0.0, 1.03, "N"),
    region(1.03, 3.0, "C:maj7/3"),
    region(3.0, 4.21, "N"),
    region(4.21, 6.0, "Bb:min7"),
    region(6.0, 6.5, "G:sus4"),
    region(7.0, 8.02, "F#"),
    region(8.02, 9.0, "X"),
]


def chord_logits(classes: np.ndarray | Tensor) -> Tensor:
    """Logits of one head that predicts these classes; class 0 for `UNKNOWN`."""
    places = torch.as_tensor(classes).clamp_min(0)
    return torch.nn.functional.one_hot(places, len(CHORDS)).float()[:, None]


@pytest.mark.parametrize(
    ("chord", "name"),
    [
        *[
            ("C", "C:maj"),
            ("C:maj/5", "C:maj"),
            ("Cb:7", "B:maj"),
            ("B#:min", "C:min"),
            ("Db:min7/b3", "C#:min"),
        ],
        *[
            ("E#:maj6", "F:maj"),
            ("G:(1,3,5)", "G:maj"),
            ("A:minmaj7", "A:min"),
            ("C/2", "C:maj"),
            ("N", "N"),
        ],
        *[(chord, None) for chord in ("X", "C:sus4", "C:aug", "C:dim", "C:hdim7", "F:5", "G:1")],
    ],
)
def test_chords_are_mapped_to_triads(chord: str, name: str | None):
    targets = Chords().row_targets(split_of([region(0, 1, chord)]), rows_of(1.0, rate=10.0))
    assert set(targets.tolist()) == {UNKNOWN if name is None else CHORDS.index(name)}


def test_no_chord_is_a_class_and_gaps_are_unknown():
    targets = Chords().row_targets(split_of(SONG), rows_of(12.0, rate=10.0, window_seconds=5.0))
    names = ["-" if i == UNKNOWN else CHORDS[i] for i in targets.tolist()]
    assert names[:10] == ["N"] * 10
    assert names[30:42] == ["N"] * 12  # in the middle, and not the chord before
    assert names[15], names[50] == ("C:maj", "A#:min")
    assert names[60:70] == ["-"] * 10  # what is no triad, then a gap
    assert names[80:] == ["-"] * 40  # an unknown chord, then nothing
    assert names[75] == "F#:maj"


def test_unknown_frames_do_not_affect_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, 25, generator=generator, requires_grad=True)
    targets = torch.tensor([3, UNKNOWN, 24, UNKNOWN, 0, UNKNOWN])
    losses = Chords().losses(logits, targets)
    expected = [torch.nn.functional.cross_entropy(logits[::2, k], targets[::2]) for k in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))
    losses.sum().backward()
    assert not logits.grad[1::2].any()
    assert Chords().losses(logits, torch.full((6,), UNKNOWN)).tolist() == [0, 0]


def majmin_of(song: list[dict[str, Any]], predicted: np.ndarray, rate: float) -> float:
    """Score of mir_eval, for intervals of equal frames."""
    borders = np.concatenate([[0], np.flatnonzero(np.diff(predicted)) + 1, [len(predicted)]])
    intervals = np.stack([borders[:-1], borders[1:]], axis=1) / rate
    chords = [CHORDS[predicted[start]] for start in borders[:-1]]
    gapless, labels = [], []
    for part in song:
        if gapless and part["start_time"] > gapless[-1][1]:
            gapless.append((gapless[-1][1], part["start_time"]))
            labels.append("X")
        gapless.append((part["start_time"], part["end_time"]))
        labels.append(part["chord_str"])
    return float(mir_eval.chord.evaluate(np.array(gapless), labels, intervals, chords)["majmin"])


@pytest.mark.parametrize("rate", [10.0, 20.0, 43.0])
def test_seconds_are_weighted_like_in_mir_eval(rate: float):
    rows = rows_of(9.0, 9.0, rate=rate, window_seconds=9.0)
    split = split_of(SONG, SONG)
    num_frames = len(rows) // 2
    generator = torch.Generator().manual_seed(5)
    ideal = Chords().row_targets(split, rows).clamp_min(0)
    random = torch.where(torch.rand(len(rows), generator=generator) < 0.6, ideal, 24)
    constant = torch.full_like(ideal, CHORDS.index("F#:maj"))
    predicted = torch.stack([ideal, random, constant], dim=1)
    logits = torch.cat([chord_logits(column) for column in predicted.T], dim=1)
    counts = Chords().predictions(logits, split, rows, "file")
    for k in range(3):
        for n in range(2):
            mine = predicted[n * num_frames : (n + 1) * num_frames, k].numpy()
            expected = majmin_of(SONG, mine, rate)
            assert (counts[n, k, 0] / counts[n, k, 1]).item() == pytest.approx(expected, abs=1e-4)
    assert (counts[..., 2] / counts[..., 3])[:, 0].tolist() == [1.0, 1.0]
    assert (counts[..., 0] / counts[..., 1])[:, 0].min() > 0.95  # a chord may end within a frame


def test_a_chord_change_within_a_frame_is_weighted_by_seconds():
    song = [region(0.0, 0.3, "C"), region(0.3, 1.0, "A:min")]
    split, rows = split_of(song), rows_of(1.0, rate=2.0)
    counts = Chords().predictions(
        chord_logits(np.array([CHORDS.index("A:min")] * 2)), split, rows, "file"
    )
    assert counts[0, 0].tolist() == pytest.approx([0.7, 1.0, 1, 2])


def test_a_constant_prediction_scores_the_share_of_its_chord():
    split, rows = split_of(SONG), rows_of(12.0, rate=20.0, window_seconds=5.0)
    constant = chord_logits(np.full(len(rows), CHORDS.index("N")))
    counts = Chords().predictions(constant, split, rows, "file")
    majmin, frames = (
        metric(counts, Chords().unit_targets(split, rows, "file")).item()
        for metric in CHORDS1217.metrics
    )
    assert counts.shape == (1, 1, 4)
    assert counts[0, 0, :2].tolist() == pytest.approx([1.03 + 1.21, 6.0 + 1.02], abs=1e-4)
    assert majmin == pytest.approx(2.24 / 7.02, abs=1e-4)
    assert frames == pytest.approx(2.24 / 7.02, abs=0.02)


def test_windows_of_a_song_can_be_scored_separately_even_with_one_frame():
    song = [region(0.0, 10.05, "C")]
    split, rows = split_of(song), rows_of(10.05, rate=20.0, window_seconds=5.0)
    assert np.bincount(rows.window).tolist() == [100, 100, 1]
    by_window = Chords().predictions(
        chord_logits(np.zeros(len(rows), dtype=np.int64)), split, rows, "window"
    )
    assert by_window[:, 0, 1].tolist() == pytest.approx([5.0, 5.0, 0.05], abs=1e-4)
    assert by_window[:, 0, 3].tolist() == [100, 100, 1]


def test_a_song_without_comparable_chords_has_zero_counts():
    split, rows = split_of([], [region(0.0, 1.0, "X")]), rows_of(1.0, 1.0, rate=20.0)
    counts = Chords().predictions(
        chord_logits(np.zeros(len(rows), dtype=np.int64)), split, rows, "file"
    )
    assert not counts.any()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("C:maj", "must be a list of chords"),
        (
            [{"start_time": 0.0, "chord_str": "C"}],
            "must have `start_time`, `end_time` and `chord_str`",
        ),
        ([region(1.0, 0.5, "C")], "must be seconds, in this order"),
        ([region("0", 0.5, "C")], "must be seconds, in this order"),
        ([region(0.0, 1.0, "H:moll")], "`chord_str` is 'H:moll'"),
        ([region(0.0, 1.0, None)], "`chord_str` is None"),
        (
            [region(0.0, 2.0, "C"), region(1.0, 3.0, "D")],
            "'D' starts at 1.0 s, but the one before ends at 2.0 s",
        ),
    ],
)
def test_wrong_chord_labels_are_an_error_that_names_the_record(label: Any, message: str):
    split, rows = split_of(SONG, label), rows_of(1.0, 1.0, rate=20.0)
    with pytest.raises(ValueError, match=f"songs.jsonl, line 2: .*{message}"):
        Chords().row_targets(split, rows)


def test_rounded_times_may_overlap_by_a_millisecond():
    song = [region(0.0, 0.5004, "C"), region(0.5, 0.5, "G"), region(0.5, 1.0, "D")]
    targets = Chords().row_targets(split_of(song), rows_of(1.0, rate=10.0))
    assert targets.tolist() == [0] * 5 + [2] * 5
