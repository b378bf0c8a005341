"""Statistics of latents have their known values."""

import itertools
import math

import pytest
import torch

from jepa_audio.training.watching.latent_statistics import (
    MAX_LATENTS,
    clip_cosine,
    clip_share,
    mean_std,
    rank_me,
)


def test_the_rank_of_a_line_is_one(rng: torch.Generator):
    assert rank_me(
        torch.randn(50, 1, generator=rng) * torch.randn(8, generator=rng)
    ) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_the_rank_of_equal_singular_values_is_their_number(dim: int, rng: torch.Generator):
    orthogonal = torch.linalg.qr(torch.randn(64, dim, generator=rng)).Q
    assert rank_me(3 * orthogonal) == pytest.approx(dim, rel=1e-4)


def test_the_rank_is_the_exponential_of_the_entropy_of_the_spectrum(rng: torch.Generator):
    left, right = (torch.linalg.qr(torch.randn(size, 3, generator=rng)).Q for size in (40, 10))
    share = torch.tensor([0.7, 0.2, 0.1])
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert rank_me(left @ torch.diag(5 * share) @ right.T) == pytest.approx(expected, rel=1e-4)


def test_zeros_have_a_finite_rank_and_half_precision_is_accepted():
    assert rank_me(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.eye(4, dtype=torch.bfloat16)) == pytest.approx(4, rel=1e-4)


def test_the_rank_of_many_latents_is_the_rank_of_evenly_spaced_ones(rng: torch.Generator):
    latents = torch.randn(3 * MAX_LATENTS - 5, 4, generator=rng) * torch.tensor(
        [1.0, 0.5, 0.2, 0.1]
    )
    assert rank_me(latents) == pytest.approx(rank_me(latents[::3]), rel=1e-6)


def test_mean_std_is_the_mean_of_the_standard_deviations(rng: torch.Generator):
    latents = torch.randn(20000, 3, generator=rng) * torch.tensor([1.0, 2.0, 3.0]) + 7
    assert mean_std(latents) == pytest.approx(2, rel=0.02)
    assert mean_std(torch.ones(5, 3)) == 0


def pairs_at_positions(latents: torch.Tensor, valid: torch.Tensor) -> list[tuple]:
    return [
        (latents[a, n], latents[b, n])
        for n in range(latents.shape[1])
        for a, b in itertools.combinations(range(len(latents)), 2)
        if valid[a, n] and valid[b, n]
    ]


def test_the_cosine_between_clips_is_the_mean_over_pairs_at_the_same_position(
    rng: torch.Generator,
):
    latents = torch.randn(4, 6, 5, generator=rng)
    valid = torch.arange(6) < torch.tensor([6, 4, 2, 1])[:, None]
    cosines = [
        torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs_at_positions(latents, valid)
    ]
    assert clip_cosine(latents, valid) == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert clip_cosine(latents[:1].expand(4, -1, -1), valid) == pytest.approx(1, abs=1e-5)
    assert math.isnan(clip_cosine(latents[:1], valid[:1]))


def test_the_share_between_clips_is_a_ratio_of_unbiased_variances(rng: torch.Generator):
    latents = torch.randn(4, 6, 5, generator=rng) + 3 * torch.randn(1, 6, 5, generator=rng) + 7
    valid = torch.arange(6) < torch.tensor([6, 4, 2, 1])[:, None]
    shared = [latents[valid[:, n], n] for n in range(6) if valid[:, n].sum() > 1]
    degrees = sum(len(clips) - 1 for clips in shared)
    within = sum(((clips - clips.mean(0)) ** 2).sum() for clips in shared) / degrees
    everything = torch.cat(shared)
    total = ((everything - everything.mean(0)) ** 2).sum() / (len(everything) - 1)
    assert clip_share(latents, valid) == pytest.approx((within / total).item(), rel=1e-4)
    assert clip_share(latents, valid) < 0.3


def test_the_share_between_clips_is_one_without_and_zero_with_only_positions(rng: torch.Generator):
    everywhere = torch.ones(8, 50, dtype=torch.bool)
    independent, positions = torch.randn(8, 50, 16, generator=rng), torch.randn(50, 16)
    assert clip_share(independent, everywhere) == pytest.approx(1, abs=0.02)
    assert clip_share(positions.expand(8, -1, -1), everywhere) == pytest.approx(0, abs=1e-9)
    assert clip_share(5 + 1e-7 * independent, everywhere) == 0, "rounding is no variance"
    assert clip_share(positions + 0.1 * independent, everywhere) == pytest.approx(0.01, rel=0.1)
    assert math.isnan(clip_share(independent[:1], everywhere[:1])), "one clip shows nothing"
    assert math.isnan(clip_share(independent * float("nan"), everywhere))
