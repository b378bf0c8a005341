"""Targets of another front end: equal to loops, fixed, exact for padding, and absent from use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.errors import UserError
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop.convert import export_weights
from jepa_audio.steps.front_ends import SpectrogramFrontEnd, SpectrogramPatches, WaveformFrontEnd
from jepa_audio.steps.front_ends.alignment import aligned_tokens
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA
from tests.conftest import FLAVOURS, LOG_MEL, LOG_MEL_TARGETS
from tests.oracles.other_targets_literal import mean_squared_error, patch_targets

# Encoded by the target encoder: a fixed, random embedding of the frames.
EMBEDDED = (
    "--model.target_front_end={class_path: SpectrogramFrontEnd, init_args: {"
    f"{LOG_MEL}, patch_bands: 8}}}}",
)
WAVE = (
    "--model.target_front_end={class_path: WaveformFrontEnd, init_args: "
    "{conv_layers: [[8, 16, 8]], sample_rate: 1000}}",
    "--model.targets.view=clip",
)
LOCAL = (
    "--model.front_end.init_args.norm=layer",
    "--model.front_end.init_args.standardize=false",
)


@pytest.mark.parametrize("flavour", ["wave", "mel"])
@pytest.mark.parametrize("masks_per_clip", [1, 2])
def test_the_loss_for_normalised_log_mel_patches_equals_loops(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str, masks_per_clip: int
):
    settings = "--model.targets.normalization=none", f"--model.masks_per_clip={masks_per_clip}"
    jepa = tiny_jepa(flavour, *LOG_MEL_TARGETS, *settings)
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    source = jepa.fixed_front_end
    assert isinstance(source, SpectrogramPatches)
    assert output.target.shape[-1] == jepa.predictor.proj_out.out_features == 16
    columns = [patch_targets(source, jepa.front_end, clip) for clip in batch.waveform]
    rows = jepa.front_end.grid(500).num_freq
    expected = mean_squared_error(output.prediction, columns, masks, rows)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_targets_are_normalised_over_the_tokens_of_the_clip(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave", *LOG_MEL_TARGETS)
    assert jepa.targets.normalization == "instance"
    masks = jepa.draw_masks(batch)
    target = jepa(batch.waveform, masks).target
    for clip, waveform in enumerate(batch.waveform):
        values = patch_targets(jepa.fixed_front_end, jepa.front_end, waveform)
        values = (values - values.mean(0)) / (values.var(0, unbiased=False) + 1e-5).sqrt()
        for group in range(2):
            count = int(masks.targets.counts[clip, group])
            index = masks.targets.index[clip, group, :count]
            torch.testing.assert_close(
                target[clip, group, :count], values[index], rtol=1e-3, atol=1e-4
            )


def test_top_k_0_takes_the_tokens_of_the_own_front_end(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("mel", "--model.targets.top_k=0")
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    tokens = jepa.front_end(batch.waveform)[:, None]
    assert torch.equal(output.target, masks.targets.gather(tokens))
    assert not output.target.requires_grad


@pytest.mark.parametrize(("flavour", "settings"), [("wave", EMBEDDED), ("mel", WAVE)])
def test_the_target_encoder_encodes_the_tokens_at_the_columns_of_the_input(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str, settings: tuple[str, ...]
):
    jepa = tiny_jepa(flavour, *settings, "--model.targets.top_k=null")
    with torch.no_grad():
        jepa.target_encoder.norm.weight.mul_(2)
    masks = jepa.draw_masks(batch)
    tokens = aligned_tokens(jepa.fixed_front_end, jepa.front_end, batch.waveform)
    latents = jepa.target_encoder(tokens, jepa.front_end.grid(500))
    expected = jepa.targets.normalize(latents, None)[:, None]
    found = jepa(batch.waveform, masks).target
    expected = masks.targets.gather(expected.expand(-1, found.shape[1], -1, -1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [LOG_MEL_TARGETS, EMBEDDED])
def test_the_front_end_of_the_targets_is_never_trained(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, settings: tuple[str, ...]
):
    jepa = tiny_jepa("wave", *settings)
    fixed = jepa.fixed_front_end
    before = {name: value.clone() for name, value in fixed.state_dict().items()}
    assert len(before) == (0 if settings == LOG_MEL_TARGETS else 4)
    optimizer = torch.optim.SGD([p for p in jepa.parameters() if p.requires_grad], lr=1.0)
    jepa.loss(batch.waveform, jepa.draw_masks(batch)).backward()
    for name, parameter in jepa.named_parameters():
        is_trained = not name.startswith(("target_", "fixed_"))
        assert is_trained == parameter.requires_grad == (parameter.grad is not None), name
        assert not is_trained or parameter.grad.abs().sum() > 0, name
    optimizer.step()
    TargetEncoderEMA.update(jepa, 0.5)
    for name, value in fixed.state_dict().items():
        assert torch.equal(value, before[name])
    assert jepa.target_front_end is None


def test_the_weights_of_the_other_parts_do_not_depend_on_it(tiny_jepa: Callable[..., JEPA]):
    plain, other = tiny_jepa("wave"), tiny_jepa("wave", *EMBEDDED)
    weights = other.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights[name], value), name
    again = tiny_jepa("wave", *EMBEDDED, "--model.seed=1").state_dict()
    name = "fixed_front_end.proj.weight"
    assert not torch.equal(again[name], weights[name])


@pytest.mark.parametrize("settings", [LOG_MEL_TARGETS, EMBEDDED])
def test_one_batch_is_overfitted(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, settings: tuple[str, ...]
):
    wide = "--model.encoder.embed_dim=32", "--model.predictor.trunk.embed_dim=32"
    jepa = tiny_jepa("wave", *settings, *wide)
    masks = jepa.draw_masks(batch)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = jepa.loss(batch.waveform, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        TargetEncoderEMA.update(jepa, 0.999)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_padding_of_a_clip_has_no_influence(tiny_jepa: Callable[..., JEPA], batch: AudioBatch):
    jepa = tiny_jepa("wave", *LOG_MEL_TARGETS, *LOCAL)
    lengths = torch.tensor([500, 240, 310, 495])
    batch = batch._replace(num_samples=lengths)
    masks = jepa.draw_masks(batch)
    assert masks.present is not None
    loss = jepa.loss(batch.waveform, masks)
    other = batch.waveform.clone()
    for clip, length in enumerate(lengths.tolist()):
        other[clip, :, length:] = 100.0
    torch.testing.assert_close(jepa.loss(other, masks), loss)
    # The front end of the input alone would keep more columns.
    full = jepa.front_end.columns(lengths)
    assert (jepa.columns(500)(lengths) <= full).all()
    assert (jepa.columns(500)(lengths) < full).any()


class Alarms(Callback):
    """Stores the metrics of each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step > 0:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        names = ("collapse/alarm", "train/loss_nearest_context", "train/loss_mean_target")
        self.metrics.append({name: float(trainer.callback_metrics[name]) for name in names})


