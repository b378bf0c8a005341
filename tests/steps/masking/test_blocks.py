"""Block and stripe masks: rectangles, a literal implementation, and published statistics."""

import pytest
import torch

from jepa_audio.steps.grid import Grid
from jepa_audio.steps.masking import BlockMasker, MultiBlockMasker, StripeMasker
from jepa_audio.steps.masking.sampling import floor_share
from tests.oracles import masks_literal

GRID = Grid(8, 256)
GRIDS = [GRID, Grid(4, 12), Grid(1, 50), Grid(12, 4), Grid(70, 130)]
MASKERS = [(BlockMasker, masks_literal.block_size), (StripeMasker, masks_literal.stripe_size)]


def draw(masker, grid, num_rows):
    masks = masker(grid, torch.arange(num_rows), seed=5, step=3)
    return [set(row.tolist()) for row in masks.targets.index[:, 0]]


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("masker_class", "draw_size"), MASKERS)
def test_targets_equal_those_of_a_loop_for_each_clip(masker_class, draw_size, grid, share):
    drawn = draw(masker_class(target_share=share), grid, 40 if grid.num_tokens < 9000 else 4)
    count = floor_share(share, grid.num_tokens)
    for row, tokens in enumerate(drawn):
        key = masks_literal.row_key(5, 3, row)
        assert tokens == masks_literal.union(draw_size, grid, count, key)


@pytest.mark.parametrize(("masker_class", "draw_size"), MASKERS)
def test_the_limit_of_attempts_holds(masker_class, draw_size):
    for row, tokens in enumerate(draw(masker_class(max_attempts=7), GRID, 20)):
        key = masks_literal.row_key(5, 3, row)
        assert tokens == masks_literal.union(draw_size, GRID, 1638, key, max_attempts=7)


def test_settings_above_the_largest_integer_of_the_compiled_loops_are_allowed():
    masker = StripeMasker(max_time_width=10**30, max_freq_width=10**30, max_attempts=10**30)
    assert all(len(tokens) == 1638 for tokens in draw(masker, GRID, 4))


def statistics(draw_size, num_draws):
    """Sizes of all rectangles, and mean number of random tokens; maskers equal this loop."""
    keys = [masks_literal.row_key(1, 0, row) for row in range(num_draws)]
    rows = [
        masks_literal.cover(draw_size, GRID, 1638, masks_literal.stream(key, 0)) for key in keys
    ]
    placed = torch.tensor([size for _, sizes in rows for size in sizes], dtype=torch.float32)
    return placed, 1638 - sum(len(tokens) for tokens, _ in rows) / num_draws


def test_pupujepa_block_statistics():
    # The published numbers are from 300 draws. Between repetitions of 300 draws, ours vary by 0.3
    # blocks, 0.05 patches and 0.4 percentage points.
    blocks, random_fill = statistics(masks_literal.block_size, 300)
    assert len(blocks) / 300 == pytest.approx(78, abs=1.5)
    assert blocks[:, 0].mean() == pytest.approx(8.5, abs=0.15)
    assert blocks[:, 1].mean() == pytest.approx(5.6, abs=0.1)
    assert (blocks[:, 1] == 8).float().mean() == pytest.approx(0.44, abs=0.015)
    assert random_fill == pytest.approx(0.1, abs=0.15)


def test_pupujepa_stripe_statistics():
    # Clips differ by 2.5 time stripes, 0.7 frequency stripes and sometimes a full row of random
    # tokens.
    stripes, random_fill = statistics(masks_literal.stripe_size, 1000)
    of_frequency = stripes[:, 0] == 256
    assert of_frequency.sum() / 1000 == pytest.approx(0.6, abs=0.1)
    assert (~of_frequency).sum() / 1000 == pytest.approx(15, abs=0.5)
    assert (stripes[~of_frequency, 1] == 8).all()
    assert (stripes[of_frequency, 1] == 1).all()
    assert random_fill == pytest.approx(8, abs=2)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(14, 14)], ids=str)
def test_multi_block_targets_are_rectangles_of_one_size(grid):
    masks = MultiBlockMasker()(grid, torch.arange(16), seed=0, step=0)
    assert masks.targets.valid is None
    planes = masks.targets.to_mask(grid.num_tokens).unflatten(-1, (grid.num_time, grid.num_freq))
    in_time, in_freq = planes.any(-1), planes.any(-2)
    assert torch.equal(planes, in_time[..., None] & in_freq[..., None, :])
    for side in (in_time, in_freq):
        assert len(side.sum(-1).unique()) == 1
        assert (side.int().diff(dim=-1).clamp(min=0).sum(-1) + side[..., 0] == 1).all(), "one run"


@pytest.mark.parametrize("grid", [GRID, Grid(1, 200), Grid(14, 14)], ids=str)
def test_multi_block_scale_holds_for_any_grid_shape(grid):
    masks = [MultiBlockMasker()(grid, torch.tensor([0]), seed=0, step=step) for step in range(60)]
    shares = torch.tensor([draw.targets.index.shape[-1] for draw in masks]) / grid.num_tokens
    # Sides are whole numbers: the area is wrong by at most half a column of the widest block.
    tolerance = 0.5 * grid.num_freq / grid.num_tokens
    assert shares.min() >= 0.15 - tolerance
    assert shares.max() <= 0.2 + tolerance
    assert shares.mean() == pytest.approx(0.175, abs=0.012)


def test_multi_block_context_is_a_large_block_without_the_targets():
    grid = Grid(8, 64)
    masks = MultiBlockMasker(context_scale=(0.5, 0.5))(grid, torch.arange(32), seed=0, step=0)
    context = masks.context.to_mask(grid.num_tokens).unflatten(-1, (64, 8))
    targets = masks.targets.to_mask(grid.num_tokens).any(1).unflatten(-1, (64, 8))
    for seen, predicted in zip(context, targets, strict=True):
        time, freq = seen.nonzero().T
        inside = torch.zeros_like(seen)
        inside[time.min() : time.max() + 1, freq.min() : freq.max() + 1] = True
        assert torch.equal(seen, inside & ~predicted)
        # Half of the grid with whole sides: round(8 / √2) = 6 rows and 43 columns.
        assert inside.sum() <= 43 * 6
