"""Steps 3 and 4 of a JEPA: the transformer that is context encoder, target encoder and trunk of the predictor."""

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
from jepa_audio.steps.encoder.positions import Positions
from jepa_audio.steps.grid import Grid, TokenSet


class Block(nn.Module):
    """Self-attention and an MLP, each with a residual path, normalised before (pre) or after (post) it.

    Args:
        dim: width D.
        num_heads: attention heads.
        mlp_ratio: hidden width over D; a SwiGLU has two branches of that width.
        mlp: "gelu" or "swiglu" (Shazeer, 2020, arXiv:2002.05202).
        norm: "pre" (ViT) or "post" (the original transformer, WavJEPA).
        norm_eps: epsilon of the layer norms.
        qk_norm: layer norm on queries and keys of each head.
        layer_scale: start value of a learned scale of each branch (Touvron et al., 2021); `None`
            for none.
        drop_path: chance that a clip skips a branch while training.
        num_prefix: tokens at the front that no rotation touches.
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
        self.mlp: nn.Module = (
            Mlp(dim, hidden)
            if mlp == "gelu"
            else GluMlp(
                dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False
            )  # the gate comes first, as in timm's EVA
        )
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "B K D"],
        rotary: Float[Tensor, "#B 1 P H"] | None,
        key_mask: Bool[Tensor, "B 1 1 K"] | None,
    ) -> Float[Tensor, "B K D"]:
        """Tokens after the block; keys where `key_mask` is False are attended by nobody."""
        if self.pre_norm:
            x = x + self.drop_path(
                self.scale1(self.attn(self.norm1(x), rope=rotary, attn_mask=key_mask))
            )
            return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
        x = self.norm1(
            x + self.drop_path(self.scale1(self.attn(x, rope=rotary, attn_mask=key_mask)))
        )
        return self.norm2(x + self.drop_path(self.scale2(self.mlp(x))))


class Transformer(nn.Module):
    """A transformer over some tokens of a grid: only the tokens asked for are ever computed.

    Args:
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide `embed_dim`.
        positions: how tokens learn where they lie.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        mlp: "gelu" or "swiglu".
        norm: "pre" or "post".
        norm_eps: epsilon of the blocks' layer norms.
        final_norm_eps: epsilon of the norm after the last block; `None` for `norm_eps`.
        qk_norm: normalise queries and keys.
        layer_scale: start value of the learned branch scales, `None` for none.
        drop_path: chance of skipping a branch at the last block; rises linearly from 0 at the
            first.
        num_registers: learned tokens beside the grid (Darcet et al., 2023, arXiv:2309.16588),
            dropped from the output.
        checkpoint_every: recompute every k-th block in the backward pass to save memory; 0 for
            never.
        init: "trunc_normal" (std 0.02, ViT) or "xavier" (uniform; MAE, PupuJEPA) for the linear
            weights.
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
        for name, value, allowed in (
            ("mlp", mlp, ("gelu", "swiglu")),
            ("norm", norm, ("pre", "post")),
        ):
            if value not in allowed:
                raise UserError(f"`{name}` ({value!r}) must be one of {allowed}")
        if num_heads < 1 or embed_dim % num_heads:
            raise UserError(f"`num_heads` ({num_heads}) must divide `embed_dim` ({embed_dim})")
        if depth < 1 or checkpoint_every < 0 or not 0 <= drop_path < 1:
            raise UserError(
                f"`depth` ({depth}) must be at least 1, `checkpoint_every` ({checkpoint_every}) at least 0 and "
                f"`drop_path` ({drop_path}) in [0, 1)"
            )
        positions.check_width(embed_dim, num_heads)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.positions = positions
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
        self.norm = nn.LayerNorm(
            embed_dim, eps=norm_eps if final_norm_eps is None else final_norm_eps
        )
        self.reset_parameters()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.init == "xavier":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | LayerScale):
                module.reset_parameters()
        if self.registers is not None:
            nn.init.trunc_normal_(self.registers, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "B N D"], grid: Grid, keep: TokenSet | None = None
    ) -> Float[Tensor, "B K D"]:
        """Latents after the last block and the final norm, of the tokens in `keep` (all, if `None`)."""
        return self.forward_gathered(tokens if keep is None else keep.gather(tokens), grid, keep)

    def forward_gathered(
        self, tokens: Float[Tensor, "B K D"], grid: Grid, where: TokenSet | None
    ) -> Float[Tensor, "B K D"]:
        """As `forward`, for tokens already picked: `tokens[:, k]` lies at `where.index[:, k]`."""
        x = tokens
        for x in self._blocks(tokens, grid, where):  # noqa: B007 (the last one is wanted)
            pass
        return self.norm(x)

    def forward_layers(
        self, tokens: Float[Tensor, "B N D"], grid: Grid, keep: TokenSet | None = None
    ) -> list[Float[Tensor, "B K D"]]:
        """The output of every block, before the final norm."""
        return list(self._blocks(tokens if keep is None else keep.gather(tokens), grid, keep))

    def add_positions(
        self, tokens: Float[Tensor, "B K D"], grid: Grid, where: TokenSet | None = None
    ) -> Float[Tensor, "B K D"]:
        """What enters the first block: tokens with their additive positions, if there are any."""
        table = self.positions.additive(grid, self.embed_dim, tokens.device)
        if table is None:
            return tokens
        return tokens + (table if where is None else table[where.index])

    def _blocks(self, tokens: Tensor, grid: Grid, where: TokenSet | None) -> Iterator[Tensor]:
        x = self.add_positions(tokens, grid, where)
        rotary = self.positions.rotary(grid, self.head_dim, x.device)
        if rotary is not None:
            rotary = (rotary[None] if where is None else rotary[where.index])[
                :, None
            ]  # [B or 1, 1, K, 2 * head_dim]
        key_mask = (
            None if where is None or where.valid is None else where.valid[:, None, None]
        )  # [B, 1, 1, K]
        num_prefix = 0
        if self.registers is not None:
            num_prefix = len(self.registers)
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
            if key_mask is not None:
                key_mask = nn.functional.pad(key_mask, (num_prefix, 0), value=True)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_every and torch.is_grad_enabled() and i % self.checkpoint_every == 0:
                x = checkpoint(block, x, rotary, key_mask, use_reentrant=False)
            else:
                x = block(x, rotary, key_mask)
            yield x[:, num_prefix:]
