"""Gradients reach the right parameters, and a run is a function of its seed and its data."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.positions import SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.steps.masking.source import MaskStream
from jepa_audio.steps.regularizers import VICReg
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA
from tests.conftest import LOG_MEL_TARGETS

FLAVOURS = ["wave", "mel"]
SGD = (
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.3",
    "--model.lr_schedule=Constant",
)


def weights(jepa: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in jepa.state_dict().items()}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("target_front_end", ["shared", "momentum"])
def test_every_trainable_parameter_gets_a_gradient_and_no_target_parameter_does(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str, target_front_end: str
):
    jepa = tiny_jepa(flavour, f"--model.target_front_end={target_front_end}")
    jepa.loss(batch.waveform, jepa.draw_masks(batch)).backward()
    for name, parameter in jepa.named_parameters():
        if name.startswith("target_"):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
    assert (jepa.target_front_end is None) == (target_front_end == "shared")


def test_a_shared_front_end_learns_from_the_context_alone(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave")
    masks = jepa.draw_masks(batch)
    frozen_target = copy.deepcopy(jepa)
    output = jepa(batch.waveform, masks)
    output.loss.backward()
    grid = frozen_target.front_end.grid(batch.waveform.shape[-1])
    tokens = frozen_target.front_end(batch.waveform)
    prediction = frozen_target.predictor(
        frozen_target.encoder(tokens, grid, masks.context), masks, grid
    )
    distance = frozen_target.distance(prediction, output.target.detach())
    valid = torch.ones_like(distance) if masks.targets.valid is None else masks.targets.valid
    ((distance * valid).sum() / valid.sum()).backward()
    for ours, theirs in zip(
        jepa.front_end.parameters(), frozen_target.front_end.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_loss_of_given_masks_draws_no_random_numbers(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour).train()
    masks = jepa.draw_masks(batch)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = jepa.loss(batch.waveform, masks)
    jepa.draw_masks(batch)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    torch.randn(3)
    assert torch.equal(jepa.loss(batch.waveform, masks), first)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_losses_of_parts_of_a_batch_add_up_to_the_loss_of_the_batch(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour)
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    valid = torch.arange(masks.targets.index.shape[-1]) < masks.targets.counts[..., None]
    literal = (output.prediction - output.target).square().mean(-1)[valid].mean()
    expected = jepa.masker.expected_targets(jepa.front_end.grid(500), seed=0, step=0)
    torch.testing.assert_close(output.loss, literal * valid.sum() / (4 * expected))
    assert output.num_targets == valid.sum()
    torch.testing.assert_close(output.distance_sum / output.num_targets, literal)
    halves = [
        jepa.loss(batch.waveform[rows], masks.rows(rows)) for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close((halves[0] + 3 * halves[1]) / 4, output.loss)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_batch_is_overfitted(tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str):
    jepa = tiny_jepa(
        flavour, "--model.encoder.embed_dim=32", "--model.predictor.trunk.embed_dim=32"
    )
    masks = jepa.draw_masks(batch)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = jepa.loss(batch.waveform, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        TargetEncoderEMA.update(jepa, 0.999)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_run_depends_on_its_seed_and_on_no_global_random_state(tiny_cli: Callable, fit: Callable):
    losses = fit(tiny_cli("wave"))
    assert len(losses) == 6
    assert fit(tiny_cli("wave", "--seed_everything=7")) == losses
    others = fit(tiny_cli("wave", "--model.seed=1"))
    assert others.keys() == losses.keys()
    assert all(others[row] != losses[row] for row in losses)


@pytest.mark.parametrize(
    "more",
    [(), ("--model.masks_per_clip=2", *LOG_MEL_TARGETS)],
    ids=["one mask", "two masks, log-mel targets"],
)
def test_micro_batches_add_up_to_one_big_batch(
    tiny_cli: Callable, fit: Callable, more: tuple[str, ...]
):
    runs = {}
    for batch_size, accumulate in ((6, 1), (2, 3)):
        settings = (
            f"--data.batch_size={batch_size}",
            f"--trainer.accumulate_grad_batches={accumulate}",
        )
        cli = tiny_cli("wave", *SGD, *settings, *more, "--trainer.max_steps=3")
        start = weights(cli.model)
        assert len(fit(cli)) == 3 * accumulate
        runs[batch_size] = weights(cli.model)
    moved = max(float((runs[6][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, value in runs[6].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-5, atol=1e-5 * moved, msg=name)


@pytest.mark.parametrize(
    ("flavour", "settings"),
    [
        ("wave", []),
        (
            "mel",
            [
                "--trainer.accumulate_grad_batches=2",
                "--data.batch_size=2",
                "--model.target_front_end=momentum",
            ],
        ),
        (
            "wave",
            [
                "--data.valid_share=0.3",
                "--trainer.val_check_interval=2",
                "--trainer.gradient_clip_val=0.1",
            ],
        ),
        ("wave", ["--model.encoder.drop_path=0.5", "--model.predictor.trunk.drop_path=0.5"]),
        (
            "wave",
            [
                "--model.masks_per_clip=2",
                *LOG_MEL_TARGETS,
                "--trainer.accumulate_grad_batches=2",
                "--data.batch_size=2",
            ],
        ),
        (
            "wave",
            [
                "--model.regularizers+=SIGReg",
                "--model.regularizers.num_projections=8",
                "--model.regularizers+=VICReg",
                "--model.regularizers.latents=clip_mean",
                "--model.target_gradient=true",
            ],
        ),
    ],
    ids=["plain", "accumulated", "validated", "drop path", "two masks", "regularized"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(
    tiny_cli: Callable, fit: Callable, flavour: str, settings: list[str]
):
    saving = "--checkpoint.every_n_train_steps=1", "--checkpoint.keep_all=true"
    cli = tiny_cli(flavour, *settings, *saving)
    uninterrupted = fit(cli)
    folder = Path(cli.trainer.checkpoint_callback.dirpath)
    resumed_cli = tiny_cli(flavour, *settings, *saving)
    resumed = fit(resumed_cli, folder / "step=00000003.ckpt")
    assert resumed == {row: loss for row, loss in uninterrupted.items() if row >= 3 * 4}
    for name, value in weights(cli.model).items():
        assert torch.equal(weights(resumed_cli.model)[name], value), name


def test_reset_parameters_reproduces_the_weights_of_step_0(tiny_cli: Callable, fit: Callable):
    cli = tiny_cli("wave", "--model.encoder.num_registers=2", "--model.encoder.qk_norm=true")
    before = weights(cli.model)
    fit(cli)
    online = [name for name in before if not name.startswith("target_")]
    assert all(not torch.equal(weights(cli.model)[name], before[name]) for name in online)
    state = torch.get_rng_state()
    cli.model.reset_parameters(seed=0)
    assert all(torch.equal(weights(cli.model)[name], before[name]) for name in online)
    assert torch.equal(torch.get_rng_state(), state)
    cli.model.reset_parameters(seed=1)
    assert not torch.equal(
        cli.model.encoder.blocks[0].attn.qkv.weight, before["encoder.blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_applies_to_matrices_only_unless_decay_all_is_set(
    tiny_cli: Callable, fit: Callable, decay_all: bool
):
    cli = tiny_cli(
        "wave",
        "--model.encoder.num_registers=2",
        "--model.predictor.trunk.num_registers=1",
        "--model.optimizer.weight_decay=0.07",
        f"--model.decay_all={str(decay_all).lower()}",
        "--trainer.max_steps=2",
    )
    fit(cli)
    names = {id(parameter): name for name, parameter in cli.model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in cli.trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == {name for name, p in cli.model.named_parameters() if p.requires_grad}
    spared = {"encoder.registers", "predictor.trunk.registers", "predictor.mask_token"}
    spared |= {
        name
        for name in decay
        if name.endswith("bias") or "norm" in name or ".stacks.0.0.1." in name
    }
    assert {name for name, value in decay.items() if value == 0} == (set() if decay_all else spared)
    assert {value for value in decay.values() if value} == {0.07}


def test_the_target_encoder_reads_the_momentum_front_end(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave", "--model.target_front_end=momentum")
    masks = jepa.draw_masks(batch)
    before = jepa(batch.waveform, masks)
    with torch.no_grad():
        jepa.front_end.projection.weight.mul_(2)
    online_moved = jepa(batch.waveform, masks)
    assert torch.equal(online_moved.target, before.target)
    assert not torch.allclose(online_moved.context, before.context)
    with torch.no_grad():
        jepa.target_front_end.projection.weight.add_(1)
    assert not torch.allclose(jepa(batch.waveform, masks).target, before.target)


def test_targets_with_gradient_are_those_of_the_encoder_itself(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave", "--model.target_gradient=true", "--model.regularizers+=VICReg")
    literal, masks = copy.deepcopy(jepa), jepa.draw_masks(batch)
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():
            parameter.add_(1)  # the momentum copy has no influence
    output = jepa(batch.waveform, masks)
    output.loss.backward()
    grid = literal.front_end.grid(batch.waveform.shape[-1])
    tokens = literal.front_end(batch.waveform)
    context = literal.encoder(tokens, grid, masks.context)
    prediction = literal.predictor(context, masks, grid)
    target = literal.targets(literal.encoder, tokens, grid, masks.targets)
    distance = literal.distance(prediction, target)[masks.targets.valid_or_true].sum()
    loss = distance / (len(batch.waveform) * masks.targets_per_clip)
    regularizer = VICReg()(context, prediction, target, masks, seed=0)
    torch.testing.assert_close(output.loss, loss + regularizer)
    (loss + regularizer).backward()
    for (name, ours), theirs in zip(jepa.named_parameters(), literal.parameters(), strict=True):
        if name.startswith("target_"):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("regularizer", "is_apart"), [(None, False), ("VICReg", True), ("SIGReg", True)]
)
def test_a_regularizer_keeps_the_clips_apart_where_targets_with_gradient_collapse(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, regularizer: str | None, is_apart: bool
):
    settings = ["--model.target_gradient=true", "--model.targets.normalization=none"]
    if regularizer:
        settings += [f"--model.regularizers+={regularizer}"]
        settings += ["--model.regularizers.latents=clip_mean"]
    jepa = tiny_jepa("wave", *settings)
    masks = jepa.draw_masks(batch)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        output = jepa(batch.waveform, masks)
        output.loss.backward()
        optimizer.step()
    valid = masks.context.valid_or_true[..., None]
    clips = (output.context * valid).sum(1) / valid.sum(1)
    spread = clips.std(0).mean().item()
    assert (spread > 0.2) == is_apart, spread


def test_targets_with_a_gradient_that_has_no_effect_are_refused(
    tiny_jepa: Callable[..., JEPA],
):
    with pytest.raises(UserError, match=r"`target_front_end` \(momentum\) would have no effect"):
        tiny_jepa("wave", "--model.target_gradient=true", "--model.target_front_end=momentum")
    classes = "{class_path: CrossEntropy, init_args: {codebook: RandomProjection}}"
    with pytest.raises(UserError, match="`distance: CrossEntropy`, because classes have no"):
        tiny_jepa("wave", "--model.target_gradient=true", f"--model.distance={classes}")


def test_a_front_end_and_an_encoder_of_different_widths_are_refused(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave")
    wider = Transformer(32, 1, 2, SinCosPositions())
    with pytest.raises(
        ValueError, match=r"`front_end.embed_dim` \(16\) must equal `encoder.embed_dim` \(32\)"
    ):
        JEPA(
            jepa.front_end,
            jepa.masker,
            wider,
            jepa.targets,
            jepa.predictor,
            jepa.distance,
            jepa.ema,
            torch.optim.AdamW,
            jepa.lr_schedule,
        )


def test_a_run_without_max_steps_is_refused(tiny_cli: Callable, fit: Callable):
    with pytest.raises(ValueError, match=r"set `trainer.max_steps` \(now -1\)"):
        fit(tiny_cli("wave", "--trainer.max_steps=-1"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_loss_under_bf16_autocast_is_finite_and_close(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour)
    masks = jepa.draw_masks(batch)
    full = jepa.loss(batch.waveform, masks)
    with torch.autocast("cpu", torch.bfloat16):
        half = jepa(batch.waveform, masks)
    assert half.loss.dtype == half.target.dtype == torch.float32
    half.loss.backward()
    assert all(p.grad.isfinite().all() for p in jepa.parameters() if p.requires_grad)
    assert half.loss.item() == pytest.approx(full.item(), rel=0.02)


def test_validation_masks_are_the_same_every_time_and_differ_from_training_masks(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave")
    first, again = (jepa.draw_masks(batch, stream=MaskStream.EVALUATION) for _ in range(2))
    assert torch.equal(first.context.to_mask(23), again.context.to_mask(23))
    assert not torch.equal(first.context.to_mask(23), jepa.draw_masks(batch).context.to_mask(23))


def test_masks_depend_on_the_row_and_not_on_the_process(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave")
    masks = jepa.draw_masks(batch)
    for rows in ([0, 1], [2, 3], [3, 1]):
        part = jepa.draw_masks(AudioBatch(batch.waveform[rows], batch.row[rows]))
        assert torch.equal(part.context.to_mask(23), masks.context.to_mask(23)[rows])
        assert torch.equal(part.targets.to_mask(23), masks.targets.to_mask(23)[rows])
    later = jepa.draw_masks(AudioBatch(batch.waveform, batch.row + 4))
    assert not torch.equal(later.context.to_mask(23), masks.context.to_mask(23))
