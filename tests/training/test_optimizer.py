"""Optimizer steps: clipping, gradient scaling, and steps that a gradient scaler skips."""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from jepa_audio.training.optimizer import clip_gradients


class ScaledFloat32(MixedPrecision):
    """The gradient scaler of 16-mixed, with a forward pass in float32."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu")

    def autocast_context_manager(self):
        return nullcontext()


class Steps(Callback):
    """Keeps norm, learning rate and weights of every step; makes some gradients infinite."""

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        self.bad_steps = bad_steps
        self.norms: list[float] = []
        self.learning_rates: list[float] = []
        self.weights: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.keep(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self.keep(pl_module)

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step + 1 in self.bad_steps:
            pl_module.predictor.mask_token.grad[0] = float("inf")

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.norms.append(float(trainer.callback_metrics["train/gradient_norm"]))

    def keep(self, module) -> None:
        for kept, encoder in (
            (self.weights, module.encoder),
            (self.targets, module.target_encoder),
        ):
            kept.append(torch.cat([p.detach().flatten().clone() for p in encoder.parameters()]))


def run_of(tiny_cli: Callable, precision: object, settings: list[str], steps: Steps) -> Steps:
    cli = tiny_cli("wave", "--trainer.max_steps=4", "--monitor.every_n_steps=99", *settings)
    if precision is not None:
        cli.trainer.strategy.precision_plugin = precision
    cli.trainer.callbacks.append(steps)
    cli.trainer.fit(cli.model, cli.datamodule)
    return steps


IMPLEMENTATIONS = {
    "fused": ["--model.optimizer.fused=true"],
    "foreach": ["--model.optimizer.foreach=true"],
    "neither": ["--model.optimizer.foreach=false"],
}
CLIPPING = {
    "norm": ["--trainer.gradient_clip_val=0.1"],
    "value": ["--trainer.gradient_clip_val=0.01", "--trainer.gradient_clip_algorithm=value"],
    "none": [],
}


# A fused optimizer divides the gradients by the scale itself; the others get divided gradients.
COMBINATIONS = [*(("fused", clipping) for clipping in CLIPPING), ("foreach", "norm")]
COMBINATIONS += [("foreach", "none"), ("neither", "value")]


def settings_of(implementation: str, clipping: str) -> list[str]:
    return [
        *IMPLEMENTATIONS[implementation],
        *CLIPPING[clipping],
        "--trainer.accumulate_grad_batches=2",
        "--data.batch_size=2",
        # A large epsilon: AdamW then depends on the size of the gradients.
        "--model.optimizer.eps=0.1",
    ]


@pytest.fixture(scope="module")
def float32_run(tiny_cli: Callable) -> Callable[[str, str], Steps]:
    """The run of an implementation and a clipping in float32, trained once."""
    return functools.cache(lambda *choice: run_of(tiny_cli, None, settings_of(*choice), Steps()))


@pytest.mark.parametrize(("implementation", "clipping"), COMBINATIONS)
def test_a_gradient_scaler_changes_neither_weights_nor_gradient_norms(
    tiny_cli: Callable, float32_run: Callable, implementation: str, clipping: str
):
    plain = float32_run(implementation, clipping)
    scaled = run_of(tiny_cli, ScaledFloat32(), settings_of(implementation, clipping), Steps())
    assert scaled.norms == pytest.approx(plain.norms, rel=1e-5)
    assert scaled.norms[0] > 0.1, "the limit must be reached"
    moved = (plain.weights[-1] - plain.weights[0]).abs().max().item()
    torch.testing.assert_close(scaled.weights[-1], plain.weights[-1], rtol=0, atol=1e-4 * moved)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_skipped_step_moves_neither_weights_nor_momentum_copy_nor_learning_rate(
    tiny_cli: Callable, implementation: str, caplog: pytest.LogCaptureFixture
):
    settings = [
        *IMPLEMENTATIONS[implementation],
        "--trainer.gradient_clip_val=0.1",
        "--model.lr_schedule={class_path: WarmupCosine, init_args: {warmup_steps: 3}}",
        "--model.optimizer.lr=0.3",
    ]
    caplog.set_level("INFO")
    run = run_of(tiny_cli, ScaledFloat32(), settings, Steps(bad_steps=(1, 3)))
    changes = [not torch.equal(a, b) for a, b in zip(run.weights, run.weights[1:], strict=False)]
    copied = [not torch.equal(a, b) for a, b in zip(run.targets, run.targets[1:], strict=False)]
    assert changes == copied == [False, True, False, True]
    assert run.learning_rates == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert [f"step {step}:" in caplog.text for step in (1, 2, 3, 4)] == [True, False, True, False]


def test_real_half_precision_trains_with_a_fused_optimizer_and_clipping(
    tiny_cli: Callable, float32_run: Callable
):
    precision = MixedPrecision("16-mixed", "cpu")
    half = run_of(tiny_cli, precision, settings_of("fused", "norm"), Steps())
    assert half.norms == pytest.approx(float32_run("fused", "norm").norms, rel=0.05)


@pytest.mark.parametrize("clipping", CLIPPING)
def test_bf16_and_a_fused_optimizer_are_clipped_as_in_float32(
    tiny_cli: Callable, float32_run: Callable, clipping: str
):
    settings = [*settings_of("fused", clipping), "--trainer.precision=bf16-mixed"]
    half = run_of(tiny_cli, None, settings, Steps())
    # The first norm differs by up to 11 % on a CPU with instructions for bfloat16.
    assert half.norms == pytest.approx(float32_run("fused", clipping).norms, rel=0.2)


def test_gradients_are_clipped_by_norm_by_value_or_not_at_all():
    module = nn.Linear(2, 1, bias=False)
    for limit, algorithm, expected in (
        (1.0, "norm", [0.6, 0.8]),
        (1.0, None, [0.6, 0.8]),
        (3.5, "value", [3.0, 3.5]),
        (None, "norm", [3.0, 4.0]),
        (None, "value", [3.0, 4.0]),
        (0.0, "norm", [3.0, 4.0]),
    ):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(module, limit, algorithm).item() == pytest.approx(5.0)
        assert module.weight.grad[0].tolist() == pytest.approx(expected)
