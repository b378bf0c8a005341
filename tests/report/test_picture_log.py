"""Pictures in loggers during training."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_audio.errors import UserError
from jepa_audio.report.picture_log import PictureLog, encode_clips, singular_values
from jepa_audio.training.watching.latent_statistics import rank_me

OFTEN = ("--pictures.every_n_steps=2", "--pictures.num_clips=3", "--trainer.max_steps=4")
NAMES = {f"pictures/{name}" for name in ("masks", "attention", "latents", "singular_values")}


class StubWandb(Logger):
    """Takes images as Lightning's `WandbLogger` does."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[tuple[str, int], np.ndarray] = {}

    @property
    def name(self) -> str:
        return "stub"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params, *args, **kwargs) -> None: ...

    def log_metrics(self, metrics, step=None) -> None: ...

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        (image,) = images
        assert step is not None
        self.images[key, step] = image


@pytest.mark.parametrize("flavour", ["wave", "mel"])
@pytest.mark.parametrize("valid_share", [0.0, 0.3])
def test_wandb_and_tensorboard_show_the_same_images_at_every_interval(
    tiny_cli, fit, caplog, flavour, valid_share
):
    caplog.set_level(logging.INFO)
    cli = tiny_cli(flavour, *OFTEN, "--trainer.logger=true", f"--data.valid_share={valid_share}")
    stub = StubWandb()
    cli.trainer.loggers += [stub]
    fit(cli)
    assert stub.images.keys() == {(name, step) for name in NAMES for step in (2, 4)}
    for image in stub.images.values():
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.std() > 1
    folder = Path(cli.trainer.default_root_dir) / "tensorboard" / "version_0"
    events = EventAccumulator(str(folder), {"images": 0})
    events.Reload()
    assert {
        (name, event.step) for name in events.Tags()["images"] for event in events.Images(name)
    } == stub.images.keys()
    shown = events.Images("pictures/masks")[0]
    assert (shown.height, shown.width) == stub.images["pictures/masks", 2].shape[:2]
    lines = [line for line in caplog.messages if "pictures drawn in" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]


def test_pictures_of_a_learned_spectrogram_are_drawn(tiny_cli, fit):
    learned = "jepa_audio.steps.front_ends.filterbank.LearnedFilterbank"
    front_end = f"--model.front_end.spectrogram={learned}"
    cli = tiny_cli("mel", *OFTEN, "--trainer.logger=true", front_end)
    stub = StubWandb()
    cli.trainer.loggers += [stub]
    fit(cli)
    assert {name for name, _ in stub.images} == NAMES
    assert cli.model.encoder.training
    assert any(p.requires_grad for p in cli.model.front_end.spectrogram.parameters())


def test_training_is_the_same_with_and_without_pictures(tiny_cli, fit):
    settings = "--trainer.max_steps=4", "--model.encoder.drop_path=0.3", "--trainer.logger=true"
    without = fit(tiny_cli("wave", *settings, "--pictures.every_n_steps=0"))
    assert without == fit(tiny_cli("wave", *settings, *OFTEN))


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_run(tiny_cli, fit, monkeypatch, caplog):
    monkeypatch.setattr(
        "jepa_audio.report.picture_log.encode_clips",
        lambda *_: (torch.ones(3, 4), torch.full((3, 4), torch.nan)),
    )
    fit(tiny_cli("wave", *OFTEN, "--trainer.logger=true"))
    assert "step 2: no pictures: latents are not finite" in caplog.messages


def test_nothing_is_drawn_without_a_logger_that_shows_images(tiny_cli, fit, monkeypatch):
    monkeypatch.setattr(PictureLog, "_draw", None)
    fit(tiny_cli("wave", *OFTEN))
    fit(tiny_cli("wave", "--trainer.max_steps=4", "--trainer.logger=true"))  # not due


def test_latents_are_those_of_complete_clips(tiny_jepa, batch):
    jepa = tiny_jepa("mel").eval()
    tokens, clips = encode_clips(jepa, batch)
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    latents = jepa.encoder(jepa.front_end(batch.waveform), grid)
    torch.testing.assert_close(clips, latents.mean(dim=1))
    torch.testing.assert_close(tokens, latents.flatten(0, 1))


def test_the_spectrum_gives_rank_me():
    latents = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    shares = singular_values(latents)
    assert math.isclose(np.exp(-(shares * np.log(shares)).sum()), rank_me(latents), rel_tol=1e-4)
    assert np.isfinite(singular_values(torch.zeros(4, 3))).all()


@pytest.mark.parametrize("settings", [{"every_n_steps": -1}, {"num_clips": 2}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"`{next(iter(settings))}`"):
        PictureLog(**settings)
