"""Every file under configs/ trains two steps, at reduced width and with a shorter warm-up."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from jsonargparse import strip_meta

CONFIGS = Path(__file__).parents[2] / "configs"
# Layers over a recipe, which train on two processes in tests/training/test_sharding.py.
STRATEGIES = [CONFIGS / "fsdp.yaml"]
RECIPES = sorted(
    {path for folder in (".", "demo", "small") for path in CONFIGS.glob(f"{folder}/*.yaml")}
    - {*STRATEGIES}
)
SIZES = sorted(CONFIGS.glob("pupujepa/*.yaml"))
FRONT_ENDS = sorted(CONFIGS.glob("front_ends/*.yaml"))
TARGETS = sorted(CONFIGS.glob("target_front_ends/*.yaml"))
SMALL = (
    "--model.encoder.embed_dim=24",
    "--model.encoder.num_heads=2",
    "--model.encoder.depth=1",
    "--model.predictor.trunk.embed_dim=16",
    "--model.predictor.trunk.num_heads=2",
    "--model.predictor.trunk.depth=1",
    "--data.batch_size=2",
    "--data.min_seconds=0.1",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_steps=2",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


@pytest.fixture(autouse=True)
def few_measured_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the spectrogram on 12 clips; tests/training/test_normalization.py has all."""
    monkeypatch.setattr("jepa_audio.training.normalization.NUM_CLIPS", 12)


