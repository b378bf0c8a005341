"""`data convert` writes the records of a raw data set, and lists the files it cannot decode."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.files import read_jsonl
from jepa_audio.probing import convert as convert_room
from jepa_audio.probing.convert import convert
from jepa_audio.probing.metrics.sums import Accuracy
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.labels import Multiclass
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
@pytest.mark.parametrize("output", ["separate", "parent"])
def test_converted_records_load_like_the_raw_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, output: str
):
    task, build = TASKS[TREES[name][0]], TREES[name][1]
    raw = build(tmp_path / "data" / "raw")
    folder = tmp_path / ("records" if output == "separate" else "data")
    convert(name, raw, folder, num_workers=2)
    expected = items_of(task, raw)
    monkeypatch.chdir(folder)  # relative paths do not start from the working directory
    assert items_of(task, folder) == expected
    records = dict(read_jsonl(folder / f"{task.stem}.train.jsonl"))
    assert all(
        Path(record["audio_path"]).is_absolute() == (output == "separate")
        for record in records.values()
    )


def test_records_and_raw_data_can_be_moved_together(tmp_path: Path):
    convert("gtzan", raw_sets.gtzan(tmp_path / "data" / "gtzan"), tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert items_of(TASKS["gtzan_genre"], tmp_path / "moved")["train"][0][0].is_relative_to(
        tmp_path / "moved"
    )


def test_records_are_written_into_the_raw_data_set_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(raw_sets.gtzan(tmp_path))
    expected = items_of(TASKS["gtzan_genre"], Path())
    convert("gtzan", Path())
    assert (tmp_path / "GTZAN" / "GTZANGenre.val.jsonl").is_file()
    assert items_of(TASKS["gtzan_genre"], Path()) == expected


def test_records_have_marbles_keys_and_decoded_lengths(tmp_path: Path):
    raw = raw_sets.giantsteps(tmp_path / "raw")
    raw_sets.sound(raw / "giantsteps-key-dataset" / "wav" / "10089.LOFI.wav", 0.25)
    (raw / "giantsteps-key-dataset" / "audio" / "10089.LOFI.mp3").unlink()
    convert("giantsteps", raw, tmp_path)
    records = list(dict(read_jsonl(tmp_path / "GS" / "GS.test.jsonl")).values())
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


def test_bit_depth_is_that_of_the_file(tmp_path: Path):
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
    records = list(dict(read_jsonl(tmp_path / "GTZAN" / "GTZANGenre.train.jsonl")).values())
    assert [record["bit_depth"] for record in records[:4]] == [24, 32, 8, 16]
    assert [record["channels"] for record in records[:4]] == [2, 2, 2, 1]


def test_files_that_cannot_be_decoded_are_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
):
    raw = raw_sets.mtt(tmp_path / "raw")
    (raw / "mp3" / "d" / "song-13.mp3").write_bytes(b"no mp3" * 40)
    convert("mtt", raw, tmp_path / "out")
    assert len(dict(read_jsonl(tmp_path / "out" / "MTT" / "MTT.test.jsonl"))) == 11
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


def test_only_the_first_undecodable_files_are_logged_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert_room, "_MAX_BAD_LOGGED", 2)
    monkeypatch.setattr(convert_room, "MAX_BAD_SHARE", 0.2)
    raw = raw_sets.gtzan(tmp_path / "raw")
    for genre in raw_sets.GENRES[:5]:
        (raw / "genres" / genre / f"{genre}.00002.wav").write_bytes(b"")
    convert("gtzan", raw, tmp_path)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert all("00002.wav is left out: " in line for line in messages[:2])
    assert messages[2] == f"3 more are left out, all are in {tmp_path / 'gtzan.bad.txt'}"


def test_too_many_undecodable_files_are_an_error_that_names_the_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    raw = raw_sets.gtzan(tmp_path / "raw")
    for genre in ("blues", "metal"):
        (raw / "genres" / genre / f"{genre}.00002.wav").write_bytes(b"")
    message = r"gtzan: 2 of 30 files are missing .*, more than 5%; all are in .*gtzan\.bad\.txt"
    with pytest.raises(ValueError, match=message):
        convert("gtzan", raw, tmp_path / "out")
    assert not caplog.records, "the error is enough, a line per file would hide it"
    assert len((tmp_path / "out" / "gtzan.bad.txt").read_text().splitlines()) == 2
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_the_summary_compares_sizes_with_the_published_ones(
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


def test_an_unknown_data_set_or_folder_is_an_error(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"no data set 'gztan', only .*nsynth.*; did you mean 'gtzan'\?$"
    ):
        convert("gztan", tmp_path, tmp_path)
    with pytest.raises(
        MissingFileError,
        match=r"there is no folder .*nowhere: give the folder of the data set gtzan",
    ):
        convert("gtzan", tmp_path / "nowhere", tmp_path)


def test_every_record_has_all_keys(tmp_path: Path):
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
