"""The masks of batches: drawn where the batches are loaded, for the right optimizer step."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data._utils.pin_memory import pin_memory

from jepa_audio.steps.grid import AudioBatch, Grid, Masks
from jepa_audio.steps.masking import BlockMasker, MixtureMasker, RandomMasker, StripeMasker
from jepa_audio.steps.masking.source import HasMasker, MaskSource, MaskStream
from jepa_audio.training.ema import HasMomentumCopies
from jepa_audio.training.watching.finite_guard import FindsRowFiles

# The size of the target group identifies the masker.
MIXTURE = (
    "--model.masker={class_path: MixtureMasker, init_args: {maskers: [{class_path: RandomMasker, "
    "init_args: {target_share: 0.2}}, {class_path: RandomMasker, init_args: {target_share: 0.6}}], "
    "weights: [0.0, 1.0], warmup_start: 3, warmup_end: 3}}"
)


def same(one: Masks, other: Masks) -> bool:
    return torch.equal(one.context.index, other.context.index) and torch.equal(
        one.targets.index, other.targets.index
    )


class Check(Callback):
    """Compares the masks of each batch with those that the model draws for the step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {"train": [], "valid": []}
        self.num_targets: dict[str, list[int]] = {"train": [], "valid": []}

    def check(self, part: str, trainer, model, batch: AudioBatch, stream: MaskStream) -> None:
        drawn = model.draw_masks(batch, trainer.global_step, stream)
        assert same(model.masks_of(batch, stream), drawn)
        assert same(batch.masks, drawn) == (batch.masks.step == trainer.global_step)
        self.steps[part].append(batch.masks.step)
        self.num_targets[part].append(drawn.targets.index.shape[-1])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.check("train", trainer, pl_module, batch, MaskStream.TRAINING)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, _=0) -> None:
        self.check("valid", trainer, pl_module, batch, MaskStream.EVALUATION)


@pytest.mark.parametrize(("num_workers", "masks_per_clip"), [(0, 1), (2, 3)])
def test_batches_bring_the_masks_of_their_step_also_to_validation(
    tiny_cli: Callable, fit: Callable, num_workers: int, masks_per_clip: int
):
    settings = (
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=4",
        "--data.valid_share=0.3",
        "--data.batch_size=2",
        f"--data.num_workers={num_workers}",
        f"--model.masks_per_clip={masks_per_clip}",
    )
    check = Check()
    fit(tiny_cli("mel", *settings, MIXTURE), None, check)
    assert check.steps["train"] == [step for step in range(6) for _ in range(2)]
    assert sorted(set(check.steps["valid"])) == [2, 4, 6]
    # 28 tokens: the curriculum changes the masker at step 3, in training and in validation.
    few, many = min(check.num_targets["train"]), max(check.num_targets["train"])
    assert few < many
    for part in ("train", "valid"):
        expected = [many if step >= 3 else few for step in check.steps[part]]
        assert check.num_targets[part] == expected


def test_repeated_batches_have_new_masks_in_every_step(tiny_cli: Callable, fit: Callable):
    settings = "--trainer.accumulate_grad_batches=2", "--trainer.overfit_batches=2"
    check = Check()
    fit(tiny_cli("mel", *settings, "--data.batch_size=2", MIXTURE), None, check)
    few, many = min(check.num_targets["train"]), max(check.num_targets["train"])
    assert check.num_targets["train"] == [few] * 3 * 2 + [many] * 3 * 2


def test_masks_for_another_step_are_drawn_again(tiny_cli: Callable, fit: Callable):
    cli = tiny_cli("mel", "--trainer.max_steps=2")
    fit(cli)
    model, row = cli.model, torch.arange(4)
    batch = AudioBatch(torch.zeros(4, 1, 500), row)
    early, current = model.draw_masks(batch, step=1), model.draw_masks(batch, step=2)
    assert same(model.masks_of(batch._replace(masks=early)), current)
    assert model.masks_of(batch._replace(masks=current)) is current
    own = replace(early, step=None)
    assert model.masks_of(batch._replace(masks=own)) is own


def test_validation_of_a_checkpoint_uses_the_curriculum_of_its_step(
    tiny_cli: Callable, fit: Callable
):
    cli = tiny_cli("mel", "--data.valid_share=0.3", MIXTURE)
    fit(cli)
    checkpoint = Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt"
    other = tiny_cli("mel", "--data.valid_share=0.3", MIXTURE)
    (expected,) = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    (found,) = other.trainer.validate(
        other.model, other.datamodule, ckpt_path=checkpoint, verbose=False
    )
    assert other.model.mask_step() == 6
    assert found["valid/loss"] == pytest.approx(expected["valid/loss"], rel=1e-6)


def test_evaluation_masks_change_with_the_curriculum_alone():
    maskers = [RandomMasker(target_share=0.5), BlockMasker(), StripeMasker()]
    masker = MixtureMasker(maskers, [0.4, 0.3, 0.3], warmup_end=100_000)
    source = MaskSource(masker, Grid(8, 64), stream=MaskStream.EVALUATION)
    batches = [torch.arange(first, first + 4) for first in range(0, 400, 4)]

    def share_of_blocks_and_stripes(step: int) -> float:
        drawn = [source.draw(rows, step).targets.index.shape[-1] for rows in batches]
        return sum(num_targets > 300 for num_targets in drawn) / len(batches)

    assert share_of_blocks_and_stripes(0) == 0
    # The standard deviation of a share of 100 batches is at most 0.05.
    assert share_of_blocks_and_stripes(50_000) == pytest.approx(0.3, abs=0.15)
    assert share_of_blocks_and_stripes(100_000) == pytest.approx(0.6, abs=0.15)
    for rows in batches[:10]:
        assert same(source.draw(rows, 100_000), source.draw(rows, 200_000))
    training = MaskSource(masker, Grid(8, 64))
    assert not same(training.draw(batches[0], 100_000), training.draw(batches[0], 200_000))


def test_masks_move_with_their_batch(ragged: Callable, batch: AudioBatch):
    masks = replace(ragged(Grid(1, 20), 4, 2), step=7)
    moved = batch._replace(masks=masks).to(torch.device("meta"))
    assert moved.masks.context.index.is_meta
    assert moved.masks.targets.valid.is_meta
    assert (moved.masks.step, moved.masks.targets_per_clip) == (7, masks.targets_per_clip)
    assert not moved.row.is_meta


def test_the_loader_pins_the_masks_of_a_batch(
    ragged: Callable, batch: AudioBatch, monkeypatch: pytest.MonkeyPatch
):
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = batch._replace(masks=replace(ragged(Grid(1, 20), 4, 2), step=7))
    copy, _ = pin_memory((batch, []))
    assert isinstance(copy, AudioBatch)
    assert same(copy.masks, batch.masks)
    assert copy.masks.step == 7
    assert {batch.masks.context.index.shape, batch.masks.targets.valid.shape} <= set(pinned)


def test_protocols_find_the_parts_of_a_model_as_python_3_12_looks_for_them(tiny_cli: Callable):
    cli = tiny_cli("wave")
    assert isinstance(cli.model, HasMasker)
    members = {cli.model: ["online_modules", "target_modules"], cli.datamodule: ["find_row_files"]}
    for holder, names in members.items():
        assert isinstance(holder, HasMomentumCopies | FindsRowFiles)
        for name in names:
            inspect.getattr_static(holder, name)  # raises `AttributeError`