def train_two_steps(wavs: Path, run_dir: Path, *settings: str, top_k: int = 1) -> None:
    from jepa_audio.cli.trainer import JEPACLI

    has_top_k = any(
        "top_k: " in Path(word.partition("=")[2]).read_text()
        for word in settings
        if "--config" in word
    )
    last = (f"--model.targets.top_k={top_k}",) if has_top_k else ()
    cli = JEPACLI(
        [*settings, f"--data.root={wavs}", f"--run_dir={run_dir}", *last, *SMALL], run=False
    )
    before = cli.model.encoder.blocks[0].attn.qkv.weight.detach().clone()
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert not torch.equal(cli.model.encoder.blocks[0].attn.qkv.weight, before)
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_trains(config: Path, wavs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jepa_audio.data.scenes.rooms import write_rooms

    monkeypatch.setattr(
        "jepa_audio.data.scenes.scenes.write_rooms", partial(write_rooms, num_rooms=1)
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    narrow = ("--model.front_end.init_args.conv_layers=[[8,10,5],[8,8,4],[8,4,4],[8,4,4]]",)
    is_wave = "WaveformFrontEnd" in config.read_text()
    train_two_steps(wavs, tmp_path, f"--config={config}", *(narrow if is_wave else ()))


@pytest.mark.parametrize("size", SIZES, ids=lambda path: path.stem)
def test_a_size_has_the_sizes_of_its_name_and_trains(size: Path, wavs: Path, tmp_path: Path):
    import yaml

    sizes = {
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "large": (1024, 24, 16),
        "huge": (1280, 32, 16),
        "giant": (1408, 40, 16),
    }
    encoder = yaml.safe_load(size.read_text())["model"]["encoder"]
    assert (encoder["embed_dim"], encoder["depth"], encoder["num_heads"]) == sizes[size.stem]
    base = f"--config={CONFIGS / 'pupujepa.yaml'}"
    train_two_steps(wavs, tmp_path, base, f"--config={size}", "--data.crop_seconds=2.56")


@pytest.mark.parametrize("front_end", FRONT_ENDS, ids=lambda path: path.stem)
def test_one_option_replaces_the_front_end(front_end: Path, wavs: Path, tmp_path: Path):
    is_wave = front_end.stem == "waveform"
    base = "wavjepa.yaml" if is_wave else "pupujepa.yaml"
    narrow = (
        ("--model.front_end.init_args.conv_layers=[[8,10,5],[8,8,4],[8,4,4]]",) if is_wave else ()
    )
    train_two_steps(
        wavs,
        tmp_path,
        f"--config={CONFIGS / 'demo' / base}",
        f"--model.front_end={front_end}",
        *narrow,
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_two_options_make_a_spectrogram_the_target(target: Path, wavs: Path, tmp_path: Path):
    train_two_steps(
        wavs,
        tmp_path,
        f"--config={CONFIGS / 'demo' / 'wavjepa.yaml'}",
        f"--model.target_front_end={target.stem}",
        "--model.front_end.init_args.conv_layers=[[8,20,10],[8,8,4],[8,4,4],[8,2,2]]",
        top_k=0,
    )


def test_one_option_replaces_the_waveform_by_a_spectrogram(wavs: Path, tmp_path: Path):
    mel = f"--model.front_end={CONFIGS / 'front_ends' / 'log_mel.yaml'}"
    train_two_steps(wavs, tmp_path, f"--config={CONFIGS / 'demo' / 'wavjepa.yaml'}", mel)


@pytest.mark.parametrize("part", [*FRONT_ENDS, *TARGETS], ids=lambda path: path.stem)
def test_a_checkpoint_may_have_the_settings_of_a_front_end(part: Path):
    from jepa_audio.class_paths import check_class_paths
    from jepa_audio.cli.trainer import JEPACLI

    option = part.parent.name.removesuffix("s")
    settings = (f"--model.{option}={part}", "--model.targets.top_k=0", "--data.root=nowhere")
    demo = f"--config={CONFIGS / 'demo' / 'wavjepa.yaml'}"
    cli = JEPACLI([demo, *settings, "--trainer.logger=false"], run=False)
    stored = {k: v for k, v in cli.model.hparams.items() if k != "_instantiator"}
    assert stored[option]["class_path"].startswith("jepa_audio.")
    check_class_paths(stored, "last.ckpt")


@pytest.mark.parametrize("part", [*FRONT_ENDS, *TARGETS], ids=lambda path: path.stem)
def test_a_configuration_file_names_a_front_end_as_the_command_line_does(
    part: Path, tmp_path: Path
):
    from jepa_audio.cli.trainer import JEPACLI

    option = part.parent.name.removesuffix("s")
    own = tmp_path / "own.yaml"
    own.write_text(f"model: {{{option}: {part.stem}, targets: {{top_k: 0}}}}")
    demo = [f"--config={CONFIGS / 'demo' / 'wavjepa.yaml'}", "--trainer.logger=false"]
    by_file, by_option = (
        strip_meta(JEPACLI([*demo, *given, "--data.root=nowhere"], run=False).config.model[option])
        for given in (
            (f"--config={own}",),
            (f"--model.{option}={part.stem}", "--model.targets.top_k=0"),
        )
    )
    assert by_file == by_option


def test_recipes_have_at_most_50_lines_of_at_most_100_columns():
    for path in [*RECIPES, *STRATEGIES, *SIZES, *FRONT_ENDS, *TARGETS]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 50, path
        assert max(map(len, lines)) <= 100, path


def millions(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


def on_the_meta_device(*configs: str):
    from jepa_audio.cli.trainer import JEPACLI

    files = [f"--config={CONFIGS / name}" for name in configs]
    with torch.device("meta"):
        return JEPACLI([*files, "--data.root=nowhere", "--trainer.logger=false"], run=False).model


def test_wavjepa_has_the_published_numbers_of_parameters_and_tokens():
    jepa = on_the_meta_device("wavjepa.yaml")
    assert next(jepa.parameters()).is_meta
    assert millions(jepa.encoder) == millions(jepa.target_encoder) == 85.1
    assert millions(jepa.predictor.trunk) == 21.3
    assert millions(jepa.front_end.stacks) == 3.7
    assert jepa.front_end.grid(32_160).num_tokens == 200


@pytest.mark.parametrize(
    ("size", "published"),
    [("tiny", 7.1), ("small", 28.4), ("base", 113.4), ("large", 403.1), ("huge", 839.6)],
)
def test_pupujepa_has_the_published_numbers_of_parameters_and_tokens(size: str, published: float):
    own = [] if size == "base" else [f"pupujepa/{size}.yaml"]
    jepa = on_the_meta_device("pupujepa.yaml", *own)
    assert millions(jepa.encoder) == published
    assert jepa.front_end.spectrogram.num_frames(245_760) == 1024
    grid = jepa.front_end.grid(245_760)
    assert (grid.num_freq, grid.num_time) == (8, 256)


def test_wavjepa_nat_has_a_stack_and_tokens_for_each_ear():
    jepa = on_the_meta_device("wavjepa_nat.yaml")
    assert millions(jepa.front_end.stacks) == 7.4
    assert jepa.front_end.grid(32_160).num_tokens == 400


def test_speech_jepa_has_tokens_at_50_hz():
    front_end = on_the_meta_device("speech_jepa.yaml").front_end
    assert front_end.sample_rate / front_end.stride == 50
    assert front_end.receptive_field == 400  # of wav2vec 2.0: 25 ms


def test_audio_jepa_has_16_by_16_patches_of_ten_seconds():
    grid = on_the_meta_device("audio_jepa.yaml").front_end.grid(320_000)
    assert (grid.num_freq, grid.num_time) == (6, 32)
