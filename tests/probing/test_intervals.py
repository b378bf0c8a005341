"""Bootstrap intervals: resamples, coverage, and paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jepa_audio.probing.intervals import (
    Difference,
    difference,
    draw_counts,
    interval,
)
from jepa_audio.probing.metrics.ranking import AUROC


def shares(correct: np.ndarray, seed: int = 0) -> np.ndarray:
    return draw_counts(len(correct), seed=seed) @ correct.astype(float) / len(correct)


def bootstrap_interval(correct: np.ndarray, seed: int = 0) -> tuple[float, float]:
    return interval(shares(correct, seed))


def paired_difference(correct: np.ndarray, other: np.ndarray) -> Difference:
    return difference(float(correct.mean()), float(other.mean()), shares(correct), shares(other))


def literal_bootstrap(values: np.ndarray, draws: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return np.percentile(means, [2.5, 97.5])


@pytest.fixture
def correct() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    better = rng.random(400) < 0.7
    return better, better & (rng.random(400) < 0.8)


def test_resamples_have_all_units_with_equal_probability():
    counts = draw_counts(30, draws=4000)
    assert counts.shape == (4000, 30)
    assert (counts.sum(axis=1) == 30).all()
    assert counts.min() == 0
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.08)
    np.testing.assert_allclose(counts.var(axis=0), 1 - 1 / 30, atol=0.12)


def test_the_same_seed_gives_the_same_resamples():
    np.testing.assert_array_equal(
        draw_counts(50, draws=20, seed=3), draw_counts(50, draws=20, seed=3)
    )
    np.testing.assert_array_equal(
        draw_counts(50, draws=20, seed=3)[:5], draw_counts(50, draws=5, seed=3)
    )
    assert (draw_counts(50, draws=20, seed=3) != draw_counts(50, draws=20, seed=4)).any()


def test_counts_of_many_units_do_not_overflow():
    counts = draw_counts(40_000, draws=2)
    assert (counts.sum(axis=1) == 40_000).all()
    assert np.iinfo(counts.dtype).max >= 40_000
    assert draw_counts(10_000, draws=2).itemsize == 2


@pytest.mark.parametrize(("num_units", "draws"), [(0, 10), (10, 0)])
def test_no_unit_or_no_draw_raises_an_error(num_units: int, draws: int):
    with pytest.raises(ValueError, match="at least 1"):
        draw_counts(num_units, draws)


def test_the_interval_equals_a_literal_bootstrap(correct: tuple[np.ndarray, np.ndarray]):
    better, worse = correct
    np.testing.assert_allclose(
        bootstrap_interval(better), literal_bootstrap(better, 4000), atol=0.008
    )
    gap = paired_difference(better, worse)
    literal = literal_bootstrap(better.astype(int) - worse, 4000)
    np.testing.assert_allclose((gap.low, gap.high), literal, atol=0.008)


def test_draws_that_cannot_be_scored_are_left_out():
    draws = np.random.default_rng(0).normal(size=200)
    with_nan = np.concatenate([draws, np.full(50, np.nan)])
    assert interval(with_nan) == interval(draws)
    gap = difference(0.5, 0.2, with_nan, np.roll(with_nan, 10))
    assert math.isfinite(gap.low)
    assert gap.value == pytest.approx(0.3)
    assert all(math.isnan(end) for end in interval(np.full(3, np.nan)))


def test_the_interval_of_a_mean_covers_the_truth_in_95_percent_of_the_cases():
    rng = np.random.default_rng(0)
    counts = draw_counts(80, draws=500)
    samples = rng.exponential(size=(600, 80))
    ends = np.array([interval(counts @ sample / 80) for sample in samples])
    covered = ((ends[:, 0] <= 1) & (ends[:, 1] >= 1)).mean()
    assert 0.90 < covered < 0.97


def test_the_interval_of_auroc_covers_the_truth_in_95_percent_of_the_cases():
    rng = np.random.default_rng(0)
    counts = draw_counts(100, draws=300)
    truth = np.repeat([[1.0], [0.0]], 50, axis=0)
    # Normal logits whose means differ by one deviation.
    true_auroc = 0.5 * math.erfc(-1 / 2)
    covered = 0
    for _ in range(300):
        low, high = interval(AUROC().resampled(rng.normal(size=(100, 1)) + truth, truth, counts))
        covered += low <= true_auroc <= high
    assert 0.90 < covered / 300 < 0.98


def test_verdicts_of_differences(correct: tuple[np.ndarray, np.ndarray]):
    better, worse = correct
    assert paired_difference(better, better) == Difference(0.0, 0.0, 0.0)
    assert paired_difference(better, better).verdict == "no significant difference"
    other = np.random.default_rng(2).permutation(better)
    assert paired_difference(better, other).verdict == "no significant difference"
    assert paired_difference(better, worse).verdict == "ahead"
    assert paired_difference(worse, better).verdict == "behind"
    assert paired_difference(worse, better).value == pytest.approx(worse.mean() - better.mean())


def test_a_paired_difference_can_be_significant_when_intervals_overlap(
    correct: tuple[np.ndarray, np.ndarray],
):
    better, _ = correct
    slightly_worse = better.copy()
    slightly_worse[np.flatnonzero(better)[:8]] = False
    assert bootstrap_interval(better)[0] < bootstrap_interval(slightly_worse)[1]
    assert paired_difference(better, slightly_worse).verdict == "ahead"


def test_a_difference_on_the_same_resamples_has_a_narrower_interval():
    rng = np.random.default_rng(0)
    truth = (rng.random((200, 3)) < 0.3).astype(np.float64)
    common = truth + rng.normal(size=truth.shape)
    first, second = (common + 0.3 * rng.normal(size=truth.shape) for _ in range(2))
    values = [
        float(AUROC()(torch.from_numpy(logits)[:, None], truth)[0]) for logits in (first, second)
    ]
    draws, same, others = (
        AUROC().resampled(logits, truth, draw_counts(200, draws=400, seed=seed))
        for logits, seed in ((first, 0), (second, 0), (second, 1))
    )
    paired, unpaired = difference(*values, draws, same), difference(*values, draws, others)
    assert paired.value == unpaired.value == values[0] - values[1]
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)
    assert paired.low < paired.value < paired.high


def test_the_same_seed_gives_the_same_interval(correct: tuple[np.ndarray, np.ndarray]):
    assert bootstrap_interval(correct[0], seed=3) == bootstrap_interval(correct[0], seed=3)
    assert bootstrap_interval(correct[0], seed=3) != bootstrap_interval(correct[0], seed=4)


def test_a_difference_is_printed_with_its_verdict():
    assert str(Difference(0.1, 0.05, 0.15)) == "ahead (+0.100 [+0.050, +0.150])"
    assert str(Difference(-0.1, -0.15, -0.05)) == "behind (-0.100 [-0.150, -0.050])"
    assert (
        str(Difference(0.01, -0.05, 0.15)) == "no significant difference (+0.010 [-0.050, +0.150])"
    )
