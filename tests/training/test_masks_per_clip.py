"""Several masks of a clip are as many complete forward passes, with one pass for the targets."""

from collections.abc import Callable

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.watching.collapse_monitor import latent_metrics
from jepa_audio.training.watching.simple_predictors import baseline_sums
from tests.oracles.masks_per_clip_literal import loss_mask_by_mask, masks_one_by_one

LOCAL = (
    "--model.front_end.init_args.norm=layer",
    "--model.front_end.init_args.standardize=false",
)
MODELS = {
    "complete clip": ("wave", ()),
    "padded": ("wave", LOCAL),
    "momentum front end": ("wave", ("--model.target_front_end=momentum",)),
    "targets only": ("mel", ()),
    "targets only, padded": ("mel", ()),
}


@pytest.fixture(params=MODELS)
def case(
    request: pytest.FixtureRequest, tiny_jepa: Callable[..., JEPA], batch: AudioBatch
) -> tuple[JEPA, AudioBatch]:
    """A model with 3 masks of each clip and a batch, with or without padding."""
    flavour, settings = MODELS[request.param]
    jepa = tiny_jepa(flavour, "--model.masks_per_clip=3", *settings)
    # Other weights than those of the encoder, so that a confusion of the two changes the loss.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in jepa.target_modules.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if "padded" in request.param:
        batch = batch._replace(num_samples=torch.tensor([500, 240, 310, 500]))
    return jepa, batch


def test_loss_and_gradients_equal_those_of_one_forward_pass_for_each_mask(
    case: tuple[JEPA, AudioBatch],
):
    jepa, batch = case
    literal = loss_mask_by_mask(jepa, batch, 3)
    literal.backward()
    expected = {n: p.grad.clone() for n, p in jepa.named_parameters() if p.requires_grad}
    jepa.zero_grad()
    loss = jepa.loss(batch.waveform, jepa.draw_masks(batch))
    loss.backward()
    torch.testing.assert_close(loss, literal, rtol=1e-5, atol=1e-6)
    for name, parameter in jepa.named_parameters():
        if parameter.requires_grad:
            close = {"rtol": 1e-4, "atol": 1e-6, "msg": name}
            torch.testing.assert_close(parameter.grad, expected[name], **close)


def test_each_clip_has_the_masks_of_its_own_rows(case: tuple[JEPA, AudioBatch]):
    jepa, batch = case
    masks = jepa.draw_masks(batch)
    num_tokens = jepa.front_end.grid(batch.waveform.shape[-1]).num_tokens
    assert (masks.num_masks, masks.per_clip) == (12, 3)
    for k, single in enumerate(masks_one_by_one(jepa, batch, 3)):
        for part in ("context", "targets"):
            drawn, alone = (getattr(m, part).to_mask(num_tokens) for m in (masks, single))
            assert torch.equal(drawn[k::3], alone)
        assert masks.targets_per_clip == single.targets_per_clip
    for rows in (torch.tensor([2, 0]), torch.tensor([False, True, False, True]), slice(1, 3)):
        lengths = None if batch.num_samples is None else batch.num_samples[rows]
        part = jepa.draw_masks(AudioBatch(batch.waveform[rows], batch.row[rows], lengths))
        chosen = masks.rows(rows)
        assert torch.equal(chosen.targets.to_mask(num_tokens), part.targets.to_mask(num_tokens))
        assert torch.equal(chosen.context.to_mask(num_tokens), part.context.to_mask(num_tokens))
        if part.present is not None:
            assert torch.equal(chosen.present.valid, part.present.valid)


def test_one_mask_of_a_clip_is_the_draw_of_the_masker_for_its_row(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa("wave")
    masks = jepa.draw_masks(batch)
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    single = masks_one_by_one(jepa, batch, 1)[0]
    assert jepa.masks_per_clip == masks.per_clip == 1
    assert torch.equal(masks.context.index, single.context.index)
    assert len(masks.targets.index) == len(batch.waveform)
    assert torch.equal(single.targets.to_mask(grid.num_tokens), masks.targets.to_mask(23))


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_the_front_end_and_the_view_clip_run_once_for_each_clip(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour, "--model.masks_per_clip=3", "--model.targets.view=clip")
    rows: dict[str, list[int]] = {"front_end": [], "target_encoder": [], "encoder": []}
    first_layers = {
        "front_end": jepa.front_end,
        "target_encoder": jepa.target_encoder.blocks[0],
        "encoder": jepa.encoder.blocks[0],
    }
    for name, module in first_layers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(len(args[0])))
    jepa.loss(batch.waveform, jepa.draw_masks(batch))
    assert rows == {"front_end": [4], "target_encoder": [4], "encoder": [12]}


def test_the_watched_numbers_are_those_of_all_masks(case: tuple[JEPA, AudioBatch]):
    jepa, batch = case
    masks = jepa.draw_masks(batch)
    output = jepa(batch.waveform, masks)
    assert all(torch.tensor([*latent_metrics(jepa, batch, masks, output).values()]).isfinite())
    name = "loss_nearest_context"
    found = baseline_sums(jepa, batch.waveform, masks, output.target)[name]
    expected = []
    for single in masks_one_by_one(jepa, batch, 3):
        target = jepa(batch.waveform, single).target
        expected.append(baseline_sums(jepa, batch.waveform, single, target)[name])
    torch.testing.assert_close(found, torch.stack(expected).sum(), rtol=1e-5, atol=1e-5)


def test_a_clip_without_a_mask_is_refused(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave")
    with pytest.raises(UserError, match=r"`masks_per_clip` \(0\) must be in \[1, 1024\]"):
        type(jepa)(
            jepa.front_end,
            jepa.masker,
            jepa.encoder,
            jepa.targets,
            jepa.predictor,
            jepa.distance,
            jepa.ema,
            torch.optim.AdamW,
            jepa.lr_schedule,
            masks_per_clip=0,
        )
