"""Beat labels: targets of frames, and scores equal to those of mir_eval."""

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
from jepa_audio.probing.tasks.beats import EVENTS, GTZAN_BEAT, GTZAN_RHYTHM, TEMPO_BPM, Beats
from tests.probing import raw_sets
from tests.probing.frame_data import rows_of, split_of

BEAT, DOWNBEAT = slice(0, 3), slice(3, 6)


def beat_label(bpm: float, seconds: float, first: float = 0.313) -> dict[str, Any]:
    beats = np.arange(first, seconds, 60 / bpm).tolist()
    return {"beat": beats, "downbeat": beats[::4], "tempo": bpm, "meter": "4/4"}


def logits_of(targets: Tensor) -> Tensor:
    """Logits of one head that nearly equal the targets."""
    return (targets.clamp(0.02, 0.98).logit())[:, None]


# Beats


def test_frames_up_to_one_step_from_a_beat_are_targets():
    split = split_of({"beat": [0.5], "downbeat": []})
    rows = rows_of(1.0, rate=75.0)
    targets = Beats().row_targets(split, rows)
    assert targets[:, 0].nonzero()[:, 0].tolist() == [36, 37, 38]
    assert not targets[:, 1].any()
    # On the task's own grid the targets are as long: 40 ms. On a coarse grid they are frames.
    assert len(Beats().row_targets(split, rows_of(1.0, rate=100.0))[:, 0].nonzero()) == 4
    coarse = Beats().row_targets(split, rows_of(1.0, rate=10.0))
    assert coarse[:, 0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


def test_targets_continue_across_windows():
    split = split_of({"beat": [10.001], "downbeat": [10.001]})
    targets = Beats().row_targets(split, rows_of(20.0, rate=100.0))
    assert targets.nonzero()[::2, 0].tolist() == [998, 999, 1000, 1001]


def test_the_loss_of_every_head_is_that_of_torch():
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
    beats, model = Beats(), BarPointer(100.0, *TEMPO_BPM["beat"])
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


def test_the_first_metric_needs_beats_only():
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


def test_windows_can_be_scored_separately_and_beats_outside_are_ignored():
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


def test_a_track_may_have_no_downbeats():
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
def test_wrong_beat_labels_are_an_error_that_names_the_record(label: Any, message: str):
    split, rows = split_of(beat_label(100, 1.0), label), rows_of(1.0, 1.0, rate=100.0)
    with pytest.raises(ValueError, match=f"songs.jsonl, line 2: .*{message}"):
        Beats().row_targets(split, rows)


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


def test_gtzan_rhythm_is_converted_to_marbles_records(
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


def test_missing_or_wrong_files_of_gtzan_rhythm_are_named(tmp_path: Path):
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
