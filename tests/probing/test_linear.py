"""Deterministic heads: they find labels, find none in noise, and agree with scikit-learn."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import Choice, FitContext, Head, HeadInput, choose
from jepa_audio.probing.heads.linear import (
    LOGISTIC_STRENGTHS,
    RIDGE_STRENGTHS,
    NeighbourHead,
    Standardisation,
    fit_logistic,
    fit_ridge,
)
from jepa_audio.probing.metrics.sums import R2, Accuracy
from jepa_audio.probing.presets import LinearPreset
from jepa_audio.probing.tasks import ProbeData, Task
from jepa_audio.probing.tasks.labels import Multiclass, Regression, Rows
from jepa_audio.probing.tasks.records import SPLITS, Item, Split

NUM_CLASSES = 5
KINDS = ["logistic", "knn"]
ONE_LAYER = [HeadInput("layer 0", (0,))]
Layer = list[np.ndarray]  # one table for each split


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def clips(rng: np.random.Generator, *sizes: int) -> list[np.ndarray]:
    return [rng.permutation(np.arange(size) % NUM_CLASSES) for size in sizes]


def clouds(rng: np.random.Generator, labels: list[np.ndarray], width: int, noise: float) -> Layer:
    """A centre for each class, correlated columns of very different scales, far from zero."""
    centres, mixing = rng.standard_normal((NUM_CLASSES, width)), rng.standard_normal((width, width))
    mixing *= np.exp(-np.arange(width) / width)
    splits = [centres[y] + noise * rng.standard_normal((len(y), width)) for y in labels]
    return [(split @ mixing + 3).astype(np.float32) for split in splits]


def features_of(*tables: np.ndarray) -> Features:
    rows = np.arange(len(tables[0]))
    return Features(tables, rows, Rows(rows, rows, np.zeros(len(rows))))


def data_of(labels: list[np.ndarray], numbers: bool = False) -> ProbeData:
    splits = {
        split: Split(
            tuple(
                Item(Path("x"), label, f"{split} {i}", "here")
                for i, label in enumerate(of.tolist())
            )
        )
        for split, of in zip(SPLITS, labels, strict=True)
    }
    kind = Regression() if numbers else Multiclass()
    task = Task("toy", "toy", kind, (R2() if numbers else Accuracy(),), {})
    return ProbeData(task, kind.fitted(splits["train"]), splits, "")


def fitted(
    layers: list[Layer], labels: list[np.ndarray], kind: str, numbers: bool = False
) -> list[Head]:
    features = {
        split: features_of(*(layer[i] for layer in layers)) for i, split in enumerate(SPLITS)
    }
    names = tuple(f"layer {i}" for i in range(len(layers)))
    fit = FitContext(features, data_of(labels, numbers), names, (0,), "cpu", "")
    return list(LinearPreset().fit(fit)[kind])


def accuracy(choice: Choice, layers: list[Layer], labels: list[np.ndarray]) -> float:
    logits = choice.heads[0].logits(features_of(*(layer[2] for layer in layers)))
    return float((logits[:, 0].argmax(dim=1).numpy() == labels[2]).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_holds_the_label_is_chosen_and_scores_one(kind: str, rng: np.random.Generator):
    labels = clips(rng, 100, 50, 50)
    oracle = [np.eye(NUM_CLASSES, dtype=np.float32)[y] for y in labels]
    noise = clouds(rng, [rng.permutation(y) for y in labels], 4, noise=1.0)
    layers = [noise, oracle, noise]
    choice = choose(fitted(layers, labels, kind))
    assert choice.heads[0].input.name == "layer 1"
    assert accuracy(choice, layers, labels) == 1
    assert choice.valid[1].max() == 1 > choice.valid[::2].max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_a_constant_encoder_scores_chance_also_with_rounding_noise(
    kind: str, jitter: float, rng: np.random.Generator
):
    labels = clips(rng, 200, 100, 500)
    constant = [(100 + y[:, None] * np.full(3, jitter)).astype(np.float32) for y in labels]
    choice = choose(fitted([constant], labels, kind))
    assert accuracy(choice, [constant], labels) == pytest.approx(1 / NUM_CLASSES, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_labels_score_chance(kind: str, rng: np.random.Generator):
    labels = clips(rng, 300, 200, 1000)
    layers = [clouds(rng, labels, 6, noise=0.1)]
    assert accuracy(choose(fitted(layers, labels, kind)), layers, labels) > 0.95
    shuffled = choose(fitted(layers, [rng.permutation(labels[0]), *labels[1:]], kind))
    assert accuracy(shuffled, layers, labels) == pytest.approx(1 / NUM_CLASSES, abs=0.1)


# More features than rows, which may be linear combinations of fewer columns.
@pytest.mark.parametrize(("width", "rank"), [(12, 12), (150, 150), (150, 20)])
def test_the_logistic_head_equals_scikit_learn(width: int, rank: int, rng: np.random.Generator):
    labels = clips(rng, 120, 50, 400)
    mixing = np.eye(width) if rank == width else rng.standard_normal((rank, width)) / rank**0.5
    train, _, test = ((x @ mixing).astype(np.float32) for x in clouds(rng, labels, rank, noise=2.0))
    heads = fit_logistic(features_of(train), torch.from_numpy(labels[0]), NUM_CLASSES, ONE_LAYER)
    scaler = StandardScaler().fit(train)
    for strength, head in zip(LOGISTIC_STRENGTHS, heads, strict=True):
        theirs = LogisticRegression(C=1 / (120 * strength), tol=1e-6, max_iter=5000)
        theirs.fit(scaler.transform(train), labels[0])
        ours = head.logits(features_of(test))[:, 0].softmax(dim=1).numpy()
        expected = theirs.predict_proba(scaler.transform(test))
        assert (ours.argmax(1) == expected.argmax(1)).mean() >= 0.99
        assert np.abs(ours - expected).mean() < 0.002


@pytest.mark.parametrize(("width", "rank"), [(12, 12), (150, 150), (150, 20)])
def test_the_ridge_head_equals_scikit_learn_also_far_from_zero(
    width: int, rank: int, rng: np.random.Generator
):
    labels = clips(rng, 120, 50, 400)
    mixing = np.eye(width) if rank == width else rng.standard_normal((rank, width)) / rank**0.5
    train, _, test = (
        (x @ mixing + 1000).astype(np.float32) for x in clouds(rng, labels, rank, noise=2.0)
    )
    targets = rng.standard_normal((120, 3)).astype(np.float32)
    heads = fit_ridge(features_of(train), torch.from_numpy(targets), ONE_LAYER)
    scaler = StandardScaler().fit(train.astype(np.float64))
    for strength, head in zip(RIDGE_STRENGTHS, heads, strict=True):
        theirs = Ridge(alpha=120 * strength).fit(
            scaler.transform(train.astype(np.float64)), targets
        )
        expected = theirs.predict(scaler.transform(test.astype(np.float64)))
        ours = head.logits(features_of(test))[:, 0].numpy()
        np.testing.assert_allclose(ours, expected, atol=5e-3)


def test_a_hard_separable_problem_converges(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
):
    labels = clips(rng, 300, 50, 50)
    train = clouds(rng, labels, 40, noise=0.01)[0]
    target = torch.from_numpy(labels[0])
    fit_logistic(features_of(train), target, NUM_CLASSES, ONE_LAYER, strengths=(1e-6, 1e-4))
    assert not caplog.records


def test_the_knn_head_equals_scikit_learn_and_the_nearest_wins_a_tie(rng: np.random.Generator):
    labels = clips(rng, 200, 50, 300)
    train, _, test = clouds(rng, labels, 8, noise=2.0)
    scale = Standardisation(torch.from_numpy(train))
    rows = torch.nn.functional.normalize(scale(torch.from_numpy(train)), dim=1)
    votes = torch.eye(NUM_CLASSES)[torch.from_numpy(labels[0])]
    scaler = StandardScaler().fit(train)
    order = np.argsort(
        -rows.numpy()
        @ torch.nn.functional.normalize(scale(torch.from_numpy(test)), dim=1).numpy().T,
        0,
    )
    for k in (1, 2, 5):
        head = NeighbourHead(ONE_LAYER[0], float(k), features_of(train), votes)
        ours = head.logits(features_of(test))[:, 0].argmax(dim=1).numpy()
        theirs = KNeighborsClassifier(k, metric="cosine").fit(scaler.transform(train), labels[0])
        share = np.sort(theirs.predict_proba(scaler.transform(test)), axis=1)
        decided = share[:, -1] > share[:, -2] + 1e-9
        assert decided.mean() > 0.3
        assert (theirs.predict(scaler.transform(test)) == ours)[decided].all()
        if k == 2:
            assert (labels[0][order[0]] == ours)[~decided].all()


def test_layers_fitted_at_once_equal_layers_fitted_one_by_one(rng: np.random.Generator):
    labels = clips(rng, 100, 40, 200)
    layers = [clouds(rng, labels, width, noise=1.5) for width in (6, 10, 130)]
    target = torch.from_numpy(labels[0])
    inputs = [HeadInput(f"layer {i}", (i,)) for i in range(3)]
    train, test = (features_of(*(layer[split] for layer in layers)) for split in (0, 2))
    at_once = fit_logistic(train, target, NUM_CLASSES, inputs)
    one_by_one = [fit_logistic(train, target, NUM_CLASSES, [one]) for one in inputs]
    for head, other in zip(at_once, chain(*one_by_one), strict=True):
        assert (head.input, head.setting) == (other.input, other.setting)
        classes, expected = (each.logits(test)[:, 0].argmax(dim=1) for each in (head, other))
        assert (classes == expected).float().mean() >= 0.98


def test_numbers_are_predicted_from_a_layer_that_holds_them(rng: np.random.Generator):
    numbers = [rng.standard_normal(size) for size in (100, 50, 80)]
    informative = [
        np.stack([5 + 3 * y, rng.standard_normal(len(y))], axis=1).astype(np.float32)
        for y in numbers
    ]
    constant = [np.ones((len(y), 2), dtype=np.float32) for y in numbers]
    for kind, least in (("ridge", 0.99), ("knn", 0.8)):
        heads = fitted([constant, informative], numbers, kind, numbers=True)
        choice = choose(heads)
        assert choice.heads[0].input.name == "layer 1"
        assert choice.valid[1].max() > least
        assert choice.valid[0].max() < 0.1
