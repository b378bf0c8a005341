"""HookTheory: from MARBLE's lines to keys, sections and scored hooks."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.metrics.sums import KEYS
from jepa_audio.probing.tasks import hooktheory
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


def test_marbles_records_of_keys_are_read_and_other_modes_are_left_out_with_a_warning(
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


def test_two_hooks_of_one_song_are_scored_separately(tmp_path: Path):
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


def test_sections_are_mapped_to_the_seven_classes_of_marble(tmp_path: Path):
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


def test_segments_of_one_file_need_unique_uids(tmp_path: Path):
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
    ("task", "good", "bad", "message"),
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
def test_a_wrong_label_is_named_with_its_line(
    task: Task, good: str, bad: str, message: str, tmp_path: Path
):
    root = write_hooks(tmp_path, task.stem, [hook("good", good), hook("bad", bad)])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: `label` is " + message):
        ProbeData.load(task, root)


def test_missing_records_of_hooktheory_are_named(tmp_path: Path):
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
def test_the_presets_of_hooktheory_differ_only_in_the_search(task: Task):
    first, second = task.protocols["marble-v1"], task.protocols["marble-v2"]
    assert first.windows == second.windows
    assert first.windows.seconds == 15
    assert len(first.learning_rates) == 6
    assert second.learning_rates == (1e-3,)
