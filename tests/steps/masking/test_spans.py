"""Span masks: the published shares and the shapes of spans."""

import pytest
import torch

from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking import SpanMasker, TargetSpanMasker
from tests.oracles import masks_literal
from tests.oracles.masks_literal import expected_span_columns

GRID = Grid(1, 200)
NUM_DRAWS = 2000


def draw(masker, grid=GRID, batch_size=NUM_DRAWS) -> Masks:
    return masker(grid, torch.arange(batch_size), seed=0, step=0)


def draw_spans(num_rows: int, num_time: int, probability: float, length: int) -> torch.Tensor:
    """Target columns of one group, without rejected rows: bool `[R, T]`."""
    settings = {"target_probability": probability, "target_length": length, "num_groups": 1}
    masker = TargetSpanMasker(**settings, min_context=0.0, min_run=1)
    return draw(masker, Grid(1, num_time), num_rows).targets.to_mask(num_time)[:, 0]


def runs(row: torch.Tensor) -> list[int]:
    """Lengths of the runs of True, from a loop."""
    lengths, current = [], 0
    for value in [*row.tolist(), False]:
        if not value and current:
            lengths.append(current)
        current = current + 1 if value else 0
    return lengths


@pytest.mark.parametrize(
    ("settings", "percent"),
    [
        ({}, 19.5),
        ({"context_length": 5}, 18.8),
        ({"context_length": 15}, 19.8),
        ({"target_length": 5}, 18.7),
        ({"target_length": 15}, 19.7),
        ({"target_probability": 0.15}, 28.2),
        ({"target_probability": 0.20}, 23.2),
        ({"target_probability": 0.30}, 16.8),
    ],
)
def test_context_share_equals_wavjepa_table_9(settings, percent):
    # A row varies by 5 percentage points, the mean of 2000 rows by 0.1; a wrong rule by 1.7.
    counts = draw(SpanMasker(**settings)).context.counts.float()
    assert counts.mean() / 2 == pytest.approx(percent, abs=0.5)


def test_wavjepa_group_share_union_share_spread_and_acceptance():
    masks = draw(SpanMasker())
    assert masks.targets.index.shape[1] == 4
    assert masks.targets.counts.float().mean() / 2 == pytest.approx(22.7, abs=0.3)
    union = masks.targets.to_mask(200).any(1).float().mean()
    assert 100 * union == pytest.approx(63.4, abs=0.6)
    low, high = torch.quantile(masks.context.counts / 2, torch.tensor([0.025, 0.975]))
    assert low == pytest.approx(11.0, abs=1.0)
    assert high == pytest.approx(29.5, abs=1.0)
    assert masks.context.counts.min() >= 20
    unfiltered = draw(SpanMasker(min_context=0.0)).context.counts
    assert (unfiltered >= 20).float().mean() == pytest.approx(0.98, abs=0.01)


@pytest.mark.parametrize("masker", [SpanMasker(), SpanMasker(context_length=15, num_groups=2)])
def test_masks_equal_those_of_a_loop_for_each_clip(masker):
    masks = masker(Grid(1, 60), torch.arange(40), seed=5, step=3)
    context, targets = masks.context.to_mask(60), masks.targets.to_mask(60)
    lengths = [(masker.target_probability, masker.target_length)] * masker.num_groups
    lengths.append((masker.context_probability, masker.context_length))
    for row in range(40):
        key = masks_literal.row_key(5, 3, row)
        columns, groups = masks_literal.spans(60, lengths, masker.num_groups, 6, key)
        assert set(context[row].nonzero()[:, 0].tolist()) == columns
        assert [set(group.nonzero()[:, 0].tolist()) for group in targets[row]] == groups


def test_rows_are_unions_of_complete_spans():
    spans = draw_spans(300, 60, 0.4, 7)
    assert all(min(runs(row)) >= 7 for row in spans)
    assert spans.any(0).all(), "spans reach both ends"


@pytest.mark.parametrize(
    ("probability", "length", "fewest", "most"), [(0.5, 1, 25, 25), (0.51, 1, 25, 26)]
)
def test_spans_are_drawn_without_replacement_in_the_expected_number(
    probability, length, fewest, most
):
    # Spans of length 1 cannot overlap, so the number of columns is the number of spans:
    # floor(25.0 + U) and floor(25.5 + U).
    counts = draw_spans(2000, 50, probability, length).sum(-1).float()
    assert (counts.min(), counts.max()) == (fewest, most)
    assert counts.mean() == pytest.approx(50 * probability, abs=0.05)


def test_starts_are_uniform_over_all_positions():
    # One span of 4 in 12 columns has 9 positions. The standard deviation of a share over 9000 rows
    # is 0.0033.
    spans = draw_spans(9000, 12, 1 / 3, 4)
    first = spans.float().argmax(-1)
    assert torch.allclose(
        torch.bincount(first, minlength=9) / 9000, torch.full((9,), 1 / 9), atol=0.015
    )


@pytest.mark.parametrize("masker", [SpanMasker(), TargetSpanMasker()])
def test_spans_cover_all_frequency_rows_and_do_not_depend_on_num_freq(masker):
    grid = Grid(4, 64)
    flat, tall = draw(masker, Grid(1, 64), 16), draw(masker, grid, 16)
    for one, many in ((flat.context, tall.context), (flat.targets, tall.targets)):
        columns = many.to_mask(grid.num_tokens).unflatten(-1, (64, 4))
        assert torch.equal(columns, one.to_mask(64)[..., None].expand_as(columns))


def test_target_spans_leave_half_as_context_without_short_runs():
    masks = draw(TargetSpanMasker(), batch_size=64)
    context, free = masks.context.to_mask(200), ~masks.targets.to_mask(200).any(1)
    assert context.sum(-1).min() >= 100
    for kept, rest in zip(context, free, strict=True):
        assert runs(kept) == [length for length in runs(rest) if length >= 5]
        assert not (kept & ~rest).any()


def test_min_run_of_one_keeps_all_runs():
    masks = draw(TargetSpanMasker(min_run=1), batch_size=16)
    assert torch.equal(masks.context.to_mask(200), ~masks.targets.to_mask(200).any(1))


@pytest.mark.parametrize(
    ("num_time", "settings"),
    [
        (200, {}),
        (200, {"target_length": 15, "num_groups": 1}),
        (12, {"target_length": 3, "context_length": 2}),
    ],
)
def test_expected_targets_equal_the_formula_if_no_row_is_rejected(num_time, settings):
    masker = SpanMasker(**settings, context_probability=0.1, min_context=0.0)
    formula = expected_span_columns(num_time, masker.target_probability, masker.target_length)
    expected = masker.expected_targets(Grid(2, num_time), seed=0, step=0)
    assert expected == pytest.approx(2 * masker.num_groups * formula, rel=0.01)
