"""Regularizers equal literal computations, with padding, in bfloat16 and on several processes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.losses import JEPAOutput
from jepa_audio.steps.regularizers import Regularizer, SIGReg, VICReg, active, regularized

LATENTS = ["context", "prediction", "clip_mean"]
Ragged = Callable[[Grid, int, int], Masks]


def literal_vicreg(x: Tensor, covariance: float, min_std: float, eps: float) -> Tensor:
    """Equations 1 to 4 of the paper in loops, for vectors `[n, D]`."""
    count, dim = x.shape
    variance = sum(
        max(torch.zeros(()), min_std - (x[:, j].var(unbiased=True) + eps).sqrt())
        for j in range(dim)
    )
    total = torch.zeros((), dtype=x.dtype)
    for i in range(dim):
        for j in range(dim):
            if i != j:
                product = (x[:, i] - x[:, i].mean()) * (x[:, j] - x[:, j].mean())
                total = total + (product.sum() / (count - 1)) ** 2
    return variance / dim + covariance * total / dim


def literal_sigreg(x: Tensor, directions: Tensor, max_frequency: float, points: int) -> Tensor:
    """The integral of each direction by the trapezoidal rule over negative and positive t."""
    values = []
    t = torch.linspace(-max_frequency, max_frequency, 2 * points - 1, dtype=x.dtype)
    for direction in directions.T.to(x.dtype):
        empirical = torch.exp(1j * (x @ direction)[:, None] * t).mean(0)
        normal = torch.exp(-(t**2) / 2)
        values.append(torch.trapezoid((empirical - normal).abs() ** 2 * normal, t))
    return len(x) * torch.stack(values).mean()


def exact_sigreg(x: np.ndarray, directions: np.ndarray) -> float:
    """The integral over all t in closed form."""
    values = []
    for projected in (x @ directions).T:
        pairs = np.exp(-(np.subtract.outer(projected, projected) ** 2) / 2).mean()
        singles = np.exp(-(projected**2) / 4).mean()
        values.append(pairs - math.sqrt(2) * singles + 1 / math.sqrt(3))
    return len(x) * math.sqrt(2 * math.pi) * float(np.mean(values))


@pytest.fixture
def masks(ragged: Ragged) -> Masks:
    return ragged(Grid(1, 24), 5, 2)


def latents(masks: Masks, rng: torch.Generator, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Context latents and predictions; at the padding, large values that must have no effect."""
    values = []
    for tokens in (masks.context, masks.targets):
        value = 0.7 * torch.randn(*tokens.index.shape, dim, generator=rng) + 0.3
        assert tokens.valid is not None
        values.append(value.masked_fill(~tokens.valid[..., None], 1e4).requires_grad_())
    return values[0], values[1]


def chosen(which: str, context: Tensor, prediction: Tensor, masks: Masks) -> Tensor:
    """The vectors of a regularizer, selected in float64 clip by clip."""
    if which == "prediction":
        return prediction.double()[masks.targets.valid_or_true]
    clips = [
        clip[valid]
        for clip, valid in zip(context.double(), masks.context.valid_or_true, strict=True)
    ]
    return torch.cat(clips) if which == "context" else torch.stack([c.mean(0) for c in clips])


