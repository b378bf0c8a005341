"""The model equals the literal, key-masked WavJEPA of tests/oracles: loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from tests.oracles.wavjepa_literal import LiteralWavJEPA


@pytest.mark.parametrize("normalization", ["instance", "joint_instance"])
def test_computing_only_the_needed_tokens_changes_neither_loss_nor_gradients(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, normalization: str
):
    jepa = tiny_jepa("wave", f"--model.targets.normalization={normalization}")
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
    assert masks.context.valid is not None, "only rows of different lengths test the padding"
    num_tokens = jepa.front_end.grid(batch.waveform.shape[-1]).num_tokens
    literal = LiteralWavJEPA(jepa)
    slow = literal(
        batch.waveform, masks.context.to_mask(num_tokens), masks.targets.to_mask(num_tokens)
    )
    fast = jepa.loss(batch.waveform, masks)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)

    slow.backward()
    expected = (
        jepa.front_end.projection.weight.grad.clone(),
        literal.trunk.layers[0].linear1.weight.grad,
    )
    jepa.zero_grad()
    fast.backward()
    found = (
        jepa.front_end.projection.weight.grad,
        jepa.predictor.trunk.blocks[0].mlp.fc1.weight.grad,
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
