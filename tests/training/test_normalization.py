"""The log spectrogram is normalised with measured numbers if the recipe states none."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.inference.load import load_encoder
from jepa_audio.training.normalization import NUM_CLIPS, MeasureNormalization, measure_normalization

UNKNOWN = ("--model.front_end.init_args.mean=null", "--model.front_end.init_args.std=null")


class Inputs(Callback):
    """Stores the images of the training batches."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.images.append(pl_module.front_end.image(batch.waveform))


def numbers(front_end: object) -> tuple[float, float]:
    return front_end.mean, front_end.std


def saved_numbers(config: Path) -> tuple[float, float]:
    settings = yaml.safe_load(config.read_text())["model"]["front_end"]["init_args"]
    return settings["mean"], settings["std"]


def settings_of(tmp_path: Path, wavs: Path, *options: str) -> list[str]:
    """A command of a short run, with loggers, of a recipe without `mean` and `std`."""
    from tests.conftest import FLAVOURS

    recipe = tmp_path / "mel.yaml"
    recipe.write_text(FLAVOURS["mel"].replace("  logger: false\n", ""))
    return ["--config", str(recipe), f"--data.root={wavs}", *UNKNOWN, *options]


@pytest.mark.parametrize("target_front_end", ["shared", "momentum"])
def test_a_new_run_measures_them_and_its_input_has_mean_0_and_deviation_1(
    tiny_cli: Callable[..., JEPACLI], fit: Callable[..., dict], target_front_end: str
):
    cli = tiny_cli("mel", *UNKNOWN, f"--model.target_front_end={target_front_end}")
    inputs = Inputs()
    fit(cli, None, inputs)
    image = torch.cat(inputs.images)
    assert abs(float(image.mean())) < 0.1
    assert float(image.std()) == pytest.approx(1, abs=0.1)
    mean, std = numbers(cli.model.front_end)
    if cli.model.target_front_end is not None:
        assert numbers(cli.model.target_front_end) == (mean, std)
    again = tiny_cli("mel", *UNKNOWN).datamodule
    again.prepare_data()
    again.setup("fit")
    assert measure_normalization(cli.model.front_end, again, NUM_CLIPS) == (mean, std)


def test_configuration_checkpoint_and_encoder_have_the_numbers_and_a_resumed_run_keeps_them(
    tmp_path: Path, wavs: Path, caplog: pytest.LogCaptureFixture
):
    run = tmp_path / "run"
    options = settings_of(tmp_path, wavs, f"--run_dir={run}")
    with caplog.at_level(logging.INFO):
        main(["fit", *options, "--trainer.max_steps=2"])
    (line,) = [line for line in caplog.messages if line.startswith("the log spectrogram of")]
    mean, std = saved_numbers(run / "config.yaml")
    assert f"mean {mean:.4f}, std {std:.4f}" in line
    last = run / "checkpoints" / "last.ckpt"
    assert numbers(load_encoder(last).front_end) == (mean, std)
    caplog.clear()
    # The first commands of the run do not state the numbers, and other files are in the corpus.
    main(["validate", *options, f"--ckpt_path={last}"])
    main(["fit", *options, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert not [line for line in caplog.messages if "the log spectrogram" in line]
    assert saved_numbers(run / "config.yaml") == (mean, std)
    assert numbers(load_encoder(last).front_end) == (mean, std)
    main(["fit", *options, f"--run_dir={tmp_path / 'next'}", f"--weights={last}"])
    assert saved_numbers(tmp_path / "next" / "config.yaml") == (mean, std)


@pytest.mark.parametrize(
    ("mean", "std", "is_warned"), [(-3, 2, False), (0, 1, True), (-3, 9, True)]
)
def test_stated_numbers_are_kept_with_a_warning_if_they_are_those_of_other_audio(
    tiny_cli: Callable[..., JEPACLI],
    fit: Callable[..., dict],
    caplog: pytest.LogCaptureFixture,
    mean: float,
    std: float,
    is_warned: bool,
):
    front_end = "--model.front_end.init_args"
    cli = tiny_cli("mel", f"{front_end}.mean={mean}", f"{front_end}.std={std}")
    fit(cli)
    assert numbers(cli.model.front_end) == (mean, std)
    warned = [line for line in caplog.messages if f"states `mean` {mean} and `std` {std}" in line]
    assert len(warned) == is_warned


def test_only_rank_zero_measures_and_all_ranks_get_its_numbers(
    tiny_cli: Callable[..., JEPACLI], monkeypatch: pytest.MonkeyPatch
):
    cli = tiny_cli("mel", *UNKNOWN)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, MeasureNormalization)]
    received: list[object] = []

    def broadcast(measured: object) -> tuple[float, float]:
        received.append(measured)
        return -1.5, 2.5

    monkeypatch.setattr(Trainer, "is_global_zero", False)
    monkeypatch.setattr(cli.trainer.strategy, "broadcast", broadcast)
    callback.setup(cli.trainer, cli.model, "fit")
    assert received == [None]
    assert numbers(cli.model.front_end) == (-1.5, 2.5)
    assert cli.model.hparams["front_end"]["init_args"]["mean"] == -1.5


def test_padding_that_is_hidden_from_the_model_is_not_measured(
    tiny_cli: Callable[..., JEPACLI], wavs: Path
):
    def measured(*options: str) -> tuple[float, float]:
        data = tiny_cli("mel", "--data.crop_seconds=4", *options).datamodule
        data.prepare_data()
        data.setup("fit")
        front_end = tiny_cli("mel").model.front_end
        return measure_normalization(front_end, data, 24)

    with_padding, without = measured(), measured("--data.mask_padding=true")
    assert with_padding[0] < without[0] - 1  # silence
    assert with_padding[1] > without[1] + 1
