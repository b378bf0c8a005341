"""Statistics of latents that show a collapse."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

# Largest number of latents in a singular value decomposition.
MAX_LATENTS = 2048


def rank_me(latents: Float[Tensor, "n D"]) -> float:
    """Effective rank (RankMe): the exponential of the entropy of the singular values.

    Source: Garrido et al., 2023, arXiv:2210.02885. The rank is between 1 (all latents are parallel)
    and min(n, D). It is computed from at most `MAX_LATENTS` evenly spaced latents. It is NaN if one
    of these is not finite.
    """
    stride = -(-len(latents) // MAX_LATENTS)
    latents = latents[::stride].float()
    if not latents.isfinite().all():
        return float("nan")
    singular = torch.linalg.svdvals(latents)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.special.entr(share).sum().exp())


def mean_std(latents: Float[Tensor, "n D"]) -> float:
    """Standard deviation of each dimension over the latents, averaged over the dimensions."""
    return float(latents.float().std(dim=0).mean())


def clip_cosine(latents: Float[Tensor, "B N D"], valid: Bool[Tensor, "B N"]) -> float:
    """Mean cosine similarity of two clips at the same position; 1 if all clips are equal.

    The mean is over all pairs of clips that are `valid` at a position. It is NaN without a pair.
    """
    units = F.normalize(latents.float(), dim=-1) * valid[..., None]
    count = valid.sum(dim=0)  # [N]
    num_pairs = (count * (count - 1)).sum()
    cosines = units.sum(dim=0).square().sum() - units.square().sum()
    return float(cosines / num_pairs) if num_pairs else float("nan")


def clip_share(latents: Float[Tensor, "B N D"], valid: Bool[Tensor, "B N"]) -> float:
    """Share of the variance of latents that is between clips at the same position.

    This is (variance around the mean of each position) / (variance around the mean of all), both
    unbiased: about 1 if positions have no influence, and 0 if all clips are equal at every
    position, also if all latents are equal. It is NaN if no position is `valid` in two clips.
    """
    shared = valid & (valid.sum(dim=0) > 1)
    if not shared.any():
        return float("nan")
    weight, latents = shared[..., None].float(), latents.float()
    count = weight.sum(dim=0)  # [N, 1]
    mean = (latents * weight).sum(dim=0) / count.clamp_min(1)  # [N, D]
    num_latents, num_positions = weight.sum(), (count > 0).sum()
    overall = (mean * count).sum(dim=0) / num_latents
    within = ((latents - mean) * weight).square().sum() / (num_latents - num_positions)
    total = ((latents - overall) * weight).square().sum() / (num_latents - 1)
    # Latents that are equal up to float rounding have no variance. NaN stays NaN.
    is_rounding = total <= 1e-10 * overall.square().sum()
    return 0.0 if is_rounding else float(within / total)
