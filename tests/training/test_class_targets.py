"""Targets that are classes, in runs: gradients, processes, accumulation, resume, watching."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.interop.convert import load_weights
from jepa_audio.steps.classes import RandomProjection
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.models import load_jepa
from jepa_audio.training.run.resume import find_changes, refuse_changes
from tests.conftest import LOG_MEL_TARGETS
from tests.oracles.other_targets_literal import patch_targets
from tests.steps.test_classes import literal_codes
from tests.training.test_ddp import SGD, on
from tests.training.test_sharding import FSDP, mean, on_processes, train

CODEBOOKS = {
    "random": (
        "--model.distance=CrossEntropy",
        "--model.distance.codebook=RandomProjection",
        "--model.distance.codebook.num_classes=32",
        "--model.distance.codebook.codebook_dim=4",
    ),
    "clusters": (
        "--model.distance=CrossEntropy",
        "--model.distance.temperature=0.12",
        "--model.distance.codebook=OnlineClusters",
        "--model.distance.codebook.num_classes=8",
        "--model.distance.codebook.by_position=false",
    ),
}
BY_POSITION = (*CODEBOOKS["clusters"][:-1], "--model.distance.codebook.by_position=true")


def state(jepa: JEPA) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in jepa.state_dict().items()}


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_trainable_parameter_gets_a_gradient_and_the_loss_is_the_cross_entropy(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, codebook: str
):
    jepa = tiny_jepa("mel", *CODEBOOKS[codebook])
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    output.loss.backward()
    for name, parameter in jepa.named_parameters():
        if name.startswith("target_"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    classes = jepa.distance.codebook(output.target, masks.targets, grid).target
    if not classes.is_floating_point():
        classes = torch.eye(32)[classes]
    losses = -(classes * jepa.distance.logits(output.prediction).log_softmax(-1)).sum(-1)
    valid = masks.targets.valid_or_true
    torch.testing.assert_close(output.distance_sum, losses[valid].sum())


@pytest.mark.parametrize("masks_per_clip", [1, 2])
def test_classes_of_log_mel_frames_are_those_of_a_literal_computation(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, masks_per_clip: int
):
    settings = "--model.targets.normalization=none", f"--model.masks_per_clip={masks_per_clip}"
    jepa = tiny_jepa("wave", *LOG_MEL_TARGETS, *CODEBOOKS["random"], *settings)
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    assert output.prediction.shape[-1] == jepa.encoder.embed_dim
    frames = [patch_targets(jepa.fixed_front_end, jepa.front_end, w) for w in batch.waveform]
    places = masks.targets.valid_or_true.nonzero().tolist()
    vectors = torch.stack(
        [frames[q // masks_per_clip][masks.targets.index[q, m, k]] for q, m, k in places]
    ).double()
    vectors = (vectors - vectors.mean(0)) / vectors.std(0, unbiased=False)
    codes = literal_codes(jepa.distance.codebook, vectors.numpy())
    logits = jepa.distance.logits(output.prediction)[masks.targets.valid_or_true]
    losses = [math.log(sum(row.exp())) - row[code] for row, code in zip(logits, codes, strict=True)]
    assert output.distance_sum.item() == pytest.approx(float(sum(losses)), rel=1e-4)
    assert len(set(codes)) > 8


def test_the_weights_of_the_other_parts_do_not_depend_on_the_distance(
    tiny_jepa: Callable[..., JEPA],
):
    plain = state(tiny_jepa("mel"))
    for settings in CODEBOOKS.values():
        other = state(tiny_jepa("mel", *settings))
        assert all(torch.equal(other[name], value) for name, value in plain.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize("settings", [CODEBOOKS["random"], BY_POSITION], ids=["random", "clusters"])
def test_two_processes_learn_the_same_weights_and_have_the_same_losses_as_one(
    tiny_cli: Callable, settings: tuple[str, ...]
):
    steps = "--trainer.max_steps=3", "--data.valid_share=0.3", "--trainer.val_check_interval=3"
    often = "--monitor.every_n_steps=1", "--trainer.log_every_n_steps=1"
    runs, metrics = {}, {}
    for num_processes in (1, 2):
        cli = tiny_cli("wave", *SGD, *steps, *often, *settings, *on(num_processes))
        start = state(cli.model)
        cli.trainer.fit(cli.model, cli.datamodule)
        runs[num_processes] = state(cli.model)
        metrics[num_processes] = cli.trainer.callback_metrics
    names = ["train/loss", "train/loss_mean_target", "valid/loss", "collapse/class_perplexity"]
    names += ["train/codebook_loss"] if settings != CODEBOOKS["random"] else []
    for name in names:
        assert metrics[2][name].item() == pytest.approx(metrics[1][name].item(), rel=1e-5), name
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[2][name], value, rtol=1e-5, atol=1e-5, msg=name)
    learned = [name for name in start if not torch.equal(start[name], runs[1][name])]
    assert "distance.head.weight" in learned
    assert ("distance.codebook.scores.weight" in learned) == (settings != CODEBOOKS["random"])
    assert "distance.codebook.projection" not in learned


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_sharded_parameters_have_the_same_losses_as_one_process(tiny_cli: Callable, tmp_path: Path):
    settings = *BY_POSITION, "--trainer.max_steps=3", "--monitor.every_n_steps=1"
    alone = train(tiny_cli("mel", *settings))
    sharding = FSDP, "--trainer.devices=2", "--data.batch_size=2", f"--run_dir={tmp_path}"
    records = on_processes(2, tmp_path, lambda: train(tiny_cli("mel", *settings, *sharding)))
    assert all(records[0].sharded)
    assert mean([record.losses for record in records]) == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(
    tiny_cli: Callable, fit: Callable, codebook: str, caplog: pytest.LogCaptureFixture
):
    saving = "--checkpoint.every_n_train_steps=1", "--checkpoint.keep_all=true"
    settings = (*CODEBOOKS[codebook], *saving, "--trainer.accumulate_grad_batches=2")
    cli = tiny_cli("wave", *settings, "--data.batch_size=2", "--monitor.every_n_steps=1")
    uninterrupted = fit(cli)
    assert "not for the 2 micro-batches of a step" in caplog.text
    folder = Path(cli.trainer.checkpoint_callback.dirpath)
    # The measurements of the monitor do not change the run.
    resumed_cli = tiny_cli("wave", *settings, "--data.batch_size=2", "--monitor.every_n_steps=100")
    resumed = fit(resumed_cli, folder / "step=00000003.ckpt")
    assert resumed == {row: loss for row, loss in uninterrupted.items() if row >= 3 * 4}
    for name, value in state(cli.model).items():
        assert torch.equal(state(resumed_cli.model)[name], value), name


def test_micro_batches_add_up_to_one_batch_for_classes_without_batch_statistics(
    tiny_cli: Callable, fit: Callable, caplog: pytest.LogCaptureFixture
):
    weights = {}
    for batch_size, accumulate in ((4, 1), (2, 2)):
        cli = tiny_cli(
            "wave",
            *SGD,
            *CODEBOOKS["random"],
            "--model.distance.codebook.normalization=layer",
            "--trainer.max_steps=2",
            f"--data.batch_size={batch_size}",
            f"--trainer.accumulate_grad_batches={accumulate}",
        )
        fit(cli)
        weights[batch_size] = dict(cli.model.named_parameters())
    for name, value in weights[4].items():
        torch.testing.assert_close(weights[2][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert "not for the 2 micro-batches of a step" not in caplog.text


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_loss_of_one_batch_falls(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, codebook: str
):
    jepa = tiny_jepa("mel", *CODEBOOKS[codebook])
    masks = jepa.draw_masks(batch)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = jepa.loss(batch.waveform, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_baseline_is_the_entropy_of_the_class_frequencies_and_usage_is_logged(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("mel", *CODEBOOKS["random"], "--trainer.max_steps=1")
    fit(cli)
    codebook, metrics = cli.model.distance.codebook, cli.trainer.callback_metrics
    shares = [share for share in codebook.frequencies.tolist() if share]
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics["train/loss_mean_target"].item() == pytest.approx(entropy, rel=1e-5)
    assert "train/loss_nearest_context" not in metrics
    perplexity = math.exp(entropy)
    assert metrics["collapse/class_perplexity"].item() == pytest.approx(perplexity, rel=1e-5)
    share = entropy / math.log(32)
    assert metrics["collapse/class_entropy"].item() == pytest.approx(share, rel=1e-4)
    assert metrics["collapse/alarm"] == 0
    assert "train/codebook_loss" not in metrics


def test_targets_of_a_single_class_raise_the_alarm(
    tiny_cli: Callable, fit: Callable, caplog: pytest.LogCaptureFixture
):
    settings = (*CODEBOOKS["random"], "--model.distance.codebook.normalization=none")
    cli = tiny_cli("mel", *settings, "--trainer.max_steps=1")
    with torch.no_grad():
        cli.model.target_encoder.norm.weight.zero_()
        cli.model.target_encoder.norm.bias.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        fit(cli)
    assert cli.trainer.callback_metrics["collapse/alarm"] == 1
    assert "the targets distinguish only 1 classes" in caplog.text


def test_a_distance_whose_weights_change_is_refused_at_a_resume(tiny_cli: Callable):
    before = tiny_cli("wave", *CODEBOOKS["random"]).config_dump
    checkpoint = {"hyper_parameters": before["model"]}
    path = "jepa_audio.steps.losses."
    for key, value in (
        ("", {"class_path": f"{path}MSE"}),
        ("", {"class_path": f"{path}SmoothL1", "init_args": {"beta": 0.5}}),
        (".temperature", 0.1),
        (".codebook", {"class_path": "jepa_audio.steps.classes.OnlineClusters"}),
        (".codebook.num_classes", 16),
        (".codebook.seed", 1),
    ):
        after = copy.deepcopy(before)
        *parents, last = f"distance{key}".split(".")
        settings = after["model"]
        for name in parents:
            settings = settings[name]["init_args"]
        settings[last] = value
        with pytest.raises(UserError, match=rf"`model\.distance{re.escape(key)}` is "):
            refuse_changes(find_changes(checkpoint, after))
        with pytest.raises(UserError, match=rf"`model\.distance{re.escape(key)}` is "):
            refuse_changes(find_changes({"hyper_parameters": after["model"]}, before))


def test_a_run_starts_from_weights_of_a_run_with_another_distance(
    tiny_cli: Callable,
    tiny_jepa: Callable[..., JEPA],
    fit: Callable,
    caplog: pytest.LogCaptureFixture,
):
    trained = {name: tiny_cli("wave", *CODEBOOKS.get(name, ())) for name in ("mse", "random")}
    for cli in trained.values():
        fit(cli)
    for old, new in (("mse", "random"), ("random", "mse"), ("random", "clusters")):
        model = tiny_jepa("wave", *CODEBOOKS.get(new, ()))
        initial = state(model)
        checkpoint = Path(trained[old].trainer.checkpoint_callback.dirpath) / "last.ckpt"
        caplog.clear()
        load_weights(model, checkpoint)
        assert "has other weights of `distance`: those are not used" in caplog.text
        for name, value in state(model).items():
            source = initial if name.startswith("distance.") else state(trained[old].model)
            assert torch.equal(value, source[name]), name


def test_a_codebook_of_a_checkpoint_is_loaded_and_not_drawn_again(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("wave", *CODEBOOKS["random"], "--trainer.max_steps=1")
    cli.model.distance.codebook.codes.neg_()
    fit(cli)
    checkpoint = Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt"
    with pytest.raises(UserError, match="is MSE, the checkpoint has CrossEntropy"):
        tiny_cli("wave").validate(str(checkpoint))
    loaded = load_jepa(checkpoint)
    assert isinstance(loaded.distance.codebook, RandomProjection)
    for name, value in state(cli.model).items():
        assert torch.equal(state(loaded)[name], value), name
