"""The metrics are right, measuring changes nothing, and only a collapse raises the alarm."""

import itertools
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback

from jepa_audio.steps.grid import AudioBatch, Grid, Masks
from jepa_audio.training.collapse_monitor import (
    MAX_LATENTS,
    CollapseMonitor,
    clip_cosine,
    mean_std,
    measure,
    nearest_context,
    rank_me,
)
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA

FLAVOURS = ["wave", "mel"]
HEALTHY = {"wave": 3e-4, "mel": 3e-3}


def test_the_rank_of_a_line_is_one(rng: torch.Generator):
    assert rank_me(
        torch.randn(50, 1, generator=rng) * torch.randn(8, generator=rng)
    ) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_the_rank_of_equal_singular_values_is_their_number(dim: int, rng: torch.Generator):
    orthogonal = torch.linalg.qr(torch.randn(64, dim, generator=rng)).Q
    assert rank_me(3 * orthogonal) == pytest.approx(dim, rel=1e-4)


def test_the_rank_is_the_exponential_of_the_entropy_of_the_spectrum(rng: torch.Generator):
    left, right = (torch.linalg.qr(torch.randn(size, 3, generator=rng)).Q for size in (40, 10))
    share = torch.tensor([0.7, 0.2, 0.1])
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert rank_me(left @ torch.diag(5 * share) @ right.T) == pytest.approx(expected, rel=1e-4)


def test_zeros_have_a_finite_rank_and_half_precision_is_accepted():
    assert rank_me(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.eye(4, dtype=torch.bfloat16)) == pytest.approx(4, rel=1e-4)


def test_the_rank_of_many_latents_is_the_rank_of_evenly_spaced_ones(rng: torch.Generator):
    latents = torch.randn(3 * MAX_LATENTS - 5, 4, generator=rng) * torch.tensor(
        [1.0, 0.5, 0.2, 0.1]
    )
    assert rank_me(latents) == pytest.approx(rank_me(latents[::3]), rel=1e-6)


def test_mean_std_is_the_mean_of_the_standard_deviations(rng: torch.Generator):
    latents = torch.randn(20000, 3, generator=rng) * torch.tensor([1.0, 2.0, 3.0]) + 7
    assert mean_std(latents) == pytest.approx(2, rel=0.02)
    assert mean_std(torch.ones(5, 3)) == 0


def test_the_cosine_between_clips_is_the_cosine_of_their_means_over_valid_tokens(
    rng: torch.Generator,
):
    latents = torch.randn(3, 6, 5, generator=rng)
    counts = [6, 4, 2]
    valid = torch.arange(6) < torch.tensor(counts)[:, None]
    means = [clip[:count].mean(0) for clip, count in zip(latents, counts, strict=True)]
    pairs = [
        torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(means, 2)
    ]
    assert clip_cosine(latents, valid) == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert clip_cosine(torch.ones(3, 6, 5), None) == pytest.approx(1, abs=1e-5)
    assert clip_cosine(torch.eye(3)[:, None], None) == pytest.approx(0, abs=1e-6)


def test_the_nearest_context_token_equals_a_brute_force_search(
    ragged: Callable[[Grid, int, int], Masks],
):
    grid = Grid(num_freq=4, num_time=9)
    masks = ragged(grid, 3, 2)
    nearest = nearest_context(masks, grid)
    place = grid.coordinates().tolist()
    seen = masks.context.to_mask(grid.num_tokens)
    for clip, group in itertools.product(range(3), range(2)):
        context = seen[clip].nonzero()[:, 0].tolist()
        for target, chosen in zip(
            masks.targets.index[clip, group], nearest.index[clip, group], strict=True
        ):
            distance = {
                c: sum((a - b) ** 2 for a, b in zip(place[c], place[target], strict=True))
                for c in context
            }
            assert distance[chosen.item()] == min(distance.values())


def flags(jepa: JEPA) -> list[bool]:
    return [
        module.training for name, module in jepa.named_modules() if not name.startswith("target_")
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("training", [True, False])
def test_measuring_does_not_change_weights_mode_or_random_state(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str, training: bool
):
    jepa = tiny_jepa(flavour, "--model.encoder.drop_path=0.5").train(training)
    before = {name: value.clone() for name, value in jepa.state_dict().items()}
    random_state, mode = torch.get_rng_state(), flags(jepa)
    metrics = measure(jepa, batch)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert flags(jepa) == mode
    assert all(parameter.grad is None for parameter in jepa.parameters())
    for name, value in jepa.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_measuring_twice_gives_equal_metrics_with_other_masks_than_training(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave", "--model.encoder.drop_path=0.5")
    assert measure(jepa, batch) == measure(jepa, batch)
    assert (
        measure(jepa, batch)["collapse/loss"]
        != jepa.eval().loss(batch.waveform, jepa.draw_masks(batch, 4)).item()
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_trivial_predictors_are_the_mean_target_and_a_copy_of_the_nearest_context(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour).eval()
    metrics = measure(jepa, batch)
    masks = jepa.draw_masks(batch, 4, stream=2)
    target = jepa(batch.waveform, masks).target.detach()
    valid = torch.arange(target.shape[2]) < masks.targets.counts[..., None]
    mean_target = target[valid].mean(0)
    expected = (target[valid] - mean_target).square().mean().item()
    assert metrics["collapse/loss_mean_target"] == pytest.approx(expected, rel=1e-4)
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    tokens = jepa.front_end(batch.waveform)
    errors = []
    for clip, row in enumerate(masks.targets.index):
        keep = masks.context.rows(slice(clip, clip + 1))
        context = type(keep)(
            keep.index[:, None], None if keep.valid is None else keep.valid[:, None]
        )
        seen = jepa.target_latents(
            batch.waveform[clip : clip + 1], tokens[clip : clip + 1], grid, context
        )[0, 0]
        nearest = nearest_context(masks, grid).index[clip]
        where = {
            index.item(): place for place, index in enumerate(keep.index[0, : int(keep.counts[0])])
        }
        for group, column in valid[clip].nonzero().tolist():
            copied = seen[where[nearest[group, column].item()]]
            errors.append((copied - target[clip, group, column]).square().mean())
        assert len(row) == len(nearest)
    assert metrics["collapse/loss_nearest_context"] == pytest.approx(
        torch.stack(errors).mean().item(), rel=1e-4
    )


def test_the_distance_of_the_momentum_copies_is_relative_to_the_weights(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave")
    assert measure(jepa, batch)["collapse/ema_distance"] == 0
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():
            parameter.mul_(1.25)
    assert measure(jepa, batch)["collapse/ema_distance"] == pytest.approx(0.25, rel=1e-4)
    TargetEncoderEMA.update(jepa, 0.0)
    assert measure(jepa, batch)["collapse/ema_distance"] == pytest.approx(0, abs=1e-6)


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
