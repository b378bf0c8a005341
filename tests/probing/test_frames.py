"""Annotations in time: what frames are held to, and how what is heard in them is scored."""

import json
import logging
from pathlib import Path
from typing import Any

import mir_eval
import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.probing.tasks.beat_decoder import BarPointer, decode_beats
from jepa_audio.probing.tasks.beats import EVENTS, TEMPO_BPM, Beats
from jepa_audio.probing.tasks.chords import CHORDS, CHORDS1217, Chords
from jepa_audio.probing.tasks.labels import UNKNOWN, Rows
from jepa_audio.probing.tasks.records import Item, Split
from jepa_audio.probing.tasks.rhythm import GTZAN_BEAT, GTZAN_RHYTHM
from tests.probing import raw_sets

BEAT, DOWNBEAT = slice(0, 3), slice(3, 6)


def split_of(*labels: Any, start_seconds: float = 0.0) -> Split:
    return Split(
        tuple(
            Item(Path(f"{n}.wav"), label, f"{n}.wav", f"songs.jsonl, line {n + 1}", start_seconds)
            for n, label in enumerate(labels)
        )
    )


def rows_of(*lengths: float, rate: float, window_seconds: float = 10.0) -> Rows:
    """Frames of items of some seconds, cut into windows; only whole frames of a window count."""
    item, window, seconds = [], [], []
    for number, length in enumerate(lengths):
        for start in np.arange(0, length, window_seconds):
            num_frames = max(1, int((min(window_seconds, length - start)) * rate + 1e-6))
            item += [number] * num_frames
            window += [window[-1] + 1 if window else 0] * num_frames
            seconds += (start + (np.arange(num_frames) + 0.5) / rate).tolist()
    return Rows(np.array(item), np.array(window), np.array(seconds, dtype=np.float32))


def beat_label(bpm: float, seconds: float, first: float = 0.313) -> dict[str, Any]:
    beats = np.arange(first, seconds, 60 / bpm).tolist()
    return {"beat": beats, "downbeat": beats[::4], "tempo": bpm, "meter": "4/4"}


def logits_of(targets: Tensor) -> Tensor:
    """Of one head that is nearly sure of what it should say."""
    return (targets.clamp(0.02, 0.98).logit())[:, None]


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
    """Of one head that says these classes; `UNKNOWN` becomes a guess."""
    places = torch.as_tensor(classes).clamp_min(0)
    return torch.nn.functional.one_hot(places, len(CHORDS)).float()[:, None]


# Beats


def test_frames_near_a_beat_are_targets_as_wide_as_published():
    split = split_of({"beat": [0.5], "downbeat": []})
    rows = rows_of(1.0, rate=75.0)
    targets = Beats().row_targets(split, rows)
    assert targets[:, 0].nonzero()[:, 0].tolist() == [36, 37, 38]
    assert not targets[:, 1].any()
    # On the task's own grid the targets are as long: 40 ms. On a coarse grid they are frames.
    assert len(Beats().row_targets(split, rows_of(1.0, rate=100.0))[:, 0].nonzero()) == 4
    coarse = Beats().row_targets(split, rows_of(1.0, rate=10.0))
    assert coarse[:, 0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


def test_targets_do_not_end_at_the_border_of_a_window():
    split = split_of({"beat": [10.001], "downbeat": [10.001]})
    targets = Beats().row_targets(split, rows_of(20.0, rate=100.0))
    assert targets.nonzero()[::2, 0].tolist() == [998, 999, 1000, 1001]


def test_the_loss_is_that_of_torch_on_every_head():
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(7, 3, 2, generator=generator),
        torch.rand(7, 2, generator=generator),
    )
    expected = [
        torch.nn.functional.binary_cross_entropy_with_logits(logits[:, k], targets)
        for k in range(3)
    ]
    torch.testing.assert_close(Beats().losses(logits, targets), torch.stack(expected))


