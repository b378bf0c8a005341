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

from jepa_audio.probing import metrics
from jepa_audio.probing.intervals import draw_counts
from jepa_audio.probing.metrics import Metric
from jepa_audio.probing.metrics.ranking import AUROC, AveragePrecision
from jepa_audio.probing.metrics.sums import (
    F1,
    KEYS,
    R2,
    Accuracy,
    KeyScore,
    MeanF1,
    PooledF1,
    Share,
    key_credits,
)

NUM_UNITS, NUM_HEADS = 60, 5


def tags(num_units: int = NUM_UNITS, num_tags: int = 4, seed: int = 0) -> np.ndarray:
    targets = (np.random.default_rng(seed).random((num_units, num_tags)) < 0.3).astype(np.float32)
    targets[0], targets[1] = 1, 0
    return targets


def tied_logits(targets: np.ndarray, num_heads: int = NUM_HEADS) -> torch.Tensor:
    """Logits correlated with the targets, with many ties and some near-ties of bfloat16."""
    rng = torch.Generator().manual_seed(1)
    logits = torch.from_numpy(targets)[:, None] + torch.randn(
        len(targets), num_heads, targets.shape[1], generator=rng
    )
    logits[:, 0] = logits[:, 0].round()
    return logits.bfloat16().float()


def classes() -> tuple[torch.Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 24, (NUM_UNITS,), generator=rng)
    logits = torch.randn(NUM_UNITS, NUM_HEADS, 24, generator=rng)
    targets[:5] = -1
    logits[torch.arange(0, NUM_UNITS, 2), :, targets[::2]] += 2
    return logits, targets.numpy()


def numbers() -> tuple[torch.Tensor, np.ndarray]:
    rng = torch.Generator().manual_seed(0)
    targets = torch.randn(NUM_UNITS, 2, generator=rng) + 3
    return targets[:, None] + 0.7 * torch.randn(
        NUM_UNITS, NUM_HEADS, 2, generator=rng
    ), targets.numpy()


def event_counts() -> tuple[torch.Tensor, np.ndarray]:
    """Hits, estimated events, true events, and a column with NaN for some units."""
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
    targets = tags()
    return tied_logits(targets), targets


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
def test_heads_scored_at_once_score_like_each_alone(
    metric: Metric, example: Example, monkeypatch: pytest.MonkeyPatch
):
    predictions, targets = example()
    at_once = metric(predictions, targets)
    alone = [metric(predictions[:, [head]], targets) for head in range(NUM_HEADS)]
    torch.testing.assert_close(at_once, torch.cat(alone), rtol=1e-12, atol=0)
    assert len(at_once.unique()) > 2, "the heads differ, or this tests nothing"
    monkeypatch.setattr(metrics, "_HEADS_AT_ONCE", 2 * predictions[:, 0].numel())
    torch.testing.assert_close(metric(predictions, targets), at_once, rtol=1e-12, atol=0)


@every_metric
def test_a_resampling_scores_like_its_drawn_units(
    metric: Metric, example: Example, monkeypatch: pytest.MonkeyPatch
):
    predictions, targets = example()
    counts = np.concatenate(
        [np.ones((1, NUM_UNITS), dtype=np.int16), draw_counts(NUM_UNITS, draws=20)]
    )
    for head in range(NUM_HEADS):
        scores = metric.resampled(predictions[:, head].numpy(), targets, counts)
        assert scores[0] == pytest.approx(float(metric(predictions[:, [head]], targets)), rel=1e-6)
        drawn = [np.repeat(np.arange(NUM_UNITS), of_draw) for of_draw in counts]
        literal = [float(metric(predictions[units][:, [head]], targets[units])) for units in drawn]
        np.testing.assert_allclose(scores, literal, rtol=1e-6)
    monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", 4 * NUM_UNITS)
    np.testing.assert_allclose(
        metric.resampled(predictions[:, head].numpy(), targets, counts), scores, rtol=1e-6
    )


def test_accuracy_equals_torchmetrics_micro_accuracy_on_known_classes():
    logits, targets = classes()
    known = targets >= 0
    scores = Accuracy()(logits[known], targets[known])
    target = torch.from_numpy(targets[known])
    for head in range(NUM_HEADS):
        literal = multiclass_accuracy(logits[known][:, head], target, 24, average="micro")
        assert float(scores[head]) == pytest.approx(float(literal))
    assert 0 < known.sum() < len(targets)
    torch.testing.assert_close(
        Accuracy()(logits, targets), scores * known.mean()
    )  # the unknown are wrong


def literal_credit(true: int, estimate: int) -> float:
    """The rule of mir_eval, for keys numbered in semitones above C, major keys first."""
    (true_minor, true_tonic), (minor, tonic) = divmod(true, 12), divmod(estimate, 12)
    if true == estimate:
        return 1.0
    if minor == true_minor:
        return 0.5 if tonic == (true_tonic + 7) % 12 else 0.0
    relative = true_tonic + 3 if true_minor else true_tonic - 3
    if tonic == relative % 12:
        return 0.3
    return 0.2 if tonic == true_tonic else 0.0


