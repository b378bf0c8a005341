"""The splits of `benchmarks/corpora.py`; nothing of its sources needs to be installed."""

import json
import re
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from benchmarks import corpora, notes, splits

from jepa_audio.errors import UserError
from jepa_audio.probing.tasks.table import table_task

SPLITS = ("train", "valid", "test")
FSDD_NAMES = [f"{d}_{s}_{t}.wav" for d in range(10) for s in splits.SPEAKERS for t in range(50)]


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpora, "installed_files", lambda package: [])
    monkeypatch.setattr(corpora.shutil, "which", lambda command: None)


@pytest.fixture
def fsdd(tmp_path: Path) -> Path:
    folder = tmp_path / "clone" / "recordings"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in FSDD_NAMES:
        if re.fullmatch(r"[01]_[a-z]+_(0|1|10|20).wav", name):
            sf.write(folder / name, 0.1 * rng.standard_normal(80), 8000)
    return folder.parent


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["corpora", *map(str, arguments)])
    return corpora.main()


def groups(rows: list[splits.Row]) -> dict[str, set[str]]:
    return {
        split: {r.group for r in rows if r.split == split} for split in ("train", "valid", "test")
    }


def programs(role: str) -> set[int]:
    return {program for program, other in splits.ROLES.items() if other == role}


def test_every_family_has_instruments_in_all_splits():
    for family, (_, roles) in splits.FAMILIES.items():
        # Only four instruments of this family share no recording with others.
        num_valid = 0 if family == "ensemble" else 1
        assert [roles.count(role) for role in "TVtvp"] == [2, 1, 1, num_valid, 4 - num_valid]


def test_instruments_of_a_split_are_in_no_other_split_and_not_in_pretraining():
    labelled = splits.labelled_notes(0)
    pretrained = {f"program {note.program}" for note in splits.pretraining_notes(0)}
    for task in ("family", "pitch"):
        for roles in (splits.SPLITS, splits.SELECT_SPLITS):
            rows = splits.gm_rows(labelled, task, roles)
            of = groups(rows)
            assert not of["train"] & of["valid"]
            assert not (of["train"] | of["valid"]) & of["test"]
            assert not (of["valid"] | of["test"]) & pretrained
            assert len({r.label for r in rows}) == (12 if task == "family" else 40)
    select = groups(splits.gm_rows(labelled, "family", splits.SELECT_SPLITS))
    result = groups(splits.gm_rows(labelled, "family", splits.SPLITS))
    assert set().union(*select.values()) == result["train"]


def test_speakers_of_the_result_are_in_no_row_of_the_selection():
    digit, select = (
        splits.fsdd_rows(FSDD_NAMES, "digit"),
        splits.fsdd_rows(FSDD_NAMES, "digit_select"),
    )
    assert groups(digit) == {
        "train": {"nicolas", "theo", "yweweler"},
        "valid": {"lucas"},
        "test": {"george", "jackson"},
    }
    assert groups(select)["train"] == {"nicolas", "theo"}
    assert groups(select)["valid"] == groups(select)["test"] == {"yweweler"}
    assert len({r.path for r in select}) == len(select) == 1500
    speaker = splits.fsdd_rows(FSDD_NAMES, "speaker")
    assert Counter(r.split for r in speaker) == {"train": 2100, "valid": 300, "test": 600}


def test_languages_of_the_result_of_the_selection_and_of_pretraining_are_disjoint():
    names = [
        f"{language}/alpha/{number}.ogg" for language in ["cs", "da", "ml"] for number in range(40)
    ]
    rows = splits.klettres_rows(names, splits.LANGUAGES, 0)
    assert Counter(r.split for r in rows) == {"train": 16, "valid": 6, "test": 18}
    assert {r.label for r in rows} == {"cs"}
    assert rows != splits.klettres_rows(names, splits.LANGUAGES, 1)
    used = set(splits.LANGUAGES) | set(splits.SELECT_LANGUAGES)
    assert not set(splits.LANGUAGES) & set(splits.SELECT_LANGUAGES)
    for languages in corpora.PRETRAINING_LANGUAGES.values():
        assert not set(languages) & {name.partition("_")[0] for name in used}


def test_expected_checksums_are_those_of_the_splits_that_need_no_files():
    expected = json.loads(corpora.EXPECTED.read_text())
    assert list(expected["assignment"]) == list(corpora.SETS)
    for task in ("digit", "digit_select", "speaker"):
        rows = splits.fsdd_rows(FSDD_NAMES, task)
        assert splits.assignment(rows) == expected["assignment"][f"fsdd_{task}"]
    rows[0] = rows[0]._replace(split="train")
    assert splits.assignment(rows) != expected["assignment"]["fsdd_speaker"]


