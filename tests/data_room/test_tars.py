"""Every file of a tar is listed with its offset; damage affects only the damaged file."""

import gzip
import io
import json
import lzma
import tarfile
from bz2 import compress as bzip2
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from jepa_audio.data.audio.location import TarMember
from jepa_audio.data.audio.read import read
from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files
from jepa_audio.data.corpus.tars import list_tar_members
from tests.sounds import FORMATS, RATE, audio, noise, pairs, tar, write

BLOCK = tarfile.BLOCKSIZE
LONG = "a-folder-with-a-long-name/" * 5  # beyond the 100 bytes of a header
NAMES = {
    "short": lambda number: f"{number}.wav",
    "just fits": lambda number: f"{number:0>96}.wav",
    "long": lambda number: f"{LONG}{number}.wav",
    "not ASCII": lambda number: f"ночь/ä{number}.wav",
    "long, not ASCII": lambda number: f"{'я' * 30}/{'ö' * 40}/{number}.wav",
    "dots in the folder": lambda number: f"./v1.0/take.{number}/{number}.wav",
}


def list_files(path: Path) -> list[DiscoveredFile]:
    (entry,) = discover_files([str(path)], path.parent)
    return list_tar_members(entry, path.parent)


def good(path: Path) -> dict[int, DiscoveredFile]:
    """The files without a reason, by the number of their sound; all decode to what was written."""
    entries = [entry for entry in list_files(path) if not entry.reason]
    numbered = {
        int(Path(entry.member).name.split(".")[0]): entry for entry in entries if entry.member
    }
    assert len(numbered) == len(entries)
    for number, entry in numbered.items():
        samples, rate = read(TarMember(path, entry.member, entry.offset, entry.num_bytes))
        np.testing.assert_array_equal(samples[0] * 2**15, noise(number), err_msg=entry.member)
        assert rate == RATE
    return numbered


def bad(path: Path) -> dict[str, str]:
    return {entry.member: entry.reason for entry in list_files(path) if entry.reason}


def headers(path: Path) -> dict[str, int]:
    """Offset of the header of every file."""
    with tarfile.open(path) as archive:
        return {info.name: info.offset_data - BLOCK for info in archive}


def overwrite(path: Path, offset: int, content: bytes = b"\xff" * BLOCK) -> Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("style", NAMES)
def test_every_tar_format_returns_what_was_written(tmp_path: Path, kind: str, style: str):
    names = [NAMES[style](number) for number in range(3)]
    path = tar(tmp_path / "t.tar", {name: audio(number) for number, name in enumerate(names)}, kind)
    assert [entry.member for entry in list_files(path)] == names
    assert all(entry.offset % BLOCK == 0 for entry in list_files(path))
    for number, entry in enumerate(list_files(path)):
        assert path.read_bytes()[entry.offset :][: entry.num_bytes] == audio(number)
        samples, _ = read(TarMember(path, entry.member, entry.offset, entry.num_bytes))
        np.testing.assert_array_equal(samples[0] * 2**15, noise(number))
    corpus = index_corpus(path)
    assert corpus.is_usable.all()
    assert corpus.table["num_frames"].to_pylist() == [len(noise(number)) for number in range(3)]


def test_json_of_the_same_key_labels_audio_before_and_after_it(tmp_path: Path):
    labels = {
        key: json.dumps({"group": key, "split": "dev"}).encode() for key in ("a/x", "b/x", "v1.0/x")
    }
    files = {
        "a/x.json": labels["a/x"],
        "a/x.wav": audio(0),
        "b/x.left.wav": audio(1),  # the key ends at the first dot of the name
        "b/x.right.flac": audio(2, "FLAC"),
        "b/x.json": labels["b/x"],
        "v1.0/x.wav": audio(3),
        "v1.0/x.json": labels["v1.0/x"],
        "x.wav": audio(4),
        "a/x.txt": b"words",
    }
    entries = {
        entry.member: (entry.group, entry.split)
        for entry in list_files(tar(tmp_path / "t.tar", files))
    }
    assert entries == {
        "a/x.wav": ("a/x", "valid"),
        "b/x.left.wav": ("b/x", "valid"),
        "b/x.right.flac": ("b/x", "valid"),
        "v1.0/x.wav": ("v1.0/x", "valid"),
        "x.wav": ("", ""),
    }


