"""`data convert` writes what a raw data set holds, and what it could not read; tables are tasks of the user's own."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing import convert as convert_room
from jepa_audio.probing.convert import convert
from jepa_audio.probing.metrics import Accuracy
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import read_records
from jepa_audio.probing.tasks.table import table_task
from tests.probing import raw_sets

TREES = {
    "gtzan": ("gtzan_genre", raw_sets.gtzan),
    "giantsteps": ("giantsteps_key", raw_sets.giantsteps),
    "emomusic": ("emomusic", raw_sets.emomusic),
    "mtt": ("mtt", raw_sets.mtt),
}


def items_of(task: Task, root: Path) -> dict[str, list[tuple[Path, object, float, float | None]]]:
    splits = ProbeData.load(task, root).splits
    return {
        name: [
            (item.path.resolve(), item.label, item.start_seconds, item.end_seconds)
            for item in split.items
        ]
        for name, split in splits.items()
    }


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("output", ["beside", "above"])
def test_what_is_converted_loads_as_the_raw_data_set_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, output: str
):
    task, build = TASKS[TREES[name][0]], TREES[name][1]
    raw = build(tmp_path / "data" / "raw")
    folder = tmp_path / ("records" if output == "beside" else "data")
    convert(name, raw, folder, num_workers=2)
    expected = items_of(task, raw)
    monkeypatch.chdir(folder)  # relative paths do not start from where the user is
    assert items_of(task, folder) == expected
    records = read_records(folder / f"{task.stem}.train.jsonl")
    assert all(
        Path(record["audio_path"]).is_absolute() == (output == "beside")
        for record in records.values()
    )


def test_records_and_raw_data_move_together(tmp_path: Path):
    convert("gtzan", raw_sets.gtzan(tmp_path / "data" / "gtzan"), tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert items_of(TASKS["gtzan_genre"], tmp_path / "moved")["train"][0][0].is_relative_to(
        tmp_path / "moved"
    )


def test_records_lie_in_the_raw_data_set_if_no_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(raw_sets.gtzan(tmp_path))
    expected = items_of(TASKS["gtzan_genre"], Path())
    convert("gtzan", Path())
    assert (tmp_path / "GTZAN" / "GTZANGenre.val.jsonl").is_file()
    assert items_of(TASKS["gtzan_genre"], Path()) == expected


def test_a_record_has_the_keys_of_marble_and_lengths_that_were_counted(tmp_path: Path):
    raw = raw_sets.giantsteps(tmp_path / "raw")
    raw_sets.sound(raw / "giantsteps-key-dataset" / "wav" / "10089.LOFI.wav", 0.25)
    (raw / "giantsteps-key-dataset" / "audio" / "10089.LOFI.mp3").unlink()
    convert("giantsteps", raw, tmp_path)
    records = list(read_records(tmp_path / "GS" / "GS.test.jsonl").values())
    assert records[0] == {
        "audio_path": "raw/giantsteps-key-dataset/wav/10089.LOFI.wav",
        "label": "Eb minor",
        "ori_uid": "0010089",
        "duration": 0.25,
        "sample_rate": 16_000,
        "num_samples": 4_000,
        "bit_depth": 16,
        "channels": 1,
    }
    samples, rate = sf.read(tmp_path / records[1]["audio_path"])
    assert (records[1]["num_samples"], records[1]["sample_rate"]) == (len(samples), rate)
    assert records[1]["bit_depth"] is None


def test_bits_of_a_sample_are_those_of_the_file(tmp_path: Path):
    raw = raw_sets.gtzan(tmp_path / "raw")
    for number, subtype in enumerate(("PCM_24", "FLOAT", "PCM_U8")):
        name = raw_sets.GENRES[number]
        sf.write(
            raw / "genres" / name / f"{name}.00000.wav",
            np.full((40, 2), 0.1),
            8000,
            subtype=subtype,
        )
    convert("gtzan", raw, tmp_path)
    records = list(read_records(tmp_path / "GTZAN" / "GTZANGenre.train.jsonl").values())
    assert [record["bit_depth"] for record in records[:4]] == [24, 32, 8, 16]
    assert [record["channels"] for record in records[:4]] == [2, 2, 2, 1]


def test_files_that_cannot_be_decoded_are_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
):
    raw = raw_sets.mtt(tmp_path / "raw")
    (raw / "mp3" / "d" / "song-13.mp3").write_bytes(b"no mp3" * 40)
    convert("mtt", raw, tmp_path / "out")
    assert len(read_records(tmp_path / "out" / "MTT" / "MTT.test.jsonl")) == 11
    report = (tmp_path / "out" / "mtt.bad.txt").read_text()
    assert report.startswith(f"{raw / 'mp3/d/song-13.mp3'}\tcannot be decoded")
    assert "song-13.mp3 is left out: cannot be decoded" in caplog.text
    assert (
        "47 train, 4 val, 11 test (not comparable with published scores, which are for (18706, "
        in capsys.readouterr().out
    )
    raw_sets.sound(raw / "mp3" / "d" / "song-13.mp3")
    convert("mtt", raw, tmp_path / "out")
    assert not (tmp_path / "out" / "mtt.bad.txt").exists(), "nothing is bad any more"


def test_of_many_files_that_are_left_out_some_are_named_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert_room, "_MAX_BAD_LOGGED", 2)
    monkeypatch.setattr(convert_room, "MAX_BAD_SHARE", 0.2)
    raw = raw_sets.gtzan(tmp_path / "raw")
    for genre in raw_sets.GENRES[:5]:
        (raw / "genres" / genre / f"{genre}.00002.wav").write_bytes(b"")
    convert("gtzan", raw, tmp_path)
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert all("00002.wav is left out: " in line for line in said[:2])
    assert said[2] == f"3 more are left out, all are in {tmp_path / 'gtzan.bad.txt'}"


def test_too_many_bad_files_are_an_error_that_names_the_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    raw = raw_sets.gtzan(tmp_path / "raw")
    for genre in ("blues", "metal"):
        (raw / "genres" / genre / f"{genre}.00002.wav").write_bytes(b"")
    said = r"gtzan: 2 of 30 files are missing or cannot be decoded, more than 5%; all are in .*gtzan\.bad\.txt"
    with pytest.raises(ValueError, match=said):
        convert("gtzan", raw, tmp_path / "out")
    assert not caplog.records, "the error says it all, a line for every file would bury it"
    assert len((tmp_path / "out" / "gtzan.bad.txt").read_text().splitlines()) == 2
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_sizes_that_equal_the_published_ones_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    task = Task("own", "GTZAN/GTZANGenre", Multiclass(), (Accuracy(),), {}, num_units=(10, 10, 10))
    monkeypatch.setitem(TASKS, "gtzan_genre", task)
    convert("gtzan", raw_sets.gtzan(tmp_path / "raw"), tmp_path)
    assert capsys.readouterr().out.endswith(
        "GTZANGenre.*.jsonl: 10 train, 10 val, 10 test (as published)\n"
    )
    convert("emomusic", raw_sets.emomusic(tmp_path / "emo"), tmp_path)
    assert "7 train, 2 val, 3 test (the published sizes are not known)" in capsys.readouterr().out


def test_an_unknown_name_or_folder_is_named(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"no data set 'gztan', only .*nsynth.*; did you mean 'gtzan'\?$"
    ):
        convert("gztan", tmp_path, tmp_path)
    with pytest.raises(
        MissingFileError,
        match=r"there is no folder .*nowhere: give that of the raw data set gtzan",
    ):
        convert("gtzan", tmp_path / "nowhere", tmp_path)


def own_table(path: Path, header: str, *lines: str) -> Path:
    """With an audio file for every name in the first column."""
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


def test_tags_stand_between_bars_or_semicolons(tmp_path: Path):
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


def test_a_table_without_splits_is_divided_by_group_and_stays_so_when_it_grows(tmp_path: Path):
    rows = [f"{group}/{i}.wav,{i},{group}" for group in range(60) for i in range(2)]
    before = groups_by_split(own_table(tmp_path / "t.csv", "path,label,group", *rows[:100]))
    after = groups_by_split(own_table(tmp_path / "t.csv", "path,label,group", *reversed(rows)))
    assert all(before[split] <= after[split] for split in before)
    assert sum(map(len, after.values())) == 60, "no group is in two splits"
    assert 30 <= len(after["train"]) <= 50, "70 % of 60 are 42, with a deviation of 3.5"
    assert min(len(after["val"]), len(after["test"])) >= 3


def test_without_groups_the_files_themselves_are_divided(tmp_path: Path):
    table = own_table(tmp_path / "t.csv", "path,label", *(f"{i}.wav,{i % 2}" for i in range(40)))
    splits = labels_of(table, "multiclass")
    assert sum(map(len, splits.values())) == 40
    assert len(splits["train"]) > len(splits["val"]) > 0


def test_a_group_in_two_of_the_users_splits_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
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
def test_what_is_wrong_with_a_table_is_named(
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
def test_missing_files_and_foreign_letters_are_named(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
):
    table = own_table(tmp_path / "t.csv", *GOOD)
    spoil(table)
    with pytest.raises(error, match=message):
        table_task(table, "multiclass")


def test_lines_of_json_hold_what_the_converter_found(tmp_path: Path):
    convert("emomusic", raw_sets.emomusic(tmp_path / "raw"), tmp_path)
    lines = (tmp_path / "EMO" / "EMO.train.jsonl").read_text().splitlines()
    assert {
        "audio_path",
        "label",
        "duration",
        "sample_rate",
        "num_samples",
        "channels",
        "bit_depth",
    } == set(json.loads(lines[0]))
