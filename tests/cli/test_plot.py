"""The commands `plot ...`, as users run them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.cli.main import main
from tests.report.test_report import FIT, MEL, WAVE

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of nine files in three folders, labels, and the runs `wave` and `mel`."""
    folder = tmp_path_factory.mktemp("plot")
    noise = np.random.default_rng(0)
    lines = ["path,label"]
    for number in range(9):
        path = folder / "corpus" / f"group {number % 3}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, 0.1 * noise.normal(size=6_000 + 1000 * number), 8_000)
        lines.append(f"{path.relative_to(folder)},{number}")
    (folder / "labels.csv").write_text("\n".join(lines))
    for name, front_end, masker in (("wave", WAVE, "SpanMasker"), ("mel", MEL, "RandomMasker")):
        config = folder / f"{name}.yaml"
        text = FIT.format(folder=folder, front_end=front_end, masker=masker)
        config.write_text(text.replace("runs/it", f"runs/{name}"))
        main(["fit", "--config", str(config)])
    return folder


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit):
        main(["plot", *map(str, args)])
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["wave", "mel"])
def test_attention_of_a_run_is_a_picture(place, name):
    audio, output = place / "corpus" / "group 1" / "1.wav", place / f"{name}-attention.png"
    main(["plot", "attention", str(place / "runs" / name), str(audio), "-o", str(output)])
    assert output.read_bytes().startswith(PNG)


def test_suffix_decides_the_format(place):
    run, audio = place / "runs" / "mel", place / "corpus" / "group 1" / "1.wav"
    choice = ["--layers", "[-1]", "--heads", "[1,2]", "--kind", "received", "--start", "0.2"]
    for suffix, first in ((".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<!doctype html>")):
        output = place / f"attention{suffix}"
        main(["plot", "attention", str(run), str(audio), "-o", str(output), *choice])
        assert output.read_bytes().startswith(first)
    title = re.search("<title>(.*)</title>", output.read_text())
    assert title is not None
    assert title[1] == "Attention of mel, context: 1.wav, 0.20 to 0.68 s"


def test_latents_and_neighbours_of_a_run_and_a_corpus(place, monkeypatch):
    monkeypatch.chdir(place)
    common = ["runs/wave", "--corpus", "corpus"]
    main(["plot", "latents", *common, "-o", "latents.png", "--umap", "false"])
    assert (place / "latents.png").read_bytes().startswith(PNG)
    labels = ["--labels", "labels.csv"]
    main(["plot", "latents", *common, *labels, "-o", "labelled.png", "--which", "random"])
    assert (place / "labelled.png").read_bytes() != (place / "latents.png").read_bytes()
    main(["plot", "neighbours", *common, "--k", "2", "--num_queries", "3"])
    html = (place / "neighbours.html").read_text()
    assert html.count("<audio") == 3 * (1 + 2)
    assert "Precision at 2 of folder (3 values)" in html


def test_more_neighbours_than_clips_are_limited_in_one_line(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    common = ["runs/wave", "--corpus", "corpus", "--num_queries", "1"]
    main(["plot", "neighbours", *common, "--k", "500", "-o", "all.html"])
    html = " ".join((place / "all.html").read_text().split())
    assert "its 8 nearest clips" in html
    assert html.count("<audio") == 9
    assert "Mean over the 9 clips that share their folder with another file." in html
    assert "`k` (500) is limited to the 8 clips of other files" in caplog.text


def test_damaged_metrics_are_named(place, tmp_path, caplog):
    broken = {"empty": b"", "binary": b"step,train/loss\n1,0.5\n\xff\xfe\n"}
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_bytes(content)
    main(["plot", "runs", str(tmp_path), "-o", str(tmp_path / "a.png")])
    assert "empty/metrics.csv is empty" in caplog.text
    assert "binary/metrics.csv is not UTF-8" in caplog.text


def test_several_runs_are_one_figure(place):
    output = place / "overlay.png"
    main(["plot", "runs", str(place / "runs"), str(place / "runs" / "mel"), "-o", str(output)])
    assert output.read_bytes().startswith(PNG)


def test_mistakes_are_named(place, capsys):
    run, audio = place / "runs" / "mel", place / "corpus" / "group 1" / "1.wav"
    assert "must end with .png, .svg, .pdf, .html" in fails(capsys, "latents", run, "-o", "a.jpg")
    assert "give the audio with `--corpus DIR`" in fails(capsys, "latents", run)
    assert "must end with .html" in fails(capsys, "neighbours", run, "-o", "a.png")
    message = fails(capsys, "neighbours", run, "--corpus", place / "corpus", "--k", "0")
    assert "`k` (0)" in message
    assert "the encoder has the layers 1 to 1" in fails(
        capsys, "attention", run, audio, "--layers", "[7]"
    )
    assert "no clip starts at 9 s" in fails(capsys, "attention", run, audio, "--start", "9")
    short = fails(capsys, "attention", run, audio, "--start", "0.87")
    assert "shorter than one token" in short
    assert "no audio file at" in fails(capsys, "attention", run, place / "nothing.wav")
    assert "`keys` (nonsense) match no metric; the runs have" in fails(
        capsys, "runs", run, "--keys", "[nonsense]"
    )
    assert "holds no runs" in fails(capsys, "runs", place / "corpus")
    sound = fails(capsys, "attention", place / "runs" / "wave", audio, "--query_hz", "100")
    assert "no known frequency" in sound
    for hz in ("100000", "-5"):
        message = fails(capsys, "attention", run, audio, f"--query_hz={hz}")
        assert "must be in [0, 4000], up to half the sample rate" in message
    (place / "empty").mkdir()
    for command, source in (
        ("latents", "labels.csv"),
        ("neighbours", "labels.csv"),
        ("latents", "empty"),
    ):
        message = fails(capsys, command, place / source)
        what = "is neither a file of `jepa-audio embed` (.parquet, .npz, .h5) nor an encoder"
        assert f"`{place / source}` {what}" in message
        assert "give the audio" not in message
    assert "nor an encoder" in fails(
        capsys, "latents", place / "labels.csv", "--corpus", place / "corpus"
    )
    assert "no embeddings at" in fails(capsys, "latents", place / "e.parquet")
    both = fails(capsys, "latents", place / "e.parquet", "--corpus", place / "corpus")
    assert "is for an encoder" in both
