"""Records, windows and labels: values come from the lines, and errors name the line."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.labels import UNKNOWN, Multiclass, Multilabel, Regression, Rows
from jepa_audio.probing.tasks.records import Item, Split, read_split, write_records

RATE = 100


def spans_by_the_rule(
    num_samples: int, rate: int, seconds: float, ratio: float
) -> list[tuple[int, int]]:
    """MARBLE's rule: whole windows, and the remainder if it is long enough."""
    length = int(seconds * rate)
    whole, rest = divmod(num_samples, length)
    spans = [(i * length, (i + 1) * length) for i in range(whole)]
    return spans + ([(whole * length, num_samples)] if rest / length >= ratio and rest else [])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seconds", [1.0, 0.37, 30.2])
def test_windows_follow_marbles_rule_at_every_edge(seconds: float, ratio: float):
    windows, length = Windows(seconds, ratio), int(seconds * RATE)
    edges = [k * length + d for k in (1, 2, 3) for d in (-1, 0, 1)]
    edges += [2 * length + round(ratio * length) + d for d in (-1, 0, 1)]
    for num_samples in edges:
        expected = spans_by_the_rule(num_samples, RATE, seconds, ratio)
        assert windows.spans(num_samples, RATE) == (expected or [(0, num_samples)]), num_samples


def test_short_segments_are_one_window_and_first_seconds_limits_the_length():
    assert Windows(30.0).spans(7, RATE) == [(0, 7)]
    assert Windows().spans(777, RATE) == [(0, 777)]
    assert Windows(5.0, first_seconds=12.0).spans(4500, RATE) == [(0, 500), (500, 1000)]
    assert Windows(5.0, 0.2, first_seconds=12.0).spans(4500, RATE)[-1] == (1000, 1200)
    with pytest.raises(ValueError, match=r"`min_ratio` \(0\.0\)"):
        Windows(5.0, 0.0)


