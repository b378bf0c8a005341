"""Rows of unequal length as one sequence without padding, for the attention kernels of a GPU.

A key mask excludes the padding from attention, but also the fast kernels (flash attention), and the
linear layers still compute it. Packed rows have no padding; `torch.nn.attention.varlen` attends
within each row.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from timm.layers import AttentionRope, apply_rot_embed_cat
from torch import Tensor
from torch.nn import functional as F

# The precisions of the kernel.
_DTYPES = (torch.bfloat16, torch.float16)
# Lengths of the rows of the check of the kernel, and the largest difference that it accepts, as a
# share of the largest value: twice the rounding of bfloat16, which has 8 bits.
_CHECKED_LENGTHS, _TOLERANCE = (1, 40, 129, 200), 2e-2


class PackedRows(NamedTuple):
    """The place of each token of rows `[R, P]` in a packed sequence of S tokens.

    Attributes:
        place: its place in the flattened rows.
        row: its row.
        ends: the first packed token of each row, and the end of the last row.
        longest: no row has more tokens.
    """

    place: Int[Tensor, " S"]
    row: Int[Tensor, " S"]
    ends: Int32[Tensor, " R1"]
    longest: int

    @staticmethod
    def of(valid: Bool[Tensor, "R P"], num_valid: int) -> PackedRows:
        """The `num_valid` tokens at which `valid` is True; the host does not wait for a GPU."""
        place = torch.nonzero_static(valid.flatten(), size=num_valid)[:, 0]
        ends = F.pad(valid.sum(dim=1).cumsum(dim=0), (1, 0)).int()
        return PackedRows(place, place // valid.shape[1], ends, valid.shape[1])

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return len(self.ends) - 1

    def pack(self, tokens: Float[Tensor, "R P D"]) -> Float[Tensor, "S D"]:
        """The tokens without padding."""
        return tokens.flatten(0, 1).index_select(0, self.place)

    def unpack(self, packed: Float[Tensor, "S D"]) -> Float[Tensor, "R P D"]:
        """The tokens in their rows, with zeros as padding."""
        rows = packed.new_zeros(self.num_rows * self.longest, packed.shape[-1])
        return rows.index_copy(0, self.place, packed).unflatten(0, (self.num_rows, self.longest))

    def pack_rotary(
        self, rotary: Float[Tensor, "#R 1 K H"], num_prefix: int
    ) -> Float[Tensor, "S 1 H"]:
        """The rotation of each packed token; the first `num_prefix` tokens of a row have none."""
        rotary = rotary[:, 0].expand(self.num_rows, -1, -1)
        sin, cos = F.pad(rotary, (0, 0, num_prefix, 0)).chunk(2, dim=-1)
        if num_prefix:
            cos = torch.cat([torch.ones_like(cos[:, :num_prefix]), cos[:, num_prefix:]], dim=1)
        return self.pack(torch.cat([sin, cos], dim=-1))[:, None]


def can_pack(tokens: Tensor, head_dim: int) -> bool:
    """Whether packed rows can be used for tokens, in the precision of autocast.

    They need a GPU, half precision, and a kernel whose results equal those of separate rows; a line
    is logged if they do not.
    """
    device = tokens.device
    is_cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_cast else tokens.dtype
    return device.type == "cuda" and dtype in _DTYPES and _kernel_works(device, dtype, head_dim)


def attend(
    attention: AttentionRope,
    tokens: Float[Tensor, "S D"],
    rotary: Float[Tensor, "S 1 H"] | None,
    rows: PackedRows,
) -> Float[Tensor, "S D"]:
    """The attention layer for packed rows: each token attends to the tokens of its row."""
    heads = attention.num_heads
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, heads, -1)).unbind(dim=1)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rotary is not None:
        query, key = (apply_rot_embed_cat(part, rotary) for part in (query, key))
    # cuDNN, which torch takes for long rows on some GPUs, needs contiguous tensors.
    query, key, value = (part.type_as(value).contiguous() for part in (query, key, value))
    return attention.proj(attend_rows(query, key, value, rows.ends, rows.longest).flatten(1))


def attend_rows(
    query: Float[Tensor, "S heads d"],
    key: Float[Tensor, "S heads d"],
    value: Float[Tensor, "S heads d"],
    ends: Int32[Tensor, " R1"],
    longest: int,
) -> Float[Tensor, "S heads d"]:
    """softmax(Q K^T / sqrt(d)) V within each row, by the kernel for rows of unequal length."""
    # `_kernel_works` has imported it.
    varlen = torch.nn.attention.varlen  # type: ignore[attr-defined]
    return varlen.varlen_attn(query, key, value, ends, ends, longest, longest)


# The only wait for the device, once in a process.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.enable_grad()
def _kernel_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether outputs and gradients of the kernel equal those of separate rows."""
    generator = torch.Generator(device).manual_seed(0)
    size = (sum(_CHECKED_LENGTHS), 2, head_dim)
    parts = torch.randn(3, *size, generator=generator, device=device).to(dtype).requires_grad_()
    ends = F.pad(torch.tensor(_CHECKED_LENGTHS).cumsum(0), (1, 0)).int().to(device)
    try:
        # No import at the top: the file of `export hf` has this code, and runs on older torch.
        import_module("torch.nn.attention.varlen")
        query, key, value = parts.unbind()
        packed = attend_rows(query, key, value, ends, 2 * max(_CHECKED_LENGTHS))
        rows = [row.transpose(1, 2) for row in parts.split(_CHECKED_LENGTHS, dim=1)]
        outputs = [F.scaled_dot_product_attention(*row.unbind()) for row in rows]
        separate = torch.cat([output.transpose(0, 1) for output in outputs])
        pairs = [(packed, separate)]
        pairs += zip(*(torch.autograd.grad(x.sin().sum(), parts) for x in pairs[0]), strict=True)
        works = all(
            bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp_min(1)) for a, b in pairs
        )
        problem = "its results differ from those of separate rows"
    except (RuntimeError, ImportError) as error:
        works, problem = False, str(error).partition("\n")[0]
    if not works:
        message = "rows of unequal length are masked, not packed: %s"
        logging.getLogger(__name__).warning(message, problem)
    return works