def test_logits_equal_to_the_targets_score_one_at_any_length():
    labels = [beat_label(100, 30.0), beat_label(141, 20.01), beat_label(75, 9.5)]
    # The last window of the second track has a single frame.
    split, rows = split_of(*labels), rows_of(30.0, 20.01, 9.5, rate=100.0)
    beats = Beats()
    counts = beats.predictions(logits_of(beats.row_targets(split, rows)), split, rows, "file")
    assert counts.shape == (3, 1, 6)
    expected = torch.tensor([[len(label[name])] * 3 for name in EVENTS for label in labels])
    assert counts[:, 0, BEAT].tolist() == expected[:3].tolist()
    # The model may start a track within a bar, and miss a downbeat there.
    torch.testing.assert_close(counts[:, 0, DOWNBEAT], expected[3:].float(), atol=1, rtol=0)
    targets = beats.unit_targets(split, rows, "file")
    assert GTZAN_BEAT.metrics[0](counts, targets).tolist() == [1.0]
    assert beats.decoder == "dbn"


def test_scores_equal_those_of_mir_eval_on_the_same_events():
    labels = [beat_label(93, 30.0), beat_label(127, 30.0)]
    split, rows = split_of(*labels), rows_of(30.0, 30.0, rate=100.0)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(rows), 2, 2, generator=generator) - 1
    beats, model = Beats(), BarPointer.build(100.0, *TEMPO_BPM["beat"])
    logits[:, 1] += 3 * beats.row_targets(split, rows)
    counts = beats.predictions(logits, split, rows, "file")
    f1, pooled = (
        metric(counts, beats.unit_targets(split, rows, "file")) for metric in GTZAN_BEAT.metrics[:2]
    )
    for k in range(2):
        of_tracks, total = [], np.zeros(3)
        for n, label in enumerate(labels):
            of_track = rows.item == n
            (frames,) = decode_beats(logits[of_track, k, 0].sigmoid()[None], model)
            estimated = rows.seconds[of_track][frames].astype(float)
            annotated = np.array(label["beat"])
            of_tracks.append(mir_eval.beat.f_measure(annotated, estimated))
            matches = mir_eval.util.match_events(annotated, estimated, 0.07)
            total += (len(matches), len(estimated), len(annotated))
        assert f1[k].item() == pytest.approx(np.mean(of_tracks))
        assert pooled[k].item() == pytest.approx(2 * total[0] / (total[1] + total[2]))
    assert f1[1] > f1[0] + 0.1


def test_heads_are_scored_separately_and_zero_activations_score_zero():
    split, rows = split_of(beat_label(100, 20.0)), rows_of(20.0, rate=100.0)
    beats = Beats()
    good = logits_of(beats.row_targets(split, rows))
    both = torch.cat([torch.full_like(good, -200.0), good], dim=1)
    counts = beats.predictions(both, split, rows, "file")
    scores = GTZAN_BEAT.metrics[0](counts, beats.unit_targets(split, rows, "file"))
    assert scores.tolist() == [0.0, 1.0]
    assert counts[0, 0, BEAT].tolist() == [0, 0, 33]


def test_heads_are_chosen_by_beats_alone():
    split, rows = split_of(beat_label(100, 20.0)), rows_of(20.0, rate=100.0)
    beats = Beats()
    logits = logits_of(beats.row_targets(split, rows))
    whole, chosen = (
        labels.predictions(logits, split, rows, "file")
        for labels in (beats, beats.for_first_metric())
    )
    assert GTZAN_BEAT.metrics[0](chosen, beats.unit_targets(split, rows, "file")).tolist() == [1.0]
    assert torch.equal(chosen[..., BEAT], whole[..., BEAT])
    assert whole[0, 0, DOWNBEAT].min() > 0
    assert chosen[0, 0, DOWNBEAT].tolist() == [0, 0, 0]


def test_windows_can_be_scored_apart_and_unheard_beats_are_not():
    split, rows = split_of(beat_label(120, 30.0)), rows_of(20.0, rate=100.0)
    beats = Beats()
    logits = logits_of(beats.row_targets(split, rows))
    assert beats.predictions(logits, split, rows, "file")[0, 0, BEAT].tolist() == [40, 40, 40]
    by_window = beats.predictions(logits, split, rows, "window")
    assert by_window[:, 0, BEAT].tolist() == [[20, 20, 20], [20, 20, 20]]
    assert len(beats.unit_targets(split, rows, "window")) == 2


