"""Clips shorter than the grid: their padding has no influence on masks, targets and loss."""

from collections.abc import Callable

import pytest
import torch

from jepa_audio.steps.grid import AudioBatch, ColumnCount, Grid
from jepa_audio.steps.masking import BlockMasker, RandomMasker, SpanMasker, TargetSpanMasker
from jepa_audio.steps.masking.source import MaskSource
from jepa_audio.training.jepa import JEPA


def draw(masker, grid, rows, num_time=None):
    """Masks of clips with one time column per sample."""
    return MaskSource(masker, grid, ColumnCount(1, 1)).draw(rows, 0, num_time)


MASKERS = [
    (SpanMasker(), Grid(1, 100)),
    (TargetSpanMasker(min_context=0.3), Grid(1, 100)),
    (RandomMasker(), Grid(4, 20)),
    (BlockMasker(), Grid(4, 20)),
]


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda value: type(value).__name__)
def test_masks_of_padded_clips_are_the_full_masks_without_the_padding(masker, grid: Grid):
    num_time = grid.num_time * torch.tensor([4, 3, 2, 4] * 4) // 4
    full = draw(masker, grid, torch.arange(16))
    padded_masks = draw(masker, grid, torch.arange(16), num_time)
    present = torch.arange(grid.num_tokens) // grid.num_freq < num_time[:, None]
    assert torch.equal(padded_masks.present.to_mask(grid.num_tokens), present)
    context = full.context.to_mask(grid.num_tokens) & present
    targets = full.targets.to_mask(grid.num_tokens) & present[:, None]
    kept = context.any(-1) & targets.any(-1).all(-1)
    assert kept[num_time < grid.num_time].any(), "some shorter clips lose no group"
    assert torch.equal(padded_masks.context.to_mask(grid.num_tokens)[kept], context[kept])
    assert torch.equal(padded_masks.targets.to_mask(grid.num_tokens)[kept], targets[kept])
    assert padded_masks.targets_per_clip == full.targets_per_clip


def test_clip_without_context_or_targets_is_redrawn_equally_on_every_process():
    grid, masker = Grid(1, 100), SpanMasker(context_length=5, target_length=5)
    num_time = torch.full((64,), 12)
    masks = draw(masker, grid, torch.arange(64), num_time)
    assert (masks.context.counts > 0).all()
    assert (masks.targets.counts > 0).all()
    assert masks.context.to_mask(100)[:, 12:].sum() == 0
    for rows in (torch.arange(32, 64), torch.tensor([7])):
        part = draw(masker, grid, rows, num_time[rows])
        assert torch.equal(part.context.to_mask(100), masks.context.to_mask(100)[rows])
        assert torch.equal(part.targets.to_mask(100), masks.targets.to_mask(100)[rows])


def test_each_of_several_masks_of_a_short_clip_is_drawn_as_if_it_were_alone():
    grid, masker = Grid(1, 100), SpanMasker(context_length=5, target_length=5)
    source = MaskSource(masker, grid, ColumnCount(1, 1), masks_per_clip=3)
    rows, num_time = torch.arange(32), torch.tensor([12, 100, 15, 20] * 8)
    masks = source.draw(rows, 0, num_time)
    assert torch.equal(masks.present.valid.sum(dim=1), num_time)
    for k in range(3):
        alone = draw(masker, grid, 3 * rows + k, num_time)
        for part in ("context", "targets"):
            several, single = (getattr(m, part).to_mask(100) for m in (masks, alone))
            assert torch.equal(several[k::3], single)


def test_full_clips_have_no_present_mask():
    grid = Grid(1, 100)
    masks = draw(SpanMasker(), grid, torch.arange(4), torch.full((4,), 100))
    assert masks.present is None


