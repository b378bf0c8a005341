"""Nearest neighbours, label agreement, and the page with players."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.errors import UserError
from jepa_audio.report.embeddings import Embeddings
from jepa_audio.report.neighbours import (
    AudioPlayers,
    build_page,
    choose_queries,
    label_agreement,
    nearest,
)
from jepa_audio.report.page import render

RATE = 8000


def clips(count: int, labels: list[str], seed: int = 0, per_file: int = 1) -> Embeddings:
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    paths = [f"/x/{i // per_file}.wav" for i in range(count)]
    return Embeddings(paths, np.zeros((count, 2)), vectors, labels, "label")


@pytest.mark.parametrize("per_file", [1, 3])
def test_neighbours_are_those_of_a_literal_search(per_file):
    found = clips(40, ["a"] * 40, per_file=per_file)
    rows, similar = nearest(found, np.arange(40), 4)
    for i in range(40):
        a = found.vectors[i].astype(float)
        cosine = {
            j: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for j, b in enumerate(found.vectors.astype(float))
            if found.paths[i] != found.paths[j]
        }
        expected = sorted(cosine, key=lambda j: -cosine[j])[:4]
        assert rows[i].tolist() == expected
        np.testing.assert_allclose(similar[i], [cosine[j] for j in expected], rtol=1e-4)


def test_missing_neighbours_are_marked():
    rows, similar = nearest(clips(4, ["a"] * 4, per_file=3), np.arange(4), 5)
    assert rows.tolist() == [[3, -1, -1, -1]] * 3 + [rows[3].tolist()]
    assert np.isnan(similar[0, 1:]).all()
    assert sorted(rows[3][:3].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("per_file", [1, 2])
def test_agreement_is_that_of_a_literal_count(per_file):
    labels = [*np.random.default_rng(1).choice(list("abc"), 30).tolist(), "alone"]
    found = clips(31, labels, per_file=per_file)
    agreement = label_agreement(found, 3)
    precisions, chances = [], []
    for i, label in enumerate(labels):
        others = [j for j in range(31) if found.paths[j] != found.paths[i]]
        same = sum(labels[j] == label for j in others)
        if same:
            rows = nearest(found, np.array([i]), 3)[0][0]
            precisions.append(np.mean([labels[j] == label for j in rows]))
            chances.append(same / len(others))
    assert agreement.num_clips == len(precisions) < 31
    assert agreement.precision == pytest.approx(np.mean(precisions))
    assert agreement.chance == pytest.approx(np.mean(chances))


def test_random_vectors_agree_at_chance_and_separate_ones_fully():
    labels = ["a", "b"] * 200
    random = label_agreement(clips(400, labels), 5)
    assert random.precision == pytest.approx(random.chance, abs=0.05)
    separate = clips(400, labels)
    separate.vectors[::2, 0] += 100
    separate.vectors[1::2, 0] -= 100
    assert label_agreement(separate, 5).precision == 1


def test_no_agreement_without_labels_that_occur_twice():
    agreement = label_agreement(clips(5, list("abcde")), 3)
    assert agreement.num_clips == 0
    assert np.isnan(agreement.precision)


def test_queries_are_of_each_label_in_turn_or_named():
    found = clips(30, ["a"] * 20 + ["b"] * 8 + ["c"] * 2)
    rows = choose_queries(found, 4, (), seed=0)
    assert sorted(found.labels[row] for row in rows[:3]) == ["a", "b", "c"]
    assert len(choose_queries(found, 99, (), seed=0)) == 30
    assert choose_queries(found, 4, ["/7.wav", "29.wav"], seed=0).tolist() == [7, 29]
    with pytest.raises(UserError, match=r"none of 30 clips is of a file nowhere\.wav"):
        choose_queries(found, 4, ["nowhere.wav"], seed=0)


@pytest.fixture
def on_disk(tmp_path: Path) -> Embeddings:
    """Six clips of 0.2 s from three stereo files with a name that needs quotes, one missing."""
    names = [str(tmp_path / "audio" / f"a b&#{i}.wav") for i in range(3)]
    (tmp_path / "audio").mkdir()
    for name in names:
        noise = 0.1 * np.random.default_rng(0).normal(size=(RATE, 2))
        sf.write(name, noise, RATE)
    paths = [name for name in names for _ in range(2)]
    spans = np.array([[0.0, 0.2], [0.5, 0.7]] * 3)
    vectors = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    missing = str(tmp_path / "<b>.wav")
    spans = np.concatenate([spans, [[0.0, 1.0]]])
    return Embeddings(
        [*paths, missing], spans, vectors, ["x", "y", "x", "y", "x", "y", "y"], "kind"
    )


def page_of(found: Embeddings, players: AudioPlayers) -> str:
    rows = np.arange(len(found))
    content = build_page(found, rows, 3, players) | {"source": "clips"}
    html = render("neighbours.html", content)
    players.page.parent.mkdir(exist_ok=True)
    players.page.write_text(html)
    return html


def test_audio_in_the_page_is_the_clip(on_disk, tmp_path):
    players = AudioPlayers(tmp_path / "page.html")
    html = page_of(on_disk, players)
    sources = re.findall(r'<audio[^>]*src="data:audio/flac;base64,([^"]*)"', html)
    assert players.num_linked == 0
    samples, rate = sf.read(io.BytesIO(base64.b64decode(sources[0])))
    expected = sf.read(on_disk.paths[0])[0][: round(0.2 * RATE)].mean(axis=1)
    assert rate == RATE
    np.testing.assert_allclose(samples, expected, atol=1e-4)
    assert "no file at this path" in html
    assert "<b>.wav" not in html
    assert re.search(r"Precision at 3 of kind \(2 values\): <b>[\d.]+ %", html)


def test_audio_above_the_limit_and_linked_audio_is_a_relative_link(on_disk, tmp_path, caplog):
    caplog.set_level("INFO")
    limited = AudioPlayers(tmp_path / "pages" / "page.html", max_megabytes=0.01)
    html = page_of(on_disk, limited)
    assert 0 < limited.num_bytes <= 10_000
    assert limited.num_linked > 0
    assert any("are linked, not embedded" in message for message in caplog.messages)
    assert "../audio/a%20b%26%230.wav#t=" in html
    linked = AudioPlayers(tmp_path / "page.html", link=True)
    html = page_of(on_disk, linked)
    assert "data:audio" not in html
    assert 'src="audio/a%20b%26%230.wav#t=0.5,0.7"' in html


def test_long_clips_are_cut_and_the_page_states_it(on_disk, tmp_path):
    html = page_of(on_disk, AudioPlayers(tmp_path / "page.html", max_seconds=0.1))
    assert "(cut to 0.1 s)" in html
    (source, *_) = re.findall(r'<audio[^>]*src="data:audio/flac;base64,([^"]*)"', html)
    assert len(sf.read(io.BytesIO(base64.b64decode(source)))[0]) == 0.1 * RATE
