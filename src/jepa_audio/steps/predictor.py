"""Step 5 of a JEPA: context latents and mask tokens → predicted latents at the targets."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid, Masks, TokenSet


class Predictor(nn.Module):
    """Predicts each group of targets from the context, on its own.

    The trunk sees the context latents and one mask token for every target of the group; nothing of
    the other groups and no other token of the grid is computed.

    Args:
        embed_dim: width D of the context encoder and of the predictions.
        trunk: the predictor's own transformer, of any width.
    """

    def __init__(self, embed_dim: int, trunk: Transformer) -> None:
        super().__init__()
        self.proj_in = nn.Linear(embed_dim, trunk.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(trunk.embed_dim))
        self.trunk = trunk
        self.proj_out = nn.Linear(trunk.embed_dim, embed_dim)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's global generator."""
        self.trunk.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)
        for linear in (self.proj_in, self.proj_out):
            if self.trunk.init == "xavier":
                nn.init.xavier_uniform_(linear.weight)
            else:
                nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self, context: Float[Tensor, "B K D"], masks: Masks, grid: Grid
    ) -> Float[Tensor, "B M T D"]:
        """Predictions at `masks.targets` from the latents at `masks.context`; filling of short rows is computed too."""
        batch, groups, num_targets = masks.targets.index.shape
        seen = self.proj_in(context)
        seen = seen[:, None].expand(-1, groups, -1, -1).flatten(0, 1)  # [B * M, K, D']
        asked = self.mask_token.expand(batch * groups, num_targets, -1)
        where = _context_then_targets(masks)
        latents = self.trunk.forward_gathered(
            torch.cat([seen, asked.to(seen.dtype)], dim=1), grid, where
        )
        return self.proj_out(latents[:, seen.shape[1] :]).unflatten(0, (batch, groups))


def _context_then_targets(masks: Masks) -> TokenSet:
    context, targets = masks.context, masks.targets
    batch, groups, num_targets = targets.index.shape
    seen = context.index[:, None].expand(-1, groups, -1)
    index = torch.cat([seen, targets.index], dim=-1).flatten(0, 1)  # [B * M, K + T]
    if context.valid is None and targets.valid is None:
        return TokenSet(index)
    full = torch.ones_like(index, dtype=torch.bool).unflatten(0, (batch, groups))
    seen_valid = (
        full[..., :-num_targets]
        if context.valid is None
        else context.valid[:, None].expand(-1, groups, -1)
    )
    asked_valid = full[..., -num_targets:] if targets.valid is None else targets.valid
    return TokenSet(index, torch.cat([seen_valid, asked_valid], dim=-1).flatten(0, 1))
