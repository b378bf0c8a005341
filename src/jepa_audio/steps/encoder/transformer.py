"""Steps 3 to 5 of a JEPA: the transformer of the context encoder, target encoder and predictor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from timm.layers import AttentionRope, DropPath, GluMlp, LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.packing import PackedRows, attend, can_pack
from jepa_audio.steps.encoder.positions import Positions
from jepa_audio.steps.grid import Grid, TokenSet

# Larger networks fit into no machine.
MAX_WIDTH = 65_536
MAX_DEPTH = 1000


class Block(nn.Module):
    """A transformer block: self-attention and an MLP, each with a residual connection.

    The norm is before each branch ("pre") or after each residual addition ("post"). See
    `Transformer` for the other arguments.

    Args:
        drop_path: probability that a clip skips a branch of this block in training.
        num_prefix: number of registers before the other tokens; they have no rotary position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        mlp: Literal["gelu", "swiglu"],
        norm: Literal["pre", "post"],
        norm_eps: float,
        qk_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        num_prefix: int,
    ) -> None:
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        self.pre_norm = norm == "pre"
        self.norm1 = norm_layer(dim)
        self.attn = AttentionRope(
            dim,
            num_heads,
            num_prefix_tokens=num_prefix,
            qk_norm=qk_norm,
            norm_layer=norm_layer if qk_norm else None,  # type: ignore[arg-type]
        )
        self.norm2 = norm_layer(dim)
        self.mlp: nn.Module
        if mlp == "gelu":
            self.mlp = Mlp(dim, hidden)
        else:  # the gate is the first branch, as in timm's EVA
            self.mlp = GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "*B K D"],
        rotary: Float[Tensor, "... H"] | None,
        key_mask: Bool[Tensor, "*B 1 1 K"] | None,
        rows: PackedRows | None = None,
    ) -> Float[Tensor, "*B K D"]:
        """Apply the block; no token attends to the keys at which `key_mask` is False.

        `rotary` `[B or 1, 1, P, H]` has P = K - `num_prefix` positions with H = 2 * head_dim
        values each. With `rows`, `x` are the K tokens of packed rows, and `rotary` is `[K, 1, H]`.
        """
        if rows is None:
            attention = partial(self.attn, rope=rotary, attn_mask=key_mask)
        else:
            attention = partial(attend, self.attn, rotary=rotary, rows=rows)
        if self.pre_norm:
            x = x + self._drop(self.scale1(attention(self.norm1(x))), rows)
            return x + self._drop(self.scale2(self.mlp(self.norm2(x))), rows)
        x = self.norm1(x + self._drop(self.scale1(attention(x)), rows))
        return self.norm2(x + self._drop(self.scale2(self.mlp(x)), rows))

    def _drop(self, branch: Tensor, rows: PackedRows | None) -> Tensor:
        """Skip the branch for random clips; packed or not, the same random numbers are drawn."""
        if rows is None:
            return self.drop_path(branch)
        if not (self.training and self.drop_path.drop_prob):
            return branch
        return branch * self.drop_path(branch.new_ones(len(rows.ends) - 1, 1))[rows.row]


