"""Laws of tars: every file is found at its place, and damage costs the file it lies in and no other."""

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

from jepa_audio.data.audio.read import TarMember, read
from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files, list_tar_members
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


def listed(path: Path) -> list[DiscoveredFile]:
    (entry,) = discover_files([str(path)], path.parent)
    return list_tar_members(entry, path.parent)


def good(path: Path) -> dict[int, DiscoveredFile]:
    """The files that nothing speaks against, by the number of their sound: all decode to just what was written."""
    entries = [entry for entry in listed(path) if not entry.reason]
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
    return {entry.member: entry.reason for entry in listed(path) if entry.reason}


def headers(path: Path) -> dict[str, int]:
    """Where the header before each file's bytes begins."""
    with tarfile.open(path) as archive:
        return {info.name: info.offset_data - BLOCK for info in archive}


def overwritten(path: Path, place: int, content: bytes = b"\xff" * BLOCK) -> Path:
    raw = bytearray(path.read_bytes())
    raw[place : place + len(content)] = content
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("named", NAMES)
def test_every_format_of_tar_gives_back_what_was_written(tmp_path: Path, kind: str, named: str):
    names = [NAMES[named](number) for number in range(3)]
    path = tar(tmp_path / "t.tar", {name: audio(number) for number, name in enumerate(names)}, kind)
    assert [entry.member for entry in listed(path)] == names
    assert all(entry.offset % BLOCK == 0 for entry in listed(path))
    for number, entry in enumerate(listed(path)):
        assert path.read_bytes()[entry.offset :][: entry.num_bytes] == audio(number)
        samples, _ = read(TarMember(path, entry.member, entry.offset, entry.num_bytes))
        np.testing.assert_array_equal(samples[0] * 2**15, noise(number))
    corpus = index_corpus(path)
    assert corpus.is_usable.all()
    assert corpus.table["num_frames"].to_pylist() == [len(noise(number)) for number in range(3)]


