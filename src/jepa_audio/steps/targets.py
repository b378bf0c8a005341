"""Step 4 of a JEPA: select and normalise the latents of the target encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid, TokenSet


@dataclass(frozen=True)
class Targets:
    """Computes the target latents with the target encoder.

    Args:
        view: input of the target encoder. "clip": the complete clip (WavJEPA, I-JEPA, data2vec).
            "targets": only the tokens of the target group (M2D, PupuJEPA).
        top_k: average the outputs of the last `top_k` blocks, before the final norm; `None` takes
            the last block after the final norm; 0 takes the tokens of the front end themselves,
            without a target encoder (see `target_front_end` of `JEPA`).
        normalization: normalisation of each of these outputs, without learned parameters: "none";
            "layer" over the channels of each token; "instance" over the tokens of a clip for each
            channel (data2vec); "joint_instance" over tokens and channels together (the published
            WavJEPA code).
        eps: constant that is added to the variance.
    """

    view: Literal["clip", "targets"] = "clip"
    top_k: int | None = None
    normalization: Literal["none", "layer", "instance", "joint_instance"] = "none"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"`top_k` ({self.top_k}) must be at least 0, or null")

    def width(self, encoder: Transformer, token_dim: int) -> int:
        """The width of the targets, for tokens of width `token_dim`.

        Raises:
            UserError: if the encoder is too shallow, or cannot encode tokens of this width.
        """
        if self.top_k == 0:
            return token_dim
        self.check_depth(encoder.depth)
        if token_dim != encoder.embed_dim:
            raise UserError(
                f"`target_front_end` has tokens of width {token_dim} (all frequency rows), the "
                f"target encoder needs `encoder.embed_dim` ({encoder.embed_dim}): make the widths "
                "equal, or set `targets.top_k` to 0 for targets that are the tokens themselves"
            )
        return encoder.embed_dim

    def check_depth(self, depth: int) -> None:
        """Raise `UserError` if an encoder of `depth` blocks is too shallow."""
        if self.top_k is not None and self.top_k > depth:
            raise UserError(
                f"`targets.top_k` ({self.top_k}) must not exceed `encoder.depth` ({depth}): set "
                f"`--model.targets.top_k {depth}` or a deeper encoder"
            )

    def __call__(
        self,
        encoder: Transformer,
        tokens: Float[Tensor, "B N D"],
        grid: Grid,
        where: TokenSet,
        present: TokenSet | None = None,
    ) -> Float[Tensor, "Q M L T"]:
        """Compute the latents of the target tokens `where` `[Q, M, L]` from all `tokens` of clips.

        The view "clip" encodes the tokens `present` (`None`: all tokens) once for all masks of a
        clip, see `Masks`. The view "targets" encodes each target group of each mask separately.

        Raises:
            UserError: if the encoder has fewer than `top_k` blocks.
        """
        if self.view == "clip":
            latents = self._encode(encoder, tokens, grid, present)
            by_clip = TokenSet(where.index.unflatten(0, (len(tokens), -1)))  # [B, Q / B, M, L]
            sizes = by_clip.index.shape[1:3]
            return by_clip.gather(latents[:, None, None].expand(-1, *sizes, -1, -1)).flatten(0, 1)
        valid = None if where.valid is None else where.valid.flatten(0, 1)
        keep = TokenSet(where.index.flatten(0, 1), valid, where.num_valid)
        num_groups = len(keep.index) // len(tokens)
        repeated = tokens[:, None].expand(-1, num_groups, -1, -1).flatten(0, 1)
        latents = self._encode(encoder, repeated, grid, keep)
        return latents.unflatten(0, where.index.shape[:2])

    def _encode(
        self, encoder: Transformer, tokens: Tensor, grid: Grid, keep: TokenSet | None
    ) -> Tensor:
        valid = None if keep is None else keep.valid
        if self.top_k == 0:
            return self.normalize(tokens if keep is None else keep.gather(tokens), valid)
        if self.top_k is None:
            return self.normalize(encoder(tokens, grid, keep), valid)
        self.check_depth(encoder.depth)
        layers = encoder.forward_layers(tokens, grid, keep)[-self.top_k :]
        total = self.normalize(layers[0], valid)
        for layer in layers[1:]:
            total = total + self.normalize(layer, valid)
        return total / len(layers)

    def normalize(
        self, latents: Float[Tensor, "B K D"], valid: Tensor | None
    ) -> Float[Tensor, "B K D"]:
        """Normalise the latents of one layer in float32, with statistics of the valid tokens."""
        latents = latents.float()
        if self.normalization == "none":
            return latents
        if self.normalization == "layer":
            return F.layer_norm(latents, latents.shape[-1:], eps=self.eps)
        axes = (1,) if self.normalization == "instance" else (1, 2)
        if valid is None:
            mean = latents.mean(axes, keepdim=True)
            variance = latents.var(axes, keepdim=True, unbiased=False)
        else:
            weight = valid[..., None].expand_as(latents).float()
            count = weight.sum(axes, keepdim=True)
            mean = (latents * weight).sum(axes, keepdim=True) / count
            variance = ((latents - mean).square() * weight).sum(axes, keepdim=True) / count
        return (latents - mean) * (variance + self.eps).rsqrt()
