"""The momentum update: its formula, once per optimizer step, and always in the Trainer."""

import math
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from jepa_audio.training.ema import TargetEncoderEMA, tensor_pairs
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.schedules import Linear

FLAVOURS = ["wave", "mel"]


def add_noise(*modules: nn.Module) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))


def copies(jepa: JEPA) -> list[tuple[nn.Module, nn.Module]]:
    """(target, online) without the properties of the module."""
    pairs = [(jepa.target_encoder, jepa.encoder)]
    return (
        pairs
        if jepa.target_front_end is None
        else [*pairs, (jepa.target_front_end, jepa.front_end)]
    )


def weights(*modules: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("target_front_end", ["shared", "momentum"])
def test_five_updates_equal_the_three_line_loop(
    tiny_jepa: Callable[..., JEPA], flavour: str, target_front_end: str
):
    jepa = tiny_jepa(flavour, f"--model.target_front_end={target_front_end}")
    targets, onlines = zip(*copies(jepa), strict=True)
    assert len(targets) == (1 if target_front_end == "shared" else 2)
    expected = weights(*targets)
    for momentum in (0.9, 0.5, 0.0, 1.0, 0.999):
        add_noise(*onlines)
        for target, online in zip(expected, weights(*onlines), strict=True):
            target.mul_(momentum)
            target.add_((1 - momentum) * online)
        TargetEncoderEMA.update(jepa, momentum)
        for ours, literal in zip(weights(*targets), expected, strict=True):
            torch.testing.assert_close(ours, literal, rtol=1e-5, atol=1e-6)


def test_the_momentum_copies_start_equal_and_share_no_memory(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("mel", "--model.target_front_end=momentum")
    for target, online in tensor_pairs(jepa):
        assert torch.equal(target, online)
        assert target.data_ptr() != online.data_ptr()


def test_floating_point_buffers_are_averaged_and_other_buffers_are_copied(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("wave")
    for module, value in ((jepa.encoder, 1.0), (jepa.target_encoder, 3.0)):
        module.register_buffer("running_mean", torch.full((2,), value))
        module.register_buffer("num_batches", torch.tensor(int(value)))
    TargetEncoderEMA.update(jepa, 0.75)
    assert jepa.target_encoder.running_mean.tolist() == [2.5, 2.5]
    assert jepa.target_encoder.num_batches == 1
    assert jepa.encoder.running_mean.tolist() == [1.0, 1.0]


def test_the_target_encoder_stays_float32_when_the_encoder_is_bfloat16(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("wave")
    add_noise(jepa.encoder)
    jepa.encoder.bfloat16()
    before, online = weights(jepa.target_encoder), weights(jepa.encoder)
    TargetEncoderEMA.update(jepa, 0.999)
    for after, target, source in zip(weights(jepa.target_encoder), before, online, strict=True):
        assert after.dtype == torch.float32
        torch.testing.assert_close(
            after, target + 0.001 * (source.float() - target), rtol=1e-6, atol=1e-7
        )


def test_a_run_makes_one_update_per_optimizer_step_with_the_momentum_of_that_step(
    tiny_cli: Callable, fit: Callable
):
    """At a learning rate of 0 the distance of the copy shrinks by the product of all momenta."""
    cli = tiny_cli(
        "wave",
        "--model.optimizer.lr=0.0",
        "--model.target_front_end=momentum",
        "--model.ema.momentum={class_path: Linear, init_args: {start: 0.5, end: 1.0}}",
        "--data.batch_size=2",
        "--trainer.max_steps=4",
        "--trainer.accumulate_grad_batches=3",
    )
    targets, onlines = zip(*copies(cli.model), strict=True)
    add_noise(*targets)
    before, still = weights(*targets), weights(*onlines)
    assert len(fit(cli)) == 4 * 3
    remaining = math.prod(Linear(0.5, 1.0)(step, 4) for step in range(4))
    for after, start, online in zip(weights(*targets), before, still, strict=True):
        torch.testing.assert_close(
            after - online, remaining * (start - online), rtol=1e-4, atol=1e-5
        )


class EqualCopies(Callback):
    """Whether the momentum copies equal their modules, before every step and at the end."""

    def __init__(self) -> None:
        self.equal: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.equal.append(all(torch.equal(*pair) for pair in tensor_pairs(pl_module)))

    def on_train_end(self, trainer, pl_module) -> None:
        self.on_train_batch_start(trainer, pl_module, None, 0)


def test_with_a_momentum_of_zero_the_target_encoder_equals_the_encoder_after_every_step(
    tiny_cli: Callable, fit: Callable
):
    momentum = "{class_path: Constant, init_args: {value: 0.0}}"
    cli = tiny_cli(
        "wave",
        f"--model.ema.momentum={momentum}",
        "--model.regularizers+=VICReg",
        "--model.target_front_end=momentum",
        "--trainer.max_steps=3",
    )
    before, seen = weights(cli.model.target_encoder), EqualCopies()
    fit(cli, None, seen)
    assert seen.equal == [True] * 4
    assert not any(map(torch.equal, before, weights(cli.model.target_encoder)))


@pytest.mark.parametrize(
    "callbacks", ["[]", "[{class_path: lightning.pytorch.callbacks.LambdaCallback}]"]
)
def test_no_list_of_callbacks_removes_the_momentum_update(
    tiny_cli: Callable, fit: Callable, callbacks: str
):
    cli = tiny_cli("wave", f"--trainer.callbacks={callbacks}", "--trainer.max_steps=2")
    before = weights(cli.model.target_encoder)
    fit(cli)
    assert [type(callback) for callback in cli.trainer.callbacks].count(TargetEncoderEMA) == 1
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, weights(cli.model.target_encoder), strict=True)
    )


def test_the_target_encoder_gets_no_gradient_and_is_not_in_the_optimizer(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("mel", "--model.target_front_end=momentum", "--trainer.max_steps=2")
    fit(cli)
    stepped = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    for target, online in copies(cli.model):
        assert all(
            p.grad is None and not p.requires_grad and id(p) not in stepped
            for p in target.parameters()
        )
        assert all(id(p) in stepped for p in online.parameters())


def test_a_momentum_outside_of_0_and_1_is_refused(tiny_cli: Callable):
    with pytest.raises(ValueError, match=r"momentum \(1.5\) must be within"):
        TargetEncoderEMA.update(tiny_cli("wave").model, 1.5)
