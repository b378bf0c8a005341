"""What is trained in each mode, and with which learning rates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.finetuning.network import Backbone, ClipNetwork
from jepa_audio.probing.finetuning.tuning import Tuning, merge_adapters


def network_of(checkpoint: Path, tuning: Tuning) -> ClipNetwork:
    backbone = Backbone(load_encoder(checkpoint))
    tuning.apply(backbone, seed=0)
    return ClipNetwork(backbone, "linear", 4, "mean", None, torch.Generator().manual_seed(0))


def literal_rates(
    network: ClipNetwork, lr: float, head_lr: float, decay: float
) -> dict[str, float]:
    """The rate of each trained parameter, one by one (Bao et al., 2022)."""
    depth = network.backbone.encoder.depth
    rates = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head."):
            rates[name] = head_lr
            continue
        if name.startswith("backbone.encoder.blocks."):
            layer = int(name.split(".")[3]) + 1
        elif name.startswith("backbone.encoder.norm."):
            layer = depth + 1
        else:
            layer = 0
        rate = lr
        for _ in range(depth + 1 - layer):
            rate *= decay
        rates[name] = rate
    return rates


@pytest.mark.parametrize("flavour", ["wave", "mel"])
@pytest.mark.parametrize(("mode", "decay"), [("full", 0.5), ("full", None), ("last_1", 0.5)])
def test_learning_rates_by_layer_equal_a_literal_loop(
    checkpoints: dict[str, Path], flavour: str, mode: str, decay: float | None
):
    tuning = Tuning(mode, layer_decay=decay)
    network = network_of(checkpoints[flavour], tuning)
    groups = tuning.parameter_groups(network, 0.1, 0.7, 0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    expected = literal_rates(network, 0.1, 0.7, decay or 0.75)
    assert rates == pytest.approx(expected)
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    shapes = dict(network.named_parameters())
    assert {name for name, value in decays.items() if value} == {
        name for name in decays if shapes[name].ndim > 1
    }


TRAINED = {
    "head": ("head.",),
    "last_1": ("head.", "backbone.encoder.blocks.1.", "backbone.encoder.norm."),
    "full": ("head.", "backbone."),
}


@pytest.mark.parametrize("mode", TRAINED)
def test_frozen_parameters_do_not_move_and_trained_ones_do(make: Callable, mode: str):
    rate = {} if mode == "head" else {"lr": 0.01}
    model, clips, trainer = make("mel", mode, **rate, trainer={"max_steps": 3})
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    trainer.fit(model, clips)
    for name, value in model.network.named_parameters():
        if name.startswith(TRAINED[mode]):
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name


def test_adapters_move_alone_and_merge_to_the_same_output(
    make: Callable, checkpoints: dict[str, Path]
):
    pytest.importorskip("peft")
    model, clips, trainer = make("mel", "lora", lr=0.05, lora_rank=2, trainer={"max_steps": 3})
    frozen = load_encoder(checkpoints["mel"])
    waveform = torch.randn(3, 1, 500, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        start = Backbone(frozen)(waveform)[0]
        torch.testing.assert_close(model.network.backbone(waveform)[0], start)
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    trainer.fit(model, clips)
    for name, value in model.network.named_parameters():
        is_trained = "lora_" in name or name.startswith("head.")
        assert torch.equal(value, before[name]) != is_trained, name
    model.eval()
    with torch.no_grad():
        adapted = model.network.backbone(waveform)[0]
        merge_adapters(model.network.backbone)
        merged = model.network.backbone(waveform)[0]
    assert (adapted - start).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert model.network.backbone.encoder.state_dict().keys() == frozen.encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("ful",), r"`mode` \('ful'\) must be one of .*; did you mean 'full'"),
        (("last_0",), "must be one of"),
        (("lora", 0.5), r"`model.layer_decay` \(0.5\) .* only the modes full and last_N use it"),
        (("full", 1.5), r"`model.layer_decay` \(1.5\) must be in"),
        (("full", None, 4), r"`model.lora_rank` \(4\) .* only the mode lora uses it"),
    ],
)
def test_settings_without_effect_are_refused(settings: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        Tuning(*settings)


def test_more_blocks_than_the_encoder_has_are_refused(checkpoints: dict[str, Path]):
    with pytest.raises(ValueError, match="`mode` is last_3, but the encoder has 2 blocks"):
        network_of(checkpoints["mel"], Tuning("last_3"))