def test_key_credits_follow_the_rule():
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


def test_symmetric_key_credits_include_the_fifth_below():
    literal = np.array(
        [[literal_credit(true, estimate) for estimate in range(24)] for true in range(24)]
    )
    for true in range(24):
        literal[true, 12 * (true // 12) + (true % 12 - 7) % 12] = 0.5
    np.testing.assert_array_equal(key_credits(True), literal)
    assert key_credits(True)[KEYS.index("C major"), KEYS.index("F major")] == 0.5


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_key_score_is_the_mean_credit_with_zero_for_an_unknown_key(symmetric: bool):
    logits, targets = classes()
    credit = [
        [
            0.0 if true < 0 else key_credits(symmetric)[true, predicted]
            for predicted in logits[unit].argmax(dim=-1)
        ]
        for unit, true in enumerate(targets)
    ]
    np.testing.assert_allclose(
        KeyScore(symmetric)(logits, targets), np.mean(credit, axis=0), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("metric", "sklearn_score", "torchmetrics_score"),
    [
        (AUROC(), roc_auc_score, multilabel_auroc),
        (AveragePrecision(), average_precision_score, multilabel_average_precision),
        (F1("macro"), lambda targets, logits: f1_score(targets, logits > 0), multilabel_f1_score),
    ],
    ids=["auroc", "ap", "f1_macro"],
)
def test_tag_scores_equal_the_libraries_with_ties_and_without_an_empty_tag(
    metric: Metric,
    sklearn_score: Callable[..., float],
    torchmetrics_score: Callable[..., torch.Tensor],
):
    targets = tags(num_tags=5)
    targets[:, 2] = 0
    logits = tied_logits(targets)
    assert len(logits[:, 0].unique()) < 12, "there are ties"
    scored = [0, 1, 3, 4]
    assert metric.num_scored(targets) == len(scored)
    for head, score in enumerate(metric(logits, targets)):
        by_sklearn = [
            sklearn_score(targets[:, tag], logits[:, head, tag].numpy()) for tag in scored
        ]
        assert float(score) == pytest.approx(np.mean(by_sklearn), abs=1e-6)
        target, probabilities = torch.from_numpy(targets).long(), logits[:, head].double().sigmoid()
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
def test_resampled_rank_scores_equal_sklearns_weighted_scores(
    metric: Metric, sklearn_score: Callable[..., float]
):
    targets = tags()
    logits = tied_logits(targets, num_heads=1)[:, 0].numpy()
    counts = draw_counts(NUM_UNITS, draws=50, seed=3)
    literal = [
        np.mean(
            [
                sklearn_score(targets[:, tag], logits[:, tag], sample_weight=weight)
                for tag in range(targets.shape[1])
            ]
        )
        for weight in counts
    ]
    np.testing.assert_allclose(metric.resampled(logits, targets, counts), literal, rtol=1e-10)


def test_a_tag_missing_from_a_draw_is_left_out_of_its_mean():
    targets = tags(num_tags=2)
    targets[:, 1], targets[7, 1] = 0, 1
    logits = tied_logits(targets, num_heads=1)[:, 0].numpy()
    counts = np.ones((3, NUM_UNITS), dtype=np.int16)
    counts[1, 7] = 0
    counts[2] = targets[:, 0] == 0
    counts[2, 7] = 0
    for metric in (AUROC(), AveragePrecision(), F1("macro")):
        both, first_alone, none = metric.resampled(logits, targets, counts)
        of_first = metric.resampled(logits[:, :1], targets[:, :1], counts[1:2])[0]
        assert first_alone == pytest.approx(of_first)
        assert both != pytest.approx(of_first)
        assert np.isnan(none)


def test_a_tag_on_all_units_counts_for_average_precision_only():
    targets = tags()
    targets[:, 0] = 1
    assert AUROC().num_scored(targets) == 3
    assert AveragePrecision().num_scored(targets) == 4
    logits = tied_logits(targets)
    torch.testing.assert_close(AUROC()(logits, targets), AUROC()(logits[..., 1:], targets[:, 1:]))
    torch.testing.assert_close(
        AveragePrecision()(logits, targets),
        (1 + 3 * AveragePrecision()(logits[..., 1:], targets[:, 1:])) / 4,
    )


@pytest.mark.parametrize(
    "metric", [AUROC(), AveragePrecision(), F1("macro"), F1("micro")], ids=lambda m: m.name
)
def test_units_without_tags_are_an_error(metric: Metric):
    logits, targets = multilabel()
    with pytest.raises(ValueError, match=f"`{metric.name}`"):
        metric(logits, np.zeros_like(targets))
    with pytest.raises(ValueError, match=f"`{metric.name}`"):
        metric.resampled(
            logits[:, 0].numpy(), np.zeros_like(targets), draw_counts(NUM_UNITS, draws=2)
        )


def test_large_logits_keep_their_order_when_probabilities_saturate():
    targets = np.array([[1], [0], [1], [0]], dtype=np.float32)
    logits = torch.tensor([90.0, 80.0, 70.0, 60.0])[:, None, None]
    assert len(logits.sigmoid().unique()) == 1
    assert AUROC()(logits, targets).item() == pytest.approx(0.75)
    assert AveragePrecision()(logits, targets).item() == pytest.approx((1 + 2 / 3) / 2)


def test_a_diverged_head_scores_at_most_chance_for_any_order_of_records():
    targets = np.sort(tags(), axis=0)[::-1].copy()
    nothing = torch.full((NUM_UNITS, 1, targets.shape[1]), torch.nan)
    assert AUROC()(nothing, targets).item() == 0.5
    assert AveragePrecision()(nothing, targets).item() == pytest.approx(targets.mean())
    assert F1("macro")(nothing, targets).item() == 0
    assert R2()(nothing[..., :2], numbers()[1]).item() == -np.inf
    one_missing = torch.tensor([3.0, torch.nan, -5.0])[:, None, None]
    assert AUROC()(one_missing, np.array([[1], [0], [1]])).item() == 1, (
        "the unit without a logit is the last"
    )


def test_micro_f1_equals_sklearn():
    targets = tags(num_tags=5)
    targets[:, 2] = 0
    logits = tied_logits(targets)
    for head, score in enumerate(F1("micro")(logits, targets)):
        assert float(score) == pytest.approx(
            f1_score(targets, logits[:, head] > 0, average="micro"), abs=1e-12
        )
    assert F1("micro").num_scored(targets) is None


def test_r2_is_of_the_whole_split_and_not_the_mean_of_batches():
    predictions, targets = numbers()
    target = torch.from_numpy(targets)
    for head in range(NUM_HEADS):
        by_output = torchmetrics_r2(predictions[:, head], target, multioutput="raw_values")
        np.testing.assert_allclose(
            by_output, r2_score(targets, predictions[:, head], multioutput="raw_values"), rtol=1e-4
        )
        assert float(R2()(predictions, targets)[head]) == pytest.approx(
            float(by_output.mean()), rel=1e-4
        )
        for output in (0, 1):
            assert float(R2(output)(predictions, targets)[head]) == pytest.approx(
                float(by_output[output]), rel=1e-4
            )
        batches = zip(predictions[:, head].split(16), target.split(16), strict=True)
        of_batches = np.mean([float(torchmetrics_r2(*batch)) for batch in batches])
        assert abs(of_batches - float(R2()(predictions, targets)[head])) > 0.01
    assert R2().num_scored(targets) == 2
    assert R2(0).num_scored(targets) is None


def test_resampled_r2_equals_sklearns_weighted_r2():
    predictions, targets = numbers()
    counts = draw_counts(NUM_UNITS, draws=20, seed=4)
    literal = [r2_score(targets, predictions[:, 0], sample_weight=weight) for weight in counts]
    np.testing.assert_allclose(
        R2().resampled(predictions[:, 0].numpy(), targets, counts), literal, rtol=1e-6
    )


def test_r2_of_constant_targets_is_an_error_and_of_a_constant_draw_nan():
    predictions, targets = numbers()
    one_unit = np.zeros((1, NUM_UNITS), dtype=np.int16)
    one_unit[0, 5] = NUM_UNITS
    assert np.isnan(R2().resampled(predictions[:, 0].numpy(), targets, one_unit)).all()
    targets[:, 1] = 3
    assert torch.isfinite(R2(0)(predictions, targets)).all()
    for metric in (R2(), R2(1)):
        with pytest.raises(ValueError, match="output 1 is the same in all 60 units"):
            metric(predictions, targets)


def test_event_counts_are_pooled_or_scored_by_unit():
    predictions = torch.tensor(
        [[3, 4, 6, 2.0], [1, 1, 1, torch.nan], [0, 2, 0, 4.0], [0, 0, 5, 0.0]]
    )[:, None]
    targets = np.zeros(4, dtype=np.int64)
    assert Share("share", (0, 2))(predictions, targets).item() == pytest.approx(4 / 12)
    assert PooledF1("pooled", (0, 1, 2))(predictions, targets).item() == pytest.approx(
        2 * 4 / (7 + 12)
    )
    assert MeanF1("mean", (0, 1, 2))(predictions, targets).item() == pytest.approx(
        (6 / 10 + 1 + 0) / 3
    )


def test_metrics_have_their_reported_names():
    expected = "accuracy key_weighted key_weighted_symmetric auroc ap f1_macro f1_micro r2"
    assert " ".join(metric.name for metric, _ in METRICS[:8]) == expected
