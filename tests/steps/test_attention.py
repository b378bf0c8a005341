"""The weights of the attention, compared with the fused attention of the blocks."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.attention import attention_weights, block_weights
from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.steps.grid import TokenSet
from tests.steps.test_transformer import DIM, GRID, VARIANTS, build


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def encoder(request: pytest.FixtureRequest) -> Transformer:
    return build(**request.param).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, GRID.num_tokens, DIM, generator=torch.Generator().manual_seed(1))


def some_tokens() -> TokenSet:
    """Rows of 10 and 7 tokens."""
    mask = torch.zeros(2, GRID.num_tokens, dtype=torch.bool)
    mask[0, ::2][:10] = mask[1, 5:12] = True
    return TokenSet.from_mask(mask)


def output_of(block: Block, x: Tensor, weights: Tensor) -> Tensor:
    """The output of the attention of a block, from its weights."""
    normed = block.norm1(x) if block.pre_norm else x
    value = block.attn.qkv(normed).chunk(3, dim=-1)[2]
    value = rearrange(value, "b p (h d) -> b h p d", h=block.attn.num_heads)
    return block.attn.proj(rearrange(weights @ value, "b h p d -> b p (h d)"))


@pytest.mark.parametrize("keep", [None, some_tokens()], ids=["all tokens", "some tokens"])
def test_weights_times_values_equal_the_attention_of_every_block(encoder, tokens, keep):
    gathered = tokens if keep is None else keep.gather(tokens)
    x, rotary, key_mask = encoder.prepare(gathered, GRID, keep)
    for block in encoder.blocks:
        weights = block_weights(block, x, rotary, key_mask)
        normed = block.norm1(x) if block.pre_norm else x
        expected = block.attn(normed, rope=rotary, attn_mask=key_mask)
        torch.testing.assert_close(output_of(block, x, weights), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        x = block(x, rotary, key_mask)


def test_weights_are_those_of_the_chosen_layers(encoder, tokens):
    x, rotary, key_mask = encoder.prepare(tokens, GRID, None)
    expected = []
    for block in encoder.blocks:
        expected.append(block_weights(block, x, rotary, key_mask))
        x = block(x, rotary, key_mask)
    found = dict(attention_weights(encoder, tokens, GRID, [3, 1]))
    assert list(found) == [1, 3]
    assert torch.equal(found[1], expected[0])
    assert torch.equal(found[3], expected[2])


def test_no_token_attends_to_padding(encoder, tokens):
    keep = some_tokens()
    num_registers = encoder.prepare(tokens, GRID, None)[0].shape[1] - GRID.num_tokens
    for _, weights in attention_weights(encoder, tokens, GRID, [1, 2, 3], keep):
        assert (weights[1, :, :, num_registers + 7 :] == 0).all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_gradients_of_the_caller_stay_on(tokens):
    for _, weights in attention_weights(build(), tokens, GRID, [1]):
        assert not weights.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("layers", [[0], [4], [1, 9]])
def test_layers_that_do_not_exist_are_refused(tokens, layers):
    with pytest.raises(UserError, match=r"`layers` .* the encoder has the layers 1 to 3"):
        list(attention_weights(build(), tokens, GRID, layers))
