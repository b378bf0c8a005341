"""Losses of two predictors that do not learn: the baselines of the training loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.losses import CrossEntropy
from jepa_audio.training.jepa import JEPA


@torch.no_grad()
def baseline_sums(
    jepa: JEPA,
    waveform: Float[Tensor, "B C S"],
    masks: Masks,
    target: Float[Tensor, "Q M L D"],
) -> dict[str, Float[Tensor, ""]]:
    """Sums of the distances of two simple predictions over all valid target tokens of a batch.

    `loss_mean_target`: the mean of the targets of the batch. `loss_nearest_context`: the target
    encoder's latent at the context token that is nearest to the target token.

    For targets that are classes, the first one is the entropy of the class frequencies: the loss of
    predicting the frequencies of the training so far. The second one does not exist, because a
    copied class has an infinite cross-entropy where it is wrong.
    """
    if isinstance(jepa.distance, CrossEntropy):
        entropy = torch.special.entr(jepa.distance.codebook.frequencies).sum()
        return {"loss_mean_target": entropy * masks.targets.counts.sum()}
    valid = masks.targets.valid_or_true
    mean = target[valid].mean(dim=0).expand_as(target)
    copied = _copy_of_nearest_context(jepa, waveform, masks)
    return {
        "loss_mean_target": jepa.distance(mean, target)[valid].sum(),
        "loss_nearest_context": jepa.distance(copied, target)[valid].sum(),
    }


def nearest_context(masks: Masks, grid: Grid) -> TokenSet:
    """The context token that is nearest on the grid to each target token, `[Q, M, L]`."""
    coordinates = grid.coordinates(masks.context.index.device).float()
    targets, context = (coordinates[s.index.flatten(1)] for s in (masks.targets, masks.context))
    distance = torch.cdist(targets, context)  # [Q, M * L, K]
    if masks.context.valid is not None:
        distance = distance.masked_fill(~masks.context.valid[:, None], float("inf"))
    nearest = torch.gather(masks.context.index, 1, distance.argmin(dim=-1))
    return TokenSet(nearest.unflatten(1, masks.targets.index.shape[1:]), masks.targets.valid)


def _copy_of_nearest_context(
    jepa: JEPA, waveform: Float[Tensor, "B C S"], masks: Masks
) -> Float[Tensor, "Q M L D"]:
    """The target encoder's latent at the context token that is nearest to each target token."""
    grid = jepa.front_end.grid(waveform.shape[-1])
    tokens = jepa.front_end(waveform)
    index, valid = masks.context.index, masks.context.valid
    context = TokenSet(index[:, None], None if valid is None else valid[:, None])
    latents = jepa.target_latents(waveform, tokens, grid, context, masks.present)
    latents = latents[:, 0]  # [Q, K, D]
    on_grid = latents.new_zeros(len(latents), grid.num_tokens, latents.shape[-1])
    on_grid.scatter_(1, index[..., None].expand_as(latents), latents)
    num_groups = masks.targets.index.shape[1]
    return nearest_context(masks, grid).gather(on_grid[:, None].expand(-1, num_groups, -1, -1))
