"""Laws of the heads: they find what is there, nothing where nothing is, and agree with scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jepa_audio.probing.heads import L2_STRENGTHS, Features, fit_knn, fit_linear

NUM_CLASSES = 5
HEADS = [fit_linear, fit_knn]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def clips(rng: np.random.Generator, *sizes: int) -> list[np.ndarray]:
    return [rng.permutation(np.arange(size) % NUM_CLASSES) for size in sizes]


def clouds(rng: np.random.Generator, labels: list[np.ndarray], width: int, noise: float) -> Features:
    """One layer: a centre for each class, correlated columns of very different scales, far from zero."""
    centres, mixing = rng.standard_normal((NUM_CLASSES, width)), rng.standard_normal((width, width))
    mixing *= np.exp(-np.arange(width) / width)
    splits = [centres[y] + noise * rng.standard_normal((len(y), width)) for y in labels]
    return Features(*([(split @ mixing + 3).astype(np.float32)] for split in splits))


def joined(*layers: Features) -> Features:
    return Features(*([getattr(f, split)[0] for f in layers] for split in ("train", "valid", "test")))


@pytest.mark.parametrize("fit", HEADS)
def test_a_layer_that_holds_the_label_is_chosen_and_scores_one(fit, rng: np.random.Generator):
    labels = clips(rng, 100, 50, 50)
    oracle = Features(*([np.eye(NUM_CLASSES, dtype=np.float32)[y]] for y in labels))
    noise = clouds(rng, [rng.permutation(y) for y in labels], 4, noise=1.0)
    choice = fit(joined(noise, oracle, noise), labels[0], NUM_CLASSES).choose(labels[1])
    assert choice.layer == 1
    assert choice.correct(labels[2]).all()
    assert choice.valid == choice.valid_by_layer[1] == 1 > max(choice.valid_by_layer[::2])


@pytest.mark.parametrize("fit", HEADS)
@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_a_constant_encoder_scores_chance_rounding_noise_or_not(fit, jitter: float, rng: np.random.Generator):
    labels = clips(rng, 200, 100, 500)
    telling = [y[:, None] * np.full(3, jitter) for y in labels]
    constant = Features(*([(100 + x).astype(np.float32)] for x in telling))
    choice = fit(constant, labels[0], NUM_CLASSES).choose(labels[1])
    assert choice.correct(labels[2]).mean() == pytest.approx(1 / NUM_CLASSES, abs=0.01)


@pytest.mark.parametrize("fit", HEADS)
def test_shuffled_labels_score_chance(fit, rng: np.random.Generator):
    labels = clips(rng, 300, 200, 1000)
    features = clouds(rng, labels, 6, noise=0.1)
    assert fit(features, labels[0], NUM_CLASSES).choose(labels[1]).correct(labels[2]).mean() > 0.95
    shuffled = fit(features, rng.permutation(labels[0]), NUM_CLASSES).choose(labels[1])
    assert shuffled.correct(labels[2]).mean() == pytest.approx(1 / NUM_CLASSES, abs=0.1)


@pytest.mark.parametrize("width", [12, 150])
def test_the_linear_head_is_logistic_regression_also_with_more_columns_than_clips(width: int, rng: np.random.Generator):
    labels = clips(rng, 120, 50, 400)
    features = clouds(rng, labels, width, noise=2.0)
    ours = fit_linear(features, labels[0], NUM_CLASSES)
    scaler = StandardScaler().fit(features.train[0])
    for k, strength in enumerate(L2_STRENGTHS):
        theirs = LogisticRegression(C=1 / (120 * strength), tol=1e-6, max_iter=5000)
        predicted = theirs.fit(scaler.transform(features.train[0]), labels[0]).predict(
            scaler.transform(features.test[0])
        )
        assert (predicted == ours.test[0, k]).mean() >= 0.99


def test_a_hard_separable_problem_converges(rng: np.random.Generator, caplog: pytest.LogCaptureFixture):
    labels = clips(rng, 300, 50, 50)
    features = clouds(rng, labels, 40, noise=0.01)
    fit_linear(features, labels[0], NUM_CLASSES, strengths=(1e-6, 1e-4))
    assert not caplog.records


def test_the_knn_head_agrees_with_scikit_learn(rng: np.random.Generator):
    labels = clips(rng, 200, 50, 300)
    features = clouds(rng, labels, 8, noise=2.0)
    ours = fit_knn(features, labels[0], NUM_CLASSES, neighbours=(1, 5))
    scaler = StandardScaler().fit(features.train[0])
    train, test = (scaler.transform(x[0]) for x in (features.train, features.test))
    for k, neighbours in enumerate((1, 5)):
        theirs = KNeighborsClassifier(neighbours, metric="cosine").fit(train, labels[0])
        share = np.sort(theirs.predict_proba(test), axis=1)
        decided = share[:, -1] > share[:, -2]
        assert decided.mean() > 0.5
        assert (theirs.predict(test) == ours.test[0, k])[decided].all()


@pytest.mark.parametrize("fit", HEADS)
def test_layers_and_settings_fitted_together_are_those_fitted_alone(fit, rng: np.random.Generator):
    labels = clips(rng, 100, 40, 200)
    layers = [clouds(rng, labels, width, noise=1.5) for width in (6, 10, 130)]
    together = fit(joined(*layers), labels[0], NUM_CLASSES)
    for number, layer in enumerate(layers):
        for k, setting in enumerate(together.settings):
            single = (setting,) if fit is fit_linear else (int(setting),)
            alone = fit(layer, labels[0], NUM_CLASSES, single)
            assert (alone.test[0, 0] == together.test[number, k]).mean() >= (0.98 if fit is fit_linear else 1)


def test_choosing_looks_at_validation_labels_alone(rng: np.random.Generator):
    labels = clips(rng, 100, 40, 40)
    features = clouds(rng, labels, 6, noise=1.5)
    predictions = fit_linear(features, labels[0], NUM_CLASSES)
    turned = Features(features.train, features.valid, [x[::-1].copy() for x in features.test])
    one = predictions.choose(labels[1])
    other = fit_linear(turned, labels[0], NUM_CLASSES).choose(labels[1])
    assert (one.layer, one.setting, one.valid) == (other.layer, other.setting, other.valid)
    assert (one.test == other.test[::-1]).all()