def test_without_any_source_each_set_is_skipped_with_the_command_to_get_it(
    tmp_path: Path, no_packages: None, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert run(monkeypatch, tmp_path / "out") == 1
    lines = capsys.readouterr().out.splitlines()
    for name in corpora.SETS:
        (line,) = [line for line in lines if line.startswith(f"{name}: skipped")]
        assert ("git clone" if name.startswith("fsdd") else "apt install") in line
    (music,) = [line for line in lines if line.startswith("music:")]
    assert all(package in music for package in (*corpora.TRACKS, *corpora.NOTES))


@pytest.mark.parametrize("archive", [False, True])
def test_probe_reads_the_tables_of_a_folder_and_of_a_tar(
    archive: bool, fsdd: Path, tmp_path: Path, no_packages: None, monkeypatch, capsys
):
    source = fsdd
    if archive:
        source = tmp_path / "fsdd.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(fsdd, "fsdd")
    out = tmp_path / "out"
    sets = ["fsdd_digit", "fsdd_digit_select", "fsdd_speaker"]
    assert run(monkeypatch, out, "--fsdd", source, "--only", *sets) == 0
    data = table_task(out / "fsdd_digit.csv", "multiclass")
    sizes = [len(data.splits[split].unit_items) for split in ("train", "val", "test")]
    assert sizes == [24, 8, 16]
    first = (out / "checksums.json").read_text()
    assert run(monkeypatch, out, "--fsdd", source, "--only", "fsdd_digit") == 0
    assert (out / "checksums.json").read_text() == first, "the same sources give the same checksums"
    assert "fsdd_digit: names, labels or splits are NOT those" in capsys.readouterr().out
    assert run(monkeypatch, out, "--fsdd", source, "--seed", 1) == 1
    assert "was built with --seed 0" in capsys.readouterr().err


def test_recordings_in_training_and_test_are_reported(
    fsdd: Path, tmp_path: Path, no_packages: None, monkeypatch, capsys
):
    copy = fsdd / "recordings" / "1_george_0.wav"
    copy.write_bytes((fsdd / "recordings" / "1_theo_0.wav").read_bytes())
    assert run(monkeypatch, tmp_path / "out", "--fsdd", fsdd, "--only", "fsdd_digit") == 1
    assert "1 recordings are in fsdd_digit test and fsdd_digit train" in capsys.readouterr().out


def test_a_folder_of_another_origin_is_not_changed(
    tmp_path: Path, no_packages: None, monkeypatch, capsys
):
    (tmp_path / "speech").mkdir()
    assert run(monkeypatch, tmp_path) == 1
    assert "is not empty and has no checksums.json" in capsys.readouterr().err
    (tmp_path / "checksums.json").write_text('{"a.wav": "123"}')
    assert run(monkeypatch, tmp_path) == 1
    assert "is not a file of this command" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checksums.json", "speech"]


def test_other_archives_and_folders_are_refused_as_fsdd(
    tmp_path: Path, no_packages: None, monkeypatch, capsys
):
    (tmp_path / "fsdd.zip").write_bytes(b"PK")
    for source in (tmp_path / "fsdd.zip", tmp_path / "missing"):
        assert run(monkeypatch, tmp_path / "out", "--fsdd", source) == 1
        assert "is neither a folder nor a tar" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, tmp_path / "out", "--fsdd", tmp_path / "empty") == 1
    assert "has no recordings of george" in capsys.readouterr().err


def test_damaged_recordings_and_other_speakers_are_left_out_and_stated(
    fsdd: Path, tmp_path: Path, no_packages: None, monkeypatch, capsys
):
    (fsdd / "recordings" / "1_theo_1.wav").write_bytes(b"RIFF")
    whole = fsdd / "recordings" / "1_theo_0.wav"
    (fsdd / "recordings" / "1_ada_0.wav").write_bytes(whole.read_bytes())
    assert run(monkeypatch, tmp_path / "out", "--fsdd", fsdd, "--only", "fsdd_digit") == 0
    out = capsys.readouterr().out
    assert "1 recordings cannot be read and are not used: 1_theo_1.wav" in out
    assert "recordings of other speakers are not used: ada" in out
    assert "fsdd_digit: 47 files" in out
    damaged = tmp_path / "fsdd.tar"
    with tarfile.open(damaged, "w") as tar:
        tar.add(fsdd, "fsdd")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    assert run(monkeypatch, tmp_path / "out", "--fsdd", damaged, "--only", "fsdd_digit") == 1
    assert "is damaged" in capsys.readouterr().err


def test_copies_and_files_without_samples_are_left_out_and_stated(tmp_path: Path, capsys):
    sounds = {name: tmp_path / name for name in ("a.wav", "b.wav", "c.wav")}
    for path, length in zip(sounds.values(), (80, 80, 0), strict=True):
        sf.write(path, np.full(length, 0.1), 8000)
    assert corpora.link_usable(sounds, tmp_path / "links") == ["a.wav"]
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["a.wav"]
    out = capsys.readouterr().out
    assert "1 of 3 files are copies" in out
    assert "1 files without samples are left out: c.wav" in out