class Transformer(nn.Module):
    """A transformer that computes only the selected tokens of a grid.

    Args:
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        positions: position encoding.
        mlp_ratio: hidden width of the MLP divided by D; a SwiGLU has two branches of that width.
        mlp: "gelu" or "swiglu" (Shazeer, 2020, arXiv:2002.05202).
        norm: "pre" (ViT) or "post" (the original transformer, WavJEPA).
        norm_eps: epsilon of the layer norms in the blocks.
        final_norm_eps: epsilon of the norm after the last block; `None` for `norm_eps`.
        qk_norm: apply layer norm to the queries and keys of each head.
        layer_scale: initial value of the learned scale of each branch (Touvron et al., 2021);
            `None` for no scale.
        drop_path: probability that a clip skips a branch of the last block in training. The
            probability rises linearly over the blocks, from 0 in the first block.
        num_registers: additional learned tokens (Darcet et al., 2023, arXiv:2309.16588); the output
            does not contain them.
        checkpoint_every: recompute every k-th block in the backward pass to save memory; 0 for no
            recomputation.
        init: initialisation of the linear weights: "trunc_normal" (std 0.02, ViT) or "xavier"
            (uniform; MAE, PupuJEPA).
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        positions: Positions,
        mlp_ratio: float = 4.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        norm: Literal["pre", "post"] = "pre",
        norm_eps: float = 1e-6,
        final_norm_eps: float | None = None,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        num_registers: int = 0,
        checkpoint_every: int = 0,
        init: Literal["trunc_normal", "xavier"] = "trunc_normal",
    ) -> None:
        super().__init__()
        _check_settings(
            embed_dim, depth, num_heads, mlp_ratio, mlp, norm, drop_path, num_registers,
            checkpoint_every,
        )  # fmt: skip
        positions.check_width(embed_dim, num_heads)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.positions = positions
        # `JEPA` sets it: rows of unequal length are packed where a kernel for them exists.
        self.packs = False
        self.checkpoint_every = checkpoint_every
        self.init = init
        self.registers = (
            nn.Parameter(torch.empty(num_registers, embed_dim)) if num_registers else None
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                mlp,
                norm,
                norm_eps,
                qk_norm,
                layer_scale,
                drop_path=drop_path * i / max(depth - 1, 1),
                num_prefix=num_registers,
            )
            for i in range(depth)
        )
        final_norm_eps = norm_eps if final_norm_eps is None else final_norm_eps
        self.norm = nn.LayerNorm(embed_dim, eps=final_norm_eps)
        self.reset_parameters()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def reset_parameters(self) -> None:
        """Draw all initial weights again from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.init)
            elif isinstance(module, nn.LayerNorm | LayerScale):
                module.reset_parameters()
        if self.registers is not None:
            nn.init.trunc_normal_(self.registers, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "B N D"], grid: Grid, keep: TokenSet | None = None
    ) -> Float[Tensor, "B K D"]:
        """Encode the tokens in `keep` (`None`: all tokens): latents after the final norm."""
        return self.forward_gathered(tokens if keep is None else keep.gather(tokens), grid, keep)

    def forward_gathered(
        self, tokens: Float[Tensor, "B K D"], grid: Grid, where: TokenSet | None
    ) -> Float[Tensor, "B K D"]:
        """As `forward`, for gathered tokens: token `k` has the grid index `where.index[:, k]`."""
        (latents,) = self._run_blocks(tokens, grid, where, first=self.depth - 1)
        return self.norm(latents)

    def forward_layers(
        self, tokens: Float[Tensor, "B N D"], grid: Grid, keep: TokenSet | None = None
    ) -> list[Float[Tensor, "B K D"]]:
        """The output of every block, before the final norm."""
        return list(self._run_blocks(tokens if keep is None else keep.gather(tokens), grid, keep))

    def add_positions(
        self, tokens: Float[Tensor, "B K D"], grid: Grid, where: TokenSet | None = None
    ) -> Float[Tensor, "B K D"]:
        """Add the additive position encoding, if there is one, to the input of the first block."""
        table = self.positions.additive(grid, self.embed_dim, tokens.device)
        if table is None:
            return tokens
        # An exported model can have half precision.
        table = table.to(self.norm.weight.dtype)
        return tokens + (table if where is None else table[where.index])

    def prepare(
        self, tokens: Tensor, grid: Grid, where: TokenSet | None
    ) -> tuple[Float[Tensor, "B P D"], Tensor | None, Bool[Tensor, "B 1 1 P"] | None]:
        """The input of the first block, with the registers first, and the other two of `Block`."""
        x = self.add_positions(tokens, grid, where)
        rotary = self.positions.rotary(grid, self.head_dim, x.device)
        if rotary is not None:  # [N, 2 * head_dim] -> [B or 1, 1, K, 2 * head_dim]
            rotary = (rotary[None] if where is None else rotary[where.index])[:, None]
        key_mask = None
        if where is not None and where.valid is not None:
            key_mask = where.valid[:, None, None]  # [B, 1, 1, K]
        if self.registers is not None:
            # `len(x)` would fix the number of clips of an exported program.
            x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)
            if key_mask is not None:
                key_mask = nn.functional.pad(key_mask, (len(self.registers), 0), value=True)
        return x, rotary, key_mask

    def _run_blocks(
        self, tokens: Tensor, grid: Grid, where: TokenSet | None, first: int = 0
    ) -> Iterator[Tensor]:
        """Yield the output of each block from the index `first` on, without the registers."""
        x, rotary, key_mask = self.prepare(tokens, grid, where)
        num_prefix = 0 if self.registers is None else len(self.registers)
        rows = self._packed_rows(x, where, key_mask)
        if rows is not None:
            x, key_mask = rows.pack(x), None
            rotary = None if rotary is None else rows.pack_rotary(rotary, num_prefix)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_every and torch.is_grad_enabled() and i % self.checkpoint_every == 0:
                x = checkpoint(block, x, rotary, key_mask, rows, use_reentrant=False)
            else:
                x = block(x, rotary, key_mask, rows)
            if i >= first:
                yield (x if rows is None else rows.unpack(x))[:, num_prefix:]

    def _packed_rows(
        self, x: Tensor, where: TokenSet | None, key_mask: Tensor | None
    ) -> PackedRows | None:
        """The places of the tokens in packed rows; `None` if the rows are not packed."""
        if not self.packs or key_mask is None or where is None or where.num_valid is None:
            return None
        if not can_pack(x, self.head_dim):
            return None
        num_registers = x.shape[1] - where.index.shape[1]
        return PackedRows.of(key_mask[:, 0, 0], where.num_valid + len(x) * num_registers)


def _check_settings(
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    mlp: str,
    norm: str,
    drop_path: float,
    num_registers: int,
    checkpoint_every: int,
) -> None:
    """Raise `UserError` if a setting of a `Transformer` is out of range."""
    if mlp not in {"gelu", "swiglu"}:
        raise UserError(f"`mlp` ({mlp!r}) must be 'gelu' or 'swiglu'")
    if norm not in {"pre", "post"}:
        raise UserError(f"`norm` ({norm!r}) must be 'pre' or 'post'")
    if num_heads < 1 or embed_dim % num_heads:
        raise UserError(f"`num_heads` ({num_heads}) must divide `embed_dim` ({embed_dim})")
    if embed_dim > MAX_WIDTH or not 0 < mlp_ratio <= 100 or not 0 <= num_registers <= 10_000:
        raise UserError(
            f"`embed_dim` ({embed_dim}) must be at most {MAX_WIDTH}, `mlp_ratio` ({mlp_ratio}) "
            f"in (0, 100] and `num_registers` ({num_registers}) in [0, 10000]"
        )
    if not 1 <= depth <= MAX_DEPTH or checkpoint_every < 0 or not 0 <= drop_path < 1:
        raise UserError(
            f"`depth` ({depth}) must be in [1, {MAX_DEPTH}], `checkpoint_every` "
            f"({checkpoint_every}) at least 0 and `drop_path` ({drop_path}) in [0, 1)"
        )


def init_linear(linear: nn.Linear, init: str) -> None:
    """Initialise a linear layer by the method `init`, see `Transformer`; the bias is 0."""
    if init == "xavier":
        nn.init.xavier_uniform_(linear.weight)
    else:
        nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
