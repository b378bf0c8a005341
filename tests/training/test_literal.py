"""The model equals the literal, key-masked steps of tests/oracles: loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from tests.oracles.pupujepa_literal import LiteralPupuJEPA
from tests.oracles.wavjepa_literal import LiteralWavJEPA


def loss_pair(
    jepa: JEPA, batch: AudioBatch, make_literal: Callable[[JEPA], nn.Module]
) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """The losses of the fast and the literal step for the same masks, and the literal module."""
    # Other weights than those of the encoder, so that a confusion of the two changes the loss.
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    masks = jepa.draw_masks(batch)
    # The literal loss is the mean over the targets.
    num_targets = float(masks.targets.counts.sum())
    masks = replace(masks, targets_per_clip=num_targets / len(batch.waveform))
    num_tokens = jepa.front_end.grid(batch.waveform.shape[-1]).num_tokens
    literal = make_literal(jepa)
    slow = literal(
        batch.waveform, masks.context.to_mask(num_tokens), masks.targets.to_mask(num_tokens)
    )
    return jepa.loss(batch.waveform, masks), slow, literal


def gradients(loss: torch.Tensor, jepa: JEPA, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of the front end, the mask token, and some parameters of the transformers."""
    shared = [*jepa.front_end.parameters(), jepa.predictor.mask_token]
    return list(torch.autograd.grad(loss, [*shared, *parameters]))


@pytest.mark.parametrize("normalization", ["instance", "joint_instance"])
def test_computing_only_the_needed_tokens_of_wavjepa_changes_neither_loss_nor_gradients(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, normalization: str
):
    jepa = tiny_jepa("wave", f"--model.targets.normalization={normalization}")
    assert jepa.draw_masks(batch).context.valid is not None, "only unequal rows test the padding"
    fast, slow, literal = loss_pair(jepa, batch, LiteralWavJEPA)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    blocks = jepa.encoder.blocks, jepa.predictor.trunk.blocks
    found = gradients(fast, jepa, [part[0].mlp.fc1.weight for part in blocks])
    layers = literal.encoder.layers, literal.trunk.layers
    expected = gradients(slow, jepa, [part[0].linear1.weight for part in layers])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masker", ["BlockMasker", "RandomMasker"])
def test_computing_only_the_needed_tokens_of_pupujepa_changes_neither_loss_nor_gradients(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, masker: str
):
    # Heads of 16 and 12 features have more than two rotation frequencies for each axis.
    widths = "--model.encoder.embed_dim=32", "--model.predictor.trunk.embed_dim=24"
    jepa = tiny_jepa("mel", f"--model.masker={masker}", *widths)
    fast, slow, literal = loss_pair(
        jepa, batch, lambda model: LiteralPupuJEPA(model, batch.waveform.shape[-1])
    )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    blocks = jepa.encoder.blocks, jepa.predictor.trunk.blocks
    found = gradients(fast, jepa, [part[0].mlp.fc1.weight for part in blocks])
    blocks = literal.encoder.blocks, literal.trunk.blocks
    gates = [linear.weight for part in blocks for linear in (part[0].gate, part[0].up)]
    expected = gradients(slow, jepa, gates)
    expected[-4:] = [torch.cat(expected[-4:-2]), torch.cat(expected[-2:])]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
