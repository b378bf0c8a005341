"""Schedules: end points, formulas, constant values outside of the ramp."""

import math

import pytest

from jepa_audio.training.schedules import (
    Constant,
    Cosine,
    Linear,
    Schedule,
    WarmupConstant,
    WarmupCosine,
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