def test_the_json_of_the_same_key_tells_group_and_split_in_whatever_order(tmp_path: Path):
    facts = {
        key: json.dumps({"group": key, "split": "dev"}).encode() for key in ("a/x", "b/x", "v1.0/x")
    }
    files = {
        "a/x.json": facts["a/x"],
        "a/x.wav": audio(0),
        "b/x.left.wav": audio(1),  # the key ends at the first dot of the name
        "b/x.right.flac": audio(2, "FLAC"),
        "b/x.json": facts["b/x"],
        "v1.0/x.wav": audio(3),
        "v1.0/x.json": facts["v1.0/x"],
        "x.wav": audio(4),
        "a/x.txt": b"words",
    }
    entries = {
        entry.member: (entry.group, entry.split) for entry in listed(tar(tmp_path / "t.tar", files))
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


def test_what_is_no_file_in_a_tar_is_passed_over(tmp_path: Path):
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


def test_tars_written_one_after_the_other_are_one(tmp_path: Path):
    one, two = (
        tar(tmp_path / "1.tar", pairs(2)),
        tar(tmp_path / "2.tar", {"x/2.wav": audio(2)}, "pax"),
    )
    both = write(tmp_path / "both.tar", one.read_bytes() + two.read_bytes())
    assert list(good(both)) == [0, 1, 2]
    assert not bad(both)


@pytest.mark.parametrize("kind", FORMATS)
def test_wherever_a_tar_is_cut_all_before_the_cut_is_found_and_nothing_is_half(
    tmp_path: Path, kind: str
):
    files = pairs(3)
    whole = tar(tmp_path / "whole.tar", files, kind)
    starts = headers(whole)
    ends = {name: starts[name] + BLOCK + len(content) for name, content in files.items()}
    last = max(ends.values())
    borders = [place + near for place in (*starts.values(), *ends.values()) for near in (-1, 0, 1)]
    for cut in sorted({place for place in (*borders, *range(0, last, 97)) if 0 <= place < last}):
        path = write(tmp_path / "cut.tar", whole.read_bytes()[:cut])
        complete = {number for number in range(3) if ends[f"{number}.json"] <= cut}
        heard = {number for number in range(3) if ends[f"{number}.wav"] <= cut}
        assert complete <= set(good(path)) <= heard, cut
        assert all(good(path)[number].group == f"g{number}" for number in complete), cut


def cut_places(files: dict[str, bytes], path: Path) -> dict[str, int]:
    start = headers(path)["2.wav"]
    return {
        "inside audio": start + BLOCK + 100,
        "inside a header": start + 100,
        "inside the JSON": headers(path)["1.json"] + BLOCK + 5,
        "on a border": start,
        "between audio and its JSON": headers(path)["1.json"],
        "before the end mark": max(headers(path).values()) + 2 * BLOCK,
        "in the padding behind audio": start + BLOCK + len(files["2.wav"]) + 5,
    }


CUTS = {
    "inside audio": ({0, 1}, {"2.wav": "the tar ends within it"}),
    "inside a header": ({0, 1}, {"byte {cut}": "a broken header: the file behind it is lost"}),
    "inside the JSON": ({0}, {"1.wav": "1.json beside it holds no JSON"}),
    "on a border": ({0, 1}, {"byte {cut}": "the tar ends without an end mark: it is cut off"}),
    "between audio and its JSON": (
        {0, 1},
        {"byte {cut}": "the tar ends without an end mark: it is cut off"},
    ),
    "before the end mark": (
        {0, 1, 2},
        {"byte {cut}": "the tar ends without an end mark: it is cut off"},
    ),
    "in the padding behind audio": (
        {0, 1, 2},
        {"byte {cut}": "the tar ends without an end mark: it is cut off"},
    ),
}


@pytest.mark.parametrize("where", CUTS)
def test_a_cut_is_noticed_wherever_it_is(tmp_path: Path, where: str):
    whole = tar(tmp_path / "whole.tar", pairs(3))
    cut = cut_places(pairs(3), whole)[where]
    path = write(tmp_path / "cut.tar", whole.read_bytes()[:cut])
    found, expected = CUTS[where]
    assert set(good(path)) == found
    named = {
        name: reason.partition(":")[0] if "JSON" in reason else reason
        for name, reason in bad(path).items()
    }
    if "padding" in where:
        assert named  # in whatever words
    else:
        assert named == {
            name.format(cut=cut // BLOCK * BLOCK): reason for name, reason in expected.items()
        }


@pytest.mark.parametrize(
    "lost", [f"{number}.{suffix}" for number in range(4) for suffix in ("wav", "json")]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_header_costs_the_file_behind_it_and_no_other(
    tmp_path: Path, kind: str, lost: str
):
    path = tar(tmp_path / "t.tar", pairs(4), kind)
    place = headers(path)[lost]
    overwritten(path, place)
    number, suffix = lost.split(".")
    assert set(good(path)) == set(range(4)) - ({int(number)} if suffix == "wav" else set())
    assert bad(path) == {f"byte {place}": "a broken header: the file behind it is lost"}
    others = {other: entry.group for other, entry in good(path).items() if other != int(number)}
    assert others == {other: f"g{other}" for other in others}


@pytest.mark.parametrize(("kind", "prefix"), [("gnu", LONG), ("pax", LONG), ("pax", "ä")])
def test_a_broken_header_behind_a_long_name_costs_no_other_file_either(
    tmp_path: Path, kind: str, prefix: str
):
    files = {f"{prefix}/{number}.wav": audio(number) for number in range(4)}
    path = tar(tmp_path / "t.tar", files, kind)
    overwritten(path, headers(path)[f"{prefix}/1.wav"])
    assert set(good(path)) == {0, 2, 3}
    assert len(bad(path)) == 1


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_broken_long_name_costs_no_other_file(tmp_path: Path, kind: str):
    files = {f"{LONG}{number}.wav": audio(number) for number in range(4)}
    path = tar(tmp_path / "t.tar", files, kind)
    overwritten(path, headers(path)[f"{LONG}1.wav"] - 2 * BLOCK)
    assert {f"{LONG}{number}.wav" for number in (0, 2, 3)} <= {
        entry.member for entry in listed(path) if not entry.reason
    }
    assert bad(path)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 3 * BLOCK, b"PK\x03\x04" * 700])
def test_garbage_between_two_files_is_named_and_costs_none(tmp_path: Path, garbage: bytes):
    whole = tar(tmp_path / "whole.tar", pairs(3))
    raw, place = whole.read_bytes(), headers(whole)["1.wav"]
    garbage += b"\1" * (-len(garbage) % BLOCK)
    path = write(tmp_path / "t.tar", raw[:place] + garbage + raw[place:])
    assert set(good(path)) == {0, 1, 2}
    assert list(bad(path)) == ([f"byte {place}"] if garbage else [])


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe", b'"text"'])
def test_broken_json_costs_the_audio_beside_it(tmp_path: Path, content: bytes):
    path = tar(tmp_path / "t.tar", pairs(3) | {"1.json": content})
    assert set(good(path)) == {0, 2}
    (reason,) = bad(path).values()
    assert reason.startswith("1.json beside it holds ")


def test_json_without_audio_is_named_and_costs_nothing(tmp_path: Path):
    files = pairs(2) | {"k.json": b"{}", "song.m4a": b"..", "song.json": b"{}"}
    path = tar(tmp_path / "t.tar", files)
    assert set(good(path)) == {0, 1}
    assert bad(path) == {
        "k.json": "no audio file beside it in the tar",
        "song.m4a": "a format that is not read (.m4a): convert it to .flac",
    }


NO_TARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "a compressed tar cannot be read at an offset: unpack it"),
    "bzip2": (bzip2, "a compressed tar cannot be read at an offset: unpack it"),
    "xz": (lzma.compress, "a compressed tar cannot be read at an offset: unpack it"),
    "zstd": (
        lambda raw: b"\x28\xb5\x2f\xfd" + raw,
        "a compressed tar cannot be read at an offset: unpack it",
    ),
    "end mark only": (lambda raw: bytes(20 * BLOCK), "a tar without audio files"),
    "zero bytes": (lambda raw: b"", "the tar ends without an end mark: it is cut off"),
    "text": (lambda raw: b"not a tar " * 300, "a broken header: the file behind it is lost"),
    "short text": (lambda raw: b"not a tar", "a broken header: the file behind it is lost"),
}


