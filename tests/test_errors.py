"""Texts of users and of files cannot control the terminal, and sizes have upper bounds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import yaml

from jepa_audio.class_paths import parse_yaml
from jepa_audio.cli.main import main
from jepa_audio.cli.messages import print_error
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import UserError, printable
from jepa_audio.files import csv_cell
from jepa_audio.interop import WeightsError, import_weights
from jepa_audio.interop.published import parse_conv_layers
from jepa_audio.steps.encoder.positions import SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import WaveformFrontEnd
from jepa_audio.steps.front_ends.transforms import CQT, VQT, Gammatone, LogMel
from jepa_audio.steps.masking import MultiBlockMasker, SpanMasker

ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202egnp\udce9"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


def test_control_characters_are_escaped_and_other_texts_are_not():
    assert printable("\x1b[2J\u202e\udce9\x9b") == r"\x1b[2J\u202e\udce9\x9b"
    for text in ("naïve 日本語 \u200c 👩\u200d🎤", "two\n\tlines", "back\\slash"):
        assert printable(text) == text
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"
    printable(ESCAPES).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with one good and one bad file; both names have control characters."""
    sf.write(tmp_path / "a.wav", np.full(8000, 0.1), 8000)
    (tmp_path / "a.wav").rename(tmp_path / "\x1b[31m[bold]good\r\n.wav")
    (tmp_path / "=\x1b]0;bad\x07.wav").write_bytes(b"RIFF")
    return tmp_path


def test_names_of_files_are_escaped_in_tables_logs_and_errors(
    corpus: Path, capfd: pytest.CaptureFixture[str]
):
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        main(["data", "index", str(corpus)])
        main(["data", "describe", str(corpus)])
        main(["data", "verify", str(corpus)])
        with pytest.raises(SystemExit):
            main(["data", "describe", "\x1b[31mnowhere"])
        with pytest.raises(SystemExit):
            main(["data", "describe", "--\x1b[31m"])
    finally:
        root.handlers = handlers
    print_error(UserError(f"{ESCAPES} is bad"))
    output = "".join(capfd.readouterr())
    assert r"\x1b[31m[bold]good" in output
    assert r"\x1b]0;bad\x07.wav" in output
    assert r"\x1b[31mnowhere" in output
    assert not set(output) & set("\x1b\r\x07\x9b\u202e")


def test_a_cell_that_a_spreadsheet_would_compute_is_a_text(corpus: Path):
    index_corpus(str(corpus), corpus / "table.parquet", max_bad_share=1.0)
    report = corpus / "table.skipped.csv"
    assert "\n'=" in report.read_text().replace("\r\n", "\n")
    for sign in "=+-@\t\r":
        assert csv_cell(f"{sign}1") == f"'{sign}1"
    assert csv_cell("a=1") == "a=1"


@pytest.mark.parametrize(
    "text",
    [BOMB, MERGES, "a: &a [*a]", "[" * 1000 + "]" * 1000, "[" * 99 + "]" * 99],
    ids=["aliases", "merges", "endless", "deep", "nested"],
)
def test_yaml_that_grows_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=r"SOURCE (is nested deeper|has more than 100,000 values)"):
        parse_yaml(text, "SOURCE")
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'bomb.yaml'}"])
    error = capsys.readouterr().err
    assert "is nested deeper" in error or "has more than" in error
    with pytest.raises(UserError, match=r"bomb.yaml"):
        import_weights("wavjepa", HUB, tmp_path / "ours", recipe=tmp_path / "bomb.yaml")


HUB = Path(__file__).parent / "data" / "wavjepa_hub"


def test_yaml_with_a_few_aliases_is_read():
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]"
    assert parse_yaml(text, "SOURCE") == yaml.safe_load(text)
    with pytest.raises(UserError, match="SOURCE is not YAML"):
        parse_yaml("a: [", "SOURCE")


@pytest.mark.parametrize(
    "spec",
    [
        "[(1,1,1)]*9999999999",
        "[(1,1,1)]*100*100*100*100*100*100",
        "[(1,1,1)]*-1",
        "[(1,1,1)]*1.5",
        "[(1,1,1)]*[1]",
        "[(9999999999,1,1)]",
        "[(1,0,1)]",
        "[(1e300,1,1)]",
        "[(float('inf'),1,1)]",
        "[[[" * 500,
        "(" * 5000 + ")" * 5000,
        "[(1,1,1)]+" * 5000 + "[(1,1,1)]",
        "[(1,2**99999999,1)]",
        "'x'*9999999999",
        "",
        "[]",
        "{1: 2}",
        {"a": 1},
        [[1, 1, 1]] * 101,
        7,
        None,
        [[1, 1, float("nan")]],
    ],
)
def test_conv_layers_are_bounded(spec: object):
    with pytest.raises(WeightsError, match="not a list of") as error:
        parse_conv_layers(spec)
    assert len(str(error.value)) < 400


BUILDS: dict[str, Callable[[], object]] = {
    "crop_seconds": lambda: data(crop_seconds=1e12),
    "clip_seconds": lambda: data(clip_seconds=1e12),
    "sample_rate": lambda: data(sample_rate=10**12),
    "crops_per_clip": lambda: data(crops_per_clip=10**9),
    "batch_size": lambda: data(batch_size=10**12),
    "num_workers": lambda: data(num_workers=10**6),
    "embed_dim": lambda: Transformer(10**9, 1, 1, SinCosPositions()),
    "depth": lambda: Transformer(8, 10**9, 1, SinCosPositions()),
    "mlp_ratio": lambda: Transformer(8, 1, 1, SinCosPositions(), mlp_ratio=1e12),
    "num_registers": lambda: Transformer(8, 1, 1, SinCosPositions(), num_registers=10**12),
    "conv_layers": lambda: WaveformFrontEnd([(10**9, 10**9, 1)], 8),
    "100 layers": lambda: WaveformFrontEnd([(1, 1, 1)] * 10**5, 8),
    "n_fft": lambda: LogMel(n_fft=10**12),
    "n_mels": lambda: LogMel(n_mels=10**9),
    "n_bins": lambda: Gammatone(n_bins=10**9),
    "num_groups": lambda: SpanMasker(num_groups=10**9),
    "num_targets": lambda: MultiBlockMasker(num_targets=10**9),
    "f_min_hz": lambda: CQT(16000, 512, f_min_hz=1e-9, n_bins=1),
    "bins_per_octave": lambda: VQT(16000, 512, bins_per_octave=10**9),
}


def data(**settings: object) -> AudioDataModule:
    return AudioDataModule(**{"root": "x", "sample_rate": 16000, "crop_seconds": 1.0, **settings})


@pytest.mark.parametrize(("name", "build"), BUILDS.items(), ids=BUILDS)
def test_a_size_that_would_take_all_memory_is_refused_by_name(
    name: str, build: Callable[[], object]
):
    with pytest.raises(UserError, match=rf"{name}"):
        build()


def test_an_absurd_setting_of_a_run_ends_in_one_sentence(
    tiny_cli: Callable[..., JEPACLI], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises((UserError, SystemExit)):
        tiny_cli("wave", "--data.crop_seconds=1e12")
