"""The shared data types: a token set is equivalent to a boolean mask."""

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, TokenSet

SHAPES = [(5, 12), (4, 3, 12)]


@pytest.fixture(params=SHAPES, ids=str)
def mask(request: pytest.FixtureRequest, rng: torch.Generator) -> torch.Tensor:
    mask = torch.rand(request.param, generator=rng) < 0.4
    mask[0] = False  # an empty row
    return mask


def test_tokens_are_in_time_major_order():
    grid = Grid(num_freq=3, num_time=2)
    assert grid.num_tokens == 6
    assert grid.coordinates().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("sides", [(0, 3), (3, 0), (-1, 3)])
def test_empty_grid_raises_an_error(sides: tuple[int, int]):
    with pytest.raises(ValueError, match="at least one row and one column"):
        Grid(*sides)


def test_mask_to_token_set_and_back_is_unchanged(mask: torch.Tensor):
    assert torch.equal(TokenSet.from_mask(mask).to_mask(mask.shape[-1]), mask)


def test_rows_contain_valid_tokens_in_grid_order_then_unique_padding(
    mask: torch.Tensor,
):
    tokens = TokenSet.from_mask(mask)
    assert tokens.index.shape[-1] == mask.sum(-1).max()
    for row, index, valid in zip(
        mask.flatten(0, -2), tokens.index.flatten(0, -2), tokens.valid.flatten(0, -2), strict=True
    ):
        assert index[valid].tolist() == row.nonzero()[:, 0].tolist()
        assert not row[index[~valid]].any()
        assert len(set(index.tolist())) == len(index)


def test_counts_are_the_numbers_of_valid_tokens(mask: torch.Tensor):
    assert torch.equal(TokenSet.from_mask(mask).counts, mask.sum(-1))
    assert TokenSet(torch.zeros(2, 3, dtype=torch.long)).counts.tolist() == [3, 3]


def test_rows_of_equal_length_have_no_valid_mask():
    mask = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, -1)
    assert TokenSet.from_mask(mask).valid is None
    assert torch.equal(TokenSet.from_mask(mask).to_mask(4), mask)


def test_empty_token_set_is_allowed():
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert TokenSet.from_mask(nothing).index.shape == (2, 0)
    assert torch.equal(TokenSet.from_mask(nothing).to_mask(5), nothing)


def test_gather_selects_the_tokens_at_the_indices(mask: torch.Tensor, rng: torch.Generator):
    tokens = torch.randn(*mask.shape, 7, generator=rng)
    kept = TokenSet.from_mask(mask)
    assert torch.equal(kept.gather(tokens)[kept.valid], tokens[mask])


def test_rows_and_to_keep_the_selected_tokens(mask: torch.Tensor):
    tokens = TokenSet.from_mask(mask)
    selected = tokens.rows(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert torch.equal(selected.to_mask(mask.shape[-1]), mask[[2, 0]])
    assert torch.equal(tokens.rows(slice(1, 3)).to_mask(mask.shape[-1]), mask[1:3])


def test_rows_of_masks_keep_targets_per_clip_of_the_whole_draw(rng: torch.Generator):
    context, targets = (
        torch.rand(4, 9, generator=rng) < 0.5,
        torch.rand(4, 2, 9, generator=rng) < 0.5,
    )
    masks = Masks.from_bool(context, targets)
    assert masks.targets_per_clip == pytest.approx(targets.sum().item() / 4)
    selected = masks.rows(torch.tensor([3])).to(torch.device("cpu"))
    assert selected.targets_per_clip == masks.targets_per_clip
    assert torch.equal(selected.context.to_mask(9), context[3:])
    assert torch.equal(selected.targets.to_mask(9), targets[3:])


@pytest.mark.usefixtures("symbolic_sizes")  # no checks of shapes, as in a user's program
@pytest.mark.parametrize("shape", [(2, 12), (2, 1, 11), (3, 1, 12)])
def test_masks_of_a_wrong_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"for one group, use `targets\[:, None\]`"):
        Masks.from_bool(torch.ones(2, 12, dtype=torch.bool), torch.ones(shape, dtype=torch.bool))