def test_annotations_count_from_the_start_of_the_file():
    label = beat_label(120, 30.0, first=0.25)
    split, rows = split_of(label, start_seconds=10.2), rows_of(10.0, rate=100.0)
    beats = Beats()
    targets = beats.row_targets(split, rows)
    assert targets[4:6, 0].tolist() == [1, 1]  # the beat of 10.25 s, 0.05 s after the start
    assert beats.predictions(logits_of(targets), split, rows, "file")[0, 0, BEAT].tolist() == [
        20,
        20,
        20,
    ]


def test_tracks_without_downbeats_are_no_fault():
    split, rows = split_of({"beat": [0.5], "downbeat": []}), rows_of(1.0, rate=100.0)
    counts = Beats().predictions(torch.zeros(100, 1, 2), split, rows, "file")
    assert counts[0, 0, 5] == 0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0.5, 1.0], "must be an object whose `beat`"),
        ({"beat": [0.5]}, "whose `downbeat` is a list"),
        ({"beat": [0.5, "1"], "downbeat": []}, "`beat` contains '1'"),
        ({"beat": [0.5, float("nan")], "downbeat": []}, "`beat` contains nan"),
        ({"beat": [0.5], "downbeat": [-1.0]}, "`downbeat` contains -1.0"),
        ({"beat": [0.5, 2.0, 1.0], "downbeat": []}, "`beat` must increase, but 1.0 s"),
    ],
)
def test_beats_that_are_none_are_refused_with_their_record(label: Any, message: str):
    split, rows = split_of(beat_label(100, 1.0), label), rows_of(1.0, 1.0, rate=100.0)
    with pytest.raises(ValueError, match=f"songs.jsonl, line 2: .*{message}"):
        Beats().row_targets(split, rows)


# Chords


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
def test_chords_become_triads(chord: str, name: str | None):
    targets = Chords().row_targets(split_of([region(0, 1, chord)]), rows_of(1.0, rate=10.0))
    assert set(targets.tolist()) == {UNKNOWN if name is None else CHORDS.index(name)}


def test_no_chord_stays_no_chord_and_gaps_and_tails_are_ignored():
    targets = Chords().row_targets(split_of(SONG), rows_of(12.0, rate=10.0, window_seconds=5.0))
    names = ["-" if place == UNKNOWN else CHORDS[place] for place in targets.tolist()]
    assert names[:10] == ["N"] * 10
    assert names[30:42] == ["N"] * 12  # in the middle, and not the chord before
    assert names[15], names[50] == ("C:maj", "A#:min")
    assert names[60:70] == ["-"] * 10  # what is no triad, then a gap
    assert names[80:] == ["-"] * 40  # an unknown chord, then nothing
    assert names[75] == "F#:maj"


def test_ignored_frames_teach_nothing():
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
    """By mir_eval, of intervals of equal frames."""
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
def test_seconds_are_weighed_as_mir_eval_weighs_them(rate: float):
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
    assert (counts[..., 0] / counts[..., 1])[
        :, 0
    ].min() > 0.95  # frames cannot tell where within them a chord ends


def test_a_chord_that_changes_between_frames_is_weighed_by_its_seconds():
    song = [region(0.0, 0.3, "C"), region(0.3, 1.0, "A:min")]
    split, rows = split_of(song), rows_of(1.0, rate=2.0)
    counts = Chords().predictions(
        chord_logits(np.array([CHORDS.index("A:min")] * 2)), split, rows, "file"
    )
    assert counts[0, 0].tolist() == pytest.approx([0.7, 1.0, 1, 2])


def test_a_constant_answer_scores_the_share_of_its_chord():
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


def test_windows_of_a_song_can_be_scored_apart_and_a_last_one_of_one_frame_works():
    song = [region(0.0, 10.05, "C")]
    split, rows = split_of(song), rows_of(10.05, rate=20.0, window_seconds=5.0)
    assert np.bincount(rows.window).tolist() == [100, 100, 1]
    by_window = Chords().predictions(
        chord_logits(np.zeros(len(rows), dtype=np.int64)), split, rows, "window"
    )
    assert by_window[:, 0, 1].tolist() == pytest.approx([5.0, 5.0, 0.05], abs=1e-4)
    assert by_window[:, 0, 3].tolist() == [100, 100, 1]