@pytest.mark.parametrize("what", NO_TARS)
def test_what_is_no_tar_of_audio_is_one_row_with_the_reason(tmp_path: Path, what: str):
    make, reason = NO_TARS[what]
    path = write(tmp_path / "t.tar", make(tar(tmp_path / "whole.tar", pairs(2)).read_bytes()))
    assert [entry.reason for entry in listed(path)] == [reason]


def test_a_tar_without_audio_is_one_row_with_the_reason(tmp_path: Path):
    path = tar(tmp_path / "t.tar", {"a.txt": b"words", "b.cls": b".."})
    assert bad(path) == {"": "a tar without audio files"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_name_that_is_no_text_costs_its_file_only(tmp_path: Path, kind: str):
    files = {"0.wav": audio(0), "caf\udce9.wav": audio(1), "2.wav": audio(2)}
    path = tar(tmp_path / "t.tar", files, kind)
    assert set(good(path)) == {0, 2}
    assert list(bad(path).values()) == ["its name is not UTF-8: rename it"]
    assert index_corpus(path).is_usable.tolist() == [True, False, True]


def test_only_a_tar_that_has_changed_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looked_at: list[str] = []

    def counted(entry: DiscoveredFile, root: Path) -> list[DiscoveredFile]:
        looked_at.append(entry.source)
        return list_tar_members(entry, root)

    monkeypatch.setattr(index_module, "list_tar_members", counted)
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / name, pairs(2))
    before = index_corpus(tmp_path)
    assert sorted(looked_at) == ["a.tar", "b.tar"]
    assert index_corpus(tmp_path) == before
    tar(tmp_path / "b.tar", {"5.wav": audio(5)})
    assert index_corpus(tmp_path).names.to_pylist() == ["a.tar:0.wav", "a.tar:1.wav", "b.tar:5.wav"]
    (tmp_path / "a.tar").unlink()
    assert index_corpus(tmp_path).names.to_pylist() == ["b.tar:5.wav"]
    assert sorted(looked_at) == ["a.tar", "b.tar", "b.tar"]
