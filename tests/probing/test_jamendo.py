"""MTG-Jamendo: from the downloaded tables and MARBLE's lines to splits, tags and windows."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks import TASKS, tags
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import SPLITS

RATE = 8000


def write_sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(0).standard_normal(RATE // 4)
    sf.write(path, wave, RATE, format="MP3" if path.suffix == ".mp3" else "WAV")


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


HEADER = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
TRACKS = {
    "train": ["48/948.mp3\t212.7\tgenre---rock\tgenre---pop", "49/949.mp3\t31.0\tgenre---jazz"],
    "validation": ["50/1350.mp3\t60.2\tgenre---pop"],
    "test": ["51/1351.mp3\t99.9\tgenre---jazz\tgenre---zydeco"],
}


def write_jamendo(raw: Path, audio: str = "audio-low", splits: str = "data/splits/split-0") -> Path:
    for tag_set in tags.TAG_SETS.values():
        for split, tracks in TRACKS.items():
            lines = [
                f"track_{i}\tartist_{split}\talbum_{i}\t{track}" for i, track in enumerate(tracks)
            ]
            write_lines(raw / splits / f"autotagging_{tag_set}-{split}.tsv", [HEADER, *lines])
    for track in (track.split("\t")[0] for tracks in TRACKS.values() for track in tracks):
        write_sound(
            raw / audio / (track.replace(".mp3", ".low.mp3") if audio.endswith("-low") else track)
        )
    return raw


@pytest.mark.parametrize(
    ("audio", "splits", "expected"),
    [
        ("audio-low", "data/splits/split-0", "audio-low/48/948.low.mp3"),
        ("audio", "mtg-jamendo-dataset/data/splits/split-0", "audio/48/948.mp3"),
        ("raw_30s/audio", "data/splits/split-0", "raw_30s/audio/48/948.mp3"),
    ],
)
def test_jamendo_is_found_in_the_folders_of_its_download_script(
    tmp_path: Path, audio: str, splits: str, expected: str
):
    converted = tags.MTG.convert(write_jamendo(tmp_path, audio, splits))
    assert set(converted) == {"MTG/MTGTop50", "MTG/MTGGenre", "MTG/MTGInstrument", "MTG/MTGMood"}
    for by_split in converted.values():
        assert by_split["train"][0] == {
            "audio_path": expected,
            "label": ["genre---rock", "genre---pop"],
        }
        assert [len(by_split[split]) for split in SPLITS] == [2, 1, 1]


@pytest.mark.parametrize(
    "task",
    tags.MTG_TAGS,
    ids=lambda t: t.name,
)
def test_jamendo_scores_whole_tracks_by_the_tags_of_the_training_split(task: Task, tmp_path: Path):
    data = ProbeData.load(task, write_jamendo(tmp_path))
    assert data.labels.names == ("genre---jazz", "genre---pop", "genre---rock")
    test = data.splits["test"]
    assert test.uids == ("audio-low/51/1351.low.mp3",)
    rows = Rows(np.array([0, 0]), np.array([0, 1]), np.array([15.0, 45.0]))
    assert data.labels.unit_targets(test, rows, "file").tolist() == [[1, 0, 0]]
    assert [metric.name for metric in task.metrics] == ["auroc", "ap", "f1_macro", "f1_micro"]


def test_jamendo_tracks_are_cut_into_the_windows_of_each_preset():
    first, second = (
        TASKS["mtg_mood"].protocols[preset].windows for preset in ("marble-v1", "marble-v2")
    )
    assert len(first.spans(61 * RATE, RATE)) == 3  # a second is enough
    assert len(second.spans(61 * RATE, RATE)) == 2
    assert len(second.spans(54 * RATE, RATE)) == 2


def test_missing_files_of_jamendo_are_named(tmp_path: Path):
    with pytest.raises(
        MissingFileError, match="data/splits/split-0 is missing: give the folder of the mtg-jamendo"
    ):
        tags.MTG.convert(tmp_path)
    raw = write_jamendo(tmp_path)
    (raw / "data/splits/split-0/autotagging_moodtheme-validation.tsv").unlink()
    with pytest.raises(MissingFileError, match=r"autotagging_moodtheme-validation\.tsv is missing"):
        tags.MTG.convert(raw)
    (write_jamendo(tmp_path) / "audio-low/51/1351.low.mp3").unlink()
    with pytest.raises(MissingFileError, match=r"test 0: .*1351\.low\.mp3 is missing"):
        ProbeData.load(TASKS["mtg_mood"], raw)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "track_1\tartist_1\talbum_1",
        "t\ta\tb\t48/948.mp3\t1.0",
        "t\ta\tb\t948.mp3\t1.0\tgenre---x",
        "t a b",
    ],
)
def test_wrong_lines_of_jamendo_are_named(line: str, tmp_path: Path):
    table = write_jamendo(tmp_path) / "data/splits/split-0/autotagging_genre-train.tsv"
    write_lines(table, [HEADER, "t\ta\tb\t48/948.mp3\t1.0\tgenre---x", line])
    with pytest.raises(
        ValueError, match=r"autotagging_genre-train\.tsv, line 3: .*download the file again"
    ):
        tags.MTG.convert(tmp_path)
    write_lines(table, ["t\ta\tb\t48/948.mp3\t1.0\tgenre---x"])
    with pytest.raises(
        ValueError, match=r"autotagging_genre-train\.tsv, line 1: must have the columns TRACK_ID"
    ):
        tags.MTG.convert(tmp_path)


def test_marbles_records_of_jamendo_are_read_unchanged(tmp_path: Path):
    write_sound(tmp_path / "data/MTG/audio-low/48/948.low.mp3")
    record = {
        "audio_path": "data/MTG/audio-low/48/948.low.mp3",
        "label": ["genre---rock"],
        "duration": 212.7,
    }
    for split in SPLITS:
        write_lines(tmp_path / f"data/MTG/MTGGenre.{split}.jsonl", [json.dumps(record)])
    data = ProbeData.load(TASKS["mtg_genre"], tmp_path / "data")
    assert data.splits["test"].items[0].path == tmp_path / "data/MTG/audio-low/48/948.low.mp3"
    assert data.labels.names == ("genre---rock",)
