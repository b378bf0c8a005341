"""The file of results: rows with checksums, lines that were cut off, a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from jepa_audio.errors import UserError
from jepa_audio.probing.rows import (
    append_rows,
    load_evidence,
    prepare_results,
    read_rows,
    save_evidence,
)
from tests.probing.rows import a_row, evidence_of


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    append_rows(path, [a_row(seed=1), a_row(seed=2)])
    return path


@pytest.mark.parametrize("num_bytes", [1, 2, 500])
def test_a_row_is_never_joined_to_a_line_that_was_cut_off(
    results: Path, num_bytes: int, caplog: pytest.LogCaptureFixture
):
    results.write_bytes(results.read_bytes()[:-num_bytes])
    append_rows(results, [a_row(seed=3)])
    # Without its line break alone, the row is complete.
    kept = [1, 2, 3] if num_bytes == 1 else [1, 3]
    assert [row.seed for row in read_rows(results)] == kept
    assert len(caplog.messages) == (num_bytes > 1)
    assert all("the last line was cut off" in message for message in caplog.messages)


def test_a_cut_line_is_removed_before_rows_are_computed_and_left_out_by_readers(
    results: Path, caplog: pytest.LogCaptureFixture
):
    results.write_bytes(results.read_bytes()[:-9])
    assert [row.seed for row in read_rows(results)] == [1]
    prepare_results(results)
    assert [row.seed for row in read_rows(results)] == [1]
    assert results.read_bytes().endswith(b"}\n")
    assert len(caplog.messages) == 2


def test_a_damaged_line_is_named_before_rows_are_computed(results: Path):
    first, second = results.read_text().splitlines()
    results.write_text(f"{first}\n\x00\x00\n{second}\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 2: not JSON.*delete the line"):
        prepare_results(results)
    prepare_results(results.with_name("none.jsonl"))


def test_a_row_with_another_score_than_its_checksum_is_refused(results: Path):
    results.write_text(results.read_text().replace('"value": 0.35', '"value": 0.85', 1))
    with pytest.raises(UserError, match=r"line 1: the row differs from its checksum"):
        read_rows(results)


def test_rows_of_earlier_versions_have_no_checksum_and_no_padded_windows(results: Path):
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    for row in rows:
        del row["checksum"], row["num_padded"]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(results) == [a_row(seed=1), a_row(seed=2)]


def test_rows_of_earlier_versions_get_the_name_of_the_pooling_that_they_had(results: Path):
    row = json.loads(results.read_text().splitlines()[0])
    del row["checksum"]
    old = [
        row | {"pooling": "mean"},
        row | {"pooling": "concat"},
        row | {"pooling": "concat", "variant": "statistics"},
        row | {"pooling": "mean", "task": "gtzan_beat"},
        row | {"pooling": "concat", "task": "mine"},
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in old))
    names = [row.pooling for row in read_rows(results)]
    assert names == [
        "mean/mean",
        "mean/concat",
        "mean_std_change/concat",
        "frames/mean",
        "mean/concat",
    ]


def test_a_full_disk_keeps_the_rows_before_it(results: Path, monkeypatch: pytest.MonkeyPatch):
    before = results.read_bytes()

    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"results\.jsonl cannot be written: No space left .*valid"):
        append_rows(results, [a_row(seed=3)])
    assert results.read_bytes() == before


def test_damaged_evidence_is_refused_in_one_sentence(tmp_path: Path):
    path = tmp_path / "evidence.npz"
    save_evidence(path, evidence_of({}, num_units=400))
    content = path.read_bytes()
    for damaged in (content[:100], b"", content[:60] + bytes(40) + content[100:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or not evidence"):
            load_evidence(path)
