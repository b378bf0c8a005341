"""An exported folder gives the tokens of the encoder, with transformers alone."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_audio.cli.main import main
from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import save_encoder
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop.hugging_face import MODEL_FILE, export_hugging_face
from tests.interop.small_encoders import (
    BY_OCTAVES,
    CASES,
    FAST,
    WINDOW,
    cases,
    clips,
    folder_of,
    small_encoder,
)

# Shorter than one token, below, as long as, and longer than a training crop.
LENGTHS = (16_000, 12_345, WINDOW, 16_000, 200, 75_001)


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Encoder]]:
    """Folder and encoder of every case."""
    root = tmp_path_factory.mktemp("exported")
    made = {}
    for name in CASES if request.config.getoption("--runslow") else FAST:
        encoder = small_encoder(name)
        folder = export_hugging_face(encoder, root / name, licence="cc-by-4.0")
        made[name] = folder, encoder
    return made


@pytest.fixture(scope="module")
def results(
    exported: dict[str, tuple[Path, Encoder]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """What another process computes, which can import neither this package nor Lightning."""
    pytest.importorskip("transformers")
    for folder, encoder in exported.values():
        stored = enumerate(clips(encoder.num_channels, LENGTHS))
        save_file({str(i): clip for i, clip in stored}, f"{folder}.clips")
    script = Path(__file__).with_name("load_without_package.py")
    folders = [str(folder) for folder, _ in exported.values()]
    command = [sys.executable, "-I", str(script), str(folder_of("transformers")), *folders]
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return {name: load_file(f"{folder}.results") for name, (folder, _) in exported.items()}


def rounding(name: str) -> float:
    return 1e-4 if name in BY_OCTAVES else 1e-5


@pytest.mark.parametrize("name", cases())
def test_every_clip_of_a_padded_batch_has_the_tokens_of_the_encoder(
    exported: dict[str, tuple[Path, Encoder]], results: dict[str, dict[str, Tensor]], name: str
):
    encoder, found = exported[name][1], results[name]
    for i, clip in enumerate(clips(encoder.num_channels, LENGTHS)):
        expected = encoder.encode_batch(clip[None])
        num_freq = expected.layers[0].shape[2]
        count = int(found["mask"][i].sum())
        assert found["mask"][i, :count].all()
        for j, layer in enumerate(expected.layers):
            ours = layer[0].flatten(0, 1)
            theirs = found[f"layer/{j}"][i, :count]
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=rounding(name))
            assert not found[f"layer/{j}"][i, count:].any()
        times = expected.times[0].repeat_interleave(num_freq)
        torch.testing.assert_close(found["times"][i, :count], times)


@pytest.mark.parametrize("name", cases())
def test_padding_halves_and_saving_change_no_more_than_rounding(
    results: dict[str, dict[str, Tensor]], name: str
):
    found = results[name]
    last = found["layer/2"]
    for i in range(len(LENGTHS)):
        alone = found[f"alone/{i}"]
        ours = last[i, : len(alone)]
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=rounding(name))
    assert torch.equal(found["saved"], last)
    spread = last.std()
    assert (found["half/torch.float16"] - last).std() < 0.01 * spread
    assert (found["half/torch.bfloat16"] - last).std() < 0.05 * spread
    assert torch.equal(found["saved_half"], found["half/torch.bfloat16"])


@pytest.mark.parametrize("name", FAST)
def test_the_encoder_is_loaded_from_the_folder(
    exported: dict[str, tuple[Path, Encoder]], name: str
):
    folder, encoder = exported[name]
    (clip,) = clips(encoder.num_channels, (16_000,))
    again = load_encoder(folder)
    assert again.window_samples == WINDOW
    for a, b in zip(
        again.encode_batch(clip[None]).layers, encoder.encode_batch(clip[None]).layers, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", cases())
def test_the_file_has_only_what_the_encoder_needs_and_is_formatted(
    exported: dict[str, tuple[Path, Encoder]], name: str
):
    folder, _ = exported[name]
    file = folder / f"{MODEL_FILE}.py"
    text = file.read_text()
    assert not re.search(r"^\s*(from|import) (jepa_audio|lightning|jaxtyping)", text, re.MULTILINE)
    assert ("nnAudio" in text) is (name in ("cqt", "cqt_by_octaves", "vqt", "gammatone"))
    assert ("WaveformFrontEnd" in text) is (name in ("waveform", "waveform_local", "two_ears"))
    assert ("class SinCosPositions" in text) is (
        name in ("waveform", "two_ears", "vqt", "gammatone")
    )
    for check in (["format", "--check"], ["check", "--select", "E,F,I", "--ignore", "F722"]):
        options = ["--isolated", "--no-cache", "--line-length", "100", "--target-version", "py311"]
        command = [sys.executable, "-m", "ruff", *check, *options, str(file)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout


def test_no_file_has_a_path_of_this_machine(exported: dict[str, tuple[Path, Encoder]]):
    folder, _ = exported["log_mel"]
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".md", ".py")]
    assert len(files) == 4
    assert not [path.name for path in files if "/home" in path.read_text()]
    config = json.loads((folder / "config.json").read_text())
    assert config["jepa_audio"]["source"] == "log_mel, step 600"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: cc-by-4.0\n" in card
    assert "optimizer steps | 600" in card


def test_the_extractor_refuses_what_is_no_clip():
    pytest.importorskip("transformers")
    from jepa_audio.interop.transformers_model import JEPAAudioFeatureExtractor

    extractor, good = JEPAAudioFeatureExtractor(), np.zeros(100, np.float32)
    wrong: list[tuple[object, str]] = [
        ("a.wav", "is a text, not a clip"),
        (["a.wav"], "is a text, not a clip"),
        ({"array": good}, "dict with the keys array"),
        ([good, {"array": good}], "dict with the keys array"),
        ([], "has no clip"),
        ([good, good[:0]], "clip 1 has 0 samples"),
        ([good, good * np.nan], "clip 1 has samples that are not finite"),
        (good + 20_000, "clip 0 has the peak 20000"),
        ([[None, 1.0]], "must be numbers"),
    ]
    for audio, message in wrong:
        with pytest.raises(UserError, match=message):
            extractor(audio, sampling_rate=16_000)
    assert extractor([good, [0.5, -0.5]], sampling_rate=16_000)["input_values"][1].shape == (100,)


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_hugging_face(small_encoder("waveform"), tmp_path)
    with pytest.raises(UserError, match="must be an identifier"):
        export_hugging_face(small_encoder("waveform"), tmp_path / "out", licence="a: b")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_of_a_fine_tuned_encoder_keeps_its_origin(tmp_path: Path):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{data: {root: /home/me/notes}, model: {ema: {start: 0.9}}}")
    source = f"{run}/checkpoints/last.ckpt, step 600, fine-tuned in the mode last_2 on tones"
    folder = tmp_path / "a (b)" / "encoder"
    save_encoder(small_encoder("waveform", source), folder)
    (run / "config.yaml").unlink()
    first = export_hugging_face(load_encoder(folder), tmp_path / "first")
    again = export_hugging_face(load_encoder(first), tmp_path / "again")
    for exported in (first, again):
        card = (exported / "README.md").read_text()
        assert "# mine, fine-tuned on tones\n" in card
        assert "| corpus | notes |" in card
        assert "| optimizer steps | 600 |" in card
        assert "| fine-tuning | on tones, mode last_2 |" in card
        assert "| ema | `{start: 0.9}` |" in card
        stored = json.loads((exported / "config.json").read_text())["jepa_audio"]
        assert stored["source"] == "mine, step 600, fine-tuned in the mode last_2 on tones"
        assert "/home" not in json.dumps(stored)
    with pytest.raises(UserError, match="is a file, not a folder"):
        export_hugging_face(load_encoder(folder), first / "README.md" / "out")


def test_a_front_end_of_the_user_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "own_front_ends"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text("# Twice as loud.\nFACTOR = 2.0\n")
    (package / "loud.py").write_text(
        "from jepa_audio.steps.front_ends import WaveformFrontEnd\n"
        "from own_front_ends.scale import FACTOR\n\n\n"
        "class Loud(WaveformFrontEnd):\n"
        "    def forward(self, waveform):\n"
        "        return super().forward(waveform) * FACTOR\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = small_encoder("waveform")
    assert encoder.settings is not None
    settings = {
        **encoder.settings,
        "front_end": {**encoder.settings["front_end"], "class_path": "own_front_ends.loud.Loud"},
    }
    encoder.settings = settings
    folder = export_hugging_face(encoder, tmp_path / "out")
    text = (folder / f"{MODEL_FILE}.py").read_text()
    assert "class Loud(WaveformFrontEnd)" in text
    assert "FACTOR = 2.0" in text
    assert "import own_front_ends" not in text
    assert "from own_front_ends" not in text


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_the_command_exports_a_run_with_its_corpus_and_steps(
    flavour: str,
    tiny_cli: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    cli = tiny_cli(flavour, "--trainer.max_steps=2")
    cli.trainer.fit(cli.model, cli.datamodule)
    run = Path(cli.trainer.checkpoint_callback.dirpath).parent
    monkeypatch.chdir(tmp_path)
    main(["export", "hf", str(run), "-o", "out", "--license", "mit", "--which", "target"])
    assert "AutoModel.from_pretrained('out', trust_remote_code=True)" in capsys.readouterr().out
    card = Path("out/README.md").read_text()
    assert "| optimizer steps | 2 |" in card
    assert "| encoder | target encoder of the run" in card
    assert "license: mit" in card
    clip = torch.randn(1, 1, 700)
    ours, again = load_encoder(run, "target"), load_encoder("out", "target")
    for a, b in zip(ours.encode_batch(clip).layers, again.encode_batch(clip).layers, strict=True):
        assert torch.equal(a, b)
