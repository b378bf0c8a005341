"""A literal implementation of WavJEPA's training step: the slow reference of the fast path.

Written from the paper (arXiv:2509.23238) with torch's transformer. The context encoder processes
every token of the clip and masks the keys of hidden tokens. The predictor processes every position
once per target group; its keys are the context and that group. The loss then selects the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.training.jepa import JEPA


def torch_transformer(encoder: Transformer) -> nn.TransformerEncoder:
    """The same network as a `torch.nn.TransformerEncoder`, with a copy of the weights."""
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
    for name, torch_name in {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }.items():
        for i, source in enumerate(encoder.blocks):
            for kind in ("weight", "bias"):
                state[f"layers.{i}.{torch_name}{kind}"] = source.state_dict()[name + kind]
    stack.load_state_dict(state | {f"norm.{k}": v for k, v in encoder.norm.state_dict().items()})
    return stack


class LiteralWavJEPA(nn.Module):
    """The loss of a WavJEPA in the literal implementation.

    Args:
        jepa: the model; its front end is shared, all other weights are copied.
    """

    def __init__(self, jepa: JEPA) -> None:
        super().__init__()
        self.jepa = jepa
        self.encoder = torch_transformer(jepa.encoder)
        self.target_encoder = torch_transformer(jepa.target_encoder).requires_grad_(False)
        self.trunk = torch_transformer(jepa.predictor.trunk)
        assert jepa.targets.top_k is not None

    def forward(self, waveform: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error over the targets; `context` `[B, N]` and `targets` `[B, M, N]`."""
        jepa, predictor = self.jepa, self.jepa.predictor
        grid = jepa.front_end.grid(waveform.shape[-1])
        batch, groups, _ = targets.shape
        features = jepa.front_end(waveform) + jepa.encoder.positions.additive(
            grid, jepa.encoder.embed_dim, waveform.device
        )

        latents = self.encoder(features, src_key_padding_mask=~context)
        # [B, N, D']
        tokens = torch.where(context[..., None], predictor.proj_in(latents), predictor.mask_token)
        tokens = tokens + predictor.trunk.positions.additive(
            grid, predictor.trunk.embed_dim, waveform.device
        )
        tokens = tokens[:, None].expand(-1, groups, -1, -1).flatten(0, 1)  # [B * M, N, D']
        keys = (context[:, None] | targets).flatten(0, 1)
        latents = self.trunk(tokens, src_key_padding_mask=~keys)
        prediction = predictor.proj_out(latents).unflatten(0, (batch, groups))

        target = self.target(features.detach())[:, None].expand_as(prediction)
        return F.mse_loss(prediction[targets], target[targets])

    @torch.no_grad()
    def target(self, features: Tensor) -> Tensor:
        """Mean of the outputs of the last blocks, each normalised over the clip."""
        axes = (1,) if self.jepa.targets.normalization == "instance" else (1, 2)
        layers, x = [], features
        for layer in self.target_encoder.layers:
            x = layer(x)
            layers.append(x)
        last = torch.stack(layers[-self.jepa.targets.top_k :])
        mean = last.mean([axis + 1 for axis in axes], keepdim=True)
        variance = last.var([axis + 1 for axis in axes], keepdim=True, unbiased=False)
        return ((last - mean) / (variance + self.jepa.targets.eps).sqrt()).mean(0)
