"""The weights of the attention of a transformer, which its fused kernel does not return."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.steps.grid import Grid, TokenSet


def attention_weights(
    transformer: Transformer,
    tokens: Float[Tensor, "B N D"],
    grid: Grid,
    layers: Collection[int],
    keep: TokenSet | None = None,
) -> Iterator[tuple[int, Float[Tensor, "B heads P P"]]]:
    """Yield the number of each block of `layers` (1 is the first) and its attention weights.

    P = number of registers + number of tokens (all, or those of `keep`); the registers are first. A
    row is a query, and its sum is 1: Attention(Q, K) = softmax(Q K^T / sqrt(d)) (Vaswani et al.,
    2017, arXiv:1706.03762, equation 1). The memory of one layer is B * heads * P^2 numbers.

    Raises:
        UserError: if there is no such block.
    """
    if unknown := sorted(set(layers) - set(range(1, transformer.depth + 1))):
        raise UserError(
            f"`layers` ({', '.join(map(str, unknown))}): the encoder has the layers 1 to "
            f"{transformer.depth}"
        )
    # A generator must not yield inside `no_grad`, which its caller would then be in.
    with torch.no_grad():
        gathered = tokens if keep is None else keep.gather(tokens)
        x, rotary, key_mask = transformer.prepare(gathered, grid, keep)
    for number, block in enumerate(transformer.blocks, start=1):
        assert isinstance(block, Block)
        with torch.no_grad():
            found = [block_weights(block, x, rotary, key_mask)] if number in layers else []
            x = block(x, rotary, key_mask)
        yield from ((number, weights) for weights in found)


def block_weights(
    block: Block,
    x: Float[Tensor, "B P D"],
    rotary: Float[Tensor, "#B 1 K H"] | None = None,
    key_mask: Bool[Tensor, "B 1 1 P"] | None = None,
) -> Float[Tensor, "B heads P P"]:
    """The attention weights of `block(x, rotary, key_mask)`, in float32."""
    attention, normed = block.attn, block.norm1(x) if block.pre_norm else x
    heads = {"three": 3, "h": attention.num_heads}
    query, key, _ = rearrange(attention.qkv(normed), "b p (three h d) -> three b h p d", **heads)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rotary is not None:
        first = attention.num_prefix_tokens
        query, key = (
            torch.cat([part[:, :, :first], apply_rot_embed_cat(part[:, :, first:], rotary)], dim=2)
            for part in (query, key)
        )
    scores = (query.float() @ key.float().mT) * attention.scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -torch.inf)
    return scores.softmax(dim=-1)
