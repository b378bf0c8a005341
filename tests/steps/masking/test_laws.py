"""Properties of every masker on every grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.steps import kernels
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking import (
    BlockMasker,
    Masker,
    MixtureMasker,
    MultiBlockMasker,
    RandomMasker,
    SpanMasker,
    StripeMasker,
    TargetSpanMasker,
)
from jepa_audio.steps.masking.numbers import row_keys
from jepa_audio.steps.masking.sampling import floor_share
from tests.oracles import masks_literal

BATCH = 48
LONG, SHORT = (Grid(1, 50), Grid(1, 200), Grid(8, 64)), Grid(4, 12)
ANY_GRID = (
    RandomMasker(),
    RandomMasker(target_share=(0.4, 0.6)),
    MultiBlockMasker(),
    BlockMasker(),
    StripeMasker(),
    MixtureMasker([RandomMasker(), BlockMasker(), StripeMasker()], [0.4, 0.3, 0.3]),
)
CASES = [
    *[(masker, grid) for masker in (SpanMasker(), TargetSpanMasker()) for grid in LONG],
    (SpanMasker(context_length=2, target_length=2), SHORT),
    (TargetSpanMasker(target_length=2, min_run=2, num_groups=2), SHORT),
    *[(masker, grid) for masker in ANY_GRID for grid in (*LONG, SHORT)],
]
all_cases = pytest.mark.parametrize(
    ("masker", "grid"),
    CASES,
    ids=[f"{type(m).__name__}-{g.num_freq}x{g.num_time}" for m, g in CASES],
)


def draw(masker: Masker, grid: Grid, seed: int = 0, batch_size: int = BATCH) -> Masks:
    return masker(grid, torch.arange(batch_size), seed, step=0)


def to_masks(masks: Masks, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    return masks.context.to_mask(grid.num_tokens), masks.targets.to_mask(grid.num_tokens)


@all_cases
def test_masks_depend_only_on_the_seed(masker, grid):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first, state = to_masks(draw(masker, grid), grid), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(2)
    second = to_masks(draw(masker, grid), grid)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.manual_seed(1).get_state())
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert not torch.equal(first[0], to_masks(draw(masker, grid, seed=3), grid)[0])


@all_cases
def test_indices_are_within_the_grid_and_unique(masker, grid):
    masks = draw(masker, grid)
    for tokens in (masks.context, masks.targets):
        assert tokens.index.dtype == torch.int64
        assert tokens.index.device.type == "cpu"
        assert tokens.index.min() >= 0
        assert tokens.index.max() < grid.num_tokens
        assert (tokens.index.sort(-1).values.diff(dim=-1) > 0).all()
    assert masks.context.index.shape[0] == masks.targets.index.shape[0] == BATCH
    assert masks.targets.index.ndim == 3


@all_cases
def test_context_and_targets_are_disjoint_and_not_empty(masker, grid):
    masks = draw(masker, grid)
    context, targets = to_masks(masks, grid)
    assert not (context & targets.any(dim=1)).any()
    assert masks.context.counts.min() >= 1
    assert masks.targets.counts.min() >= 1


@all_cases
def test_every_token_is_context_and_target_in_some_draw(masker, grid):
    seen, predicted = torch.zeros(2, grid.num_tokens, dtype=torch.bool)
    for step in range(60):
        context, targets = to_masks(masker(grid, torch.arange(BATCH), 0, step), grid)
        seen |= context.any(0)
        predicted |= targets.any(0).any(0)
        if seen.all() and predicted.all():
            return
    pytest.fail(f"never context: {(~seen).nonzero().T}, never target: {(~predicted).nonzero().T}")


@all_cases
def test_rows_of_a_batch_differ(masker, grid):
    context, _ = to_masks(draw(masker, grid), grid)
    # On 48 tokens, a few rows can be equal by chance, but not most of them.
    assert len(context.unique(dim=0)) > 0.5 * BATCH


@pytest.mark.parametrize("grid", [*LONG, SHORT, Grid(8, 256)])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("masker_class", [RandomMasker, BlockMasker, StripeMasker])
def test_target_share_is_exact(masker_class, share, grid):
    masks = draw(masker_class(target_share=share), grid, batch_size=8)
    num_targets = (
        grid.num_tokens - floor_share(1 - share, grid.num_tokens)
        if masker_class is RandomMasker
        else floor_share(share, grid.num_tokens)
    )
    assert masks.targets.index.shape == (8, 1, num_targets)
    assert masks.context.index.shape == (8, grid.num_tokens - num_targets)
    assert masks.targets.valid is None
    assert masks.context.valid is None


def test_pupujepa_random_masks_have_409_context_tokens():
    masks = draw(RandomMasker(), Grid(8, 256))
    assert (masks.context.index.shape[-1], masks.targets.index.shape[-1]) == (409, 1639)


def test_share_from_a_range_is_drawn_per_step_over_the_full_range():
    masker, grid = RandomMasker(target_share=(0.4, 0.6)), Grid(1, 200)
    masks = [masker(grid, torch.arange(2), 0, step) for step in range(100)]
    counts = [draw.targets.index.shape[-1] for draw in masks]
    assert 80 <= min(counts) <= 85
    assert 115 <= max(counts) <= 121
    assert [masker.expected_targets(grid, 0, step) for step in range(100)] == counts


@all_cases
def test_a_row_has_the_same_masks_in_every_batch_and_others_in_every_step_and_seed(masker, grid):
    context, targets = to_masks(draw(masker, grid, batch_size=200), grid)
    rows = torch.tensor([150, 3, 64, 63, 199])
    for part in (rows, rows[:1]):
        some = to_masks(masker(grid, part, 0, step=0), grid)
        assert torch.equal(some[0], context[part])
        assert torch.equal(some[1], targets[part])
    for seed, step in ((0, 1), (1, 0)):
        assert not torch.equal(masker(grid, rows, seed, step).context.index, context[rows])
        other = masker(grid, rows, seed, step).context.to_mask(grid.num_tokens)
        assert not torch.equal(other, context[rows])


@all_cases
def test_the_loss_divides_by_the_expected_number_of_targets(masker, grid):
    for step in range(3):
        masks = masker(grid, torch.arange(2000), 7, step)
        expected = masker.expected_targets(grid, 7, step)
        assert masks.targets_per_clip == expected
        assert masks.targets.counts.sum() / 2000 == pytest.approx(expected, rel=0.01)


def test_at_least_one_context_token_remains():
    assert draw(RandomMasker(target_share=0.99), SHORT).context.index.shape[-1] == 1


@pytest.mark.parametrize(
    ("share", "num_tokens", "count"), [(1 - 0.8, 50, 10), (0.57, 100, 57), (0.8, 2048, 1638)]
)
def test_shares_are_rounded_down_without_float_errors(share, num_tokens, count):
    assert floor_share(share, num_tokens) == count


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_random_context_equals_a_literal_shuffle_of_the_tokens(share):
    masks = RandomMasker(target_share=share)(Grid(4, 12), torch.arange(20), seed=5, step=3)
    for row, context in enumerate(masks.context.index.tolist()):
        key = masks_literal.row_key(5, 3, row)
        count = 48 - masks.targets.index.shape[-1]
        assert context == sorted(masks_literal.choose(list(range(48)), count, key))


def chosen_items(num_items: int, count: int, num_rows: int = 4000) -> np.ndarray:
    keys = row_keys(0, 0, torch.arange(num_rows))
    chosen = np.empty((num_rows, num_items), dtype=bool)
    kernels.draw_tokens(keys, count, chosen)
    return chosen


@pytest.mark.parametrize("count", [1, 40, 120, 199, 200])
def test_random_tokens_are_uniform_over_all_subsets_of_their_size(count):
    chosen = chosen_items(200, count)
    assert (chosen.sum(-1) == count).all()
    share = count / 200
    deviation = (share * (1 - share) / 4000) ** 0.5
    assert np.allclose(chosen.mean(0), share, atol=5 * deviation)
    pair_share = share * (count - 1) / 199
    for other in (1, 63, 64, 199):
        both = (chosen[:, 0] & chosen[:, other]).mean()
        assert both == pytest.approx(pair_share, abs=5 * (pair_share / 4000) ** 0.5 + 1e-3)


def test_all_pairs_of_tokens_have_the_same_probability():
    # 3 of 36 pairs of 9 tokens; the standard deviation of a share over 4000 rows is 0.0044.
    chosen = chosen_items(9, 3)
    pairs = chosen.astype(float).T @ chosen / 4000
    assert np.allclose(pairs[~np.eye(9, dtype=bool)], 3 / 36, atol=0.02)


@pytest.mark.parametrize("masker_class", [BlockMasker, StripeMasker])
def test_completing_tokens_are_uniform_over_the_tokens_outside_the_rectangles(masker_class):
    # Without attempts, all tokens are completing ones.
    masker, grid = masker_class(target_share=0.25, max_attempts=1), Grid(1, 40)
    if masker_class is BlockMasker:
        masker = replace(masker, scale=(1e-6, 1e-6))
    else:
        masker = replace(masker, max_time_width=1)
    targets = masker(grid, torch.arange(4000), 0, 0).targets.to_mask(40)[:, 0]
    assert (targets.sum(-1) == 10).all()
    assert torch.allclose(targets.float().mean(0), torch.tensor(0.25), atol=0.035)


def test_only_rejected_rows_are_drawn_again():
    # A draw uses a stream of its row: rows that are accepted at once are equal in both cases.
    grid, rows = Grid(1, 200), torch.arange(500)
    first = SpanMasker(min_context=0.0)(grid, rows, 0, 0).context.to_mask(200)
    final = SpanMasker(min_context=0.15)(grid, rows, 0, 0).context.to_mask(200)
    accepted = first.sum(-1) >= 30
    assert 0 < accepted.sum() < 500
    assert torch.equal(first[accepted], final[accepted])
    assert (first[~accepted] != final[~accepted]).any(-1).all()
    assert final.sum(-1).min() >= 30


def test_the_error_counts_the_rejected_rows(monkeypatch):
    monkeypatch.setattr("jepa_audio.steps.masking.sampling.MAX_REDRAWS", 0)
    grid, rows = Grid(1, 200), torch.arange(500)
    context = SpanMasker(min_context=0.0)(grid, rows, 0, 0).context
    rejected = int((context.counts < 30).sum())
    with pytest.raises(UserError, match=f"{rejected} of 500 rows .* after 0 draws"):
        SpanMasker(min_context=0.15)._draw(200, row_keys(0, 0, rows))


@all_cases
def test_each_loop_is_compiled_once_for_all_maskers(masker, grid):
    draw(masker, grid)
    masker(grid, torch.arange(100)[::3], seed=-1, step=2**40)
    signatures = {
        name: len(value.signatures)
        for name, value in vars(kernels).items()
        if name in {"row_keys", "token_indices"} or name.startswith("draw_")
    }
    assert max(signatures.values()) == 1, signatures


@pytest.mark.parametrize(
    ("masker", "grid", "message"),
    [
        (
            SpanMasker(context_probability=1.0, min_context=0.9),
            Grid(1, 50),
            r"`min_context` \(0.9\).*SpanMasker\(",
        ),
        (
            SpanMasker(context_length=12),
            SHORT,
            r"`context_length` \(12\) must be below the number of time columns \(12\)",
        ),
        (SpanMasker(context_length=2), Grid(8, 10), r"`target_length` \(10\)"),
        (TargetSpanMasker(min_run=60), Grid(1, 50), r"`min_run` \(60\)"),
        (
            MultiBlockMasker(target_scale=(1.0, 1.0)),
            SHORT,
            r"`min_context` \(0.1\).*target_scale=\(1.0, 1.0\)",
        ),
        (RandomMasker(), Grid(1, 1), "num_time=1"),
        (BlockMasker(target_share=0.01), SHORT, r"`target_share` \(0.01\)"),
        (StripeMasker(target_share=0.01), SHORT, r"`target_share` \(0.01\)"),
    ],
)
def test_invalid_grids_raise_errors_with_name_and_value(masker, grid, message, monkeypatch):
    monkeypatch.setattr("jepa_audio.steps.masking.sampling.MAX_REDRAWS", 20)
    with pytest.raises(ValueError, match=message):
        draw(masker, grid, batch_size=2)


@pytest.mark.parametrize(
    ("masker_class", "settings"),
    [
        (RandomMasker, {"target_share": 0.0}),
        (RandomMasker, {"target_share": 1.0}),
        (RandomMasker, {"target_share": float("nan")}),
        (RandomMasker, {"target_share": (0.6, 0.4)}),
        (SpanMasker, {"context_probability": 1.5}),
        (SpanMasker, {"target_probability": 0.0}),
        (SpanMasker, {"context_length": 0}),
        (SpanMasker, {"num_groups": 0}),
        (SpanMasker, {"min_context": 1.0}),
        (TargetSpanMasker, {"target_length": 0}),
        (TargetSpanMasker, {"min_run": 0}),
        (MultiBlockMasker, {"num_targets": 0}),
        (MultiBlockMasker, {"target_scale": (0.2, 0.1)}),
        (MultiBlockMasker, {"context_scale": (0.9, 1.1)}),
        (MultiBlockMasker, {"target_aspect": (0.0, 1.0)}),
        (MultiBlockMasker, {"min_context": -0.1}),
        (BlockMasker, {"target_share": 1.2}),
        (BlockMasker, {"scale": (0.0, 0.1)}),
        (BlockMasker, {"long_aspect": (5.0, 2.0)}),
        (BlockMasker, {"max_attempts": 0}),
        (StripeMasker, {"max_time_width": 0}),
        (StripeMasker, {"max_freq_width": 0}),
    ],
)
def test_invalid_settings_raise_errors_with_name_and_value(masker_class, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        masker_class(**settings)
    assert str(value) in str(error.value)
