"""Raw data sets as downloaded are converted to the records of MARBLE."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchaudio.datasets import gtzan as torchaudio_gtzan

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.tasks import gtzan
from jepa_audio.probing.tasks.base import ProbeData, Task
from jepa_audio.probing.tasks.emomusic import EMOMUSIC_EMOTION
from jepa_audio.probing.tasks.giantsteps import GIANTSTEPS_KEY
from jepa_audio.probing.tasks.gtzan import GTZAN_GENRE, split_files
from jepa_audio.probing.tasks.tags import MTT_TAGS
from tests.probing import raw_sets

FAMILIES: dict[str, tuple[Task, Callable[[Path], Path]]] = {
    "gtzan": (GTZAN_GENRE, raw_sets.gtzan),
    "giantsteps": (GIANTSTEPS_KEY, raw_sets.giantsteps),
    "emomusic": (EMOMUSIC_EMOTION, raw_sets.emomusic),
    "mtt": (MTT_TAGS, raw_sets.mtt),
}


def labels_of(data: ProbeData, split: str) -> dict[str, object]:
    """Labels by uid."""
    return {item.uid: item.label for item in data.splits[split].unit_items}


def replace_in(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("folder", "suffix"), [("genres", ".wav"), ("genres_original", ".wav"), (".", ".au")]
)
def test_gtzan_is_split_by_the_lists_in_its_folder(tmp_path: Path, folder: str, suffix: str):
    data = ProbeData.load(GTZAN_GENRE, raw_sets.gtzan(tmp_path, folder, suffix))
    for number, split in enumerate(("train", "val", "test")):
        expected = {tmp_path / folder / g / f"{g}.{number:05}{suffix}": g for g in raw_sets.GENRES}
        assert {item.path: item.label for item in data.splits[split].items} == expected
    assert data.labels.names == raw_sets.GENRES


def test_lists_of_numbers_count_the_files(tmp_path: Path):
    raw_sets.gtzan(tmp_path)
    raw_sets.text(tmp_path / "train_filtered.txt", "     1", "   901", "", "402")
    assert list(split_files(tmp_path)["train"]) == ["blues.00000", "rock.00000", "hiphop.00001"]


def test_the_shipped_split_is_the_fault_filtered_one(tmp_path: Path):
    raw_sets.gtzan(tmp_path)
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}_filtered.txt").unlink()
    raw_sets.sound(tmp_path / "genres" / "jazz" / "jazz.00054.wav")
    files = split_files(tmp_path)
    assert tuple(map(len, files.values())) == GTZAN_GENRE.num_units
    of_torchaudio = (
        torchaudio_gtzan.filtered_train,
        torchaudio_gtzan.filtered_valid,
        torchaudio_gtzan.filtered_test,
    )
    assert [list(names) for names in files.values()] == [list(names) for names in of_torchaudio]


def test_a_changed_split_file_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gtzan, "SPLIT_SHA256", "0" * 64)
    with pytest.raises(
        UserError, match=r"gtzan_split\.json has the sha256 checksum .*, must have 0"
    ):
        gtzan.published_split()


@pytest.mark.parametrize("content", [None, b"RIFF", b""])
def test_the_often_corrupt_file_is_left_out_if_it_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
):
    raw_sets.gtzan(tmp_path)
    with (tmp_path / "train_filtered.txt").open("a") as file:
        file.write("jazz/jazz.00054.wav\n")
    if content is not None:
        (tmp_path / "genres" / "jazz" / "jazz.00054.wav").write_bytes(content)
    assert len(split_files(tmp_path)["train"]) == 10
    assert "jazz.00054 is left out: " in caplog.text
    raw_sets.sound(tmp_path / "genres" / "jazz" / "jazz.00054.wav")
    assert list(split_files(tmp_path)["train"])[-1] == "jazz.00054"


def test_any_other_missing_file_of_gtzan_is_an_error(tmp_path: Path):
    raw_sets.gtzan(tmp_path)
    (tmp_path / "genres" / "rock" / "rock.00001.wav").unlink()
    with pytest.raises(MissingFileError, match=r"val 9: .*rock\.00001\.wav is missing"):
        ProbeData.load(GTZAN_GENRE, tmp_path)


def test_giantsteps_splits_confident_songs_by_artist_and_keeps_collaborators_together(
    tmp_path: Path,
):
    data = ProbeData.load(GIANTSTEPS_KEY, raw_sets.giantsteps(tmp_path))
    assert labels_of(data, "train") == {"0005881": "A major", "0010359": "Db major"}
    # 5061 and 20 come to val by an artist who made 7217 with an artist of val.
    in_val = {
        "0005061": "Eb minor",
        "0007217": "F minor",
        "6574410": "B major",
        "0000020": "G minor",
    }
    assert labels_of(data, "val") == in_val
    assert labels_of(data, "test") == {
        "0010089": "Eb minor",
        "0061415": "F minor",
        "0877345": "Eb major",
        "1234749": "Bb major",
    }
    assert (
        data.splits["test"].items[0].path
        == tmp_path / "giantsteps-key-dataset" / "audio" / "10089.LOFI.mp3"
    )
    assert len(data.labels.names) == 24


def test_folders_with_the_names_of_github_archives_are_found(tmp_path: Path):
    raw_sets.giantsteps(tmp_path)
    for name in ("giantsteps-key-dataset", "giantsteps-mtg-key-dataset"):
        (tmp_path / name).rename(tmp_path / f"{name}-master")
    assert len(ProbeData.load(GIANTSTEPS_KEY, tmp_path).splits["test"]) == 4
    (tmp_path / "giantsteps-key-dataset-copy").mkdir()
    with pytest.raises(ValueError, match="has 2 folders for giantsteps-key-dataset"):
        ProbeData.load(GIANTSTEPS_KEY, tmp_path)


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_emomusic_is_split_by_artist_and_standardised_without_the_test_songs(
    tmp_path: Path, folder: str
):
    data = ProbeData.load(EMOMUSIC_EMOTION, raw_sets.emomusic(tmp_path, folder))
    songs = {
        split: {int(item.path.stem): item.label for item in data.splits[split].items}
        for split in data.splits
    }
    assert set(songs["test"]) == {11, 12, 13}
    # The sha1 checksums of "the kse band b" to "the kse band j" (a to z only), modulo 10: 4 6 0 8 2
    # 0 9 4 2.
    assert (set(songs["train"]), set(songs["val"])) == ({2, 3, 4, 6, 7, 9, 10}, {5, 8})
    raw = {song: (3 + song % 5, 8 - song / 3) for song in range(2, 14)}
    known = np.array([raw[song] for song in range(2, 11)])
    for song, label in (songs["train"] | songs["val"] | songs["test"]).items():
        np.testing.assert_allclose(
            label, (np.array(raw[song]) - known.mean(axis=0)) / known.std(axis=0)
        )


def test_mtt_uses_the_50_most_frequent_tags_and_keeps_clips_without_a_tag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = ProbeData.load(MTT_TAGS, raw_sets.mtt(tmp_path))
    assert set(data.labels.names) == {f"tag {n}" for n in range(50)}
    assert {split: len(data.splits[split]) for split in data.splits} == {
        "train": 47,
        "val": 4,
        "test": 12,
    }
    folders = {
        split: {item.path.parent.name for item in data.splits[split].items} for split in data.splits
    }
    assert (folders["val"], folders["test"]) == ({"c"}, set("def"))
    label_of = {
        item.path.name: item.label for split in data.splits.values() for item in split.items
    }
    assert label_of["song-60.mp3"] == [], "tag 50 is as frequent as tag 49, and its column is later"
    assert label_of["song-59.mp3"] == ["tag 0"]
    assert len(label_of["song-0.mp3"]) == 50
    assert "song-22.mp3 is left out: the file is empty (0 bytes)" in caplog.text


WRONG: list[tuple[str, Callable[[Path], object], type[Exception], str]] = [
    (
        "gtzan",
        lambda raw: (raw / "genres").rename(raw / "music"),
        MissingFileError,
        r"genres/blues is missing: give",
    ),
    (
        "gtzan",
        lambda raw: (raw / "genres" / "pop").rename(raw / "pop"),
        MissingFileError,
        r"genres/pop is missing: give",
    ),
    (
        "gtzan",
        lambda raw: (raw / "valid_filtered.txt").unlink(),
        MissingFileError,
        r"valid_filtered\.txt is missing: all three lists",
    ),
    (
        "gtzan",
        lambda raw: replace_in(raw / "test_filtered.txt", "disco/disco", "techno/techno"),
        ValueError,
        r"test_filtered\.txt, line 4: 'techno/techno\.00002\.wav' is not a file of GTZAN",
    ),
    (
        "gtzan",
        lambda raw: raw_sets.text(raw / "test_filtered.txt", "1001"),
        ValueError,
        r"test_filtered\.txt, line 1: '1001'",
    ),
    (
        "giantsteps",
        lambda raw: (raw / "giantsteps-mtg-key-dataset" / "audio").rename(raw / "audio"),
        MissingFileError,
        r"giantsteps-mtg-key-dataset/audio is missing: give",
    ),
    (
        "giantsteps",
        lambda raw: (raw / "giantsteps-key-dataset").rename(raw / "key-dataset"),
        MissingFileError,
        r"giantsteps-key-dataset\* is missing: give",
    ),
    (
        "giantsteps",
        lambda raw: (raw / "giantsteps-mtg-key-dataset" / "audio" / "7217.LOFI.mp3").unlink(),
        MissingFileError,
        r"val 1: .*7217\.LOFI\.mp3 is missing",
    ),
    (
        "giantsteps",
        lambda raw: replace_in(
            raw / "giantsteps-mtg-key-dataset/annotations/annotations.txt",
            "F minor\t2",
            "H minor\t2",
        ),
        ValueError,
        r"annotations\.txt, line 4: 'H minor' is not a key",
    ),
    (
        "giantsteps",
        lambda raw: replace_in(
            raw / "giantsteps-key-dataset/annotations/key/1234749.LOFI.key", "major", "lydian"
        ),
        ValueError,
        r"1234749\.LOFI\.key, line 1: 'Bb lydian' is not a key; a key is like",
    ),
    (
        "giantsteps",
        lambda raw: replace_in(
            raw / "giantsteps-mtg-key-dataset/annotations/annotations.txt", "7217", "7218"
        ),
        ValueError,
        r"annotations\.txt, line 4: song 7218 has no line in .*beatport_metadata\.txt",
    ),
    (
        "giantsteps",
        lambda raw: replace_in(
            raw / "giantsteps-mtg-key-dataset/annotations/beatport_metadata.txt", "ARTIST", "BAND"
        ),
        ValueError,
        r"beatport_metadata\.txt, line 1: there is no column `ARTIST`, only `ID`, `BAND`",
    ),
    (
        "emomusic",
        lambda raw: (raw / "songs_info.csv").unlink(),
        MissingFileError,
        r"songs_info\.csv is missing",
    ),
    (
        "emomusic",
        lambda raw: (raw / "clips_45seconds").rename(raw / "clips"),
        MissingFileError,
        r"clips_45seconds is missing: give",
    ),
    (
        "emomusic",
        lambda raw: replace_in(raw / "static_annotations.csv", "3,6,1.5", "3,high,1.5"),
        ValueError,
        r"static_annotations\.csv, line 3, column `mean_arousal`: 'high' must be a finite number",
    ),
    (
        "emomusic",
        lambda raw: replace_in(raw / "songs_info.csv", "development", "train"),
        ValueError,
        r"songs_info\.csv, line 2, column `Mediaeval 2013 set`: 'train' must be development",
    ),
    (
        "emomusic",
        lambda raw: replace_in(raw / "static_annotations.csv", "\n13,", "\n14,"),
        ValueError,
        r"static_annotations\.csv, line 13: song 14 has no line in .*songs_info\.csv",
    ),
    (
        "mtt",
        lambda raw: (raw / "annotations_final.csv").unlink(),
        MissingFileError,
        r"annotations_final\.csv is missing",
    ),
    (
        "mtt",
        lambda raw: replace_in(raw / "annotations_final.csv", '"2"\t"1"', '"2"\t"yes"'),
        ValueError,
        r"annotations_final\.csv, line 2, column `tag 0`: 'yes' must be 0 or 1",
    ),
    (
        "mtt",
        lambda raw: replace_in(raw / "annotations_final.csv", '"3"\t"1"\t', '"3"\t'),
        ValueError,
        r"annotations_final\.csv, line 3: must have 62 cells, as the header has",
    ),
    (
        "mtt",
        lambda raw: replace_in(raw / "annotations_final.csv", "2/song-2.mp3", "g/song-2.mp3"),
        ValueError,
        r"annotations_final\.csv, line 4, column `mp3_path`: 'g/song-2\.mp3' must be a file in one",
    ),
]


@pytest.mark.parametrize(
    ("name", "spoil", "error", "message"), WRONG, ids=[f"{w[0]}: {w[3]}" for w in WRONG]
)
def test_missing_or_wrong_files_are_named(
    tmp_path: Path, name: str, spoil: Callable[[Path], object], error: type[Exception], message: str
):
    task, build = FAMILIES[name]
    spoil(build(tmp_path))
    with pytest.raises(error, match=message):
        ProbeData.load(task, tmp_path)


MARBLE_LINES = {
    "gtzan": ("genres/blues/blues.00029.wav", "blues", {"bit_depth": 16}),
    "giantsteps": (
        "giantsteps_clips/wav/0010089-0.wav",
        "Eb minor",
        {"bit_depth": 16, "ori_uid": "0010089"},
    ),
    "emomusic": ("wav/2.wav", [-0.83, 0.52], {"bit_depth": 16}),
    "mtt": ("mp3/0/song.mp3", ["guitar", "slow"], {"bit_depth": None, "bitrate": 32}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_marbles_records_are_read_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
):
    (task, _), (name, label, more) = FAMILIES[family], MARBLE_LINES[family]
    root, other = tmp_path / "data", [1.5, -0.2] if family == "emomusic" else label
    for split in ("train", "val", "test"):
        lines = []
        for number, of_line in enumerate((label, other)):
            path = (
                Path("data") / Path(task.stem).parent / name.replace("/", f"/{split}{number}/", 1)
            )
            raw_sets.sound(tmp_path / path)
            own = {"ori_uid": f"{split}{number}"} if "ori_uid" in more else {}
            of_audio = {"duration": 0.2, "sample_rate": 16000, "num_samples": 3200, "channels": 1}
            lines.append(
                json.dumps(
                    {"audio_path": path.as_posix(), "label": of_line, **of_audio, **more, **own}
                )
            )
        raw_sets.text(root / f"{task.stem}.{split}.jsonl", *lines)
    for folder in (tmp_path, tmp_path / "data" / "GTZAN"):  # as MARBLE runs, and from elsewhere
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        data = ProbeData.load(task, root)
        assert [item.label for item in data.splits["test"].items] == [label, other]
        assert data.labels.encode(data.splits["test"].items).shape[0] == 2
        assert (data.labels.encode(data.splits["val"].items) != -1).any()
        assert all(item.path.is_file() for split in data.splits.values() for item in split.items)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_both_presets_and_a_converter(family: str):
    task, _ = FAMILIES[family]
    assert set(task.protocols) == {"marble-v1", "marble-v2"}
    assert len(task.protocols["marble-v2"].learning_rates) == 1
    assert task.data_set is not None


def test_sizes_that_differ_from_the_published_ones_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        ProbeData.load(GTZAN_GENRE, raw_sets.gtzan(tmp_path))
    assert (
        "(10, 10, 10) units in train, val and test; published scores are for (443, 197, 290)"
        in caplog.text
    )
