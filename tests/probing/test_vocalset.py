"""VocalSet: from the downloaded folders to splits, labels and scored windows."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.tasks import vocalset
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


def write_takes(raw: Path, takes: Iterable[str], tree: str = "FULL") -> Path:
    for take in takes:
        path = raw / tree / take
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # no converter looks into audio
    return raw


def many_takes(singers: Iterable[str]) -> list[str]:
    return [
        f"{singer}/{context}/{technique}/{singer[0]}{singer.lstrip('femal')}"
        f"_{context}_{technique}_{vowel}.wav"
        for singer in singers
        for context in ("arpeggios", "scales")
        for technique in ("belt", "breathy", "vocal_fry", "forte")
        for vowel in "aeiou"
    ]


@pytest.fixture(scope="module")
def vocalset_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = [*(f"female{i}" for i in range(1, 10)), *(f"male{i}" for i in range(1, 12))]
    return write_takes(tmp_path_factory.mktemp("VocalSet"), many_takes(folders))


def test_every_singer_is_in_all_splits_and_every_recording_in_one(vocalset_tree: Path):
    splits = vocalset.VOCALSET.convert(vocalset_tree)["VocalSet/VocalSetS"]
    assert [len(splits[split]) / 800 for split in SPLITS] == pytest.approx(
        [0.48, 0.32, 0.20], abs=0.03
    )
    assert all(
        {record["label"] for record in splits[split]} == set(vocalset.SINGERS) for split in SPLITS
    )
    paths = [record["audio_path"] for split in SPLITS for record in splits[split]]
    assert len(paths) == len(set(paths)) == 800
    assert "FULL/female1/scales/forte/f1_scales_forte_a.wav" in paths


def test_test_singers_of_techniques_are_not_in_training(
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
    paths = [record["audio_path"] for split in SPLITS for record in splits[split]]
    assert len(paths) == len(set(paths)) == 600
    for split in SPLITS:
        assert all(
            record["label"] == record["audio_path"].split("/")[3] for record in splits[split]
        )
        assert {record["label"] for record in splits[split]} == {
            "belt",
            "breathy",
            "vocal_fry",
        }  # forte is none


def test_the_splits_of_vocalset_are_the_documented_ones(vocalset_tree: Path):
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


def test_the_split_of_a_recording_does_not_depend_on_other_recordings_or_folder_names(
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


def test_singer_and_technique_come_from_the_folders(tmp_path: Path):
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


def test_copies_and_recordings_of_an_uncertain_singer_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    uncertain = [
        "female2/scales/vibrato/f2_scales_vibrato_a(1).wav",
        "male8/excerpts/vibrato/m9_caro_vibrato.wav",
        "male1/scales/belt/m11_scales_belt_a.wav",
    ]
    kept = [
        "female2/scales/vibrato/f2_scales_vibrato_a.wav",
        "male11/scales/belt/m11_scales_belt_a.wav",
    ]
    write_takes(tmp_path, [*uncertain, *kept])
    (tmp_path / "FULL/male11/scales/belt/._m11_scales_belt_a.wav").write_bytes(b"left by a Mac")
    splits = vocalset.VOCALSET.convert(tmp_path)["VocalSet/VocalSetS"]
    paths = {record["audio_path"] for records in splits.values() for record in records}
    assert paths == {f"FULL/{take}" for take in kept}
    assert "3 of the 5 recordings" in caplog.text
    assert all(Path(take).name in caplog.text for take in uncertain)


def test_unknown_folders_of_vocalset_are_named(tmp_path: Path):
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
    targets = data.labels.unit_targets(test, rows, "window")
    assert [data.labels.names[i] for i in targets] == [test.items[i].label for i in (0, 0, 1)]


def test_a_short_last_window_is_kept_for_the_singer_only():
    of_singer = vocalset.VOCALSET_SINGER.protocols["marble-v1"].windows
    of_technique = vocalset.VOCALSET_TECHNIQUE.protocols["marble-v1"].windows
    assert of_singer.spans(7 * RATE, RATE) == [
        (0, 3 * RATE),
        (3 * RATE, 6 * RATE),
        (6 * RATE, 7 * RATE),
    ]
    assert of_technique.spans(7 * RATE, RATE) == [(0, 3 * RATE), (3 * RATE, 6 * RATE)]
    assert of_singer.spans(7 * RATE - 1, RATE) == of_technique.spans(7 * RATE, RATE)
