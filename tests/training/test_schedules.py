"""Schedules: end points, formulas, constant values outside of the ramp."""

import math
from collections.abc import Callable

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.training.optimizer import add_schedule
from jepa_audio.training.schedules import (
    AveragingWindow,
    Constant,
    Cosine,
    LengthScaled,
    Linear,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
)

RAMPS = [Linear, Cosine]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("num_steps", "length"), [(None, 100), (40, 40)])
def test_a_ramp_reaches_both_ends_and_stays_constant_afterwards(
    ramp: type[Schedule], num_steps: int | None, length: int
):
    schedule = ramp(start=0.2, end=0.9, num_steps=num_steps)
    assert schedule(0, 100) == pytest.approx(0.2, abs=1e-12)
    assert schedule(-5, 100) == pytest.approx(0.2, abs=1e-12)
    assert schedule(length // 2, 100) == pytest.approx(0.55, abs=1e-12)
    assert schedule(length, 100) == pytest.approx(0.9, abs=1e-12)
    assert schedule(10 * length, 100) == pytest.approx(0.9, abs=1e-12)
    values = [schedule(step, 100) for step in range(length + 1)]
    assert values == sorted(values)


def test_linear_and_cosine_follow_their_formulas():
    assert Linear(0.0, 1.0)(25, 100) == pytest.approx(0.25)
    assert Cosine(0.0, 1.0)(25, 100) == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_of_zero_steps_has_its_end_value(ramp: type[Schedule]):
    assert ramp(0.2, 0.9, num_steps=0)(0, 100) == pytest.approx(0.9)


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_a_constant_is_constant(step: int):
    assert Constant(0.3)(step, 10) == 0.3


def test_the_warm_up_starts_above_zero_and_ends_at_one():
    for schedule in (WarmupCosine(10), WarmupConstant(10)):
        assert schedule(0, 100) == pytest.approx(0.1)
        assert schedule(4, 100) == pytest.approx(0.5)
        assert schedule(9, 100) == pytest.approx(1.0)


def test_after_the_warm_up_the_cosine_falls_to_its_end_and_the_constant_stays_at_one():
    falling = WarmupCosine(10, end=0.1)
    assert falling(10, 110) == pytest.approx(1.0)
    assert falling(60, 110) == pytest.approx(0.55)
    assert falling(110, 110) == pytest.approx(0.1)
    assert falling(500, 110) == pytest.approx(0.1)
    values = [falling(step, 110) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)
    assert {WarmupConstant(10)(step, 110) for step in range(10, 200)} == {1.0}


def test_without_warm_up_the_factor_starts_at_one():
    assert WarmupCosine(0)(0, 100) == pytest.approx(1.0)
    assert WarmupConstant(0)(0, 100) == pytest.approx(1.0)


@pytest.mark.parametrize("max_steps", [9, 10])
def test_a_warm_up_that_is_not_shorter_than_the_run_is_refused(max_steps: int):
    with pytest.raises(
        ValueError, match=rf"`warmup_steps` \(10\) .* `trainer.max_steps` \({max_steps}\)"
    ):
        WarmupCosine(10)(0, max_steps)


FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda p, end: (1 - p) + end * p,
    "cosine": lambda p, end: end + (1 - end) / 2 * (1 + math.cos(math.pi * p)),
    "exponential": lambda p, end: math.exp(p * math.log(end)),
}


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize(("max_steps", "warmup", "decay"), [(600, 60, 150), (6000, 600, 1500)])
def test_warmup_stable_decay_is_the_literal_formula_in_shares_of_the_run(
    shape: str, max_steps: int, warmup: int, decay: int
):
    schedule = WarmupStableDecay(0.1, 0.25, 0.1, shape)  # type: ignore[arg-type]
    expected = []
    for step in range(max_steps + 1):
        if step < warmup:
            expected.append((step + 1) / warmup)
        elif step < max_steps - decay:
            expected.append(1.0)
        else:
            expected.append(FALLS[shape]((step - (max_steps - decay)) / decay, 0.1))
    values = [schedule(step, max_steps) for step in range(max_steps + 1)]
    assert values == pytest.approx(expected)
    assert values[-1] == pytest.approx(0.1)
    assert schedule(2 * max_steps, max_steps) == pytest.approx(0.1)


def test_the_exponential_fall_halves_at_equal_distances_as_in_the_paper():
    schedule = WarmupStableDecay(0.0, 0.5, 1 / 16, "exponential")
    values = [schedule(step, 80) for step in (40, 50, 60, 70, 80)]
    assert values == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])


