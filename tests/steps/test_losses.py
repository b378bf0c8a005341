"""The distances equal a loop over tokens and channels."""

import math

import pytest
import torch

from jepa_audio.steps.losses import MSE, Distance, NormalizedMSE, SmoothL1


def literal_mse(prediction: list[float], target: list[float]) -> float:
    return sum((p - t) ** 2 for p, t in zip(prediction, target, strict=True)) / len(target)


def literal_smooth_l1(prediction: list[float], target: list[float], beta: float = 0.5) -> float:
    errors = [abs(p - t) for p, t in zip(prediction, target, strict=True)]
    return sum(e * e / (2 * beta) if e < beta else e - beta / 2 for e in errors) / len(errors)


def literal_normalized(prediction: list[float], target: list[float]) -> float:
    dot = sum(p * t for p, t in zip(prediction, target, strict=True))
    return 2 - 2 * dot / (math.hypot(*prediction) * math.hypot(*target))


DISTANCES = [
    (MSE(), literal_mse),
    (SmoothL1(0.5), literal_smooth_l1),
    (NormalizedMSE(), literal_normalized),
]


@pytest.mark.parametrize(("distance", "literal"), DISTANCES, ids=lambda value: type(value).__name__)
def test_distance_equals_the_formula_for_each_token(
    distance: Distance, literal, rng: torch.Generator
):
    prediction, target = torch.randn(2, 2, 3, 4, 5, generator=rng)
    measured = distance(prediction, target)
    assert measured.shape == (2, 3, 4)
    for i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)):
        index = tuple(i.tolist())
        expected = literal(prediction[index].tolist(), target[index].tolist())
        assert measured[index].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("distance", "literal"), DISTANCES, ids=lambda value: type(value).__name__)
def test_exact_prediction_has_zero_distance_and_bfloat16_is_computed_in_float32(
    distance: Distance, literal, rng
):
    target = torch.randn(3, 8, generator=rng)
    assert distance(target, target).abs().max() < 1e-6
    half = distance(target.bfloat16(), 1.1 * target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, distance(target.bfloat16().float(), 1.1 * target))


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_that_is_not_positive_raises_an_error(beta: float):
    with pytest.raises(ValueError, match=rf"`beta` \({beta}\)"):
        SmoothL1(beta)
