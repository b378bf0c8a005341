"""The network gives the features of the frozen encoder, with gradients."""

from pathlib import Path

import pytest
import torch

from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.finetuning.network import Backbone, ClipNetwork


@pytest.mark.parametrize("flavour", ["wave", "mel"])
@pytest.mark.parametrize("num_samples", [3, 300, 500, 1730])
def test_latents_equal_those_of_the_frozen_encoder(
    checkpoints: dict[str, Path], flavour: str, num_samples: int
):
    encoder = load_encoder(checkpoints[flavour])
    waveform = torch.randn(2, 1, num_samples, generator=torch.Generator().manual_seed(0))
    expected = encoder.encode_batch(waveform, layers=[-1])
    backbone = Backbone(encoder).eval()
    latents, times = backbone(waveform)
    torch.testing.assert_close(latents, expected.layers[0].clone(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(times, expected.times[0].cpu().clone())
    latents.square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_clips_of_a_batch_have_the_logits_that_they_have_alone(
    checkpoints: dict[str, Path], kind: str
):
    backbone = Backbone(load_encoder(checkpoints["mel"]))
    generator = torch.Generator().manual_seed(0)
    network = ClipNetwork(backbone, kind, 3, "concat", None, generator).eval()
    torch.nn.init.normal_(network.head.weight, generator=generator)
    waveform = torch.randn(4, 1, 900, generator=generator)
    lengths = [900, 500, 700, 500]
    with torch.no_grad():
        network.standardise(network.measure(waveform, lengths))
        together = network(waveform, lengths)
        alone = [network(w[None, :, :n], [n])[0] for w, n in zip(waveform, lengths, strict=True)]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    measured = network.measure(waveform, lengths)
    columns = (measured - network.head.mean) * network.head.factor
    torch.testing.assert_close(columns.mean(0), torch.zeros(measured.shape[1]), atol=1e-5, rtol=0)
