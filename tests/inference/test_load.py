"""Encoders are loaded from runs, checkpoints, exported folders and the Hub, or refused by name."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import read_encoder, save_encoder
from jepa_audio.inference.load import load_encoder
from jepa_audio.training.jepa import JEPA


@pytest.fixture(scope="module", params=["wave", "mel"])
def run(request: pytest.FixtureRequest, tiny_cli: Callable) -> tuple[Path, JEPA]:
    """(folder of a run, the model at its end)."""
    cli = tiny_cli(request.param, "--trainer.max_steps=2", "--model.seed=5")
    cli.trainer.fit(cli.model, cli.datamodule)
    return Path(cli.trainer.checkpoint_callback.dirpath).parent, cli.model


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(1, 1, 700, generator=torch.Generator().manual_seed(0))


def assert_equal(ours: Encoder, other: Encoder, clip: torch.Tensor) -> None:
    pairs = zip(ours.encode_batch(clip).layers, other.encode_batch(clip).layers, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("which", ["context", "target", "random"])
def test_a_folder_gives_the_encoder_that_was_saved(
    run: tuple[Path, JEPA], clip: torch.Tensor, tmp_path: Path, which: str
):
    encoder = load_encoder(run[0], which)
    again = load_encoder(
        str(save_encoder(encoder, tmp_path / "out")), which if which == "target" else "context"
    )
    assert_equal(again, encoder, clip)
    assert again.window_samples == 500
    assert again.which == which
    assert (again.sample_rate, again.num_channels) == (1000, 1)
    # Saved again, from the folder and from the model in memory.
    assert_equal(read_encoder(save_encoder(again, tmp_path / "again")), encoder, clip)
    if which != "random":
        saved = save_encoder(Encoder.from_jepa(run[1], 500, which), tmp_path / "memory")
        assert_equal(read_encoder(saved), encoder, clip)


def test_the_last_checkpoint_of_a_run_is_used_and_named(
    run: tuple[Path, JEPA], clip: torch.Tensor, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        encoder = load_encoder(str(run[0]))
    assert "the encoder of last.ckpt is used" in caplog.text
    assert encoder.source.endswith("last.ckpt, step 2")
    assert_equal(encoder, Encoder.from_jepa(run[1], 500), clip)


def test_the_first_load_of_a_run_does_not_import_lightning(run: tuple[Path, JEPA]):
    code = (
        "import sys; from jepa_audio import load_encoder; "
        f"load_encoder({str(run[0])!r}); print('lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_random_twin_of_a_folder_needs_no_run(run: tuple[Path, JEPA], clip, tmp_path: Path):
    folder = save_encoder(load_encoder(run[0]), tmp_path)
    assert_equal(
        load_encoder(folder, "random", random_seed=5), load_encoder(run[0], "random"), clip
    )


def test_the_other_encoder_of_a_model_is_not_in_its_folder(run: tuple[Path, JEPA], tmp_path: Path):
    folder = save_encoder(load_encoder(run[0]), tmp_path)
    with pytest.raises(UserError, match="holds the context encoder, not the target encoder"):
        load_encoder(folder, "target")


def test_a_name_of_the_hub_is_read_from_its_cache(
    run: tuple[Path, JEPA], clip: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A local stand-in in the layout of the cache of huggingface_hub; nothing is downloaded."""
    import huggingface_hub.constants as settings

    stored = tmp_path / "models--user--tiny.wave"
    save_encoder(load_encoder(run[0]), stored / "snapshots" / ("a" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert_equal(load_encoder("user/tiny.wave"), load_encoder(run[0]), clip)
    with pytest.raises(
        MissingFileError, match="and the Hugging Face Hub cannot be reached, nor does"
    ):
        load_encoder("user/other")


def test_what_is_no_encoder_is_refused_with_the_nearest_names(
    run: tuple[Path, JEPA], tmp_path: Path
):
    (tmp_path / "runs").mkdir()
    shutil.copytree(run[0], tmp_path / "runs" / "wavjepa")
    with pytest.raises(MissingFileError, match=r"no encoder at .*wavjepe; did you mean 'wavjepa'"):
        load_encoder(tmp_path / "runs" / "wavjepe")
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*lst\.ckpt; did you mean 'last"):
        load_encoder(tmp_path / "runs" / "wavjepa" / "checkpoints" / "lst.ckpt")
    with pytest.raises(
        UserError, match=r"neither the folder of a run.*it has runs: give .*wavjepa"
    ):
        load_encoder(tmp_path / "runs")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "model.safetensors").touch()
    for name in ("config.yaml", "clip.wav"):
        (tmp_path / "runs" / "wavjepa" / name).write_text("model:")
        with pytest.raises(UserError, match=r"is not a checkpoint .*: give the folder .*wavjepa$"):
            load_encoder(tmp_path / "runs" / "wavjepa" / name)
    (tmp_path / "names" / ".x.lock").mkdir(parents=True)
    with pytest.raises(MissingFileError, match=r"no encoder at .*names/nowhere$"):
        load_encoder(tmp_path / "names" / "nowhere")
    with pytest.raises(UserError, match=r"`what` \(None\) must be the path of a run"):
        getattr(load_encoder, "__wrapped__", load_encoder)(None)
    with pytest.raises(UserError, match=r"`jepa-audio import LAYOUT .*published` converts"):
        load_encoder(tmp_path / "published")
    with pytest.raises(UserError, match="neither the folder of a run"):
        (tmp_path / "empty").mkdir()
        load_encoder(tmp_path / "empty")


def test_a_damaged_or_foreign_folder_is_refused_in_one_sentence(
    run: tuple[Path, JEPA], tmp_path: Path
):
    folder = save_encoder(load_encoder(run[0]), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def refused(message: str, **settings: object) -> None:
        changed = config["jepa_audio"] | settings
        (folder / "config.json").write_text(json.dumps({"jepa_audio": changed}))
        with pytest.raises(UserError, match=message):
            load_encoder(folder)

    refused("`window_samples`", window_samples="500")
    refused(r"`front_end.class_path` names `os\.system`", front_end={"class_path": "os.system"})
    refused("`encoder` is missing", encoder=None)
    refused("`sample_rate` .* differs", sample_rate=44100)
    weights.write_bytes(whole[:500])
    refused(r"model\.safetensors is damaged")
    tensors = load_file_of(whole, tmp_path)
    save_file({**tensors, "encoder.other": torch.zeros(2)}, weights)
    refused(r"do not fit the model:\s+unknown \(1\): encoder\.other")


def load_file_of(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole.safetensors").write_bytes(content)
    return load_file(folder / "whole.safetensors")


def test_an_encoder_without_a_configuration_is_not_saved(
    tiny_jepa: Callable[..., JEPA], tmp_path: Path
):
    jepa = tiny_jepa("wave")
    encoder = Encoder(jepa.front_end, jepa.encoder, 500)
    with pytest.raises(UserError, match="made from modules without a configuration"):
        save_encoder(encoder, tmp_path)
