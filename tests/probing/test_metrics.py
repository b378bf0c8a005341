"""Golden values and laws of metrics: libraries and literal rules are the oracles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import r2_score as torchmetrics_r2

from jepa_audio.probing.intervals import draw_counts
from jepa_audio.probing.metrics import (
    AUROC,
    F1,
    KEYS,
    R2,
    Accuracy,
    AveragePrecision,
    KeyScore,
    MeanF1,
    Metric,
    PooledF1,
    Share,
    base,
    key_credits,
)

NUM_UNITS, NUM_HEADS = 60, 5


def tags(num_units: int = NUM_UNITS, num_tags: int = 4, seed: int = 0) -> np.ndarray:
    truth = (np.random.default_rng(seed).random((num_units, num_tags)) < 0.3).astype(np.float32)
    truth[0], truth[1] = 1, 0
    return truth


def tied_logits(truth: np.ndarray, num_heads: int = NUM_HEADS) -> torch.Tensor:
    """Logits that say something of the truth, with many ties and some near-ties that bfloat16 makes."""
    rng = torch.Generator().manual_seed(1)
    said = torch.from_numpy(truth)[:, None] + torch.randn(
        len(truth), num_heads, truth.shape[1], generator=rng
    )
    said[:, 0] = said[:, 0].round()
    return said.bfloat16().float()


def classes() -> tuple[torch.Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 24, (NUM_UNITS,), generator=rng)
    logits = torch.randn(NUM_UNITS, NUM_HEADS, 24, generator=rng)
    truth[:5] = -1
    logits[torch.arange(0, NUM_UNITS, 2), :, truth[::2]] += 2
    return logits, truth.numpy()


def numbers() -> tuple[torch.Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(NUM_UNITS, 2, generator=rng) + 3
    return truth[:, None] + 0.7 * torch.randn(NUM_UNITS, NUM_HEADS, 2, generator=rng), truth.numpy()


def event_counts() -> tuple[torch.Tensor, np.ndarray]:
    """Hits, estimated events, true events, and a number that some units lack."""
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 6, (NUM_UNITS, NUM_HEADS))
    reference = np.broadcast_to(
        hits.max(axis=1, keepdims=True) + rng.integers(0, 3, (NUM_UNITS, 1)), hits.shape
    ).copy()
    reference[0], hits[0] = 0, 0
    error = rng.random(hits.shape)
    error[3:6] = np.nan
    counts = np.stack([hits, hits + rng.integers(0, 4, hits.shape), reference, error], axis=-1)
    return torch.from_numpy(counts).float(), np.zeros(NUM_UNITS, dtype=np.int64)


def multilabel() -> tuple[torch.Tensor, np.ndarray]:
    truth = tags()
    return tied_logits(truth), truth


Example = Callable[[], tuple[torch.Tensor, np.ndarray]]
METRICS: list[tuple[Metric, Example]] = [
    (Accuracy(), classes),
    (KeyScore(), classes),
    (KeyScore(symmetric=True), classes),
    (AUROC(), multilabel),
    (AveragePrecision(), multilabel),
    (F1("macro"), multilabel),
    (F1("micro"), multilabel),
    (R2(), numbers),
    (R2(1, "r2_valence"), numbers),
    (Share("frames", (0, 2)), event_counts),
    (PooledF1("pooled", (0, 1, 2)), event_counts),
    (MeanF1("by_track", (0, 1, 2)), event_counts),
]
every_metric = pytest.mark.parametrize(
    ("metric", "example"), METRICS, ids=[metric.name for metric, _ in METRICS]
)


@every_metric
def test_heads_are_scored_together_as_each_alone(
    metric: Metric, example: Example, monkeypatch: pytest.MonkeyPatch
):
    answers, truth = example()
    together = metric(answers, truth)
    alone = [metric(answers[:, [head]], truth) for head in range(NUM_HEADS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)
    assert len(together.unique()) > 2, "the heads differ, or this says nothing"
    monkeypatch.setattr(base, "_HEADS_AT_ONCE", 2 * answers[:, 0].numel())
    torch.testing.assert_close(metric(answers, truth), together, rtol=1e-12, atol=0)


@every_metric
def test_a_resampling_is_scored_as_the_units_that_were_drawn(
    metric: Metric, example: Example, monkeypatch: pytest.MonkeyPatch
):
    answers, truth = example()
    counts = np.concatenate(
        [np.ones((1, NUM_UNITS), dtype=np.int16), draw_counts(NUM_UNITS, draws=20)]
    )
    for head in range(NUM_HEADS):
        scores = metric.resampled(answers[:, head].numpy(), truth, counts)
        assert scores[0] == pytest.approx(float(metric(answers[:, [head]], truth)), rel=1e-6)
        drawn = [np.repeat(np.arange(NUM_UNITS), of_draw) for of_draw in counts]
        literal = [float(metric(answers[units][:, [head]], truth[units])) for units in drawn]
        np.testing.assert_allclose(scores, literal, rtol=1e-6)
    monkeypatch.setattr(base, "_DRAWS_AT_ONCE", 4 * NUM_UNITS)
    np.testing.assert_allclose(
        metric.resampled(answers[:, head].numpy(), truth, counts), scores, rtol=1e-6
    )


def test_accuracy_is_the_libraries_micro_accuracy_where_all_classes_are_known():
    logits, truth = classes()
    known = truth >= 0
    scores = Accuracy()(logits[known], truth[known])
    target = torch.from_numpy(truth[known])
    for head in range(NUM_HEADS):
        literal = multiclass_accuracy(logits[known][:, head], target, 24, average="micro")
        assert float(scores[head]) == pytest.approx(float(literal))
    assert 0 < known.sum() < len(truth)
    torch.testing.assert_close(
        Accuracy()(logits, truth), scores * known.mean()
    )  # the unknown are wrong


def literal_credit(true: int, estimate: int) -> float:
    """The rule for keys numbered by semitones above C, majors first."""
    (true_minor, true_tonic), (minor, tonic) = divmod(true, 12), divmod(estimate, 12)
    if true == estimate:
        return 1.0
    if minor == true_minor:
        return 0.5 if tonic == (true_tonic + 7) % 12 else 0.0
    relative = true_tonic + 3 if true_minor else true_tonic - 3
    if tonic == relative % 12:
        return 0.3
    return 0.2 if tonic == true_tonic else 0.0


def test_the_key_table_is_the_rule():
    literal = [[literal_credit(true, estimate) for estimate in range(24)] for true in range(24)]
    np.testing.assert_array_equal(key_credits(False), literal)
    named = {
        (true, estimate): key_credits(False)[i, j]
        for i, true in enumerate(KEYS)
        for j, estimate in enumerate(KEYS)
    }
    assert named["C major", "G major"] == 0.5
    assert named["C major", "F major"] == 0.0
    assert named["C major", "A minor"] == named["A minor", "C major"] == 0.3
    assert named["Gb major", "Eb minor"] == named["Eb minor", "Gb major"] == 0.3
    assert named["Bb minor", "Bb major"] == 0.2
    assert named["E minor", "B minor"] == 0.5
    assert len(set(KEYS)) == 24
    assert not any("#" in key for key in KEYS)


def test_the_symmetric_key_table_also_credits_the_fifth_below():
    literal = np.array(
        [[literal_credit(true, estimate) for estimate in range(24)] for true in range(24)]
    )
    for true in range(24):
        literal[true, 12 * (true // 12) + (true % 12 - 7) % 12] = 0.5
    np.testing.assert_array_equal(key_credits(True), literal)
    assert key_credits(True)[KEYS.index("C major"), KEYS.index("F major")] == 0.5


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_key_score_is_the_mean_credit_and_none_for_an_unknown_key(symmetric: bool):
    logits, truth = classes()
    credit = [
        [
            0.0 if true < 0 else key_credits(symmetric)[true, said]
            for said in logits[unit].argmax(dim=-1)
        ]
        for unit, true in enumerate(truth)
    ]
    np.testing.assert_allclose(
        KeyScore(symmetric)(logits, truth), np.mean(credit, axis=0), rtol=1e-12
    )
    with pytest.raises(ValueError, match="24 classes"):
        KeyScore(symmetric)(logits[..., :12], truth)


@pytest.mark.parametrize(
    ("metric", "sklearn_score", "torchmetrics_score"),
    [
        (AUROC(), roc_auc_score, multilabel_auroc),
        (AveragePrecision(), average_precision_score, multilabel_average_precision),
        (F1("macro"), lambda truth, said: f1_score(truth, said > 0), multilabel_f1_score),
    ],
    ids=["auroc", "ap", "f1_macro"],
)
def test_scores_of_tags_are_the_libraries_with_ties_and_without_the_empty_tag(
    metric: Metric,
    sklearn_score: Callable[..., float],
    torchmetrics_score: Callable[..., torch.Tensor],
):
    truth = tags(num_tags=5)
    truth[:, 2] = 0
    logits = tied_logits(truth)
    assert len(logits[:, 0].unique()) < 12, "there are ties"
    scored = [0, 1, 3, 4]
    assert metric.num_scored(truth) == len(scored)
    for head, score in enumerate(metric(logits, truth)):
        by_sklearn = [sklearn_score(truth[:, tag], logits[:, head, tag].numpy()) for tag in scored]
        assert float(score) == pytest.approx(np.mean(by_sklearn), abs=1e-6)
        target, probabilities = torch.from_numpy(truth).long(), logits[:, head].double().sigmoid()
        by_torchmetrics = torchmetrics_score(probabilities, target, num_labels=5, average=None)
        assert float(score) == pytest.approx(float(by_torchmetrics[scored].mean()), abs=1e-5)
        every_tag = torchmetrics_score(probabilities, target, num_labels=5, average="macro")
        assert float(score) > float(every_tag) + 0.01, (
            "the library's own mean counts the empty tag as 0"
        )


@pytest.mark.parametrize(
    ("metric", "sklearn_score"),
    [(AUROC(), roc_auc_score), (AveragePrecision(), average_precision_score)],
    ids=["auroc", "ap"],
)
def test_resampled_ranks_are_the_librarys_weighted_ones(
    metric: Metric, sklearn_score: Callable[..., float]
):
    truth = tags()
    logits = tied_logits(truth, num_heads=1)[:, 0].numpy()
    counts = draw_counts(NUM_UNITS, draws=50, seed=3)
    literal = [
        np.mean(
            [
                sklearn_score(truth[:, tag], logits[:, tag], sample_weight=weight)
                for tag in range(truth.shape[1])
            ]
        )
        for weight in counts
    ]
    np.testing.assert_allclose(metric.resampled(logits, truth, counts), literal, rtol=1e-10)


def test_a_tag_that_a_draw_loses_is_left_out_of_the_mean_of_that_draw():
    truth = tags(num_tags=2)
    truth[:, 1], truth[7, 1] = 0, 1
    logits = tied_logits(truth, num_heads=1)[:, 0].numpy()
    counts = np.ones((3, NUM_UNITS), dtype=np.int16)
    counts[1, 7] = 0
    counts[2] = truth[:, 0] == 0
    counts[2, 7] = 0
    for metric in (AUROC(), AveragePrecision(), F1("macro")):
        both, first_alone, none = metric.resampled(logits, truth, counts)
        of_first = metric.resampled(logits[:, :1], truth[:, :1], counts[1:2])[0]
        assert first_alone == pytest.approx(of_first)
        assert both != pytest.approx(of_first)
        assert np.isnan(none)


def test_a_tag_that_all_have_counts_for_the_precision_alone():
    truth = tags()
    truth[:, 0] = 1
    assert AUROC().num_scored(truth) == 3
    assert AveragePrecision().num_scored(truth) == 4
    logits = tied_logits(truth)
    torch.testing.assert_close(AUROC()(logits, truth), AUROC()(logits[..., 1:], truth[:, 1:]))
    torch.testing.assert_close(
        AveragePrecision()(logits, truth),
        (1 + 3 * AveragePrecision()(logits[..., 1:], truth[:, 1:])) / 4,
    )


@pytest.mark.parametrize(
    "metric", [AUROC(), AveragePrecision(), F1("macro"), F1("micro")], ids=lambda m: m.name
)
def test_no_tag_at_all_is_refused(metric: Metric):
    logits, truth = multilabel()
    with pytest.raises(ValueError, match=f"`{metric.name}`"):
        metric(logits, np.zeros_like(truth))
    with pytest.raises(ValueError, match=f"`{metric.name}`"):
        metric.resampled(
            logits[:, 0].numpy(), np.zeros_like(truth), draw_counts(NUM_UNITS, draws=2)
        )


def test_large_logits_keep_their_order_where_probabilities_are_all_one():
    truth = np.array([[1], [0], [1], [0]], dtype=np.float32)
    logits = torch.tensor([90.0, 80.0, 70.0, 60.0])[:, None, None]
    assert len(logits.sigmoid().unique()) == 1
    assert AUROC()(logits, truth).item() == pytest.approx(0.75)
    assert AveragePrecision()(logits, truth).item() == pytest.approx((1 + 2 / 3) / 2)


def test_a_diverged_head_is_at_chance_or_below_whatever_the_order_of_the_records():
    truth = np.sort(tags(), axis=0)[::-1].copy()
    nothing = torch.full((NUM_UNITS, 1, truth.shape[1]), torch.nan)
    assert AUROC()(nothing, truth).item() == 0.5
    assert AveragePrecision()(nothing, truth).item() == pytest.approx(truth.mean())
    assert F1("macro")(nothing, truth).item() == 0
    assert R2()(nothing[..., :2], numbers()[1]).item() == -np.inf
    one_missing = torch.tensor([3.0, torch.nan, -5.0])[:, None, None]
    assert AUROC()(one_missing, np.array([[1], [0], [1]])).item() == 1, (
        "the unit without a logit is the last"
    )


def test_f1_of_all_tags_in_one_pool_is_the_librarys():
    truth = tags(num_tags=5)
    truth[:, 2] = 0
    logits = tied_logits(truth)
    for head, score in enumerate(F1("micro")(logits, truth)):
        assert float(score) == pytest.approx(
            f1_score(truth, logits[:, head] > 0, average="micro"), abs=1e-12
        )
    assert F1("micro").num_scored(truth) is None


def test_r2_is_that_of_the_whole_split_and_not_the_mean_of_batches():
    answers, truth = numbers()
    target = torch.from_numpy(truth)
    for head in range(NUM_HEADS):
        by_output = torchmetrics_r2(answers[:, head], target, multioutput="raw_values")
        np.testing.assert_allclose(
            by_output, r2_score(truth, answers[:, head], multioutput="raw_values"), rtol=1e-4
        )
        assert float(R2()(answers, truth)[head]) == pytest.approx(float(by_output.mean()), rel=1e-4)
        for output in (0, 1):
            assert float(R2(output)(answers, truth)[head]) == pytest.approx(
                float(by_output[output]), rel=1e-4
            )
        batches = zip(answers[:, head].split(16), target.split(16), strict=True)
        of_batches = np.mean([float(torchmetrics_r2(*batch)) for batch in batches])
        assert abs(of_batches - float(R2()(answers, truth)[head])) > 0.01
    assert R2().num_scored(truth) == 2
    assert R2(0).num_scored(truth) is None


def test_resampled_r2_is_the_librarys_weighted_one_about_the_mean_of_the_draw():
    answers, truth = numbers()
    counts = draw_counts(NUM_UNITS, draws=20, seed=4)
    literal = [r2_score(truth, answers[:, 0], sample_weight=weight) for weight in counts]
    np.testing.assert_allclose(
        R2().resampled(answers[:, 0].numpy(), truth, counts), literal, rtol=1e-6
    )


def test_r2_of_truth_that_does_not_vary_is_refused_and_such_a_draw_is_left_out():
    answers, truth = numbers()
    one_unit = np.zeros((1, NUM_UNITS), dtype=np.int16)
    one_unit[0, 5] = NUM_UNITS
    assert np.isnan(R2().resampled(answers[:, 0].numpy(), truth, one_unit)).all()
    truth[:, 1] = 3
    assert torch.isfinite(R2(0)(answers, truth)).all()
    for metric in (R2(), R2(1)):
        with pytest.raises(ValueError, match="output 1 is the same in all 60 units"):
            metric(answers, truth)


def test_counts_of_events_are_pooled_or_scored_by_unit():
    answers = torch.tensor([[3, 4, 6, 2.0], [1, 1, 1, torch.nan], [0, 2, 0, 4.0], [0, 0, 5, 0.0]])[
        :, None
    ]
    truth = np.zeros(4, dtype=np.int64)
    assert Share("share", (0, 2))(answers, truth).item() == pytest.approx(4 / 12)
    assert PooledF1("pooled", (0, 1, 2))(answers, truth).item() == pytest.approx(2 * 4 / (7 + 12))
    assert MeanF1("mean", (0, 1, 2))(answers, truth).item() == pytest.approx((6 / 10 + 1 + 0) / 3)


def test_metrics_have_the_names_that_are_reported():
    names = [metric.name for metric, _ in METRICS]
    assert names[:8] == [
        "accuracy",
        "key_weighted",
        "key_weighted_symmetric",
        "auroc",
        "ap",
        "f1_macro",
        "f1_micro",
        "r2",
    ]
    assert names[8:] == ["r2_valence", "frames", "pooled", "by_track"]
