"""All audio of a source is discovered; damage costs only the damaged file, with a reason."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from jepa_audio.data.corpus import index as index_module
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files
from jepa_audio.data.corpus.table import Corpus, CorpusError
from jepa_audio.data.corpus.tars import list_tar_members
from jepa_audio.errors import UserError
from tests.sounds import audio, noise, pairs, tar, write


def discover(*sources: Path | str, root: Path = Path("/nowhere")) -> list[DiscoveredFile]:
    """All discovered files, with the members of tars instead of the tars."""
    entries = discover_files([str(source) for source in sources], root)
    return [
        file
        for entry in entries
        for file in (list_tar_members(entry, root) if entry.is_tar else [entry])
    ]


def reasons(corpus: Corpus) -> dict[str, str]:
    return dict(zip(corpus.names.to_pylist(), corpus.table["reason"].to_pylist(), strict=True))


def error_message(*sources: Path | str) -> str:
    with pytest.raises(UserError) as error:
        discover(*sources)
    return str(error.value)


def test_a_folder_has_its_audio_files_and_those_in_its_tars_but_no_hidden_ones(tmp_path: Path):
    write(tmp_path / "a.wav")
    write(tmp_path / "deep" / "er" / "b.FLAC", audio(1, "FLAC"))
    write(tmp_path / ".hidden" / "c.wav")
    write(tmp_path / "deep" / ".cache" / "d.wav")
    tar(tmp_path / "deep" / "t.tar", {"e.wav": audio(2), "notes.txt": b"no audio"})
    corpus = index_corpus(tmp_path)
    assert reasons(corpus) == dict.fromkeys(["a.wav", "deep/er/b.FLAC", "deep/t.tar:e.wav"], "")
    assert corpus.table["num_frames"].to_pylist() == [len(noise(number)) for number in (0, 1, 2)]


def test_a_path_below_the_root_is_relative_and_any_other_absolute(tmp_path: Path):
    for name in ("in/a.wav", "other/b.wav"):
        write(tmp_path / name)
    entries = discover(tmp_path / "in", tmp_path / "other", root=tmp_path / "in")
    assert [entry.source for entry in entries] == ["a.wav", str(tmp_path / "other" / "b.wav")]


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_subfolders_that_cannot_be_read_are_skipped_and_named_in_one_line(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name in ("a.wav", "x/b.wav", "lost+found/c.wav", "y/lost+found/d.wav"):
        write(tmp_path / name)
    original = getattr(os, call)

    def refuse(path: str, *args: object, **kwargs: object) -> object:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    assert [entry.source for entry in discover(tmp_path, root=tmp_path)] == ["a.wav", "x/b.wav"]
    folders = f"{tmp_path / 'lost+found'}, {tmp_path / 'y' / 'lost+found'}"
    line = f"{tmp_path}: skipped 2 folders that cannot be read ({folders})"
    assert [message for message in caplog.messages if "cannot be read" in message] == [line]
    with pytest.raises(CorpusError, match=r"lost.found cannot be read: Permission denied"):
        discover(tmp_path / "lost+found")


@pytest.mark.parametrize(
    "pattern", ["t-{00..02}.tar", "t-*.tar", "{t-00,t-0[12]}.tar", "**/t-*.tar"]
)
def test_a_pattern_matches_all_its_tars(tmp_path: Path, pattern: str):
    for number in range(3):
        tar(tmp_path / f"t-{number:02}.tar", {f"{number}.wav": audio(number)})
    assert [entry.member for entry in discover(tmp_path / pattern)] == ["0.wav", "1.wav", "2.wav"]
    assert len(index_corpus(tmp_path / pattern)) == 3


def test_an_error_names_the_part_of_a_pattern_that_matches_nothing(tmp_path: Path):
    tar(tmp_path / "t-0.tar", pairs(1))
    assert error_message(tmp_path / "t-{0..1}.tar").startswith(
        f"the audio source {tmp_path}/t-1.tar (part of {tmp_path}/t-{{"
    )
    assert error_message(tmp_path / "{t,u}-*.tar").endswith("matches no files")
    assert "u-*.tar" in error_message(tmp_path / "{t,u}-*.tar")


def test_an_existing_file_is_not_expanded_as_a_pattern(tmp_path: Path):
    write(tmp_path / "take [1] {a,b}.wav")
    assert len(discover(tmp_path / "take [1] {a,b}.wav")) == 1


@pytest.mark.parametrize(
    "url", ["s3://bucket/{00..99}.tar", "https://host/a.tar", "pipe:aws s3 cp x -", "hf://a/b"]
)
def test_remote_sources_are_refused(url: str):
    assert error_message(url) == (
        f"{url} is not a local path; download it first, because training reads files in random "
        "order"
    )


@pytest.mark.parametrize(
    "name", ["table.parquet", "notes.txt", "audio.zip", "shard.tar.gz", "examples.jsonx", "no"]
)
def test_an_unknown_kind_of_file_is_refused_with_the_known_kinds(tmp_path: Path, name: str):
    message = error_message(write(tmp_path / name))
    assert message.startswith(
        f"{tmp_path / name} is not an audio source; use a folder, examples.json or one of "
    )
    assert ".flac" in message
    assert ".jsonl" in message


def manifest(path: Path, records: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        return write(path, "\n".join(map(json.dumps, records)).encode())
    separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [
        separator.join(records[0]),
        *(separator.join(map(str, record.values())) for record in records),
    ]
    return write(path, "\n".join(lines).encode())


@pytest.mark.parametrize("column", ["path", "audio_path", "file"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_manifest_lists_files_groups_and_splits(tmp_path: Path, suffix: str, column: str):
    write(tmp_path / "audio" / "ä b.wav")
    write(tmp_path / "lists" / "c.wav")
    paths = ["../audio/ä b.wav", str(tmp_path / "lists" / "c.wav")]
    lines = [{"id": 7, column: path, "group": f"g{path[0]}", "split": "test"} for path in paths]
    entries = discover(manifest(tmp_path / "lists" / f"m{suffix}", lines), root=tmp_path)
    assert [entry[0] for entry in entries] == ["audio/ä b.wav", "lists/c.wav"]
    assert [(entry.group, entry.split) for entry in entries] == [("g.", "test"), ("g/", "test")]
    assert index_corpus(tmp_path / "lists" / f"m{suffix}").is_usable.all()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val", "valid"),
        ("dev", "valid"),
        ("validation", "valid"),
        ("training", "train"),
        ("testing", "test"),
    ]
    + [(name, name) for name in ("train", "valid", "test", "")],
)
def test_other_names_of_a_split_are_normalized(tmp_path: Path, name: str, split: str):
    for spelling in (name, name.upper(), f" {name} "):
        (entry,) = discover(manifest(tmp_path / "m.tsv", [{"path": "a.wav", "split": spelling}]))
        assert entry.split == split


def test_an_unknown_split_is_a_reason_against_the_file(tmp_path: Path):
    (entry,) = discover(manifest(tmp_path / "m.csv", [{"path": "a.wav", "split": "fold1"}]))
    assert entry.reason == "unknown split 'fold1'; use train, valid or test"


def test_groups_can_be_numbers_including_zero(tmp_path: Path):
    entries = discover(
        manifest(
            tmp_path / "m.jsonl", [{"path": f"{group}.wav", "group": group} for group in (0, 1)]
        )
    )
    assert [entry.group for entry in entries] == ["0", "1"]


def test_a_bad_line_of_a_manifest_affects_no_other_line(tmp_path: Path):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav")
    lines = [
        '{"path": "a.wav"}',
        "",
        '{"path": "b',
        "[1]",
        '{"id": 3}',
        '{"path": ""}',
        '{"path": 5}',
    ]
    text = "\n".join([*lines, '{"path": "gone.wav"}', '{"path": "b.wav"}'])
    assert reasons(index_corpus(write(tmp_path / "m.jsonl", text.encode()), max_bad_share=1.0)) == {
        "a.wav": "",
        "b.wav": "",
        "gone.wav": "cannot be opened: No such file or directory",
        "m.jsonl:line 3": "not JSON: Invalid control character at: line 1 column 12 (char 11)",
        "m.jsonl:line 4": "not a JSON object, but list",
        **{f"m.jsonl:line {line}": "no 'path' in this line" for line in (5, 6, 7)},
    }
    byte_order_mark = b"\xef\xbb\xbf"
    write(tmp_path / "m.csv", byte_order_mark + b"path,id\na.wav,1\n,2\ngone.wav,3\nb.wav\n")
    assert reasons(index_corpus(tmp_path / "m.csv", max_bad_share=1.0)) == {
        "a.wav": "",
        "b.wav": "",
        "gone.wav": "cannot be opened: No such file or directory",
        "m.csv:line 3": "no 'path' in this line",
    }


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_manifest_without_a_path_column_is_refused_with_its_columns(tmp_path: Path, suffix: str):
    message = error_message(manifest(tmp_path / f"m{suffix}", [{"id": 1, "filename": "a.wav"}]))
    assert message == (
        f"{tmp_path / 'm'}{suffix} has no column for the audio file; rename one of "
        "['id', 'filename'] to 'path'"
    )


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_an_empty_manifest_is_refused_with_its_name(tmp_path: Path, name: str):
    write(tmp_path / name, b"path\n" if name == "m.csv" else b"")
    with pytest.raises(CorpusError, match=name):
        index_corpus(tmp_path / name)


def lines_of(path: Path, text: str | bytes) -> dict[str, tuple[str, str, str]]:
    """Group, split and reason of every line of a manifest."""
    write(path, text if isinstance(text, bytes) else text.encode())
    return {
        entry.member or Path(entry.source).name: (entry.group, entry.split, entry.reason)
        for entry in discover(path)
    }


def test_labels_of_other_types_are_a_reason_against_the_line(tmp_path: Path):
    deep = "[" * 90 + "]" * 90
    lines = [
        '{"path": "a.wav", "group": 1.0, "split": null}',
        '{"path": "b.wav", "group": NaN}',
        '{"path": "c.wav", "group": ["g"]}',
        f'{{"path": "d.wav", "group": {{"a": {deep}}}}}',
        '{"path": "e.wav", "split": ["test"]}',
        '{"path": "f.wav", "split": 1}',
        '{"path": "g.wav", "group": -Infinity}',
        '{"path": ["h.wav"]}',
        '{"path": null}',
        f'{{"path": "i.wav", "group": {50 * deep[:90]}{50 * deep[90:]}}}',
        '{"Path ": "k.wav", "SPLIT": "test", "group": " x "}',
        '{"path": "l.wav", "split": "test", "Split": "train"}',
    ]
    assert lines_of(tmp_path / "m.jsonl", "\n".join(lines)) == {
        "a.wav": ("1", "", ""),
        "b.wav": ("", "", "`group` is nan, not text or a finite number"),
        "c.wav": ("", "", "`group` is list, not text or a number"),
        "d.wav": ("", "", "`group` is dict, not text or a number"),
        "e.wav": ("", "", "`split` is list; use train, valid or test"),
        "f.wav": ("", "", "`split` is int; use train, valid or test"),
        "g.wav": ("", "", "`group` is -inf, not text or a finite number"),
        "line 8": ("", "", "no 'path' in this line"),
        "line 9": ("", "", "no 'path' in this line"),
        "line 10": ("", "", "not JSON: nested deeper than 100 levels"),
        "k.wav": ("x", "test", ""),
        "line 12": ("", "", "two keys differ only in case"),
    }


def test_a_line_of_a_csv_with_other_cells_than_the_header_is_bad(tmp_path: Path):
    text = (
        "path,group,split\na.wav,g,test\nb,c.wav,g,test\nd.wav,g\ne.wav\n\n"
        '"f.wav\n",g,test\nh.wav,"g\n",test\n i.wav, g , Test \n'
    )
    assert lines_of(tmp_path / "m.csv", text) == {
        "a.wav": ("g", "test", ""),
        "line 3": ("", "", "1 values more than the header has columns: quote values with commas"),
        "line 4": ("", "", "no 'split' in this line"),
        "line 5": ("", "", "no 'group' in this line"),
        "line 8": ("", "", "a line break in 'path': is a quote not closed?"),
        "line 10": ("", "", "a line break in 'group': is a quote not closed?"),
        " i.wav": ("g", "test", ""),
    }


def test_an_unclosed_quote_in_a_manifest_is_refused_with_its_line(tmp_path: Path):
    text = 'path,group\na.wav,g\n"b.wav,g\n' + "".join(f"{i}.wav,g\n" for i in range(6))
    write(tmp_path / "m.csv", text.encode())
    with pytest.raises(UserError, match=r"m\.csv, line 3: a quote is opened and never closed"):
        index_corpus(tmp_path / "m.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_other_separators_line_ends_and_a_byte_order_mark_are_read(
    tmp_path: Path, separator: str, ending: str, mark: str, caplog: pytest.LogCaptureFixture
):
    text = f"{mark}ID, Path ,SPLIT,{ending}1,ä.wav,Test,{ending}{ending}2,b.wav,,{ending}"
    with caplog.at_level("INFO"):
        assert lines_of(tmp_path / "m.csv", text.replace(",", separator)) == {
            "ä.wav": ("", "test", ""),
            "b.wav": ("", "", ""),
        }
    separated = f": the columns are separated by {separator!r}"
    assert any(separated in line for line in caplog.messages) == (separator != ",")
    assert f"{tmp_path / 'm.csv'}: these columns are not used: id" in caplog.messages


def test_a_file_that_is_listed_with_different_labels_is_bad(tmp_path: Path):
    for name in "abcd":
        write(tmp_path / f"{name}.wav")
    lines = ["a.wav,g,train", "b.wav,g,test", "b.wav,g,train", "c.wav,,", "c.wav,h,test", "d.wav,,"]
    write(tmp_path / "m.csv", "\n".join(["path,group,split", *lines, lines[0]]).encode())
    corpus = index_corpus([tmp_path / "m.csv", tmp_path], tmp_path / "t.parquet")
    conflict = "listed several times, with different group or split"
    assert reasons(corpus) == {"a.wav": "", "b.wav": conflict, "c.wav": "", "d.wav": ""}
    splits = dict(zip(corpus.names.to_pylist(), corpus.table["split"].to_pylist(), strict=True))
    assert (splits["a.wav"], splits["c.wav"], splits["d.wav"]) == ("train", "test", "")


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    write(tmp_path / "m.csv", b"path,split,Split\na.wav,train,test\n")
    assert error_message(tmp_path / "m.csv") == (
        f"{tmp_path / 'm.csv'}, line 1: there are two columns 'split'"
    )


def test_a_manifest_in_another_encoding_is_refused_or_its_names_are_bad(tmp_path: Path):
    assert lines_of(tmp_path / "m.csv", "path\né.wav\na.wav\n".encode("latin-1")) == {
        "line 2": (
            "",
            "",
            "the name \\udce9.wav is not UTF-8: save the manifest as UTF-8, or rename the file",
        ),
        "a.wav": ("", "", ""),
    }
    write(tmp_path / "u.csv", "\ufeffpath\na.wav\n".encode("utf-16"))
    assert error_message(tmp_path / "u.csv").endswith("is UTF-16, not UTF-8: save it as UTF-8")


def test_labels_of_a_tar_in_a_manifest_apply_to_its_members(tmp_path: Path):
    tar(tmp_path / "t.tar", {"a.wav": audio(0)})
    (entry,) = discover(
        manifest(tmp_path / "m.csv", [{"path": "t.tar", "group": "g", "split": "test"}])
    )
    assert (entry.member, entry.group, entry.split) == ("a.wav", "g", "test")


def test_nsynth_is_grouped_by_instrument_and_split_by_folder(tmp_path: Path):
    for split in ("train", "valid", "test"):
        folder = tmp_path / f"nsynth-{split}"
        notes = {
            f"bass_0-{pitch}": {"instrument_str": "bass_0", "pitch": pitch} for pitch in (40, 41)
        }
        write(folder / "examples.json", json.dumps(notes).encode())
        for name in notes:
            write(folder / "audio" / f"{name}.wav")
        (tmp_path / f"nsynth-{split}" / "audio" / "unlisted.wav").write_bytes(audio(1))
    corpus = index_corpus(
        tmp_path / "nsynth-{train,valid,test}" / "examples.json", tmp_path / "t.parquet"
    )
    assert corpus.is_usable.all()
    assert len(corpus) == 6
    for row in corpus.table.to_pylist():
        assert (row["group"], row["split"]) == (
            "bass_0",
            row["source"].split("/")[0].removeprefix("nsynth-"),
        )


@pytest.mark.parametrize("content", [b"{", b"[1]", b"{}", b'{"note": 1}'])
def test_a_broken_nsynth_manifest_is_refused_with_its_name(tmp_path: Path, content: bytes):
    assert str(tmp_path / "examples.json") in error_message(
        write(tmp_path / "examples.json", content)
    )


def test_the_suffix_of_a_tar_can_be_in_capitals(tmp_path: Path):
    assert [entry.member for entry in discover(tar(tmp_path / "T.TAR", pairs(2)))] == [
        "0.wav",
        "1.wav",
    ]


def test_a_file_in_several_sources_is_indexed_once(tmp_path: Path):
    write(tmp_path / "a.wav")
    tar(tmp_path / "sub" / "t.tar", pairs(2))
    manifest(tmp_path / "m.csv", [{"path": "sub/../a.wav"}])
    sources = [
        tmp_path,
        tmp_path / "sub",
        tmp_path / "sub" / "*.tar",
        tmp_path / "m.csv",
        tmp_path / "a.wav",
    ]
    for _ in range(2):  # the second time from the table
        corpus = index_corpus(sources, tmp_path / "out" / "t.parquet")
        names = corpus.names.to_pylist()
        assert [name.removeprefix(f"{tmp_path}/") for name in names] == [
            "a.wav",
            "sub/t.tar:0.wav",
            "sub/t.tar:1.wav",
        ]


def test_a_manifest_labels_files_that_a_folder_lists_too(tmp_path: Path):
    write(tmp_path / "audio" / "a.wav")
    manifest(tmp_path / "m.csv", [{"path": "audio/a.wav", "group": "g", "split": "test"}])
    corpus = index_corpus([tmp_path / "audio", tmp_path / "m.csv"], tmp_path / "t.parquet")
    assert corpus.table.select(["group", "split"]).to_pylist() == [{"group": "g", "split": "test"}]


def test_a_relative_source_is_not_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "audio" / "a.wav")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert index_corpus("../audio").names.to_pylist() == ["a.wav"]
    monkeypatch.setattr(
        index_module, "inspect", lambda audio: pytest.fail(f"{audio} was decoded again")
    )
    index_corpus("../audio")


def test_a_file_name_that_is_not_utf8_affects_only_its_file(tmp_path: Path):
    write(tmp_path / "a.wav")
    write(tmp_path / os.fsdecode(b"caf\xe9.wav"))
    assert reasons(index_corpus(tmp_path)) == {
        "a.wav": "",
        "caf\\udce9.wav": "its name is not UTF-8: rename the file",
    }


def test_a_folder_of_compressed_tars_is_refused_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path / "a.tar.gz")
    write(tmp_path / "b.tgz")
    assert "2 compressed tars are not read (decompress them to .tar" in error_message(tmp_path)
    write(tmp_path / "c.wav")
    assert len(discover(tmp_path)) == 1
    assert "2 compressed tars" in caplog.text


def test_a_bad_tar_affects_no_other_tar(tmp_path: Path):
    tar(tmp_path / "good.tar", pairs(2))
    write(
        tmp_path / "gzip.tar", gzip.compress(tar(tmp_path / "x" / "in.tar", pairs(1)).read_bytes())
    )
    shutil.rmtree(tmp_path / "x")
    assert reasons(index_corpus(tmp_path)) == {
        "good.tar:0.wav": "",
        "good.tar:1.wav": "",
        "gzip.tar": "a compressed tar does not allow random access: decompress the tar",
    }