def test_shards_of_the_webdataset_package_are_read(tmp_path: Path):
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(3):
            record = {"group": f"g{number}", "split": "validation"}
            writer.write(
                {"__key__": f"sub/{number}", "wav": audio(number), "json": record, "cls": number}
            )
    assert not bad(tmp_path / "w.tar")
    entries = good(tmp_path / "w.tar")
    assert [entry.member for entry in entries.values()] == ["sub/0.wav", "sub/1.wav", "sub/2.wav"]
    assert [(entry.group, entry.split) for entry in entries.values()] == [
        (f"g{number}", "valid") for number in range(3)
    ]


def labels(group: str, split: str) -> bytes:
    return json.dumps({"group": group, "split": split}).encode()


def rows(path: Path) -> dict[str, tuple[str, str, str]]:
    """Group, split and reason of every member of a tar."""
    return {file.member: (file.group, file.split, file.reason) for file in list_files(path)}


@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_json_of_the_same_stem_applies_also_if_the_name_has_dots(
    tmp_path: Path, is_reversed: bool
):
    files = {
        "Track 2.0.wav": audio(0),
        "Track 2.0.json": labels("a", "test"),
        "Track 2.1.wav": audio(1),
        "Track 2.1.json": labels("b", "train"),
        "Track 2.wav": audio(2),
        "Track 2.json": labels("c", "valid"),
        "v1.5/x.y.flac": audio(3, "FLAC"),
        "v1.5/x.y.JSON": labels("d", "test"),
        "._Track 2.0.wav": b"",
        "._Track 2.0.json": labels("e", "train"),
    }
    items = [*files.items()]
    path = tar(tmp_path / "t.tar", dict(items[::-1] if is_reversed else items))
    assert rows(path) == {
        "Track 2.0.wav": ("a", "test", ""),
        "Track 2.1.wav": ("b", "train", ""),
        "Track 2.wav": ("c", "valid", ""),
        "v1.5/x.y.flac": ("d", "test", ""),
    }


def test_all_audio_of_a_webdataset_sample_has_the_labels_of_its_json(tmp_path: Path):
    files = {"s.left.wav": audio(0), "s.right.wav": audio(1), "s.json": labels("a", "test")}
    files |= {"m.wav": audio(2), "m.info.json": b"{}", "m.meta.json": b"{}"}
    files |= {"n.wav": audio(3), "n.meta.json": labels("b", "valid")}
    assert rows(tar(tmp_path / "t.tar", files)) == {
        "s.left.wav": ("a", "test", ""),
        "s.right.wav": ("a", "test", ""),
        "m.wav": ("", "", ""),
        "n.wav": ("b", "valid", ""),
    }


def test_a_file_never_gets_the_labels_of_another_file_with_its_key(tmp_path: Path):
    files = {"Track 2.0.wav": audio(0), "Track 2.1.wav": audio(1)}
    files |= {"Track 2.1.json": labels("b", "train"), "Track 2.wav": audio(2)}
    reason = (
        "no JSON file of its own: its key 'Track 2' (up to the first dot) is also that of "
        "Track 2.1.json; add {}.json"
    )
    assert rows(tar(tmp_path / "t.tar", files)) == {
        "Track 2.0.wav": ("", "", reason.format("Track 2.0")),
        "Track 2.1.wav": ("b", "train", ""),
        "Track 2.wav": ("", "", reason.format("Track 2")),
    }


