"""Measuring changes nothing, and only a collapse raises the alarm."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.watching.collapse_monitor import (
    CollapseMonitor,
    ema_distance,
    encode_complete_clips,
    latent_metrics,
)

FLAVOURS = ["wave", "mel"]
HEALTHY = {"wave": 3e-4, "mel": 3e-3}
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_measuring_does_not_change_modes_or_random_state(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour, "--model.encoder.drop_path=0.5").train()
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    random_state = torch.get_rng_state()
    modes = [module.training for module in jepa.modules()]
    with torch.no_grad():
        first, second = (latent_metrics(jepa, batch, masks, output) for _ in range(2))
    assert first == second
    assert all(torch.tensor(value).isfinite() for value in first.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in jepa.modules()] == modes


def test_complete_clips_are_compared_without_their_padding(tiny_jepa: Callable[..., JEPA]):
    front_end = "--model.front_end.init_args.norm=layer", "--model.front_end.standardize=false"
    jepa = tiny_jepa("wave", *front_end)
    lengths = torch.tensor([500, 300] * 10)
    batch = AudioBatch(torch.randn(20, 1, 500), torch.arange(20), lengths)
    latents, valid = encode_complete_clips(jepa, batch, jepa.draw_masks(batch))
    assert len(latents) == 10, "at most 16 evenly spaced clips"
    assert valid.all(), "the clips at even rows have no padding"
    batch = AudioBatch(batch.waveform[:4], batch.row[:4], lengths[:4])
    _, valid = encode_complete_clips(jepa, batch, jepa.draw_masks(batch))
    assert valid.sum(1).tolist() == jepa.front_end.columns(lengths[:4]).tolist()


def test_the_distance_of_the_momentum_copies_is_relative_to_the_weights(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("wave")
    assert ema_distance(jepa) == 0
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():
            parameter.mul_(1.25)
    assert ema_distance(jepa) == pytest.approx(0.25, rel=1e-4)
    TargetEncoderEMA.update(jepa, 0.0)
    assert ema_distance(jepa) == pytest.approx(0, abs=1e-6)


class Replaced(torch.nn.Module):
    """A front end whose tokens keep only a share of what differs between clips."""

    def __init__(
        self, front_end: torch.nn.Module, share: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.front_end, self.share, self.generator = front_end, share, generator
        self.positions: torch.Tensor | None = None

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("front_end"), name)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        tokens = self.front_end(waveform)
        if self.positions is None:
            self.positions = torch.randn(tokens.shape[1:], generator=self.generator)
        return self.positions + self.share * (tokens - tokens.mean(0))


RECIPES = [
    "wavjepa",
    "pupujepa",
    "audio_jepa",
    "speech_jepa",
    "demo/wavjepa",
    "demo/pupujepa",
    "demo/pupujepa --model.front_end cqt",
    "demo/pupujepa --model.front_end vqt",
    "demo/pupujepa --model.front_end gammatone",
    "demo/pupujepa --model.front_end log_mel",
    "demo/pupujepa --model.front_end waveform",
    "demo/wavjepa --model.masker TargetSpanMasker --model.masker.min_context 0.1",
    "demo/pupujepa --model.masker MultiBlockMasker",
]
SMALL = [
    "--model.encoder.embed_dim=48",
    "--model.encoder.num_heads=4",
    "--model.encoder.depth=2",
    "--model.predictor.trunk.embed_dim=16",
    "--model.predictor.trunk.num_heads=2",
    "--model.predictor.trunk.depth=1",
]


def small_recipe(words: str) -> JEPA:
    """The model of a recipe at a reduced width."""
    from jepa_audio.cli.trainer import JEPACLI

    name, *settings = words.split()
    has_top_k = "top_k" in (CONFIGS / f"{name}.yaml").read_text()
    top_k = ["--model.targets.top_k=2"] if has_top_k else []
    args = [f"--config={CONFIGS / name}.yaml", "--data.root=unused", *SMALL, *top_k, *settings]
    model = JEPACLI([*args, "--trainer.precision=32-true"], run=False).model
    if getattr(model.front_end, "mean", 0.0) is None:
        # `fit` measures them.
        model.front_end.mean, model.front_end.std = -5.0, 2.5
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_a_function_of_the_position_raises_the_alarm_at_the_first_measurement(
    recipe: str, rng: torch.Generator
):
    jepa = small_recipe(recipe)
    num_samples = round(0.8 * jepa.front_end.sample_rate)
    level = torch.rand(4, 1, 1, generator=rng) + 0.1
    batch = AudioBatch(
        level * torch.randn(4, jepa.front_end.num_channels, num_samples, generator=rng),
        torch.arange(4),
    )
    masks, real = jepa.draw_masks(batch), jepa.front_end
    shares = {}
    for share in (None, 0.0, 0.01):
        jepa.front_end = real if share is None else Replaced(real, share, rng)
        monitor = CollapseMonitor()
        with torch.no_grad():
            output = jepa(batch.waveform, masks)
            metrics = latent_metrics(jepa, batch, masks, output)
        monitor.first_metrics = metrics
        shares[share] = metrics["collapse/clip_share"]
        assert bool(monitor._alarm_reasons(metrics)) == (share is not None), shares
    assert shares[0.0] < 1e-6
    assert shares[0.0] < shares[0.01] < 0.01
    assert shares[None] > 0.1


def monitor_of(cli: object) -> CollapseMonitor:
    (monitor,) = (
        callback for callback in cli.trainer.callbacks if isinstance(callback, CollapseMonitor)
    )
    return monitor


class Alarms(Callback):
    """Keeps the alarm of every optimizer step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values[trainer.global_step] = float(trainer.callback_metrics["collapse/alarm"])


