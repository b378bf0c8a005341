"""Block and stripe masks: rectangles, a literal implementation, and published statistics."""

import math

import pytest
import torch

from jepa_audio.steps.grid import Grid
from jepa_audio.steps.masking import BlockMasker, MultiBlockMasker, StripeMasker

GRID = Grid(8, 256)
GRIDS = [GRID, Grid(4, 12), Grid(1, 50), Grid(12, 4)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def literal_block(grid, uniform, free):
    area = min(grid.num_tokens * (0.01 + 0.04 * uniform[0]), free)
    aspect = 2 + 3 * uniform[2] if uniform[1] < 0.5 else 0.2 + 0.3 * uniform[2]
    return int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))


def literal_stripe(grid, uniform, free):
    if uniform[0] < grid.num_time / (grid.num_time + grid.num_freq):
        return min(1 + int(40 * uniform[1]), free // grid.num_freq), grid.num_freq
    return grid.num_time, min(1, free // grid.num_time)


def literal_cover(draw_size, grid, count, uniform):
    """The covered tokens of one clip, and the size of every block that covered a new token."""
    covered, placed = set(), []
    for attempt in uniform:
        free = count - len(covered)
        if free == 0:
            break
        height, width = draw_size(grid, attempt[:3], free)
        height, width = min(max(height, 1), grid.num_time), min(max(width, 1), grid.num_freq)
        first_time = int(attempt[3] * (grid.num_time - height + 1))
        first_freq = int(attempt[4] * (grid.num_freq - width + 1))
        block = {
            time * grid.num_freq + freq
            for time in range(first_time, first_time + height)
            for freq in range(first_freq, first_freq + width)
        }
        if len(covered | block) > count:
            break
        if block - covered:
            placed.append([height, width])
        covered |= block
    return covered, placed


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("masker", "literal_size"), [(BlockMasker(), literal_block), (StripeMasker(), literal_stripe)]
)
def test_cover_equals_a_loop_for_each_clip(masker, literal_size, grid):
    uniform = torch.rand(150, 5, 6, generator=generator(), dtype=torch.float64)
    count = int(0.8 * grid.num_tokens)
    covered, placed = masker._cover(grid, count, uniform)
    for row in range(6):
        tokens, blocks = literal_cover(literal_size, grid, count, uniform[:, :, row].tolist())
        assert set(covered[row].nonzero().flatten().tolist()) == tokens
        assert [block for block in placed[:, row].tolist() if block != [0, 0]] == blocks


def test_masks_of_a_clip_do_not_depend_on_other_clips_of_the_batch():
    uniform = torch.rand(150, 5, 6, generator=generator(), dtype=torch.float64)
    batched, _ = BlockMasker()._cover(GRID, 1638, uniform)
    single, _ = BlockMasker()._cover(GRID, 1638, uniform[:, :, 2:3].contiguous())
    assert torch.equal(batched[2], single[0])


def statistics(masker, num_draws):
    uniform = torch.rand(150, 5, num_draws, generator=generator(), dtype=torch.float64)
    covered, placed = masker._cover(GRID, 1638, uniform)
    return placed[placed.prod(-1) > 0].float(), 1638 - covered.sum(-1).float().mean().item()


def test_pupujepa_block_statistics():
    # The published numbers are from 300 draws. Between repetitions of 300 draws, ours vary by 0.3
    # blocks, 0.05 patches and 0.4 percentage points.
    blocks, random_fill = statistics(BlockMasker(), 300)
    assert len(blocks) / 300 == pytest.approx(78, abs=1.5)
    assert blocks[:, 0].mean() == pytest.approx(8.5, abs=0.15)
    assert blocks[:, 1].mean() == pytest.approx(5.6, abs=0.1)
    assert (blocks[:, 1] == 8).float().mean() == pytest.approx(0.44, abs=0.015)
    assert random_fill == pytest.approx(0.1, abs=0.15)


def test_pupujepa_stripe_statistics():
    # Clips differ by 2.5 time stripes, 0.7 frequency stripes and sometimes a full row of random
    # tokens.
    stripes, random_fill = statistics(StripeMasker(), 1000)
    of_frequency = stripes[:, 0] == 256
    assert of_frequency.sum() / 1000 == pytest.approx(0.6, abs=0.1)
    assert (~of_frequency).sum() / 1000 == pytest.approx(15, abs=0.5)
    assert (stripes[~of_frequency, 1] == 8).all()
    assert (stripes[of_frequency, 1] == 1).all()
    assert random_fill == pytest.approx(8, abs=2)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(14, 14)], ids=str)
def test_multi_block_targets_are_rectangles_of_one_size(grid):
    masks = MultiBlockMasker()(grid, 16, generator(), step=0)
    assert masks.targets.valid is None
    planes = masks.targets.to_mask(grid.num_tokens).unflatten(-1, (grid.num_time, grid.num_freq))
    in_time, in_freq = planes.any(-1), planes.any(-2)
    assert torch.equal(planes, in_time[..., None] & in_freq[..., None, :])
    for side in (in_time, in_freq):
        assert len(side.sum(-1).unique()) == 1
        assert (side.int().diff(dim=-1).clamp(min=0).sum(-1) + side[..., 0] == 1).all(), "one run"


@pytest.mark.parametrize("grid", [GRID, Grid(1, 200), Grid(14, 14)], ids=str)
def test_multi_block_scale_holds_for_any_grid_shape(grid):
    source = generator()
    shares = (
        torch.tensor(
            [MultiBlockMasker()(grid, 1, source, step=0).targets.index.shape[-1] for _ in range(60)]
        )
        / grid.num_tokens
    )
    # Sides are whole numbers: the area is wrong by at most half a column of the widest block.
    tolerance = 0.5 * grid.num_freq / grid.num_tokens
    assert shares.min() >= 0.15 - tolerance
    assert shares.max() <= 0.2 + tolerance
    assert shares.mean() == pytest.approx(0.175, abs=0.012)


def test_multi_block_context_is_a_large_block_without_the_targets():
    grid = Grid(8, 64)
    masks = MultiBlockMasker(context_scale=(0.5, 0.5))(grid, 32, generator(), step=0)
    context = masks.context.to_mask(grid.num_tokens).unflatten(-1, (64, 8))
    targets = masks.targets.to_mask(grid.num_tokens).any(1).unflatten(-1, (64, 8))
    for seen, predicted in zip(context, targets, strict=True):
        time, freq = seen.nonzero().T
        inside = torch.zeros_like(seen)
        inside[time.min() : time.max() + 1, freq.min() : freq.max() + 1] = True
        assert torch.equal(seen, inside & ~predicted)
        # Half of the grid with whole sides: round(8 / √2) = 6 rows and 43 columns.
        assert inside.sum() <= 43 * 6