def test_json_files_that_differ_make_their_audio_bad(tmp_path: Path):
    files = {"a.wav": audio(0), "a.x.json": labels("a", "test"), "a.y.json": labels("a", "train")}
    path = tar(tmp_path / "t.tar", files)
    assert rows(path)["a.wav"][2] == ("JSON files differ in group or split: a.x.json and a.y.json")
    one = tar(tmp_path / "1.tar", {"a.wav": audio(0), "a.json": labels("a", "test")})
    two = tar(tmp_path / "2.tar", {"a.wav": audio(1), "a.json": labels("a", "train")})
    both = write(tmp_path / "both.tar", one.read_bytes() + two.read_bytes())
    assert {file.reason for file in list_files(both)} == {
        "JSON files differ in group or split: a.json"
    }


def test_folders_links_and_pipes_in_a_tar_are_skipped(tmp_path: Path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind in (
            ("d.wav", tarfile.DIRTYPE),
            ("l.wav", tarfile.SYMTYPE),
            ("p.wav", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.wav"
            archive.addfile(info)
        info = tarfile.TarInfo("0.wav")
        info.size = len(audio(0))
        archive.addfile(info, io.BytesIO(audio(0)))
    assert list(good(tmp_path / "t.tar")) == [0]
    assert not bad(tmp_path / "t.tar")


def test_concatenated_tars_are_read_as_one(tmp_path: Path):
    one, two = (
        tar(tmp_path / "1.tar", pairs(2)),
        tar(tmp_path / "2.tar", {"x/2.wav": audio(2)}, "pax"),
    )
    both = write(tmp_path / "both.tar", one.read_bytes() + two.read_bytes())
    assert list(good(both)) == [0, 1, 2]
    assert not bad(both)


@pytest.mark.parametrize("kind", FORMATS)
def test_all_files_before_any_cut_are_listed_and_none_is_incomplete(tmp_path: Path, kind: str):
    files = pairs(3)
    uncut = tar(tmp_path / "uncut.tar", files, kind)
    starts = headers(uncut)
    ends = {name: starts[name] + BLOCK + len(content) for name, content in files.items()}
    last = max(ends.values())
    edges = [edge + shift for edge in (*starts.values(), *ends.values()) for shift in (-1, 0, 1)]
    for cut in sorted({edge for edge in (*edges, *range(0, last, 97)) if 0 <= edge < last}):
        path = write(tmp_path / "cut.tar", uncut.read_bytes()[:cut])
        complete = {number for number in range(3) if ends[f"{number}.json"] <= cut}
        with_audio = {number for number in range(3) if ends[f"{number}.wav"] <= cut}
        assert complete <= set(good(path)) <= with_audio, cut
        assert all(good(path)[number].group == f"g{number}" for number in complete), cut


def cut_offsets(files: dict[str, bytes], path: Path) -> dict[str, int]:
    start = headers(path)["2.wav"]
    return {
        "inside audio": start + BLOCK + 100,
        "inside a header": start + 100,
        "inside the JSON": headers(path)["1.json"] + BLOCK + 5,
        "between files": start,
        "between audio and its JSON": headers(path)["1.json"],
        "before the end mark": max(headers(path).values()) + 2 * BLOCK,
        "in the padding after audio": start + BLOCK + len(files["2.wav"]) + 5,
    }


CUTS = {
    "inside audio": ({0, 1}, {"2.wav": "the tar ends inside this file: copy the tar again"}),
    "inside a header": (
        {0, 1},
        {"byte {cut}": "broken header: the file after this header is lost"},
    ),
    "inside the JSON": ({0}, {"1.wav": "1.json is not JSON"}),
    "between files": (
        {0, 1},
        {"byte {cut}": "the tar has no end mark and may be truncated: copy the tar again"},
    ),
    "between audio and its JSON": (
        {0, 1},
        {"byte {cut}": "the tar has no end mark and may be truncated: copy the tar again"},
    ),
    "before the end mark": (
        {0, 1, 2},
        {"byte {cut}": "the tar has no end mark and may be truncated: copy the tar again"},
    ),
    "in the padding after audio": (
        {0, 1, 2},
        {"byte {cut}": "the tar has no end mark and may be truncated: copy the tar again"},
    ),
}


@pytest.mark.parametrize("where", CUTS)
def test_every_cut_is_reported(tmp_path: Path, where: str):
    uncut = tar(tmp_path / "uncut.tar", pairs(3))
    cut = cut_offsets(pairs(3), uncut)[where]
    path = write(tmp_path / "cut.tar", uncut.read_bytes()[:cut])
    intact, expected = CUTS[where]
    assert set(good(path)) == intact
    reported = {
        name: reason.partition(":")[0] if "JSON" in reason else reason
        for name, reason in bad(path).items()
    }
    if "padding" in where:
        assert reported  # with any reason
    else:
        assert reported == {
            name.format(cut=cut // BLOCK * BLOCK): reason for name, reason in expected.items()
        }


@pytest.mark.parametrize(
    "lost", [f"{number}.{suffix}" for number in range(4) for suffix in ("wav", "json")]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_header_loses_only_the_file_after_it(tmp_path: Path, kind: str, lost: str):
    path = tar(tmp_path / "t.tar", pairs(4), kind)
    offset = headers(path)[lost]
    overwrite(path, offset)
    number, suffix = lost.split(".")
    assert set(good(path)) == set(range(4)) - ({int(number)} if suffix == "wav" else set())
    assert bad(path) == {f"byte {offset}": "broken header: the file after this header is lost"}
    others = {other: entry.group for other, entry in good(path).items() if other != int(number)}
    assert others == {other: f"g{other}" for other in others}


@pytest.mark.parametrize(("kind", "prefix"), [("gnu", LONG), ("pax", LONG), ("pax", "ä")])
def test_a_broken_header_after_a_long_name_loses_no_other_file(
    tmp_path: Path, kind: str, prefix: str
):
    files = {f"{prefix}/{number}.wav": audio(number) for number in range(4)}
    path = tar(tmp_path / "t.tar", files, kind)
    overwrite(path, headers(path)[f"{prefix}/1.wav"])
    assert set(good(path)) == {0, 2, 3}
    assert len(bad(path)) == 1


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_broken_long_name_loses_no_other_file(tmp_path: Path, kind: str):
    files = {f"{LONG}{number}.wav": audio(number) for number in range(4)}
    path = tar(tmp_path / "t.tar", files, kind)
    overwrite(path, headers(path)[f"{LONG}1.wav"] - 2 * BLOCK)
    assert {f"{LONG}{number}.wav" for number in (0, 2, 3)} <= {
        entry.member for entry in list_files(path) if not entry.reason
    }
    assert bad(path)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 3 * BLOCK, b"PK\x03\x04" * 700])
def test_garbage_between_two_files_is_reported_and_loses_none(tmp_path: Path, garbage: bytes):
    clean = tar(tmp_path / "clean.tar", pairs(3))
    raw, offset = clean.read_bytes(), headers(clean)["1.wav"]
    garbage += b"\1" * (-len(garbage) % BLOCK)
    path = write(tmp_path / "t.tar", raw[:offset] + garbage + raw[offset:])
    assert set(good(path)) == {0, 1, 2}
    assert list(bad(path)) == ([f"byte {offset}"] if garbage else [])


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe", b'"text"'])
def test_broken_json_makes_its_audio_bad(tmp_path: Path, content: bytes):
    path = tar(tmp_path / "t.tar", pairs(3) | {"1.json": content})
    assert set(good(path)) == {0, 2}
    (reason,) = bad(path).values()
    assert reason.startswith("1.json is not ")


def test_json_without_audio_is_reported(tmp_path: Path):
    files = pairs(2) | {"k.json": b"{}", "song.wma": b"..", "song.json": b"{}"}
    path = tar(tmp_path / "t.tar", files)
    assert set(good(path)) == {0, 1}
    assert bad(path) == {
        "k.json": "no audio file of this name in the tar",
        "song.wma": "unsupported format (.wma): convert it to .flac",
    }


NOT_AUDIO_TARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "a compressed tar does not allow random access: decompress the tar"),
    "bzip2": (bzip2, "a compressed tar does not allow random access: decompress the tar"),
    "xz": (lzma.compress, "a compressed tar does not allow random access: decompress the tar"),
    "zstd": (
        lambda raw: b"\x28\xb5\x2f\xfd" + raw,
        "a compressed tar does not allow random access: decompress the tar",
    ),
    "end mark only": (lambda raw: bytes(20 * BLOCK), "the tar contains no audio files"),
    "zero bytes": (
        lambda raw: b"",
        "the tar has no end mark and may be truncated: copy the tar again",
    ),
    "text": (lambda raw: b"not a tar " * 300, "broken header: the file after this header is lost"),
    "short text": (lambda raw: b"not a tar", "broken header: the file after this header is lost"),
}


@pytest.mark.parametrize("what", NOT_AUDIO_TARS)
def test_a_file_that_is_not_a_tar_of_audio_is_one_row_with_the_reason(tmp_path: Path, what: str):
    make, reason = NOT_AUDIO_TARS[what]
    path = write(tmp_path / "t.tar", make(tar(tmp_path / "good.tar", pairs(2)).read_bytes()))
    assert [entry.reason for entry in list_files(path)] == [reason]


def test_a_tar_without_audio_is_one_row_with_the_reason(tmp_path: Path):
    path = tar(tmp_path / "t.tar", {"a.txt": b"words", "b.cls": b".."})
    assert bad(path) == {"": "the tar contains no audio files"}


def test_slices_of_members_are_equal_from_memory_and_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tar(tmp_path / "t.tar", {"0.wav": audio(0), "9.flac": audio(9, "FLAC")})
    for limit in (1 << 20, 0):
        monkeypatch.setattr("jepa_audio.data.audio.location._MAX_BYTES_IN_MEMORY", limit)
        for number, entry in good(path).items():
            member = TarMember(path, entry.member, entry.offset, entry.num_bytes)
            for start in (0, 100, len(noise(number)) - 50):
                samples, _ = read(member, start, 50)
                np.testing.assert_array_equal(samples[0] * 2**15, noise(number)[start:][:50])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_member_name_that_is_not_utf8_affects_only_its_file(tmp_path: Path, kind: str):
    files = {"0.wav": audio(0), "caf\udce9.wav": audio(1), "2.wav": audio(2)}
    path = tar(tmp_path / "t.tar", files, kind)
    assert set(good(path)) == {0, 2}
    assert list(bad(path).values()) == ["its name is not UTF-8: rename the file"]
    assert index_corpus(path).is_usable.tolist() == [True, False, True]


def test_only_changed_tars_are_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listed: list[str] = []

    def counted(entry: DiscoveredFile, root: Path) -> list[DiscoveredFile]:
        listed.append(entry.source)
        return list_tar_members(entry, root)

    monkeypatch.setattr(index_module, "list_tar_members", counted)
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / name, pairs(2))
    before = index_corpus(tmp_path)
    assert sorted(listed) == ["a.tar", "b.tar"]
    assert index_corpus(tmp_path) == before
    tar(tmp_path / "b.tar", {"5.wav": audio(5)})
    assert index_corpus(tmp_path).names.to_pylist() == ["a.tar:0.wav", "a.tar:1.wav", "b.tar:5.wav"]
    (tmp_path / "a.tar").unlink()
    assert index_corpus(tmp_path).names.to_pylist() == ["b.tar:5.wav"]
    assert sorted(listed) == ["a.tar", "b.tar", "b.tar"]
