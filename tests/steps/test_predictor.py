"""The predictor: groups are independent, and only context and targets are computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jepa_audio.steps.encoder.positions import RotaryPositions, SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.predictor import Predictor

GRID = Grid(num_freq=2, num_time=20)
TRUNKS = {
    "post-norm": {"norm": "post", "positions": SinCosPositions()},
    "rotary swiglu": {"mlp": "swiglu", "positions": RotaryPositions(), "num_registers": 2},
}


@pytest.fixture(params=TRUNKS.values(), ids=TRUNKS.keys())
def predictor(request: pytest.FixtureRequest) -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(16, Transformer(8, 2, 2, **request.param))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return predictor


@pytest.fixture
def masks(ragged: Callable[[Grid, int, int], Masks]) -> Masks:
    return ragged(GRID, 3, 2)


@pytest.fixture
def context(masks: Masks, rng: torch.Generator) -> Tensor:
    return torch.randn(*masks.context.index.shape, 16, generator=rng)


def literal(predictor: Predictor, context: Tensor, masks: Masks, clip: int, group: int) -> Tensor:
    """Predictions from all N positions: mask tokens outside the context, other keys masked."""
    seen = masks.context.index[clip, : int(masks.context.counts[clip])]
    target_index = masks.targets.index[clip, group, : int(masks.targets.counts[clip, group])]
    tokens = predictor.mask_token.repeat(GRID.num_tokens, 1)
    tokens[seen] = predictor.proj_in(context[clip, : len(seen)])
    keys = torch.zeros(1, GRID.num_tokens, dtype=torch.bool)
    keys[0, seen] = keys[0, target_index] = True
    latents = predictor.trunk(
        tokens[None], GRID, TokenSet(torch.arange(GRID.num_tokens)[None], keys)
    )
    return predictor.proj_out(latents)[0, target_index]


def test_prediction_equals_full_grid_with_key_mask(
    predictor: Predictor, context: Tensor, masks: Masks
):
    prediction = predictor(context, masks, GRID)
    assert prediction.shape == (*masks.targets.index.shape, 16)
    for clip in range(3):
        for group in range(2):
            expected = literal(predictor, context, masks, clip, group)
            torch.testing.assert_close(
                prediction[clip, group, : len(expected)], expected, rtol=1e-5, atol=1e-5
            )


def test_groups_are_predicted_independently(predictor: Predictor, context: Tensor, masks: Masks):
    before = predictor(context, masks, GRID)
    index, valid = masks.targets.index.clone(), masks.targets.valid.clone()
    index[:, 1] = index[:, 1].flip(-1)
    valid[:, 1] = True
    after = predictor(
        context, Masks(masks.context, TokenSet(index, valid), masks.targets_per_clip), GRID
    )
    first = masks.targets.valid[:, 0]
    torch.testing.assert_close(after[:, 0][first], before[:, 0][first], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1e-3)


def test_padded_row_of_a_batch_equals_row_encoded_separately(
    predictor: Predictor, context: Tensor, masks: Masks
):
    batched = predictor(context, masks, GRID)
    for clip in range(3):
        num_seen = int(masks.context.counts[clip])
        for group in range(2):
            num_targets = int(masks.targets.counts[clip, group])
            single_masks = Masks(
                TokenSet(masks.context.index[clip : clip + 1, :num_seen]),
                TokenSet(masks.targets.index[clip : clip + 1, group : group + 1, :num_targets]),
                1.0,
            )
            separate = predictor(context[clip : clip + 1, :num_seen], single_masks, GRID)
            torch.testing.assert_close(
                batched[clip, group, :num_targets], separate[0, 0], rtol=1e-5, atol=1e-5
            )


def test_only_valid_context_has_a_gradient(predictor: Predictor, context: Tensor, masks: Masks):
    context.requires_grad_()
    predictor(context, masks, GRID)[masks.targets.valid].square().sum().backward()
    valid = masks.context.valid
    assert torch.equal(context.grad[~valid], torch.zeros_like(context.grad[~valid]))
    assert (context.grad[valid].abs().sum(-1) > 0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in predictor.parameters())


def test_predictions_depend_on_the_target_position(
    predictor: Predictor, context: Tensor, masks: Masks
):
    prediction = predictor(context, masks, GRID)
    assert (prediction[:, :, 0] - prediction[:, :, 1]).abs().amax(-1).min() > 1e-3


def test_reset_parameters_changes_all_weights_and_depends_only_on_the_seed(
    predictor: Predictor,
):
    changed = {name: value.clone() for name, value in predictor.state_dict().items()}
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        predictor.reset_parameters()
        states.append({name: value.clone() for name, value in predictor.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert not torch.equal(value, changed[name]), name