@pytest.fixture
def records(tmp_path: Path) -> list[dict]:
    """Write records like MARBLE's: paths start from a folder above the records."""
    (tmp_path / "data" / "X" / "audio").mkdir(parents=True)
    lines = []
    for i in range(4):
        sf.write(tmp_path / "data" / "X" / "audio" / f"{i}.wav", np.full(50, 0.1), RATE)
        lines.append(
            {
                "audio_path": f"data/X/audio/{i}.wav",
                "label": "ab"[i // 2],
                "ori_uid": f"song {i // 2}",
            }
        )
    return lines


def written(records: list[dict], tmp_path: Path) -> Path:
    path = tmp_path / "data" / "X" / "X.train.jsonl"
    write_records(path, records)
    return path


def test_paths_start_from_a_folder_above_and_units_come_from_a_key(
    records: list[dict], tmp_path: Path
):
    path = written(records, tmp_path)
    split = read_split(path, "ori_uid")
    assert split.uids == ("song 0", "song 1")
    assert split.unit_index.tolist() == [0, 0, 1, 1]
    assert [item.label for item in split.unit_items] == ["a", "b"]
    assert all(item.path.is_file() for item in split.items)
    assert len(read_split(path).uids) == 4
    records[1]["uid"] = "apart"
    assert read_split(written(records, tmp_path), "ori_uid").uids == ("song 0", "apart", "song 1")


def test_segments_of_one_file_are_separate_items(records: list[dict], tmp_path: Path):
    same = records[0]["audio_path"]
    segments = [
        {"audio_path": same, "label": "a", "uid": "first", "start": 0, "end": 0.2},
        {"audio_path": same, "label": "b", "uid": "second", "start": 0.2},
    ]
    split = read_split(written(segments, tmp_path))
    assert [(item.start_seconds, item.end_seconds) for item in split.items] == [
        (0.0, 0.2),
        (0.2, None),
    ]
    assert split.uids == ("first", "second")


def test_errors_of_records_name_file_and_line(records: list[dict], tmp_path: Path):
    path = written(records, tmp_path)

    def refused(match: str, error: type[Exception] = ValueError, **changes: object) -> None:
        write_records(path, [records[0], records[1] | changes, *records[2:]])
        with pytest.raises(error, match=match):
            read_split(path, "ori_uid")

    refused(
        r"X\.train\.jsonl, line 2: .*audio/9\.wav is missing",
        MissingFileError,
        audio_path="data/X/audio/9.wav",
    )
    refused(r"line 2: `song 0` has the label 'c', but 'a' in .*line 1; give", label="c")
    refused(r"line 2: `start` \(3\) and `end` \(2\) must be seconds", start=3, end=2)
    refused(r"line 2: `start` \('now'\)", start="now")
    path.write_text(json.dumps(records[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"X\.train\.jsonl, line 2: not JSON"):
        read_split(path)
    path.write_text(json.dumps({"audio_path": "x.wav"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: no `label`"):
        read_split(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no records"):
        read_split(path)
    with pytest.raises(MissingFileError, match=r"Y\.train\.jsonl cannot be read: No such file"):
        read_split(tmp_path / "Y.train.jsonl")


def split_of(*labels: object) -> Split:
    return Split(
        tuple(
            Item(Path("x"), label, f"unit {i}", f"line {i + 1}") for i, label in enumerate(labels)
        )
    )


def test_a_subset_has_all_items_of_its_units_in_order():
    items = tuple(Item(Path("x"), "ab"[i // 3 % 2], f"unit {i // 3}", "here") for i in range(30))
    split = Split(items)
    subset = split.subset(4, seed=0)
    assert len(subset.uids) == 4
    assert len(subset) == 12
    assert list(subset.uids) == sorted(subset.uids, key=split.uids.index)
    assert split.subset(None, 0) is split
    with pytest.raises(ValueError, match="at least one unit, got 0"):
        split.subset(0, 0)


def test_classes_are_those_of_the_training_split_and_others_are_unknown():
    labels = Multiclass().fitted(split_of(62, 9, 62, 100))
    assert labels.names == ("9", "62", "100")
    assert labels.encode(split_of(100, 9, 61).items).tolist() == [2, 0, UNKNOWN]
    assert Multiclass(("x", "y")).fitted(split_of("x")).names == ("x", "y")
    with pytest.raises(ValueError, match="line 1: `label` is 'z', must be one of x, y"):
        Multiclass(("x", "y")).encode(split_of("z").items)
    with pytest.raises(
        ValueError, match=r"line 1: `label` is \['a'\], must be the name or the number of one class"
    ):
        labels.encode(split_of(["a"]).items)


def test_unknown_classes_do_not_affect_the_loss():
    logits = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN])
    known = targets != UNKNOWN
    expected = [
        torch.nn.functional.cross_entropy(logits[known, k], targets[known]) for k in range(2)
    ]
    torch.testing.assert_close(
        Multiclass(("a", "b", "c")).losses(logits, targets), torch.stack(expected)
    )
    assert Multiclass(("a", "b", "c")).losses(logits, torch.full((5,), UNKNOWN)).tolist() == [0, 0]


def test_tags_may_be_empty_and_numbers_are_standardised_on_the_training_split():
    tags = Multilabel().fitted(split_of(["b", "a"], [], ["b"]))
    assert tags.encode(split_of([], ["a", "other"], ["a", "b"]).items).tolist() == [
        [0, 0],
        [1, 0],
        [1, 1],
    ]
    with pytest.raises(ValueError, match="line 1: `label` is 'a', must be a list of tags"):
        tags.encode(split_of("a").items)
    numbers = Regression(("x", "y")).fitted(split_of([1, 10], [3, 30]))
    np.testing.assert_allclose(numbers.encode(split_of([2, 40]).items), [[0, 2]])
    with pytest.raises(ValueError, match=r"line 1: `label` is \[1\], must be 2 finite numbers"):
        numbers.encode(split_of([1]).items)
    with pytest.raises(
        ValueError, match="number 1 of the labels is the same in the whole training split"
    ):
        Regression().fitted(split_of([1, 5], [2, 5]))


def test_predictions_are_means_over_a_unit_and_equal_logits_stay_equal():
    items = tuple(Item(Path("x"), "a", f"song {i // 2}", "here") for i in range(4))
    split = Split(items)
    rows = Rows(np.array([0, 0, 1, 2, 3, 3, 3]), np.arange(7), np.zeros(7))
    logits = torch.arange(7.0)[:, None, None].expand(-1, 2, 3)
    labels = Multiclass(("a", "b", "c"))
    assert labels.predictions(logits, split, rows, "file")[:, 0, 0].tolist() == [1.0, 4.5]
    assert labels.predictions(logits, split, rows, "window")[:, 0, 0].tolist() == list(range(7))
    assert labels.unit_targets(split, rows, "window").tolist() == [0] * 7
    same = torch.full((7, 1, 3), 0.1).log()
    assert len(labels.predictions(same, split, rows, "file").unique()) == 1