def test_a_song_without_anything_to_compare_counts_nothing():
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
def test_chords_that_are_none_are_refused_with_their_record(label: Any, message: str):
    split, rows = split_of(SONG, label), rows_of(1.0, 1.0, rate=20.0)
    with pytest.raises(ValueError, match=f"songs.jsonl, line 2: .*{message}"):
        Chords().row_targets(split, rows)


def test_times_that_were_rounded_may_overlap_by_a_millisecond():
    song = [region(0.0, 0.5004, "C"), region(0.5, 0.5, "G"), region(0.5, 1.0, "D")]
    targets = Chords().row_targets(split_of(song), rows_of(1.0, rate=10.0))
    assert targets.tolist() == [0] * 5 + [2] * 5


# GTZAN-Rhythm


def write_jams(folder: Path, stem: str, annotations: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.wav.jams").write_text(
        json.dumps({"annotations": annotations, "file_metadata": {}})
    )


def jams_of(kind: str | None, *times: float, namespace: str = "beat") -> dict[str, Any]:
    data = [
        {"time": time, "duration": 0.0, "value": 1.0, "confidence": float("nan")} for time in times
    ]
    return {
        "namespace": namespace,
        "data": data,
        "sandbox": {"annotation_type": kind} if kind else {},
    }


def rhythm(raw: Path) -> Path:
    raw_sets.gtzan(raw)
    for number, genre in enumerate(raw_sets.GENRES):
        for take in range(3):
            annotations = [
                jams_of("beat", 0.1, 0.05 + number / 100),
                jams_of("downbeat", *([0.1] if take else [])),
                jams_of(None, 0.0, namespace="tag_open"),
            ]
            write_jams(
                raw / "GTZAN-Rhythm_v2_ismir2015_lbd" / "jams", f"{genre}.{take:05}", annotations
            )
    return raw


def test_gtzan_rhythm_becomes_the_records_of_marble(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        data = ProbeData.load(GTZAN_BEAT, rhythm(tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 10,
        "val": 10,
        "test": 10,
    }
    first, last = data.splits["train"].items[0], data.splits["test"].items[-1]
    assert first.label == {"beat": [0.05, 0.1], "downbeat": []}
    assert last.label == {"beat": [0.1, 0.14], "downbeat": [0.1]}
    assert (first.path.name, last.path.name) == ("blues.00000.wav", "rock.00002.wav")
    assert "(443, 197, 290)" in caplog.text
    assert data.labels.row_targets(data.splits["train"], rows_of(*[0.2] * 10, rate=100.0)).any()


def test_what_is_missing_of_gtzan_rhythm_is_named(tmp_path: Path):
    raw = rhythm(tmp_path)
    jams = raw / "GTZAN-Rhythm_v2_ismir2015_lbd" / "jams"
    (jams / "pop.00001.wav.jams").unlink()
    with pytest.raises(
        MissingFileError, match=r"pop\.00001\.wav\.jams is missing: give the folder"
    ):
        GTZAN_RHYTHM.convert(raw)
    write_jams(jams, "pop.00001", [jams_of("beat", 0.1)])
    with pytest.raises(
        ValueError, match=r"pop\.00001\.wav\.jams has no annotation of type 'downbeat'"
    ):
        GTZAN_RHYTHM.convert(raw)
    (jams / "pop.00001.wav.jams").write_text("[]")
    with pytest.raises(ValueError, match=r"pop\.00001\.wav\.jams is not a JAMS file"):
        GTZAN_RHYTHM.convert(raw)
    for file in jams.iterdir():
        file.unlink()
    with pytest.raises(
        MissingFileError, match=r"GTZAN-Rhythm_v2_ismir2015_lbd/jams/\*\.jams is missing"
    ):
        GTZAN_RHYTHM.convert(raw)