@pytest.mark.parametrize("max_steps", range(1, 30))
def test_warmup_stable_decay_fits_runs_of_any_length(max_steps: int):
    for shares in ((0.05, 0.2), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        values = [WarmupStableDecay(*shares)(step, max_steps) for step in range(max_steps)]
        assert all(0 < value <= 1 for value in values)
        assert max(values) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_share": 1.5}, "`warmup_share` .1.5. must be in .0, 1."),
        ({"decay_share": -0.1}, "`decay_share`"),
        ({"warmup_share": 0.6, "decay_share": 0.5}, "must not exceed 1 together"),
        ({"shape": "exponential"}, "`end` .0.0. must be above 0"),
    ],
)
def test_impossible_shares_of_a_run_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        WarmupStableDecay(**settings)


def test_the_averaging_window_is_a_share_of_the_run():
    for max_steps in (600, 6000):
        schedule = AveragingWindow(0.05, 0.2)
        for share, step in ((0.05, 0), (0.125, max_steps // 2), (0.2, max_steps)):
            momentum = schedule(step, max_steps)
            assert 1 / (1 - momentum) == pytest.approx(share * max_steps)
            # The weights of the momentum copy, by age: their mean age is the window less one.
            ages = torch.arange(200_000, dtype=torch.float64)
            mean_age = float(((1 - momentum) * momentum**ages * ages).sum())
            assert mean_age == pytest.approx(share * max_steps - 1)
    assert AveragingWindow(0.01, 0.5)(0, 10) == 0.0, "a window of less than one step"


def test_batches_of_twice_the_size_have_the_squared_momentum_to_first_order():
    schedule = AveragingWindow(0.1, 0.1)
    assert schedule(0, 3000) == pytest.approx(schedule(0, 6000) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{"start_share": 0.0}, {"end_share": -1.0}, {"end_share": math.inf}]
)
def test_an_impossible_averaging_window_is_refused(settings: dict[str, float]):
    with pytest.raises(UserError, match="must be above 0 and finite: it is a share of the run"):
        AveragingWindow(**settings)


def test_a_learning_rate_scales_with_the_length_of_the_run():
    schedule = LengthScaled(WarmupStableDecay(0.1, 0.2), reference_steps=600)
    inner = WarmupStableDecay(0.1, 0.2)
    assert [schedule(step, 600) for step in (0, 300, 599)] == [
        inner(step, 600) for step in (0, 300, 599)
    ]
    assert schedule(3000, 6000) == pytest.approx(10**-0.32)
    with pytest.raises(UserError, match="`reference_steps`"):
        LengthScaled(inner, 0)


@pytest.mark.parametrize("stop", [1, 5, 17])
def test_a_resumed_schedule_equals_an_uninterrupted_one(stop: int):
    def learning_rates(scheduler, num_steps: int) -> list[float]:
        values = []
        for _ in range(num_steps):
            values.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
        return values

    def new():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        schedule = LengthScaled(WarmupStableDecay(0.2, 0.5, 0.1, "cosine"), 100)
        return add_schedule(optimizer, schedule, 20)["lr_scheduler"]["scheduler"]

    first = new()
    values = learning_rates(first, stop)
    second = new()
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert values + learning_rates(second, 20 - stop) == learning_rates(new(), 20)


def test_one_line_states_what_shares_are_in_a_run(tiny_cli, fit, caplog):
    caplog.set_level("INFO")
    cli = tiny_cli(
        "wave",
        "--trainer.max_steps=6",
        "--model.lr_schedule=LengthScaled",
        "--model.lr_schedule.reference_steps=12",
        "--model.lr_schedule.schedule=WarmupStableDecay",
        "--model.lr_schedule.schedule.decay_share=0.5",
        "--model.ema.momentum=AveragingWindow",
        "--model.ema.momentum.end_share=0.5",
    )
    fit(cli)
    lines = [line for line in caplog.messages if line.startswith(("learning rate:", "momentum:"))]
    assert lines == [
        "learning rate: times 1.25, for 6 steps instead of 12; 1 steps of warm-up, 2 at the full "
        "value, 3 of linear decay to 0",
        "momentum: an average over 1 to 3 steps, momentum 0 to 0.666667 (windows are at least one "
        "step)",
    ]
    momentum = cli.trainer.callback_metrics["train/momentum"]
    assert float(momentum) == pytest.approx(AveragingWindow(0.05, 0.5)(5, 6))
