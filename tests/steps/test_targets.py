"""The targets: normalisation equals a loop, and the view "targets" ignores the context."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.targets import Targets

GRID = Grid(num_freq=2, num_time=12)
NORMALIZATIONS = ["none", "layer", "instance", "joint_instance"]
EPS = 1e-3


@pytest.fixture
def encoder() -> Transformer:
    torch.manual_seed(0)
    encoder = Transformer(8, 3, 2, RotaryPositions()).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


@pytest.fixture
def tokens(rng: torch.Generator) -> Tensor:
    return torch.randn(3, GRID.num_tokens, 8, generator=rng)


@pytest.fixture
def masks(ragged: Callable[[Grid, int, int], Masks]) -> Masks:
    return ragged(GRID, 3, 2)


def standardized(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / (variance + EPS) ** 0.5 for value in values]


def literal(clip: Tensor, normalization: str) -> Tensor:
    """The normalised tokens `[K, D]` of one clip, all valid."""
    if normalization == "none":
        return clip
    if normalization == "layer":
        return torch.tensor([standardized(token.tolist()) for token in clip])
    if normalization == "instance":
        return torch.tensor([standardized(channel.tolist()) for channel in clip.T]).T
    return torch.tensor(standardized(clip.flatten().tolist())).view_as(clip)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_normalisation_equals_a_loop_over_valid_tokens(
    normalization: str, is_ragged: bool, rng: torch.Generator
):
    latents = 3 + 2 * torch.randn(3, 9, 5, generator=rng)
    counts = [9, 4, 2] if is_ragged else [9, 9, 9]
    valid = torch.arange(9) < torch.tensor(counts)[:, None] if is_ragged else None
    normalized = Targets(normalization=normalization, eps=EPS).normalize(latents, valid)
    for clip, count in enumerate(counts):
        expected = literal(latents[clip, :count], normalization)
        torch.testing.assert_close(normalized[clip, :count], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision_is_normalised_in_float32(normalization: str, rng: torch.Generator):
    latents = torch.randn(2, 6, 4, generator=rng).bfloat16()
    targets = Targets(normalization=normalization)
    assert torch.equal(targets.normalize(latents, None), targets.normalize(latents.float(), None))


def test_view_clip_encodes_once_for_all_groups(encoder: Transformer, tokens: Tensor, masks: Masks):
    latents = encoder(tokens, GRID)
    targets = Targets("clip")(encoder, tokens, GRID, masks.targets)
    for group in range(2):
        where = TokenSet(masks.targets.index[:, group])
        torch.testing.assert_close(targets[:, group], where.gather(latents))


def test_view_targets_encodes_each_group_separately(
    encoder: Transformer, tokens: Tensor, masks: Masks
):
    targets = Targets("targets")(encoder, tokens, GRID, masks.targets)
    for clip in range(3):
        for group in range(2):
            index = masks.targets.index[clip, group, : int(masks.targets.counts[clip, group])]
            separate = encoder(tokens[clip : clip + 1], GRID, TokenSet(index[None]))[0]
            torch.testing.assert_close(
                targets[clip, group, : len(index)], separate, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_only_view_clip_depends_on_the_context(
    normalization: str, top_k: int | None, encoder: Transformer, tokens: Tensor, masks: Masks
):
    context = masks.context.to_mask(GRID.num_tokens)
    gradients = {}
    for view in ("clip", "targets"):
        seen = tokens.clone().requires_grad_()
        latents = Targets(view, top_k, normalization)(encoder, seen, GRID, masks.targets)
        latents[masks.targets.valid][:, :3].square().sum().backward()
        gradients[view] = seen.grad
    assert (gradients["clip"][context].abs().sum(-1) > 0).all()
    assert torch.equal(
        gradients["targets"][context], torch.zeros_like(gradients["targets"][context])
    )
    assert gradients["targets"][masks.targets.to_mask(GRID.num_tokens).any(1)].abs().sum() > 0


@pytest.mark.parametrize("view", ["clip", "targets"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_top_k_averages_separately_normalised_blocks(
    view: str, normalization: str, encoder: Transformer, tokens: Tensor, masks: Masks
):
    where = TokenSet(masks.targets.index[:, :1, :5])  # one full group
    targets = Targets(view, 2, normalization, eps=EPS)(encoder, tokens, GRID, where)[:, 0]
    keep = None if view == "clip" else TokenSet(where.index[:, 0])
    layers = [
        torch.stack([literal(clip, normalization) for clip in layer.detach()])
        for layer in encoder.forward_layers(tokens, GRID, keep)[-2:]
    ]
    mean = (layers[0] + layers[1]) / 2
    expected = TokenSet(where.index[:, 0]).gather(mean) if view == "clip" else mean
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-4)


def test_without_top_k_targets_are_the_last_block_after_the_final_norm(
    encoder: Transformer, tokens: Tensor, masks: Masks
):
    where = masks.targets.rows(slice(None))
    last = encoder.forward_layers(tokens, GRID)[-1]
    top_1 = Targets(top_k=1)(encoder, tokens, GRID, where)
    torch.testing.assert_close(top_1, where.gather(last[:, None].expand(-1, 2, -1, -1)))
    torch.testing.assert_close(Targets()(encoder, tokens, GRID, where), encoder.norm(top_1))


def test_top_k_above_depth_raises_an_error(encoder: Transformer, tokens: Tensor, masks: Masks):
    with pytest.raises(
        ValueError, match=r"`targets.top_k` \(4\) must not exceed `encoder.depth` \(3\)"
    ):
        Targets(top_k=4)(encoder, tokens, GRID, masks.targets)


def test_top_k_of_zero_takes_the_tokens_that_would_be_encoded(
    encoder: Transformer, tokens: Tensor, masks: Masks
):
    for view, normalization in (("clip", "layer"), ("targets", "instance")):
        targets = Targets(view, top_k=0, normalization=normalization)
        found = targets(encoder, tokens, GRID, masks.targets)
        chosen = masks.targets.gather(tokens[:, None].expand(-1, 2, -1, -1))
        for clip, group in [(0, 0), (1, 1), (2, 0)]:
            count = int(masks.targets.counts[clip, group])
            values = chosen[clip, group, :count]
            expected = targets.normalize(values[None], None)[0]
            torch.testing.assert_close(found[clip, group, :count], expected)


def test_a_negative_top_k_is_refused():
    with pytest.raises(ValueError, match=r"`top_k` \(-1\) must be at least 0, or null"):
        Targets(top_k=-1)