def settings_of(flavour: str, learning_rate: float) -> list[str]:
    return [
        "--trainer.max_steps=40",
        "--monitor.every_n_steps=10",
        "--model.lr_schedule.warmup_steps=5",
        f"--model.optimizer.lr={learning_rate}",
    ]


COLLAPSING = ["--model.ema.momentum={class_path: Constant, init_args: {value: 0.0}}"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_healthy_run_raises_no_alarm(tiny_cli: Callable, fit: Callable, flavour: str):
    alarms = Alarms()
    cli = tiny_cli(flavour, *settings_of(flavour, HEALTHY[flavour]))
    fit(cli, None, alarms)
    assert set(alarms.values.values()) == {0.0}
    assert len(alarms.values) == 40


@pytest.mark.parametrize(("flavour", "stop_after"), [("wave", 2), ("mel", 0)])
def test_a_collapse_raises_the_alarm_and_stop_after_ends_the_run(
    tiny_cli: Callable, fit: Callable, flavour: str, stop_after: int
):
    alarms = Alarms()
    settings = *settings_of(flavour, 100 * HEALTHY[flavour]), f"--monitor.stop_after={stop_after}"
    cli = tiny_cli(flavour, *settings, *COLLAPSING)
    fit(cli, None, alarms)
    raised = [step for step, value in alarms.values.items() if value]
    assert len(raised) > 0
    assert cli.trainer.global_step == (raised[0] + 10 if stop_after else 40)
    assert monitor_of(cli).alarms_in_a_row >= 1


def test_the_first_step_and_every_nth_step_are_measured(
    tiny_cli: Callable, fit: Callable, monkeypatch: pytest.MonkeyPatch
):
    measured_at: list[int] = []
    cli = tiny_cli(
        "wave",
        "--monitor.every_n_steps=2",
        "--trainer.accumulate_grad_batches=2",
        "--data.batch_size=2",
    )
    check = CollapseMonitor._check
    monkeypatch.setattr(
        CollapseMonitor,
        "_check",
        lambda self, metrics, trainer: (
            measured_at.append(trainer.global_step),
            check(self, metrics, trainer),
        ),
    )
    fit(cli)
    assert measured_at == [1, 2, 4, 6]
    first = monitor_of(cli).first_metrics
    resumed = CollapseMonitor(every_n_steps=2)
    resumed.load_state_dict(monitor_of(cli).state_dict())
    assert resumed.first_metrics == first
    assert first["collapse/context_std"] > 0


def test_the_monitor_does_not_change_the_losses(tiny_cli: Callable, fit: Callable):
    often = fit(tiny_cli("wave", "--monitor.every_n_steps=1", "--model.encoder.drop_path=0.3"))
    assert often == fit(
        tiny_cli("wave", "--monitor.every_n_steps=1000", "--model.encoder.drop_path=0.3")
    )


def test_zero_steps_between_measurements_are_refused():
    with pytest.raises(ValueError, match=r"`every_n_steps` \(0\)"):
        CollapseMonitor(every_n_steps=0)
