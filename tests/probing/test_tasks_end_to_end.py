"""Every task from files to results: an encoder of the label scores one, a constant one chance."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.convert import convert
from jepa_audio.probing.feature_store import FeatureStore
from jepa_audio.probing.presets import preset_of
from jepa_audio.probing.rows import load_evidence, read_rows
from jepa_audio.probing.run import probe
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.report.page import write_leaderboard
from tests.probing import oracle_encoders
from tests.probing.tiny_sets import SET_OF, Probed, rows_of
from tests.probing.tiny_sounds import write_json_lines, write_notes

ENCODERS = "tests.probing.oracle_encoders:"
ONE_OF_EACH_KIND = {
    type(TASKS[name].labels).__name__: name
    for name in ("gtzan_genre", "mtt", "emomusic", "gtzan_beat", "chords1217")
}
CLIP_TASKS = [name for name, task in TASKS.items() if task.grid_hz is None]


def linked(source: Path, target: Path) -> Path:
    """Copy a folder with hard links, so that files of the copy can be removed."""
    return shutil.copytree(source, target, copy_function=os.link)


def as_records(task: str, root: Path, output: Path) -> Path:
    """Write the records of a task into a folder in which a test can change them."""
    data_set = TASKS[task].data_set
    if data_set is None:
        for path in (root / TASKS[task].stem).parent.glob("*.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for record in records:
                record["audio_path"] = str(root.parent / record["audio_path"])
            write_json_lines(output / path.relative_to(root), records)
    else:
        convert(data_set.name, root, output)
    return output


def off_beat(label: dict[str, list[float]]) -> dict[str, list[float]]:
    half = (label["beat"][1] - label["beat"][0]) / 2
    return {name: [time + half for time in times] for name, times in label.items()}


def shuffle_labels(path: Path) -> None:
    """Give every record the label of another record.

    Beats are moved to the middle between two clicks instead. With the beats of another track, even
    a head with a small weight on clicks would find the true beats.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    labels = [record["label"] for record in records]
    if isinstance(labels[0], dict):
        labels = [off_beat(label) for label in labels]
    elif len(labels) < 10:
        labels = [*labels[1:], labels[0]]  # no song keeps its label
    else:
        random.Random(0).shuffle(labels)
    write_json_lines(
        path, [{**record, "label": label} for record, label in zip(records, labels, strict=True)]
    )


# Every task


def test_every_task_has_a_tiny_data_set():
    assert set(TASKS) <= set(SET_OF)
    assert set(ONE_OF_EACH_KIND) == {type(task.labels).__name__ for task in TASKS.values()}


@pytest.mark.parametrize("task", TASKS)
def test_an_encoder_of_the_label_scores_one(task: str, probed: Callable[[str], Probed]):
    tiny, rows = SET_OF[task], rows_of(probed(task).rows, task, SET_OF[task].oracle)
    assert rows[0].head in {"logistic", "ridge"}
    assert rows[0].value > 0.95
    for row in rows:
        assert row.layer == tiny.oracle  # not the constant layer
        assert row.layers == ("nothing", tiny.oracle)
        assert row.value > 0.5 * (1 + row.chance)
        assert row.metric == TASKS[task].metrics[0].name
        assert (
            row.score.low - 1e-5 <= row.value <= row.score.high + 1e-5
        )  # the value is rounded to 32 bits, its ends are not
        assert row.num_test == tiny.num_test[task]
        assert row.against_random is None


@pytest.mark.parametrize("task", TASKS)
def test_a_constant_encoder_scores_chance(task: str, probed: Callable[[str], Probed]):
    rows = rows_of(probed(task).rows, task, "constant")
    kind = TASKS[task].labels.kind
    for row in rows:
        if TASKS[task].grid_hz is not None:
            assert row.value == pytest.approx(row.chance, abs=0.05)
        elif kind == "class":
            assert row.value == pytest.approx(row.chance, abs=0.03)  # two classes may be as usual
        elif kind == "tags":
            assert row.value == pytest.approx(0.5, abs=1e-6)
        else:
            assert row.value <= 0
            assert row.chance <= 0