def test_a_truncated_file_is_converted_to_the_samples_that_can_be_decoded(tmp_path: Path, capsys):
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000)
    sf.write(tmp_path / "whole.wav", samples, 8000, subtype="PCM_16")
    (tmp_path / "a.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:-2000])
    names = corpora.link_usable({"x/a.wav": tmp_path / "a.wav"}, tmp_path / "links")
    assert names == ["x/a.flac"]
    written, rate = sf.read(tmp_path / "links" / "x" / "a.flac")
    assert rate == 8000
    np.testing.assert_allclose(written, samples[:7000], atol=1e-4)
    assert "1 files are converted, because libsndfile" in capsys.readouterr().out


def test_notes_of_a_midi_file_begin_at_multiples_of_their_length():
    played = [notes.Note(index % 128, 40 + index % 40, 1 + index % 127) for index in range(300)]
    events = read_midi(notes.midi_file(played))
    starts = [(time, key, velocity) for time, status, key, velocity in events if status == 0x90]
    assert starts == [(2000 * i, note.pitch, note.velocity) for i, note in enumerate(played)]
    ends = [time for time, status, *_ in events if status == 0x80]
    assert ends == [2000 * i + 1500 for i in range(300)]
    assert [key for _, status, key, _ in events if status == 0xC0] == [n.program for n in played]
    off = [time for time, status, key, _ in events if status == 0xB0 and key == 120]
    assert off == [2000 * i + 1990 for i in range(300)]


def read_midi(data: bytes) -> list[tuple[int, int, int, int]]:
    """The messages of one track: milliseconds, status, data bytes."""
    assert data[:14] == b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500)
    assert data[14:18] == b"MTrk"
    assert struct.unpack_from(">I", data, 18)[0] == len(data) - 22
    place, time, events = 22, 0, []
    while place < len(data):
        delta = 0
        while True:
            byte = data[place]
            place += 1
            delta = delta << 7 | byte & 0x7F
            if byte < 0x80:
                break
        time += delta
        status = data[place]
        length = {0xC0: 1, 0xFF: 2}.get(status, 2)
        values = [*data[place + 1 : place + 1 + length], 0][:2]
        events.append((time, status, *values))
        place += 1 + length
    assert events[-1][1:] == (0xFF, 0x2F, 0)
    return events


def test_instruments_that_share_a_recording_are_found_and_refused_in_two_splits(tmp_path: Path):
    path = tmp_path / "tiny.sf2"
    path.write_bytes(soundfont({0: [0], 1: [0, 1], 2: [2], 4: [3]}))
    samples = notes.read_samples(path)
    assert samples[0] < samples[1]
    assert not samples[1] & samples[2]
    assert {program: len(used) for program, used in samples.items()} == {0: 1, 1: 2, 2: 1, 4: 1}
    splits.check_soundfont(samples)
    path.write_bytes(soundfont({0: [0], 2: [0]}))
    with pytest.raises(UserError, match="programs 0 and 2 of the soundfont use the same recording"):
        splits.check_soundfont(notes.read_samples(path))
    path.write_bytes(b"not a soundfont")
    with pytest.raises(UserError, match="is not a SoundFont"):
        notes.read_samples(path)


def soundfont(presets: dict[int, list[int]]) -> bytes:
    """A SoundFont whose presets use one instrument each, with the given samples."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    number, num_zones = len(presets), sum(map(len, presets.values()))
    num_samples = 1 + max(max(used) for used in presets.values())
    pcm = np.repeat(np.arange(num_samples, dtype="<i2"), 10).tobytes()
    phdr = b"".join(
        struct.pack("<20sHHHIII", b"p", program, 0, index, 0, 0, 0)
        for index, program in enumerate([*presets, 0])
    )
    zones, instruments, zone_samples = 0, b"", []
    for used in presets.values():
        instruments += struct.pack("<20sH", b"i", zones)
        zones += len(used)
        zone_samples += used
    instruments += struct.pack("<20sH", b"EOI", zones)
    tables = {
        b"phdr": phdr,
        b"pbag": b"".join(struct.pack("<HH", i, 0) for i in range(number + 1)),
        b"pgen": b"".join(struct.pack("<HH", 41, i) for i in range(number)) + bytes(4),
        b"inst": instruments,
        b"ibag": b"".join(struct.pack("<HH", i, 0) for i in range(num_zones + 1)),
        b"igen": b"".join(struct.pack("<HH", 53, used) for used in zone_samples) + bytes(4),
        b"shdr": b"".join(
            struct.pack("<20sIIIIIBbHH", b"s", 10 * i, 10 * i + 10, 0, 0, 44100, 60, 0, 0, 1)
            for i in range(num_samples)
        )
        + bytes(46),
    }
    pdta = b"pdta" + b"".join(chunk(name, content) for name, content in tables.items())
    lists = chunk(b"LIST", b"sdta" + chunk(b"smpl", pcm)) + chunk(b"LIST", pdta)
    return chunk(b"RIFF", b"sfbk" + lists)
