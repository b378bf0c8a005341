"""Step 5 of a JEPA: context latents and mask tokens → predicted latents at the targets."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jepa_audio.steps.encoder.transformer import Transformer, init_linear
from jepa_audio.steps.grid import Grid, Masks, TokenSet


class Predictor(nn.Module):
    """Predicts each target group separately from the context.

    For each group, the trunk processes the context latents and one mask token per target. The trunk
    does not process the other groups or any other token of the grid.

    Args:
        embed_dim: width D of the context encoder and, without `set_width`, of the predictions.
        trunk: the transformer of the predictor, of any width.
    """

    def __init__(self, embed_dim: int, trunk: Transformer) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.proj_in = nn.Linear(embed_dim, trunk.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(trunk.embed_dim))
        self.trunk = trunk
        self.proj_out = nn.Linear(trunk.embed_dim, embed_dim)
        self._init_projections()

    def set_width(self, width: int) -> None:
        """Prepare for predictions of a width W, that of the targets."""
        if width != self.proj_out.out_features:
            self.proj_out = nn.Linear(self.trunk.embed_dim, width)
            init_linear(self.proj_out, self.trunk.init)

    def reset_parameters(self) -> None:
        """Draw all initial weights again from torch's global generator."""
        self.trunk.reset_parameters()
        self._init_projections()

    def _init_projections(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)
        init_linear(self.proj_in, self.trunk.init)
        init_linear(self.proj_out, self.trunk.init)

    def forward(
        self, context: Float[Tensor, "Q K D"], masks: Masks, grid: Grid
    ) -> Float[Tensor, "Q M L W"]:
        """Predict the latents at `masks.targets` from the latents at `masks.context`.

        The predictions contain the padding of short rows, see `TokenSet.valid`.
        """
        batch, groups, num_targets = masks.targets.index.shape
        latents = self.proj_in(context)[:, None].expand(-1, groups, -1, -1).flatten(0, 1)
        queries = self.mask_token.expand(batch * groups, num_targets, -1).to(latents.dtype)
        where = _context_then_targets(masks)
        tokens = torch.cat([latents, queries], dim=1)  # [B * M, K + T, D']
        outputs = self.trunk.forward_gathered(tokens, grid, where)
        return self.proj_out(outputs[:, latents.shape[1] :]).unflatten(0, (batch, groups))


def _context_then_targets(masks: Masks) -> TokenSet:
    """The context followed by the targets of one group, for every group: `[B * M, K + T]`."""
    context, targets = masks.context, masks.targets
    num_groups = targets.index.shape[1]
    context_index = context.index[:, None].expand(-1, num_groups, -1)
    index = torch.cat([context_index, targets.index], dim=-1).flatten(0, 1)
    if context.valid is None and targets.valid is None:
        return TokenSet(index)
    context_valid = context.valid_or_true[:, None].expand(-1, num_groups, -1)
    valid = torch.cat([context_valid, targets.valid_or_true], dim=-1).flatten(0, 1)
    if context.num_valid is None or targets.num_valid is None:
        return TokenSet(index, valid)
    return TokenSet(index, valid, num_groups * context.num_valid + targets.num_valid)