@pytest.mark.parametrize("settings", [LOG_MEL_TARGETS, EMBEDDED])
def test_a_run_with_fixed_targets_raises_no_alarm_and_its_encoder_is_used_without_them(
    tiny_cli: Callable[..., JEPACLI], fit: Callable[..., dict], settings: tuple[str, ...], tmp_path
):
    cli = tiny_cli("wave", *settings, "--monitor.every_n_steps=1")
    alarms = Alarms()
    fit(cli, None, alarms)
    assert len(alarms.metrics) == 6
    assert {metrics["collapse/alarm"] for metrics in alarms.metrics} == {0.0}
    assert all(torch.tensor([*metrics.values()]).isfinite().all() for metrics in alarms.metrics)
    last = Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt"
    clip = torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(0))
    for which, encoder in {
        "context": cli.model.encoder,
        "target": cli.model.target_encoder,
    }.items():
        loaded = load_encoder(last, which)
        assert isinstance(loaded.front_end, WaveformFrontEnd)
        assert not [name for name in loaded.state_dict() if "fixed" in name]
        tokens = cli.model.front_end.eval()(clip)
        expected = encoder.eval()(tokens, cli.model.front_end.grid(500))
        found = loaded.encode_batch(clip).layers[-1].flatten(1, 2)
        torch.testing.assert_close(found, expected)
    name = type(cli.model.fixed_front_end).__name__
    with pytest.raises(UserError, match=f"has no `target_front_end: {name}`"):
        export_weights("wavjepa", last, tmp_path)


def test_the_numbers_of_the_targets_spectrogram_are_measured_saved_and_kept(
    wavs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    recipe, run = tmp_path / "wave.yaml", tmp_path / "run"
    recipe.write_text(FLAVOURS["wave"].replace("  logger: false\n", ""))
    unknown = [word.replace("mean: -3.0, std: 2.0", "mean: null, std: null") for word in EMBEDDED]
    options = ["--config", str(recipe), f"--data.root={wavs}", f"--run_dir={run}", *unknown]
    with caplog.at_level(logging.INFO):
        main(["fit", *options, "--trainer.max_steps=2"])
    (line,) = [line for line in caplog.messages if "spectrogram of 256 training clips" in line]
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]["target_front_end"]
    mean, std = settings["init_args"]["mean"], settings["init_args"]["std"]
    assert line == (
        f"the targets' spectrogram of 256 training clips has mean {mean:.4f}, std {std:.4f}: they "
        "become `mean` and `std` of the target front end and its configuration"
    )
    # With the file that the run has written, and with the command that does not state the numbers.
    last = run / "checkpoints" / "last.ckpt"
    main(["validate", "--config", str(run / "config.yaml"), f"--ckpt_path={last}"])
    main(["fit", *options, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert len([line for line in caplog.messages if "the targets' spectrogram" in line]) == 1
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]["target_front_end"]
    assert config == settings


def test_settings_that_do_not_fit_are_refused_with_a_sentence(tiny_cli: Callable[..., JEPACLI]):
    with pytest.raises(UserError, match=r"tokens of width 16 .* set `targets.top_k` to 0"):
        tiny_cli(
            "wave", LOG_MEL_TARGETS[0], "--model.targets.top_k=1", "--model.encoder.embed_dim=32"
        )
    other_rate = LOG_MEL_TARGETS[0].replace("sample_rate: 1000", "sample_rate: 2000")
    with pytest.raises(UserError, match=r"`target_front_end` has `sample_rate` 2000"):
        tiny_cli("wave", other_rate, *LOG_MEL_TARGETS[1:])
    with pytest.raises(UserError, match=r"`top_k` \(-1\) must be at least 0"):
        tiny_cli("wave", "--model.targets.top_k=-1")
    with pytest.raises(UserError, match=r"`target_front_end` \(SpectrogramPatches\) would have no"):
        tiny_cli("wave", *LOG_MEL_TARGETS, "--model.target_gradient=true")
    assert isinstance(tiny_cli("wave", *EMBEDDED).model.fixed_front_end, SpectrogramFrontEnd)
