"""Labels that cannot be learned or scored are refused or stated in one line before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepa_audio.errors import UserError
from jepa_audio.probing.metrics.sums import R2, Accuracy
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.chords import Chords
from jepa_audio.probing.tasks.label_checks import check_labels
from jepa_audio.probing.tasks.labels import Labels, Multiclass, Multilabel, Regression
from jepa_audio.probing.tasks.records import Item, Split

A_MAJOR = [{"start_time": 0.0, "end_time": 1.0, "chord_str": "A:maj"}]
A_TO_D = [*A_MAJOR, {"start_time": 1.0, "end_time": 2.0, "chord_str": "D:maj"}]


def data_of(labels: Labels, train: list, val: list, test: list) -> ProbeData:
    splits = [
        Split(tuple(Item(Path(f"{i}.wav"), label, f"{i}", f"{name} {i}") for i, label in rows))
        for name, rows in (
            ("train", enumerate(train)),
            ("val", enumerate(val)),
            ("test", enumerate(test)),
        )
    ]
    metric = R2() if isinstance(labels, Regression) else Accuracy()
    return ProbeData.of(Task("birds", "birds", labels, (metric,), {}), splits)


@pytest.mark.parametrize(
    ("labels", "train", "val", "test", "message"),
    [
        (Multiclass(), ["a", "a"], ["a"], ["a"], r"train 0 on\): all units have the class 'a'"),
        (Multiclass(), ["a", "b"], ["a"], ["c", "c"], r"test \(from test 0 on\): no unit has a cl"),
        (Multiclass(("a", "b")), ["a", "b"], ["a"], ["c"], r"test 0: `label` is 'c', must be one"),
        (Multilabel(), [[], []], [["x"]], [["x"]], r"train .*: no unit has a tag"),
        (
            Multilabel(),
            [["x"], ["y"]],
            [["x"], []],
            [["z"]],
            r"test .*: every tag has all",
        ),
        (Multilabel(), [["x"], ["x"]], [["x"], []], [["x"], []], r"train .*: every tag has all"),
        (Regression(), [1.0, 2.0], [1.0, 2.0], [3.0, 3.0], r"test .*same label 3\.0"),
        (Regression(), [1.0, 2.0], [1.0, 2.0], [3.0, "x"], r"`label` is 'x', must be 1 finite"),
        (Chords(), [A_MAJOR, A_MAJOR], [A_TO_D], [A_TO_D], r"train .*: all units have the same"),
    ],
)
def test_what_cannot_be_learned_or_scored_is_refused(
    labels: Labels, train: list, val: list, test: list, message: str
):
    with pytest.raises(UserError, match=message):
        check_labels(data_of(labels, train, val, test))


@pytest.mark.parametrize(
    ("labels", "train", "val", "test", "lines"),
    [
        (Multiclass(), ["a", "b"], ["b", "a"], ["a", "b"], []),
        (
            Multiclass(),
            ["a", "b"],
            ["a", "b"],
            ["c", "a", "d", "b"],
            ["birds: 2 of 4 units in test have the classes c, d, which no training unit has: they"],
        ),
        (Multiclass(), ["a", "b"], ["a", "b"], ["a"], ["birds: no unit in test has the class b"]),
        (
            Multiclass(("a", "b", "c")),
            ["a", "b"],
            ["a", "b"],
            ["a", "b"],
            ["birds: no training unit has the class c"],
        ),
        (
            Multilabel(),
            [["x"], ["y"]],
            [["x"], ["y"]],
            [["x"], ["x", "y"], ["x", "z"]],
            ["all units in test or none have the tag x", "the tag z in test are not predicted"],
        ),
        (Regression(), [1.0, 2.0], [1.0, 2.0], [3.0], ["all units in test have the same label"]),
        (Chords(), [A_TO_D], [A_TO_D], [A_MAJOR], ["all units in test have the same label"]),
    ],
)
def test_labels_that_are_missing_in_a_split_are_stated_in_one_line(
    labels: Labels,
    train: list,
    val: list,
    test: list,
    lines: list[str],
    caplog: pytest.LogCaptureFixture,
):
    check_labels(data_of(labels, train, val, test))
    assert len(caplog.messages) == len(lines)
    for message, line in zip(caplog.messages, lines, strict=True):
        assert line in message
