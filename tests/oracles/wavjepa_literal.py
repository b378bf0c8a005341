"""WavJEPA's training step to the letter: all positions computed, keys masked; the slow twin of the fast path.

Written from the paper (arXiv:2509.23238) with torch's own transformer. The context encoder runs
over every token of the clip and forbids the hidden ones as keys; the predictor runs over every
position once for each target group and allows the context and that group as keys; the loss then
picks the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.training.jepa import JEPA


def torch_transformer(encoder: Transformer) -> nn.TransformerEncoder:
    """The same network with the same weights (copied) as `torch.nn.TransformerEncoder`."""
    block = encoder.blocks[0]
    assert not block.pre_norm and isinstance(block.mlp.fc1, nn.Linear)
    layer = nn.TransformerEncoderLayer(
        encoder.embed_dim,
        block.attn.num_heads,
        block.mlp.fc1.out_features,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=block.norm1.eps,
        batch_first=True,
    )
    final = nn.LayerNorm(encoder.embed_dim, eps=encoder.norm.eps)
    stack = nn.TransformerEncoder(layer, encoder.depth, norm=final, enable_nested_tensor=False)
    state = {}
    for ours, theirs in {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }.items():
        for i, own in enumerate(encoder.blocks):
            for kind in ("weight", "bias"):
                state[f"layers.{i}.{theirs}{kind}"] = own.state_dict()[ours + kind]
    stack.load_state_dict(state | {f"norm.{k}": v for k, v in encoder.norm.state_dict().items()})
    return stack


class LiteralWavJEPA(nn.Module):
    """The loss of a WavJEPA, the slow way.

    Args:
        jepa: the model whose weights are taken (the front end itself is shared).
    """

    def __init__(self, jepa: JEPA) -> None:
        super().__init__()
        self.jepa = jepa
        self.encoder = torch_transformer(jepa.encoder)
        self.target_encoder = torch_transformer(jepa.target_encoder).requires_grad_(False)
        self.trunk = torch_transformer(jepa.predictor.trunk)
        assert jepa.targets.top_k is not None

    def forward(self, waveform: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over all targets; `context` `[B, N]` and `targets` `[B, M, N]` are boolean planes."""
        jepa, predictor = self.jepa, self.jepa.predictor
        grid = jepa.front_end.grid(waveform.shape[-1])
        batch, groups, _ = targets.shape
        features = jepa.front_end(waveform) + jepa.encoder.positions.additive(
            grid, jepa.encoder.embed_dim, waveform.device
        )

        seen = predictor.proj_in(
            self.encoder(features, src_key_padding_mask=~context)
        )  # [B, N, D']
        plane = torch.where(context[..., None], seen, predictor.mask_token)
        plane = plane + predictor.trunk.positions.additive(
            grid, predictor.trunk.embed_dim, waveform.device
        )
        plane = plane[:, None].expand(-1, groups, -1, -1).flatten(0, 1)  # [B * M, N, D']
        allowed = (context[:, None] | targets).flatten(0, 1)
        prediction = predictor.proj_out(self.trunk(plane, src_key_padding_mask=~allowed)).unflatten(
            0, (batch, groups)
        )

        target = self.target(features.detach())[:, None].expand_as(prediction)
        return F.mse_loss(prediction[targets], target[targets])

    @torch.no_grad()
    def target(self, features: Tensor) -> Tensor:
        """Mean of the last blocks' outputs, each normalised over the clip as the model says."""
        axes = (1,) if self.jepa.targets.normalization == "instance" else (1, 2)
        layers, x = [], features
        for layer in self.target_encoder.layers:
            x = layer(x)
            layers.append(x)
        last = torch.stack(layers[-self.jepa.targets.top_k :])
        mean = last.mean([axis + 1 for axis in axes], keepdim=True)
        variance = last.var([axis + 1 for axis in axes], keepdim=True, unbiased=False)
        return ((last - mean) / (variance + self.jepa.targets.eps).sqrt()).mean(0)
