"""A literal implementation of PupuJEPA's training step: the slow reference of the fast path.

Written from the papers (arXiv:2606.25713; SwiGLU: arXiv:2002.05202; rotary positions:
arXiv:2104.09864). Both encoders and the predictor process every token of the grid and mask keys:
the context encoder sees the context, the target encoder the targets, the predictor both. The loss
then selects the targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid
from jepa_audio.training.jepa import JEPA


def rotary_angles(grid: Grid, head_dim: int, max_resolution: int) -> Tensor:
    """The angle of every pair of features of a head at every token: `[N, head_dim / 2]`.

    The first half of the pairs rotates with time, the second with frequency; both axes go from -1
    to 1. The frequencies are a geometric series from half a turn to `max_resolution / 4` turns.
    """
    index = torch.arange(grid.num_tokens)
    time, freq = index // grid.num_freq, index % grid.num_freq
    octaves = math.log2(max_resolution / 2)
    turns = 0.5 * 2 ** torch.linspace(0, octaves, head_dim // 4) * 2 * math.pi
    scaled = [
        torch.linspace(-1, 1, size)[place]
        for size, place in ((grid.num_time, time), (grid.num_freq, freq))
    ]
    return torch.cat([place[:, None] * turns for place in scaled], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of neighbouring features: `x` `[B, H, N, d]`, `angles` `[N, d / 2]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class LiteralBlock(nn.Module):
    """A pre-norm block with a copy of the weights of another."""

    def __init__(self, block: nn.Module, num_heads: int) -> None:
        super().__init__()
        assert block.pre_norm
        self.num_heads = num_heads
        dim, hidden = block.mlp.fc2.weight.shape
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=block.norm1.eps) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        copies = {
            (self.norm1,): block.norm1,
            (self.norm2,): block.norm2,
            (self.query, self.key, self.value): block.attn.qkv,
            (self.out,): block.attn.proj,
            (self.gate, self.up): block.mlp.fc1,
            (self.down,): block.mlp.fc2,
        }
        for modules, source in copies.items():
            for name in ("weight", "bias"):
                parts = getattr(source, name).detach().chunk(len(modules))
                for module, part in zip(modules, parts, strict=True):
                    getattr(module, name).data = part.clone()

    def forward(self, x: Tensor, angles: Tensor, keys: Tensor) -> Tensor:
        """`x` `[B, N, D]`; no token attends to the positions at which `keys` `[B, N]` is False."""
        normed = self.norm1(x)
        query, key, value = (
            linear(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query, key = rotate(query, angles), rotate(key, angles)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class LiteralTransformer(nn.Module):
    """The blocks and the final norm of a transformer, with copies of the weights."""

    def __init__(self, encoder: Transformer, grid: Grid) -> None:
        super().__init__()
        positions = encoder.positions
        assert isinstance(positions, RotaryPositions) and positions.normalized
        assert positions.axes == "time_freq" and encoder.registers is None
        self.blocks = nn.ModuleList(LiteralBlock(b, encoder.num_heads) for b in encoder.blocks)
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=encoder.norm.eps)
        self.norm.load_state_dict(encoder.norm.state_dict())
        angles = rotary_angles(grid, encoder.head_dim, positions.max_resolution)
        self.register_buffer("angles", angles)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Encode every token, with the keys of some."""
        for block in self.blocks:
            x = block(x, self.angles, keys)
        return self.norm(x)


class LiteralPupuJEPA(nn.Module):
    """The loss of a PupuJEPA in the literal implementation, for clips of one length.

    Args:
        jepa: the model; its front end, the projections and the mask token of its predictor are
            shared, all other weights are copied.
        num_samples: length of the clips.
    """

    def __init__(self, jepa: JEPA, num_samples: int) -> None:
        super().__init__()
        grid = jepa.front_end.grid(num_samples)
        self.jepa = jepa
        self.encoder = LiteralTransformer(jepa.encoder, grid)
        self.target_encoder = LiteralTransformer(jepa.target_encoder, grid).requires_grad_(False)
        self.trunk = LiteralTransformer(jepa.predictor.trunk, grid)
        assert jepa.targets.view == "targets" and jepa.targets.top_k is None
        assert jepa.targets.normalization == "none"

    def forward(self, waveform: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over the targets; `context` `[B, N]` and `targets` `[B, 1, N]`."""
        predictor, targets = self.jepa.predictor, targets.squeeze(1)
        tokens = self.jepa.front_end(waveform)
        latents = predictor.proj_in(self.encoder(tokens, context))
        queries = torch.where(context[..., None], latents, predictor.mask_token)
        prediction = predictor.proj_out(self.trunk(queries, context | targets))
        with torch.no_grad():
            target = self.target_encoder(tokens, targets)
        return F.mse_loss(prediction[targets], target[targets])
