"""VocalSet, MTG-Jamendo and HookTheory: from downloaded trees and from MARBLE's lines to what is scored."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.metrics import KEYS
from jepa_audio.probing.tasks import hooktheory, mtg, vocalset
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


# VocalSet


def write_takes(raw: Path, takes: Iterable[str], tree: str = "FULL") -> Path:
    for take in takes:
        path = raw / tree / take
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # no converter looks into audio
    return raw


def many_takes(singers: Iterable[str]) -> list[str]:
    return [
        f"{singer}/{context}/{technique}/{singer[0]}{singer.lstrip('femal')}_{context}_{technique}_{vowel}.wav"
        for singer in singers
        for context in ("arpeggios", "scales")
        for technique in ("belt", "breathy", "vocal_fry", "forte")
        for vowel in "aeiou"
    ]


@pytest.fixture(scope="module")
def vocalset_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    everybody = [*(f"female{i}" for i in range(1, 10)), *(f"male{i}" for i in range(1, 12))]
    return write_takes(tmp_path_factory.mktemp("VocalSet"), many_takes(everybody))


def test_a_singer_is_heard_in_every_split_and_a_take_in_one(vocalset_tree: Path):
    splits = vocalset.VOCALSET.convert(vocalset_tree)["VocalSet/VocalSetS"]
    assert [len(splits[split]) / 800 for split in SPLITS] == pytest.approx(
        [0.48, 0.32, 0.20], abs=0.03
    )
    assert all(
        {record["label"] for record in splits[split]} == set(vocalset.SINGERS) for split in SPLITS
    )
    heard = [record["audio_path"] for split in SPLITS for record in splits[split]]
    assert len(heard) == len(set(heard)) == 800
    assert "FULL/female1/scales/forte/f1_scales_forte_a.wav" in heard


def test_the_technique_of_a_singer_is_tested_where_nobody_learned_from_that_singer(
    vocalset_tree: Path,
):
    splits = vocalset.VOCALSET.convert(vocalset_tree)["VocalSet/VocalSetT"]
    singers = {
        split: {record["audio_path"].split("/")[1] for record in splits[split]} for split in SPLITS
    }
    assert singers["test"] == {"female2", "female8", "male3", "male5", "male10"}
    assert len(singers["train"]) == 15
    assert not singers["test"] & (singers["train"] | singers["val"])
    assert len(splits["train"]) / (len(splits["train"]) + len(splits["val"])) == pytest.approx(
        0.6, abs=0.06
    )
    heard = [record["audio_path"] for split in SPLITS for record in splits[split]]
    assert len(heard) == len(set(heard)) == 600
    for split in SPLITS:
        assert all(
            record["label"] == record["audio_path"].split("/")[3] for record in splits[split]
        )
        assert {record["label"] for record in splits[split]} == {
            "belt",
            "breathy",
            "vocal_fry",
        }  # forte is none


def test_the_splits_of_vocalset_are_those_that_are_written_down(vocalset_tree: Path):
    converted = vocalset.VOCALSET.convert(vocalset_tree)
    for name in (
        "f1/scales/belt/f1_scales_belt_a",
        "m11/arpeggios/vocal_fry/m11_arpeggios_vocal_fry_u",
    ):
        percent = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        of_singer = "train" if percent < 48 else "val" if percent < 80 else "test"
        of_technique = "train" if percent < 60 else "val"
        for stem, split in {
            "VocalSet/VocalSetS": of_singer,
            "VocalSet/VocalSetT": of_technique,
        }.items():
            assert any(
                record["audio_path"].endswith(f"{name.split('/')[-1]}.wav")
                for record in converted[stem][split]
            )


def test_a_take_stays_in_its_split_whatever_else_is_there_and_however_folders_are_called(
    tmp_path: Path,
):
    one = "scales/belt/f1_scales_belt_a.wav"
    alone = write_takes(tmp_path / "alone", [f"f1/{one}"], tree="data_by_singer")
    among = write_takes(tmp_path / "among", [f"female1/{one}", *many_takes(["female3"])])
    for stem in ("VocalSet/VocalSetS", "VocalSet/VocalSetT"):
        where = [
            {
                split
                for split, records in vocalset.VOCALSET.convert(raw)[stem].items()
                for r in records
                if one in r["audio_path"]
            }
            for raw in (alone, among)
        ]
        assert where[0] == where[1]
        assert len(where[0]) == 1


def test_the_folders_say_who_sings_and_how_where_names_do_not(tmp_path: Path):
    write_takes(
        tmp_path,
        [
            "female2/arpeggios/lip_trill/lip_trill_arps.wav",
            "female2/arpeggios/vibrado/f2_arpeggios_vibrato_a.wav",
        ],
    )
    converted = vocalset.VOCALSET.convert(tmp_path)
    assert {
        r["label"] for records in converted["VocalSet/VocalSetS"].values() for r in records
    } == {"f2"}
    assert {r["label"] for r in converted["VocalSet/VocalSetT"]["test"]} == {"lip_trill", "vibrato"}


def test_copies_and_takes_of_a_doubtful_singer_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    doubtful = [
        "female2/scales/vibrato/f2_scales_vibrato_a(1).wav",
        "male8/excerpts/vibrato/m9_caro_vibrato.wav",
        "male1/scales/belt/m11_scales_belt_a.wav",
    ]
    kept = [
        "female2/scales/vibrato/f2_scales_vibrato_a.wav",
        "male11/scales/belt/m11_scales_belt_a.wav",
    ]
    write_takes(tmp_path, [*doubtful, *kept])
    (tmp_path / "FULL/male11/scales/belt/._m11_scales_belt_a.wav").write_bytes(b"left by a Mac")
    splits = vocalset.VOCALSET.convert(tmp_path)["VocalSet/VocalSetS"]
    heard = {record["audio_path"] for records in splits.values() for record in records}
    assert heard == {f"FULL/{take}" for take in kept}
    assert "3 of the 5 recordings" in caplog.text
    assert all(Path(take).name in caplog.text for take in doubtful)


def test_vocalset_names_what_it_does_not_know(tmp_path: Path):
    with pytest.raises(
        MissingFileError,
        match=r"FULL/\*/\*/\*/\*\.wav is missing: .*unpacked; also tried: data_by_singer",
    ):
        vocalset.VOCALSET.convert(tmp_path)
    yodel = write_takes(tmp_path / "yodel", ["female1/scales/yodel/f1_scales_yodel_a.wav"])
    with pytest.raises(
        ValueError, match=r"f1_scales_yodel_a\.wav: `yodel` is not a technique; rename.*belt"
    ):
        vocalset.VOCALSET.convert(yodel)
    tenth = write_takes(tmp_path / "tenth", ["female10/scales/belt/f10_scales_belt_a.wav"])
    with pytest.raises(
        ValueError, match=r"f10_scales_belt_a\.wav: `female10` is not one of the singers"
    ):
        vocalset.VOCALSET.convert(tenth)


@pytest.mark.parametrize(
    ("task", "num_outputs"),
    [(vocalset.VOCALSET_SINGER, 20), (vocalset.VOCALSET_TECHNIQUE, 10)],
    ids=["singer", "technique"],
)
def test_vocalset_is_scored_by_windows_first(task: Task, num_outputs: int, vocalset_tree: Path):
    data = ProbeData.load(task, vocalset_tree)
    assert data.labels.num_outputs == num_outputs
    assert task.units == ("window", "file")
    test = data.splits["test"]
    rows = Rows(np.array([0, 0, 1]), np.array([0, 1, 2]), np.array([1.5, 4.5, 1.5]))
    truth = data.labels.unit_targets(test, rows, "window")
    assert [data.labels.names[i] for i in truth] == [test.items[i].label for i in (0, 0, 1)]


def test_the_rest_of_a_take_counts_for_the_singer_only():
    of_singer = vocalset.VOCALSET_SINGER.protocols["marble-v1"].windows
    of_technique = vocalset.VOCALSET_TECHNIQUE.protocols["marble-v1"].windows
    assert of_singer.spans(7 * RATE, RATE) == [
        (0, 3 * RATE),
        (3 * RATE, 6 * RATE),
        (6 * RATE, 7 * RATE),
    ]
    assert of_technique.spans(7 * RATE, RATE) == [(0, 3 * RATE), (3 * RATE, 6 * RATE)]
    assert of_singer.spans(7 * RATE - 1, RATE) == of_technique.spans(7 * RATE, RATE)


# MTG-Jamendo

HEADER = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
TRACKS = {
    "train": ["48/948.mp3\t212.7\tgenre---rock\tgenre---pop", "49/949.mp3\t31.0\tgenre---jazz"],
    "validation": ["50/1350.mp3\t60.2\tgenre---pop"],
    "test": ["51/1351.mp3\t99.9\tgenre---jazz\tgenre---zydeco"],
}


def write_jamendo(raw: Path, audio: str = "audio-low", splits: str = "data/splits/split-0") -> Path:
    for tag_set in mtg.TAG_SETS.values():
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
def test_jamendo_is_found_where_its_own_script_puts_it(
    tmp_path: Path, audio: str, splits: str, expected: str
):
    converted = mtg.MTG.convert(write_jamendo(tmp_path, audio, splits))
    assert set(converted) == {"MTG/MTGTop50", "MTG/MTGGenre", "MTG/MTGInstrument", "MTG/MTGMood"}
    for by_split in converted.values():
        assert by_split["train"][0] == {
            "audio_path": expected,
            "label": ["genre---rock", "genre---pop"],
        }
        assert [len(by_split[split]) for split in SPLITS] == [2, 1, 1]


@pytest.mark.parametrize(
    "task", [mtg.MTG_TOP50, mtg.MTG_GENRE, mtg.MTG_INSTRUMENT, mtg.MTG_MOOD], ids=lambda t: t.name
)
def test_jamendo_tracks_are_scored_whole_by_the_tags_of_the_training_split(
    task: Task, tmp_path: Path
):
    data = ProbeData.load(task, write_jamendo(tmp_path))
    assert data.labels.names == ("genre---jazz", "genre---pop", "genre---rock")
    test = data.splits["test"]
    assert test.uids == ("audio-low/51/1351.low.mp3",)
    rows = Rows(np.array([0, 0]), np.array([0, 1]), np.array([15.0, 45.0]))
    assert data.labels.unit_targets(test, rows, "file").tolist() == [[1, 0, 0]]
    assert [metric.name for metric in task.metrics] == ["auroc", "ap", "f1_macro", "f1_micro"]


def test_the_audio_of_jamendo_is_cut_as_each_preset_says():
    first, second = (
        mtg.MTG_MOOD.protocols[preset].windows for preset in ("marble-v1", "marble-v2")
    )
    assert len(first.spans(61 * RATE, RATE)) == 3  # a second is enough
    assert len(second.spans(61 * RATE, RATE)) == 2
    assert len(second.spans(54 * RATE, RATE)) == 2


def test_jamendo_names_what_is_missing(tmp_path: Path):
    with pytest.raises(
        MissingFileError, match="data/splits/split-0 is missing: give the folder of the mtg-jamendo"
    ):
        mtg.MTG.convert(tmp_path)
    raw = write_jamendo(tmp_path)
    (raw / "data/splits/split-0/autotagging_moodtheme-validation.tsv").unlink()
    with pytest.raises(MissingFileError, match=r"autotagging_moodtheme-validation\.tsv is missing"):
        mtg.MTG.convert(raw)
    (write_jamendo(tmp_path) / "audio-low/51/1351.low.mp3").unlink()
    with pytest.raises(MissingFileError, match=r"test 0: .*1351\.low\.mp3 is missing"):
        ProbeData.load(mtg.MTG_MOOD, raw)


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
def test_jamendo_names_the_line_that_is_none(line: str, tmp_path: Path):
    table = write_jamendo(tmp_path) / "data/splits/split-0/autotagging_genre-train.tsv"
    write_lines(table, [HEADER, "t\ta\tb\t48/948.mp3\t1.0\tgenre---x", line])
    with pytest.raises(
        ValueError, match=r"autotagging_genre-train\.tsv, line 3: .*download the file again"
    ):
        mtg.MTG.convert(tmp_path)
    write_lines(table, ["t\ta\tb\t48/948.mp3\t1.0\tgenre---x"])
    with pytest.raises(
        ValueError, match=r"autotagging_genre-train\.tsv, line 1: must have the columns TRACK_ID"
    ):
        mtg.MTG.convert(tmp_path)


def test_marble_lines_of_jamendo_are_read_unchanged(tmp_path: Path):
    write_sound(tmp_path / "data/MTG/audio-low/48/948.low.mp3")
    record = {
        "audio_path": "data/MTG/audio-low/48/948.low.mp3",
        "label": ["genre---rock"],
        "duration": 212.7,
    }
    for split in SPLITS:
        write_lines(tmp_path / f"data/MTG/MTGGenre.{split}.jsonl", [json.dumps(record)])
    data = ProbeData.load(mtg.MTG_GENRE, tmp_path / "data")
    assert data.splits["test"].items[0].path == tmp_path / "data/MTG/audio-low/48/948.low.mp3"
    assert data.labels.names == ("genre---rock",)


# HookTheory


def hook(name: str, label: str | list[str], song: str = "5BmEGm-mraE", **more: float | str) -> dict:
    described = {
        "duration": 0.25,
        "sample_rate": RATE,
        "num_samples": RATE // 4,
        "bit_depth": 16,
        "channels": 1,
    }
    return {
        "audio_path": f"data/HookTheory/hooktheory_clips/{name}.mp3",
        "ori_uid": song,
        "label": label,
    } | (described | more)


def section(name: str, label: list[str], start: float = 40.19, song: str = "cyvyHcLHSfY") -> dict:
    whole = f"data/HookTheory/audio/{song}.mp3"
    return hook(
        name, label, song, ori_audio_path=whole, segment_start=start, segment_end=start + 0.25
    )


def write_hooks(root: Path, stem: str, records: Iterable[dict]) -> Path:
    records = list(records)
    for record in records:
        write_sound(root / record["audio_path"])
    for split in SPLITS:
        write_lines(root / f"data/{stem}.{split}.jsonl", map(json.dumps, records))
    return root / "data"


def test_marble_lines_of_keys_are_read_and_other_modes_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    keys = ["D major", "A dorian", "Eb minor", "E phrygianDominant", "Gb major"]
    root = write_hooks(
        tmp_path, hooktheory.HOOKTHEORY_KEY.stem, (hook(f"h{i}", key) for i, key in enumerate(keys))
    )
    with caplog.at_level(logging.WARNING):
        data = ProbeData.load(hooktheory.HOOKTHEORY_KEY, root)
    assert data.labels.names == KEYS
    for split in data.splits.values():
        assert [item.label for item in split.items] == ["D major", "Eb minor", "Gb major"]
    assert "2 of 5 records are left out" in caplog.text
    assert "HookTheoryKey.val.jsonl" in caplog.text


def test_two_hooks_of_one_song_are_scored_apart(tmp_path: Path):
    hooks = [hook("verse", "D major"), hook("chorus", "E major"), hook("outro", "D major")]
    test = ProbeData.load(
        hooktheory.HOOKTHEORY_KEY, write_hooks(tmp_path, "HookTheory/HookTheoryKey", hooks)
    ).splits["test"]
    assert len(test.uids) == 3
    sections = [
        section("one", ["verse"], 10.0),
        section("two", ["verse"], 20.0),
        section("three", ["chorus"], 30.0),
    ]
    root = write_hooks(tmp_path, "HookTheory/HookTheoryStructure", sections)
    test = ProbeData.load(hooktheory.HOOKTHEORY_STRUCTURE, root).splits["test"]
    assert len(test.uids) == 3
    assert test.items[0].start_seconds == 0  # the clip is cut already


def test_sections_are_counted_among_the_seven_classes_of_marble(tmp_path: Path):
    expected = {
        ("intro",): "intro",
        ("verse",): "verse",
        ("pre-chorus",): "pre-chorus",
        ("chorus",): "chorus",
        ("bridge",): "bridge",
        ("outro",): "outro",
        ("instrumental",): "inst",
        ("solo",): "inst",
        ("pre-chorus", "chorus"): "chorus",
        ("intro", "chorus"): "chorus",
        ("verse", "pre-chorus"): "verse",
        ("intro", "verse"): "verse",
    }
    records = (section(f"h{i}", list(words)) for i, words in enumerate(expected))
    data = ProbeData.load(
        hooktheory.HOOKTHEORY_STRUCTURE,
        write_hooks(tmp_path, "HookTheory/HookTheoryStructure", records),
    )
    assert data.labels.names == (
        "intro",
        "verse",
        "pre-chorus",
        "chorus",
        "bridge",
        "outro",
        "inst",
    )
    test = data.splits["test"]
    assert [item.label for item in test.items] == list(expected.values())
    rows = Rows(np.arange(12), np.arange(12), np.zeros(12))
    assert data.labels.row_targets(test, rows).tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 3, 3, 1, 1]


def test_segments_of_one_file_are_never_mixed_up(tmp_path: Path):
    first, second = section("one", ["verse"], 0.0), section("one", ["verse"], 0.1)
    root = write_hooks(tmp_path, "HookTheory/HookTheoryStructure", [first, second])
    with pytest.raises(
        ValueError,
        match=r"train\.jsonl, line 2: .*one\.mp3` is also in .*line 1.*`start` and `end`",
    ):
        ProbeData.load(hooktheory.HOOKTHEORY_STRUCTURE, root)
    apart = [first | {"uid": "a", "start": 0.0, "end": 0.1}, second | {"uid": "b", "start": 0.1}]
    write_hooks(tmp_path, "HookTheory/HookTheoryStructure", apart)
    test = ProbeData.load(hooktheory.HOOKTHEORY_STRUCTURE, root).splits["test"]
    assert [(item.uid, item.start_seconds, item.end_seconds) for item in test.items] == [
        ("a", 0.0, 0.1),
        ("b", 0.1, None),
    ]


@pytest.mark.parametrize(
    ("task", "good", "bad", "said"),
    [
        (hooktheory.HOOKTHEORY_KEY, "C major", "C# minor", "'C# minor', must be a tonic"),
        (hooktheory.HOOKTHEORY_KEY, "C major", 7, "7, must be a tonic"),
        (
            hooktheory.HOOKTHEORY_STRUCTURE,
            ["verse"],
            ["verse", "polka"],
            r"\['verse', 'polka'\], must be a list",
        ),
        (hooktheory.HOOKTHEORY_STRUCTURE, ["verse"], [], r"\[\], must be a list"),
    ],
)
def test_a_label_that_is_none_is_named_with_its_line(
    task: Task, good: str, bad: str, said: str, tmp_path: Path
):
    root = write_hooks(tmp_path, task.stem, [hook("good", good), hook("bad", bad)])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: `label` is " + said):
        ProbeData.load(task, root)


def test_hooktheory_names_the_records_it_needs(tmp_path: Path):
    with pytest.raises(
        MissingFileError, match=r"hooktheory_key needs .*HookTheory/HookTheoryKey\.train\.jsonl"
    ):
        ProbeData.load(hooktheory.HOOKTHEORY_KEY, tmp_path)
    root = write_hooks(tmp_path, "HookTheory/HookTheoryKey", [hook("h", "A dorian")])
    with pytest.raises(
        ValueError,
        match=r"HookTheoryKey\.train\.jsonl: no record has a label that is a class of the task",
    ):
        ProbeData.load(hooktheory.HOOKTHEORY_KEY, root)


@pytest.mark.parametrize(
    "task", [hooktheory.HOOKTHEORY_KEY, hooktheory.HOOKTHEORY_STRUCTURE], ids=lambda t: t.name
)
def test_the_presets_of_hooktheory_differ_in_what_is_searched_alone(task: Task):
    first, second = task.protocols["marble-v1"], task.protocols["marble-v2"]
    assert first.windows == second.windows
    assert first.windows.seconds == 15
    assert len(first.learning_rates) == 6
    assert second.learning_rates == (1e-3,)