@pytest.mark.parametrize("which", LATENTS)
@pytest.mark.parametrize("name", ["vicreg", "sigreg"])
def test_value_and_gradient_equal_the_formulae_of_the_paper_without_padding(
    masks: Masks, rng: torch.Generator, which: str, name: str
):
    context, prediction = latents(masks, rng)
    vectors = chosen(which, context, prediction, masks)
    if name == "vicreg":
        regularizer: Regularizer = VICReg(latents=which, covariance=0.3, min_std=0.8, eps=1e-3)
        expected = literal_vicreg(vectors, 0.3, 0.8, 1e-3)
    else:
        regularizer = SIGReg(latents=which, num_projections=7, max_frequency=2.5, num_frequencies=9)
        expected = literal_sigreg(vectors, regularizer.directions(6, seed=3), 2.5, 9)
    value = regularizer(context, prediction, prediction, masks, seed=3)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    inputs = [context, prediction]
    ours = torch.autograd.grad(value, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
    assert sum(gradient is not None for gradient in ours) == 1
    for gradient, literal in zip(ours, theirs, strict=True):
        assert (gradient is None) == (literal is None)
        if gradient is not None:
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(gradient, literal, rtol=1e-4, atol=1e-7)


def test_sigreg_on_a_fine_grid_equals_the_integral_in_closed_form(rng: torch.Generator):
    x = 1.5 * torch.randn(40, 5, generator=rng) - 0.2
    sigreg = SIGReg(num_projections=20, max_frequency=8.0, num_frequencies=100)
    value = sigreg.measure(x, torch.ones(40, dtype=torch.bool), seed=1)
    expected = exact_sigreg(x.double().numpy(), sigreg.directions(5, 1).double().numpy())
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_sigreg_is_smallest_for_a_standard_normal_distribution(rng: torch.Generator):
    normal = torch.randn(500, 8, generator=rng)
    others = {
        "constant": torch.zeros(500, 8),
        "shifted": normal + 1,
        "wide": 2 * normal,
        "one direction": normal[:, :1].expand(-1, 8),
        "two points": normal.sign(),
    }
    every = torch.ones(500, dtype=torch.bool)
    best = SIGReg().measure(normal, every, seed=0)
    for name, vectors in others.items():
        assert SIGReg().measure(vectors, every, seed=0) > 1.5 * best, name


def output_of(context: Tensor, prediction: Tensor) -> JEPAOutput:
    loss = (prediction**2).mean()
    return JEPAOutput(loss, loss, torch.tensor(1), context, prediction, prediction.detach())


def test_the_loss_is_the_distance_plus_the_weighted_statistics(masks: Masks, rng: torch.Generator):
    output = output_of(*latents(masks, rng))
    chosen_ones = [VICReg(0.5), SIGReg(0.25, "clip_mean"), VICReg(2.0, "prediction")]
    total = regularized(output, chosen_ones, masks, seed=0)
    names = ["vicreg_context", "sigreg_clip_mean", "vicreg_prediction"]
    assert list(total.regularizers) == names
    added = sum(
        regularizer.weight * total.regularizers[name]
        for regularizer, name in zip(chosen_ones, names, strict=True)
    )
    torch.testing.assert_close(total.loss, output.loss + added)
    assert regularized(output, [], masks, seed=0) is output


class Counted(Regularizer):
    """Counts its calls."""

    latents = "context"

    def __init__(self, weight: float) -> None:
        self.weight, self.calls = weight, 0

    def measure(self, vectors: Tensor, valid: Tensor, seed: int) -> Tensor:
        self.calls += 1
        return vectors.sum()


def test_a_regularizer_of_weight_zero_is_not_computed(masks: Masks, rng: torch.Generator):
    output = output_of(*latents(masks, rng))
    for weight, calls in ((0.0, 0), (1.0, 1)):
        counted = Counted(weight)
        regularized(output, active([counted]), masks, seed=0)
        assert counted.calls == calls


def test_directions_depend_on_seed_and_step_alone(masks: Masks, rng: torch.Generator):
    output = output_of(*latents(masks, rng))

    def value(step: int | None, seed: int = 0) -> float:
        torch.randn(3)
        at = dataclasses.replace(masks, step=step)
        return regularized(output, [SIGReg()], at, seed).regularizers["sigreg_context"].item()

    assert value(5) == value(5) != value(6)
    assert value(5) != value(5, seed=1)
    with torch.no_grad():
        assert value(5) == value(6) == value(None), "the same at every evaluation"


@pytest.mark.parametrize("regularizer", [VICReg(), SIGReg(), SIGReg(latents="clip_mean")])
def test_statistics_are_float32_under_autocast(
    masks: Masks, rng: torch.Generator, regularizer: Regularizer
):
    context, prediction = (value.detach().bfloat16() for value in latents(masks, rng))
    with torch.autocast("cpu", torch.bfloat16):
        half = regularized(output_of(context, prediction), [regularizer], masks, seed=0)
    full = regularized(output_of(context.float(), prediction), [regularizer], masks, seed=0)
    assert half.regularizers == full.regularizers
    assert half.regularizers[regularizer.name].dtype == torch.float32


def test_a_single_vector_is_refused_in_training_and_measured_in_an_evaluation(rng: torch.Generator):
    tokens = TokenSet(torch.arange(4)[None])
    masks = Masks(tokens, TokenSet(tokens.index[:, None]), 4.0)
    context, prediction = torch.randn(1, 4, 3, generator=rng), torch.randn(1, 1, 4, 3)
    for regularizer in (VICReg(latents="clip_mean"), SIGReg(latents="clip_mean")):
        with pytest.raises(UserError, match=r"`clip_mean` needs at least two .*data.batch_size"):
            regularizer(context, prediction, prediction, masks, seed=0)
        with torch.no_grad():
            assert regularizer(context, prediction, prediction, masks, seed=0).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VICReg(weight=-1.0), r"`weight` \(-1.0\) of VICReg must be at least 0"),
        (lambda: SIGReg(weight=math.nan), r"`weight` \(nan\) of SIGReg"),
        (lambda: VICReg(eps=0.0), r"`eps` \(0.0\) above 0"),
        (lambda: SIGReg(num_projections=0), r"`num_projections` \(0\)"),
        (lambda: SIGReg(num_frequencies=1), r"\(1\) above 1"),
        (lambda: active([SIGReg(), VICReg(), SIGReg(0.1)]), "sigreg_context 2 times: keep one"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(UserError, match=message):
        make()


def on_one_of_two(rank: int, folder: Path, regularizers: list[Regularizer]) -> None:
    """Values and gradient of the rows of one process, whose numbers of rows differ."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    inputs, masks = torch.load(folder / "inputs", weights_only=False)
    context, prediction = (value[rows].detach().requires_grad_() for value in inputs)
    total = regularized(output_of(context, prediction), regularizers, masks.rows(rows), seed=0)
    sum(total.regularizers.values()).backward()
    with torch.no_grad():
        alone = regularized(total, regularizers, masks.rows(rows), seed=0).regularizers
    gradients = context.grad, prediction.grad
    torch.save((dict(total.regularizers), gradients, dict(alone)), folder / str(rank))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_two_processes_with_unequal_rows_have_the_statistics_and_gradients_of_one(
    masks: Masks, rng: torch.Generator, tmp_path: Path
):
    inputs = latents(masks, rng)
    regularizers = [kind(latents=which) for kind in (VICReg, SIGReg) for which in LATENTS]
    torch.save((inputs, masks), tmp_path / "inputs")
    torch.multiprocessing.start_processes(
        on_one_of_two, (tmp_path, regularizers), nprocs=2, start_method="fork"
    )
    total = regularized(output_of(*inputs), regularizers, masks, seed=0)
    sum(total.regularizers.values()).backward()
    parts = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    for values, _, alone in parts:
        torch.testing.assert_close(values, dict(total.regularizers), rtol=1e-5, atol=1e-6)
        assert all(alone[name] != values[name] for name in values), "an evaluation does not wait"
    for index, value in enumerate(inputs):
        # The gradients of parameters are averaged over the processes: half of each part counts.
        gradient = torch.cat([gradients[index] for _, gradients, _ in parts]) / 2
        torch.testing.assert_close(gradient, value.grad, rtol=1e-4, atol=1e-7)
