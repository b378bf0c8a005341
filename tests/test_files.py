"""Atomic writes leave no half-written file; readers name the file and the line of an error."""

from pathlib import Path

import pytest

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import atomic_path, read_csv, read_json, read_jsonl, scan_jsonl, write_text


def test_an_atomic_write_replaces_the_file_and_creates_missing_folders(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("eins", "zwei ä"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_atomic_write_keeps_the_old_content_and_removes_its_temporary_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_read_and_its_errors_name_the_file(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"ä": [1, null]}'.encode())
    assert read_json(path) == {"ä": [1, None]}
    for content in (b"{", b"\xff\xfe{", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is not JSON: "):
            read_json(path)


def test_json_lines_are_numbered_and_empty_lines_are_skipped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \r\n{"b": "ä"}', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"b": "ä"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "not JSON: the key 'c' occurs twice"),
        (b'{"a": ', "not JSON: "),
        (b"[1]", "not a JSON object, but list"),
        (b'"\xff"', "not JSON: "),
    ],
)
def test_a_bad_json_line_is_reported_with_its_number(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    records = dict(scan_jsonl(path))
    assert (records[1], records[3]) == ({"a": 1}, {"b": 2})
    assert isinstance(records[2], UserError)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: {reason}"):
        list(read_jsonl(path))


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.TSV", "\t")])
def test_csv_rows_are_numbered_and_a_byte_order_mark_is_ignored(
    tmp_path: Path, name: str, delimiter: str
):
    path = tmp_path / name
    path.write_text('\ufeffpath,label\n"a\nb",ä\nc\n'.replace(",", delimiter), encoding="utf-8")
    columns, rows = read_csv(path)
    assert columns == ["path", "label"]
    assert list(rows) == [(3, {"path": "a\nb", "label": "ä"}), (4, {"path": "c", "label": None})]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path,g\na,1\n"b,2\nc,3\n', 3),
        ('path,g\n\na,"1\nb,"2"\nc,3\n', 3),
        ('path,g\na,1\nb,"2', 3),
        ('path,"g\na,1\nb,2\n', 1),
        ('"a, b".wav,1\nc,"3\n', 2),
    ],
)
def test_an_unclosed_quote_is_an_error_with_its_line(tmp_path: Path, text: str, line: int):
    path = tmp_path / "a.csv"
    for ending in ("\n", "\r\n", "\r"):
        path.write_bytes(text.replace("\n", ending).encode())
        with pytest.raises(UserError, match=rf"a\.csv, line {line}: a quote is opened"):
            list(read_csv(path)[1])


def test_quotes_that_are_closed_or_inside_a_word_are_read(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('path,g\n"a, ""b""\nc",1\n5" disc,2\n"d" e,3\n\n"f",4')
    assert [row["path"] for _, row in read_csv(path)[1]] == ['a, "b"\nc', '5" disc', "d e", "f"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused(tmp_path: Path, encoding: str):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffpath\na\n".encode(encoding))
    for errors in ("strict", "surrogateescape"):
        with pytest.raises(UserError, match=r"a\.csv is UTF-16, not UTF-8"):
            read_csv(path, errors=errors)


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_deeply_nested_json_is_refused_before_it_can_fail_elsewhere(tmp_path: Path, depth: int):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"a": ' * 99 + "1" + "}" * 99 + "\n" + '{"a": ' + "[" * depth + "]" * depth + "}"
    )
    records = dict(scan_jsonl(path))
    assert isinstance(records[1], dict)
    assert str(records[2]) == "not JSON: nested deeper than 100 levels"
    path.write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match="not JSON: nested deeper than 100 levels"):
        read_json(path)


def test_an_empty_csv_has_no_columns_and_no_rows(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.touch()
    columns, rows = read_csv(path)
    assert (columns, list(rows)) == ([], [])


def test_csv_errors_name_the_file(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes("path\né\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8"):
        list(read_csv(path)[1])
    assert list(read_csv(path, errors="surrogateescape")[1]) == [(2, {"path": "\udce9"})]
    path.write_text("path\n" + "a" * 200_000)
    with pytest.raises(UserError, match=r"a\.csv, after line 1: not CSV: field larger"):
        list(read_csv(path)[1])


@pytest.mark.parametrize("read", [read_json, lambda path: list(read_jsonl(path)), read_csv])
def test_missing_and_unreadable_files_are_different_errors(tmp_path: Path, read):
    with pytest.raises(MissingFileError, match=r"a\.x cannot be read: No such file or directory"):
        read(tmp_path / "a.x")
    with pytest.raises(UserError, match="cannot be read: Is a directory") as error:
        read(tmp_path)
    assert not isinstance(error.value, MissingFileError)
