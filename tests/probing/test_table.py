"""Tables of labels are tasks: columns, splits by hash, and errors with line and column."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks.table import table_task
from tests.probing import raw_sets


def own_table(path: Path, header: str, *lines: str) -> Path:
    """Write a table, and an audio file for every name in its first column."""
    for line in lines:
        raw_sets.sound(path.parent / line.replace("\t", ",").split(",")[0])
    return raw_sets.text(path, header, *lines)


def labels_of(path: Path, *args: object) -> dict[str, dict[str, object]]:
    splits = table_task(path, *args).splits
    return {
        name: {item.path.name: item.label for item in split.items} for name, split in splits.items()
    }


def test_a_table_with_splits_is_a_task(tmp_path: Path):
    table = own_table(
        tmp_path / "birds.csv",
        "file,label,split",
        "a/1.wav,finch,train",
        "a/2.wav,tit,Train",
        "b/3.wav,tit,valid",
        "4.wav,finch,test",
    )
    data = table_task(table, "multiclass")
    assert labels_of(table, "multiclass") == {
        "train": {"1.wav": "finch", "2.wav": "tit"},
        "val": {"3.wav": "tit"},
        "test": {"4.wav": "finch"},
    }
    assert (data.task.name, data.labels.names) == ("birds", ("finch", "tit"))
    assert [metric.name for metric in data.task.metrics] == ["accuracy"]
    assert data.splits["val"].items[0].where == f"{table}, line 4"


def test_tags_are_separated_by_bars_or_semicolons(tmp_path: Path):
    rows = ("1.wav\tslow | piano|slow\ttrain", "2.wav\tfast; loud\tval", "3.wav\t\ttest")
    table = own_table(tmp_path / "mood.tsv", "path\ttags\tsplit", *rows)
    labels = labels_of(table, "multilabel")
    assert [labels["train"]["1.wav"], labels["val"]["2.wav"], labels["test"]["3.wav"]] == [
        ["slow", "piano"],
        ["fast", "loud"],
        [],
    ]
    assert [metric.name for metric in table_task(table, "multilabel").task.metrics] == [
        "auroc",
        "ap",
        "f1_macro",
        "f1_micro",
    ]


def test_several_columns_of_numbers_are_a_regression(tmp_path: Path):
    rows = ("1.wav,1,-2.5,train", "2.wav,3,2,train", "3.wav,4,1e-3,val", "4.wav,5,0,test")
    table = own_table(tmp_path / "va.csv", "filename,valence,arousal,split", *rows)
    data = table_task(table, "regression", ("arousal", "valence"))
    assert labels_of(table, "regression", ("arousal", "valence"))["val"] == {"3.wav": [1e-3, 4.0]}
    assert data.labels.names == ("arousal", "valence")
    assert [metric.name for metric in data.task.metrics] == ["r2", "r2_arousal", "r2_valence"]


def groups_by_split(path: Path) -> dict[str, set[str]]:
    return {
        name: {item.path.parent.name for item in split.items}
        for name, split in table_task(path, "multiclass").splits.items()
    }


def test_a_table_without_splits_is_split_by_group_and_keeps_its_splits_when_it_grows(
    tmp_path: Path,
):
    rows = [f"{group}/{i}.wav,{i},{group}" for group in range(60) for i in range(2)]
    before = groups_by_split(own_table(tmp_path / "t.csv", "path,label,group", *rows[:100]))
    after = groups_by_split(own_table(tmp_path / "t.csv", "path,label,group", *reversed(rows)))
    assert all(before[split] <= after[split] for split in before)
    assert sum(map(len, after.values())) == 60, "no group is in two splits"
    assert 30 <= len(after["train"]) <= 50, "70 % of 60 are 42, with a deviation of 3.5"
    assert min(len(after["val"]), len(after["test"])) >= 3


def test_a_table_without_groups_is_split_by_file(tmp_path: Path):
    table = own_table(tmp_path / "t.csv", "path,label", *(f"{i}.wav,{i % 2}" for i in range(40)))
    splits = labels_of(table, "multiclass")
    assert sum(map(len, splits.values())) == 40
    assert len(splits["train"]) > len(splits["val"]) > 0


def test_a_group_in_two_splits_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = ("1.wav,a,train,X", "2.wav,a,val,X", "3.wav,a,test,Y", "4.wav,b,train,")
    with caplog.at_level(logging.WARNING):
        table_task(own_table(tmp_path / "t.csv", "path,label,split,group", *rows), "multiclass")
    assert "t.csv: 1 groups are in more than one split, such as 'X'" in caplog.text


GOOD = ["path,label,split", "1.wav,1,train", "2.wav,2,train", "3.wav,2,val", "4.wav,1,test"]


def spoilt(line: int, content: str) -> list[str]:
    return [content if i == line else good for i, good in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("lines", "kind", "columns", "message"),
    [
        (spoilt(2, "2.wav,2"), "multiclass", (), r"t\.csv, line 3: must have 3 cells"),
        (spoilt(2, "2.wav,2,train,x"), "multiclass", (), r"t\.csv, line 3: must have 3 cells"),
        (
            spoilt(2, "2.wav,2,dev"),
            "multiclass",
            (),
            r"t\.csv, line 3, column `split`: 'dev' must be one of train, val",
        ),
        (
            spoilt(2, "2.wav,,train"),
            "multiclass",
            (),
            r"t\.csv, line 3, column `label`: '' must not be empty",
        ),
        (
            spoilt(2, ",2,train"),
            "multiclass",
            (),
            r"t\.csv, line 3, column `path`: '' must not be empty",
        ),
        (
            spoilt(2, "2.wav,two,train"),
            "regression",
            (),
            r"t\.csv, line 3, column `label`: 'two' must be a finite number",
        ),
        (
            spoilt(2, "2.wav,inf,train"),
            "regression",
            (),
            r"t\.csv, line 3, column `label`: 'inf' must be a finite number",
        ),
        (
            spoilt(4, "4.wav,1,val"),
            "multiclass",
            (),
            r"t\.csv: no row is in the split 'test'; add rows with test in the column `split`$",
        ),
        (
            spoilt(4, "1.wav,1,test"),
            "multiclass",
            (),
            r"line 5: 1\.wav is in test, but in train in .*line 2",
        ),
        (
            spoilt(2, "1.wav,2,train"),
            "multiclass",
            (),
            r"line 3: `1\.wav` has the label '2', but '1' in .*line 2",
        ),
        (
            spoilt(0, "name,label,split"),
            "multiclass",
            (),
            r"line 1: there is no column `path` or `file` or",
        ),
        (
            spoilt(0, "path,class,split"),
            "multiclass",
            (),
            r"line 1: there is no column `label`, only `path`, `class`",
        ),
        (
            spoilt(0, "path,path,split"),
            "multiclass",
            (),
            r"line 1: there are two columns `path`",
        ),
        (
            GOOD,
            "multiclass",
            ("bird",),
            r"line 1: there is no column `bird`, only `path`, `label`, `split`",
        ),
        (
            GOOD,
            "multilabel",
            ("label", "split"),
            r"`columns` has 2 columns .* only a regression may have several",
        ),
        (GOOD[:1], "multiclass", (), r"t\.csv has no rows"),
        (
            ["path,label", "1.wav,1", "2.wav,1"],
            "multiclass",
            (),
            r"in the column `split`: there are too few groups",
        ),
    ],
)
def test_errors_of_a_table_name_line_and_column(
    tmp_path: Path, lines: list[str], kind: str, columns: tuple[str, ...], message: str
):
    for number in range(1, 5):
        raw_sets.sound(tmp_path / f"{number}.wav")
    with pytest.raises(ValueError, match=message):
        table_task(raw_sets.text(tmp_path / "t.csv", *lines), kind, columns)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda table: table.with_name("3.wav").unlink(),
            MissingFileError,
            r"t\.csv, line 4: .*3\.wav is missing",
        ),
        (lambda table: table.unlink(), MissingFileError, r"t\.csv cannot be read: No such file"),
        (
            lambda table: table.write_bytes(b"path,label\n\xff.wav,1\n"),
            ValueError,
            r"t\.csv is not UTF-8",
        ),
    ],
)
def test_missing_files_and_wrong_encodings_are_named(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
):
    table = own_table(tmp_path / "t.csv", *GOOD)
    spoil(table)
    with pytest.raises(error, match=message):
        table_task(table, "multiclass")