@pytest.mark.parametrize(
    "task", [name for name in CLIP_TASKS if TASKS[name].labels.kind != "numbers"]
)
def test_chance_is_the_score_of_a_constant_prediction(task: str, probed: Callable[[str], Probed]):
    expected = {
        "gtzan_genre": 1 / 10,
        "giantsteps_key": 2 / 24,  # the key, and a half, 0.3 and 0.2 for its relations
        "hooktheory_key": 2 / 24,
        "hooktheory_structure": 7 / 48,  # the first of seven sections is on seven of 48 hooks
        "nsynth_pitch": 1 / 12,
        "nsynth_instrument": 1 / 6,
        "vocalset_technique": 1 / 10,
    }
    row = rows_of(probed(task).rows, task, "constant")[0]
    if task == "vocalset_singer":
        assert 0 <= row.chance <= 8 / 97
    else:
        assert row.chance == pytest.approx(expected.get(task, 0.5), abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_shuffled_labels_score_chance(task: str, probed: Callable[[str], Probed], tmp_path: Path):
    clean, tiny = probed(task), SET_OF[task]
    records = as_records(task, clean.root, tmp_path / "records")
    shuffle_labels(records / f"{TASKS[task].stem}.train.jsonl")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "features").symlink_to(clean.output / "features")
    rows = rows_of(
        probe(ENCODERS + tiny.oracle, task, records, tmp_path / "results", preset="linear"),
        task,
        tiny.oracle,
    )
    clean_row = rows_of(clean.rows, task, tiny.oracle)[0]
    assert rows[0].num_test == clean_row.num_test
    assert rows[0].split_checksum != clean_row.split_checksum
    for row in rows:
        assert row.value < row.chance + 0.45 * (1 - row.chance)


@pytest.mark.parametrize("task", TASKS)
def test_results_are_written(task: str, probed: Callable[[str], Probed]):
    of = probed(task)
    assert read_rows(of.output / "results.jsonl") == of.rows
    for row in of.rows:
        assert len(load_evidence(of.output / row.evidence).uids) == row.num_test
    assert {row.encoder for row in of.rows} == {SET_OF[task].oracle, "constant", "log-mel"}


@pytest.mark.parametrize("task", ONE_OF_EACH_KIND.values(), ids=ONE_OF_EACH_KIND)
def test_a_leaderboard_is_written_for_each_kind_of_labels(
    task: str, probed: Callable[[str], Probed]
):
    page = write_leaderboard(probed(task).output / "results.jsonl")
    for path in (page, page.with_name("leaderboard.md")):
        assert task in path.read_text()


@pytest.mark.parametrize("task", [name for name in TASKS if SET_OF[name].audio])
def test_a_missing_audio_file_is_named(task: str, roots: Callable[[str], Path], tmp_path: Path):
    tiny, copy = SET_OF[task], linked(roots(task), tmp_path / "copy")
    (copy / tiny.audio).unlink()
    with pytest.raises(MissingFileError, match=Path(tiny.audio).name):
        probe(ENCODERS + "constant", task, copy / tiny.root, tmp_path / "results", preset="linear")


@pytest.mark.parametrize("task", ["vocalset_singer", "vocalset_technique"])
def test_a_missing_audio_file_of_converted_records_is_named(
    task: str, roots: Callable[[str], Path], tmp_path: Path
):
    copy = linked(roots(task), tmp_path / "copy")
    as_records(task, copy, copy)
    sound = copy / "FULL" / "male3" / "scales" / "belt" / "m3_scales_belt_a.wav"
    sound.unlink()
    with pytest.raises(MissingFileError, match=sound.name):
        probe(ENCODERS + "constant", task, copy, tmp_path / "results", preset="linear")


@pytest.mark.parametrize("task", TASKS)
def test_missing_annotations_are_named(task: str, roots: Callable[[str], Path], tmp_path: Path):
    tiny, copy = SET_OF[task], linked(roots(task), tmp_path / "copy")
    annotations = copy / tiny.annotations.format(stem=TASKS[task].stem)
    annotations.rename(tmp_path / "away")
    with pytest.raises(MissingFileError, match=annotations.name):
        probe(ENCODERS + "constant", task, copy / tiny.root, tmp_path / "results", preset="linear")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("task", [name for name in TASKS if SET_OF[name].root == "data"])
def test_missing_records_are_named(task: str, roots: Callable[[str], Path], tmp_path: Path):
    copy = linked(roots(task), tmp_path / "copy") / "data"
    records = copy / f"{TASKS[task].stem}.train.jsonl"
    records.unlink()
    with pytest.raises(MissingFileError, match=records.name):
        probe(ENCODERS + "constant", task, copy, tmp_path / "results", preset="linear")


# Units and windows


