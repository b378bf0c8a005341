"""Attentive pooling: heads that weight the time columns of a clip by learned queries."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.parallel import track_progress
from jepa_audio.probing.features import Features, FrameFeatures
from jepa_audio.probing.heads import Device, FitContext, Head, HeadInput
from jepa_audio.probing.heads.linear import Standardisation

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
NUM_QUERIES = 4
BATCH_SIZE = 64
MAX_EPOCHS = 60
PATIENCE = 10
"""Epochs without a better score of any head after which the heads of a layer stop."""

# Features of a batch that are computed at once: 256 MiB.
_MAX_VALUES = 2**26
# Frames from which means and deviations are computed.
_NUM_SCALED = 2**16


class AttentivePooling(nn.Module):
    """Attention of learned queries over the time columns of a clip, then a linear map.

    With standardised columns x_t, the weights of query q are softmax_t(q · x_t), and the logits are
    linear in the weighted means of all queries. This is multi-head attention with one learned query
    (as in the attentive probes of V-JEPA, Bardes et al., 2024, arXiv:2404.08471, without its MLP):
    the key projection of a head is part of q; value and output projections are part of the map.
    """

    mean: Tensor
    factor: Tensor

    def __init__(
        self, scale: Standardisation, num_outputs: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        width = len(scale.mean)
        drawn = torch.randn(width, NUM_QUERIES, generator=generator)
        self.queries = nn.Parameter(drawn / math.sqrt(width))
        self.weight = nn.Parameter(torch.zeros(NUM_QUERIES * width, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        self.register_buffer("mean", scale.mean.float())
        self.register_buffer("factor", scale.factor.float())

    def forward(
        self, frames: Float[Tensor, "n T D"], valid: Bool[Tensor, "n T"]
    ) -> Float[Tensor, "n C"]:
        """Logits of clips from their columns; those that are not `valid` are padding."""
        columns = (frames - self.mean) * self.factor
        scores = (columns @ self.queries).masked_fill(~valid[..., None], -math.inf)
        pooled = torch.einsum("nth,ntd->nhd", scores.softmax(dim=1), columns)
        return pooled.flatten(1) @ self.weight + self.bias


@dataclass(frozen=True)
class AttentiveHead(Head):
    """A trained attentive pooling."""

    setting_name = "learning rate"

    module: AttentivePooling

    @override
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        return _logits([self.module.to(device)], features, self.input.layers[0], device)


def fit_attentive(fit: FitContext, inputs: Sequence[HeadInput]) -> list[AttentiveHead]:
    """Train a head for every seed, single-layer input and learning rate, in this order.

    AdamW with weight decay 0.01. The heads of a layer see the same batches; each keeps the weights
    of its best validation epoch.
    """
    points = list(product(fit.seeds, inputs))
    progress = track_progress(points, fit.description, total=len(points))
    return [head for seed, head_input in progress for head in _fit_layer(fit, head_input, seed)]


def _fit_layer(fit: FitContext, head_input: HeadInput, seed: int) -> list[AttentiveHead]:
    train, labels, layer = fit.features["train"], fit.data.labels, head_input.layers[0]
    assert isinstance(train, FrameFeatures)
    targets = labels.row_targets(fit.data.splits["train"], train.rows)
    scale = Standardisation(train.sample_frames(layer, _NUM_SCALED))
    # All heads start with the same weights.
    modules = [
        AttentivePooling(scale, labels.num_outputs, torch.Generator().manual_seed(seed))
        for _ in LEARNING_RATES
    ]
    best = [
        AttentiveHead(head_input, rate, module.to(fit.device), seed=seed, valid=-math.inf)
        for module, rate in zip(modules, LEARNING_RATES, strict=True)
    ]
    groups = [{"params": [*head.module.parameters()], "lr": head.setting} for head in best]
    optimizer = torch.optim.AdamW(groups)
    generator, last_best = torch.Generator().manual_seed(seed), 0
    for epoch in range(MAX_EPOCHS):
        order = torch.randperm(len(train), generator=generator).numpy()
        for rows in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
            batch = [each.to(fit.device) for each in train.read_frames(layer, rows)]
            logits = torch.stack([module(*batch) for module in modules], dim=1)
            loss = labels.losses(logits, targets[rows].to(fit.device)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = fit.validation_scores(_logits(modules, fit.features["val"], layer, fit.device))
        for i, (module, score) in enumerate(zip(modules, scores.tolist(), strict=True)):
            if score > best[i].valid or epoch == 0:
                best[i] = replace(best[i], module=copy.deepcopy(module), valid=score)
                last_best = epoch
        if epoch - last_best >= PATIENCE:
            break
    return best


@torch.no_grad()
def _logits(
    modules: Sequence[AttentivePooling], features: Features, layer: int, device: Device
) -> Float[Tensor, "rows K C"]:
    """Logits of every head for every clip of a split."""
    assert isinstance(features, FrameFeatures)
    longest, width = int(features.counts.max()), features.widths([layer])[0]
    size = max(1, _MAX_VALUES // (longest * width))
    logits = []
    for start in range(0, len(features), size):
        batch = features.read_frames(layer, slice(start, start + size))
        frames, valid = (each.to(device) for each in batch)
        logits.append(torch.stack([module(frames, valid) for module in modules], dim=1))
    return torch.cat(logits)