@pytest.mark.parametrize("view", ["clip", "targets"])
@pytest.mark.parametrize("normalization", ["instance", "joint_instance"])
def test_padding_content_changes_neither_loss_nor_gradient(
    tiny_jepa: Callable[..., JEPA], view: str, normalization: str, rng: torch.Generator
):
    settings = (f"--model.targets.view={view}", f"--model.targets.normalization={normalization}")
    front_end = (
        "--model.front_end.init_args.norm=layer",
        "--model.front_end.init_args.standardize=false",
    )
    waveform = torch.randn(4, 1, 500, generator=rng)
    num_samples = torch.tensor([500, 400, 333, 250])
    losses, gradients = [], []
    for filling in (0.0, 5.0):
        jepa = tiny_jepa("wave", *settings, *front_end).train()
        padded = waveform.clone()
        for clip, length in enumerate(num_samples.tolist()):
            padded[clip, :, length:] = filling
        batch = AudioBatch(padded, torch.arange(4), num_samples)
        loss = jepa.loss(padded, jepa.draw_masks(batch))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(jepa.encoder.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)


def test_parts_of_a_batch_with_padding_add_up_to_the_loss_of_the_batch(
    tiny_jepa: Callable[..., JEPA], rng: torch.Generator
):
    front_end = (
        "--model.front_end.init_args.norm=layer",
        "--model.front_end.init_args.standardize=false",
    )
    jepa = tiny_jepa("wave", *front_end).eval()
    waveform, row = torch.randn(4, 1, 500, generator=rng), torch.arange(4)
    num_samples = torch.tensor([500, 300, 250, 400])
    whole = jepa.loss(waveform, jepa.draw_masks(AudioBatch(waveform, row, num_samples)))
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        batch = AudioBatch(waveform[rows], row[rows], num_samples[rows])
        parts.append(jepa.loss(batch.waveform, jepa.draw_masks(batch)))
    torch.testing.assert_close((parts[0] + 3 * parts[1]) / 4, whole)


def test_targets_of_a_padded_clip_equal_those_of_the_clip_without_padding(
    tiny_jepa: Callable[..., JEPA], rng: torch.Generator
):
    """Compare a short clip in a batch with a long clip to the short clip in a separate batch."""
    front_end = (
        "--model.front_end.init_args.norm=layer",
        "--model.front_end.init_args.standardize=false",
    )
    jepa = tiny_jepa("wave", *front_end).eval()
    waveform = torch.randn(2, 1, 500, generator=rng)
    waveform[1, :, 300:] = 0
    masks = jepa.draw_masks(AudioBatch(waveform, torch.arange(2), torch.tensor([500, 300])))
    batched = jepa(waveform, masks)
    single_masks = masks.rows(slice(1, 2))
    columns = jepa.front_end.grid(300).num_time
    valid = single_masks.targets.valid
    single = jepa.target_latents(
        waveform[1:, :, :300],
        jepa.front_end(waveform[1:, :, :300]),
        Grid(1, columns),
        type(single_masks.targets)(single_masks.targets.index.clamp(max=columns - 1), valid),
    )
    torch.testing.assert_close(batched.target[1:][valid], single[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm", ["--model.front_end.init_args.norm=group", "--model.front_end.init_args.norm=layer"]
)
def test_front_end_with_clip_statistics_raises_an_error_for_padded_clips(
    tiny_jepa: Callable[..., JEPA], norm: str
):
    jepa = tiny_jepa("wave", norm)
    batch = AudioBatch(torch.randn(2, 1, 500), torch.arange(2), torch.tensor([500, 300]))
    with pytest.raises(
        ValueError, match=r"`data.mask_padding`.*`norm` to 'layer' and `standardize` to false"
    ):
        jepa.draw_masks(batch)


def test_counted_spectrogram_columns_do_not_depend_on_the_padding(
    tiny_jepa: Callable[..., JEPA],
):
    front_end = tiny_jepa("mel").front_end
    for length in range(200, 500, 7):
        columns = int(front_end.columns(torch.tensor([length])))
        waveform = torch.randn(2, 1, 500)
        waveform[1, :, :length] = waveform[0, :, :length]
        one, other = front_end(waveform).unflatten(1, (-1, front_end.grid(500).num_freq))
        torch.testing.assert_close(one[:columns], other[:columns])
    with pytest.raises(ValueError, match=r"raise `data\.min_seconds`"):
        front_end.columns(torch.tensor([40]))


def test_error_for_a_too_short_clip_names_the_setting_to_raise():
    with pytest.raises(
        ValueError,
        match=r"a clip of 4 time columns is too short to be masked, raise `data.min_seconds`",
    ):
        draw(SpanMasker(), Grid(1, 100), torch.arange(2), torch.tensor([100, 4]))