@pytest.mark.parametrize(
    ("task", "windows"),
    [
        ("gtzan_genre", {1: 30}),
        ("giantsteps_key", {1: 46, 2: 2}),  # 61 s: two windows of 30 s, what is shorter is dropped
        ("emomusic", {1: 17, 2: 2, 6: 1}),  # 6.2 s: 5 s and a rest; 32 s: of the first 30 s
        ("mtt", {1: 18}),
        ("vocalset_singer", {1: 77, 2: 10}),  # 4.1 s: 3 s and a rest
        ("vocalset_technique", {1: 100}),
        ("mtg_top50", {1: 31, 3: 1}),  # 62 s: a rest of 2 s counts
    ],
)
def test_audio_is_encoded_in_the_windows_of_the_protocol(
    task: str, windows: dict[int, int], probed: Callable[[str], Probed]
):
    encoder = getattr(oracle_encoders, SET_OF[task].oracle)()
    preparation = preset_of("linear").preparation(TASKS[task])
    store = FeatureStore(probed(task).output / "features", encoder, preparation, 240.0)
    rows = store.features(ProbeData.load(TASKS[task], probed(task).root).splits["test"], task).rows
    num_windows, num_items = np.unique(np.bincount(rows.item), return_counts=True)
    assert dict(zip(num_windows.tolist(), num_items.tolist(), strict=True)) == windows


def test_beats_and_downbeats_are_scored_by_track_and_pooled(probed: Callable[[str], Probed]):
    oracle = rows_of(probed("gtzan_beat").rows, "gtzan_beat", "onsets")[0]
    constant = rows_of(probed("gtzan_beat").rows, "gtzan_beat", "constant")[0]
    assert set(oracle.scores) == {"beat_f1", "beat_f1_pooled", "downbeat_f1", "downbeat_f1_pooled"}
    assert oracle.scores["beat_f1_pooled"].value > 0.95
    assert oracle.scores["downbeat_f1"].value > constant.scores["downbeat_f1"].value + 0.4
    assert oracle.decoder == "dbn"


def test_silence_within_a_song_is_a_no_chord(probed: Callable[[str], Probed]):
    of = probed("chords1217")
    row = rows_of(of.rows, "chords1217", "triads")[0]
    assert set(row.scores) == {"majmin", "frame_accuracy"}
    # Eight of 33 regions have no chord, one is ignored: whoever takes them for the chord before is
    # below this.
    assert min(score.value for score in row.scores.values()) > 1 - 5 / 32
    assert rows_of(of.rows, "chords1217", "constant")[0].value == pytest.approx(8 / 32, abs=1e-3)


def test_windows_and_files_of_singers_are_both_scored(probed: Callable[[str], Probed]):
    for task in ("vocalset_singer", "vocalset_technique"):
        for row in rows_of(probed(task).rows, task, "spectrum"):
            assert set(row.scores) == {"accuracy", "file_accuracy"}
            assert row.unit == "window"
    takes = ProbeData.load(TASKS["vocalset_singer"], probed("vocalset_singer").root).splits["test"]
    num_long = sum(sf.info(item.path).duration > 3 for item in takes.items)
    assert (
        rows_of(probed("vocalset_singer").rows, "vocalset_singer", "spectrum")[0].num_test
        == len(takes) + num_long
    )


def test_each_tag_set_has_the_tracks_of_its_table(probed: Callable[[str], Probed]):
    tables = {
        "top50": "top50tags",
        "genre": "genre",
        "instrument": "instrument",
        "mood": "moodtheme",
    }
    for name, table in tables.items():
        of = probed(f"mtg_{name}")
        lines = (
            (of.root / "data" / "splits" / "split-0" / f"autotagging_{table}-test.tsv")
            .read_text()
            .splitlines()
        )
        assert rows_of(of.rows, f"mtg_{name}", "spectrum")[0].num_test == len(lines) - 1


def test_clips_of_one_song_are_one_unit_and_hooks_of_one_song_are_not(
    roots: Callable[[str], Path], tmp_path: Path
):
    keys = ("C major", "A minor", "Gb major")
    for split, songs in {"train": 9, "val": 3, "test": 6}.items():
        records = []
        for song in range(songs):
            for clip in range(2):
                path = tmp_path / "GS" / "giantsteps_clips" / "wav" / f"{split}{song}-{clip}.wav"
                write_notes(path, [60 + 4 * (song % 3)])
                record = {
                    "audio_path": f"GS/giantsteps_clips/wav/{path.name}",
                    "ori_uid": f"{split}{song}",
                }
                records.append({**record, "label": keys[song % 3]})
        write_json_lines(tmp_path / "GS" / f"GS.{split}.jsonl", records)
    row = probe(
        ENCODERS + "spectrum", "giantsteps_key", tmp_path, tmp_path / "results", preset="linear"
    )[0]
    assert (row.value, row.num_train, row.num_valid, row.num_test) == (1.0, 9, 3, 6)
    hooks = ProbeData.load(TASKS["hooktheory_key"], roots("hooktheory_key") / "data").splits["test"]
    songs = [
        json.loads(line)["ori_uid"]
        for line in (roots("hooktheory_key") / "data" / "HookTheory" / "HookTheoryKey.test.jsonl")
        .read_text()
        .splitlines()
    ]
    assert len(set(songs)) == 24
    assert len(hooks.uids) == 48
