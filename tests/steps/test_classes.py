"""Codebooks and cross-entropy equal literal computations in float64, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.steps.classes import Codebook, OnlineClusters, RandomProjection
from jepa_audio.steps.grid import Grid, TokenSet
from jepa_audio.steps.losses import CrossEntropy

GRID = Grid(2, 5)
SHAPE = (4, 2, 6)
WIDTH = 7


@pytest.fixture
def target(rng: torch.Generator) -> torch.Tensor:
    """Targets whose channels have different means and deviations."""
    scale = torch.linspace(0.1, 5, WIDTH)
    return torch.randn(*SHAPE, WIDTH, generator=rng) * scale + 3 * scale.flip(0)


@pytest.fixture
def where(rng: torch.Generator) -> TokenSet:
    """Tokens of a grid; some are padding. No token of the last position is valid."""
    index = torch.randint(0, GRID.num_tokens, SHAPE, generator=rng)
    valid = (torch.rand(SHAPE, generator=rng) > 0.25) & (index < GRID.num_tokens - 1)
    return TokenSet(index, valid)


def built(codebook: Codebook, seed: int = 0) -> Codebook:
    codebook.set_width(WIDTH)
    torch.manual_seed(seed)
    codebook.reset_parameters()
    return codebook


def doubles(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def literal_codes(codebook: RandomProjection, vectors: np.ndarray) -> list[int]:
    """The index of the code nearest to A x, both of unit length, one vector at a time."""
    projection, codes = doubles(codebook.projection), doubles(codebook.codes)
    found = []
    for vector in vectors:
        projected = np.array([sum(vector * column) for column in projection.T])
        projected /= math.sqrt(sum(projected**2))
        distances = [math.dist(code / np.linalg.norm(code), projected) for code in codes]
        found.append(distances.index(min(distances)))
    return found


@pytest.mark.parametrize("normalization", ["none", "layer", "batch"])
def test_the_class_is_the_nearest_code_of_the_normalised_target(
    target: torch.Tensor, where: TokenSet, normalization: str
):
    codebook = built(RandomProjection(32, 3, normalization))
    vectors = doubles(target).reshape(-1, WIDTH)
    if normalization == "layer":
        vectors = (vectors - vectors.mean(1, keepdims=True)) / vectors.std(1, keepdims=True)
    if normalization == "batch":
        counted = vectors[where.valid.flatten().numpy()]
        vectors = (vectors - counted.mean(0)) / counted.std(0)
    classes = codebook(target, where, GRID)
    assert classes.loss is None
    assert classes.target.flatten().tolist() == literal_codes(codebook, vectors)
    least = {"none": 2, "layer": 4, "batch": 9}[normalization]
    assert len(set(classes.target.flatten().tolist())) >= least


def test_projection_and_codes_have_the_distributions_of_the_paper_and_are_never_trained():
    codebook = built(RandomProjection(2000, 16))
    assert list(codebook.parameters()) == []
    bound = math.sqrt(6 / (WIDTH + 16))
    projection = codebook.projection
    assert 0.9 * bound < projection.abs().max() <= bound
    assert projection.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    torch.testing.assert_close(codebook.codes.norm(dim=-1), torch.ones(2000))
    # Directions of standard normal vectors are uniform on the sphere: covariance 1 / dimension.
    torch.testing.assert_close(torch.cov(codebook.codes.T), torch.eye(16) / 16, atol=0.01, rtol=0)


def test_a_random_projection_depends_on_its_own_seed_alone():
    state = torch.get_rng_state()
    first = built(RandomProjection(8, 2), seed=0)
    torch.set_rng_state(state)
    again, other = built(RandomProjection(8, 2), seed=1), built(RandomProjection(8, 2, seed=1))
    assert torch.equal(first.projection, again.projection)
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.projection, other.projection)
    assert not torch.equal(first.codes, other.codes)
    before = torch.get_rng_state()
    RandomProjection(8, 2).set_width(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_evaluation_uses_the_statistics_of_the_training_so_far(
    target: torch.Tensor, where: TokenSet
):
    codebook = built(RandomProjection(16, 3))
    batches = [target, 2 * target + 1, -target]
    for batch in batches:
        codebook(batch, where, GRID)
    counted = [doubles(batch[where.valid]) for batch in batches]
    mean = np.mean([batch.mean(0) for batch in counted], axis=0)
    variance = np.mean([batch.var(0) for batch in counted], axis=0)
    np.testing.assert_allclose(codebook.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(codebook.variance, variance, rtol=1e-4)
    codebook.eval()
    one = TokenSet(where.index[:1, :1, :1])
    vector = (doubles(target[:1, :1, :1]) - mean) / np.sqrt(variance)
    alone = codebook(target[:1, :1, :1], one, GRID).target
    assert alone.flatten().tolist() == literal_codes(codebook, vector.reshape(1, -1))
    assert alone.item() == codebook(target, where, GRID).target[0, 0, 0].item()


def literal_assignments(
    scores: np.ndarray, groups: list[int], valid: list[bool], iterations: int
) -> np.ndarray:
    """Sinkhorn-Knopp as in CAPI: clusters of each group, then tokens, are divided by their sums."""
    matrix = np.exp(scores)
    for _ in range(iterations):
        for group in set(groups):
            rows = [
                i for i, (g, v) in enumerate(zip(groups, valid, strict=True)) if g == group and v
            ]
            for cluster in range(matrix.shape[1]):
                if rows:
                    matrix[rows, cluster] /= sum(matrix[row, cluster] for row in rows)
        for row in range(len(matrix)):
            matrix[row] /= sum(matrix[row])
    return matrix


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("iterations", [1, 3])
def test_online_clusters_are_sinkhorn_assignments_and_learn_by_their_cross_entropy(
    target: torch.Tensor, where: TokenSet, by_position: bool, iterations: int
):
    codebook = built(OnlineClusters(5, by_position, num_iterations=iterations))
    target = target.requires_grad_()
    classes = codebook(target, where, GRID)
    vectors, valid = doubles(target).reshape(-1, WIDTH), where.valid.flatten().tolist()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ doubles(codebook.scores.weight).T + doubles(codebook.scores.bias)
    groups = where.index.flatten().tolist() if by_position else [0] * len(scores)
    expected = literal_assignments(scores / 0.06, groups, valid, iterations)
    np.testing.assert_allclose(
        classes.target.flatten(0, -2)[valid], expected[valid], rtol=1e-3, atol=1e-6
    )
    predicted = np.exp(scores / 0.12) / np.exp(scores / 0.12).sum(1, keepdims=True)
    losses = -(expected * np.log(predicted)).sum(1)
    np.testing.assert_allclose(classes.loss.detach().flatten()[valid], losses[valid], rtol=1e-3)
    assert classes.target.isfinite().all()
    assert classes.loss.isfinite().all()
    assert not classes.target.requires_grad
    classes.loss[where.valid].sum().backward()
    assert target.grad is None
    # The gradient of a cross-entropy with a softmax: (predicted - expected) / temperature.
    gradient = ((predicted - expected)[valid] / 0.12).T @ vectors[valid]
    np.testing.assert_allclose(codebook.scores.weight.grad, gradient, rtol=1e-2, atol=1e-3)


def test_enough_iterations_give_every_cluster_the_same_share_at_every_position(
    target: torch.Tensor, where: TokenSet
):
    codebook = built(OnlineClusters(3, num_iterations=300, target_temperature=0.5))
    assigned = codebook(target, where, GRID).target
    for position in range(GRID.num_tokens - 1):
        shares = assigned[(where.index == position) & where.valid].mean(0)
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=1e-3, atol=1e-3)


def test_clusters_by_position_cannot_stand_for_positions(rng: torch.Generator):
    of_position = torch.randn(GRID.num_tokens, WIDTH, generator=rng)
    index = torch.arange(GRID.num_tokens).expand(6, 1, -1)
    perplexities = {}
    for by_position in (True, False):
        codebook = built(OnlineClusters(5, by_position))
        codebook(of_position[index], TokenSet(index), GRID)
        perplexities[by_position] = codebook.perplexity
    assert perplexities[True] == pytest.approx(1, abs=1e-3)
    assert perplexities[False] > 3


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e6])
def test_very_large_and_very_small_scores_have_finite_assignments(
    target: torch.Tensor, where: TokenSet, scale: float
):
    codebook = built(OnlineClusters(4))
    with torch.no_grad():
        codebook.scores.weight.mul_(scale)
    classes = codebook(target, where, GRID)
    torch.testing.assert_close(classes.target.sum(-1), torch.ones(SHAPE))
    assert classes.loss.isfinite().all()


def test_classes_of_an_evaluation_do_not_depend_on_the_other_clips(
    target: torch.Tensor, where: TokenSet
):
    for codebook in (RandomProjection(16, 3), OnlineClusters(4)):
        built(codebook)(target, where, GRID)
        codebook.eval()
        together = codebook(target, where, GRID).target
        alone = [codebook(target[i : i + 1], where.rows(slice(i, i + 1)), GRID) for i in range(4)]
        torch.testing.assert_close(torch.cat([classes.target for classes in alone]), together)


def test_only_training_passes_with_gradients_change_the_statistics(
    target: torch.Tensor, where: TokenSet
):
    for codebook in (RandomProjection(16, 3), OnlineClusters(4)):
        built(codebook)(target, where, GRID)
        before = {name: buffer.clone() for name, buffer in codebook.named_buffers()}
        assert codebook.num_tokens == where.valid.sum()
        with torch.no_grad():
            codebook(2 * target, where, GRID)
        codebook.eval()(3 * target, where, GRID)
        assert all(torch.equal(b, before[name]) for name, b in codebook.named_buffers())


def test_perplexity_is_the_number_of_classes_that_targets_distinguish(
    target: torch.Tensor, where: TokenSet
):
    codebook = built(RandomProjection(16, 3))
    classes = codebook(target, where, GRID).target[where.valid].tolist()
    shares = [classes.count(label) / len(classes) for label in set(classes)]
    expected = math.prod(share**-share for share in shares)
    assert codebook.perplexity == pytest.approx(expected, rel=1e-5)
    soft = built(OnlineClusters(4, by_position=False))
    probabilities = doubles(soft(target, where, GRID).target[where.valid])
    entropy = -(probabilities * np.log(probabilities)).sum(1).mean()
    mean = probabilities.mean(0)
    expected = math.exp(-(mean * np.log(mean)).sum() - entropy)
    assert soft.perplexity == pytest.approx(expected, rel=1e-4)
    own_loss = soft(target, where, GRID).loss[where.valid].mean().item()
    assert soft.own_loss.item() == pytest.approx(own_loss, rel=1e-5)
    assert codebook.own_loss == 0


def test_equal_targets_have_one_class(where: TokenSet):
    for codebook in (RandomProjection(16, 3), OnlineClusters(4)):
        built(codebook)(torch.ones(*SHAPE, WIDTH), where, GRID)
        assert codebook.perplexity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.12])
@pytest.mark.parametrize("codebook", [RandomProjection(6, 3), OnlineClusters(6)], ids=["rp", "oc"])
def test_cross_entropy_equals_the_formula_for_predictions_and_targets_of_other_widths(
    target: torch.Tensor,
    where: TokenSet,
    rng: torch.Generator,
    temperature: float | None,
    codebook: Codebook,
):
    distance = CrossEntropy(codebook, temperature)
    assert distance.set_widths(3, WIDTH) == 3, "predictions of any width are possible"
    distance.reset_parameters()
    prediction = torch.randn(*SHAPE, 3, generator=rng, requires_grad=True)
    measured = distance.at_targets(prediction, target, where, GRID)
    classes = codebook(target, where, GRID)
    weight, vectors = doubles(distance.head.weight), doubles(prediction)
    if temperature is None:
        logits = vectors @ weight.T + doubles(distance.head.bias)
    else:
        cosines = vectors @ weight.T / np.linalg.norm(vectors, axis=-1, keepdims=True)
        logits = cosines / np.linalg.norm(weight, axis=-1) / temperature
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = doubles(classes.target)
    if classes.loss is None:
        expected = np.eye(6)[classes.target]
    np.testing.assert_allclose(
        doubles(measured), -(expected * log_probabilities).sum(-1), rtol=1e-4
    )
    measured[where.valid].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (prediction, *distance.parameters()))


def test_autocast_changes_neither_classes_nor_the_type_of_losses(
    target: torch.Tensor, where: TokenSet
):
    for codebook in (RandomProjection(6, 3), OnlineClusters(6)):
        distance = CrossEntropy(codebook, 0.12)
        distance.set_widths(WIDTH, WIDTH)
        distance.reset_parameters()
        full = codebook(target, where, GRID)
        with torch.autocast("cpu", torch.bfloat16):
            half, losses = codebook(target, where, GRID), distance(target, target, where, GRID)
        assert torch.equal(full.target, half.target)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(
            losses, distance(target, target, where, GRID), rtol=0.05, atol=0.1
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomProjection(1), r"`num_classes` \(1\) must be in \[2, 262144\]"),
        (lambda: RandomProjection(10**9), "`num_classes`"),
        (lambda: RandomProjection(8, 0), r"`codebook_dim` \(0\) must be in \[1, 256\]"),
        (lambda: RandomProjection(seed=-1), r"`seed` \(-1\)"),
        (lambda: RandomProjection(seed=2**64), "`seed`"),
        (lambda: OnlineClusters(4, temperature=0.0), r"`temperature` \(0.0\)"),
        (lambda: OnlineClusters(4, target_temperature=math.nan), r"`target_temperature` \(nan\)"),
        (lambda: OnlineClusters(4, num_iterations=0), r"`num_iterations` \(0\)"),
        (lambda: CrossEntropy(OnlineClusters(4), 0.0), r"`temperature` \(0.0\) must be in \[0.001"),
        (lambda: CrossEntropy(OnlineClusters(4), math.inf), r"`temperature` \(inf\)"),
    ],
)
def test_a_wrong_setting_is_refused(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
