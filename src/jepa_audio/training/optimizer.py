"""What the optimizer is given."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_audio.errors import UserError


def parameter_groups(module: nn.Module, decay_all: bool) -> list[dict[str, Any]]:
    """Groups of learned parameters, with the optimizer's own weight decay or with none.

    Args:
        module: whose parameters.
        decay_all: one group, decay for all; else norms, biases and learned tokens get none.
    """
    if decay_all:
        return [
            {"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}
        ]
    learned_tokens = [name for name, _ in module.named_parameters() if name.endswith("registers")]
    groups = param_groups_weight_decay(module, no_weight_decay_list=learned_tokens)
    del groups[1]["weight_decay"]  # the optimizer's own
    return groups


def clip_gradients(module: nn.Module, max_norm: float | None, algorithm: str | None) -> Tensor:
    """Scale the gradients down to a total norm of at most `max_norm` (`None`: leave them); the norm they had.

    Raises:
        UserError: if `algorithm` is another than "norm".
    """
    if algorithm not in (None, "norm"):
        raise UserError(f"`trainer.gradient_clip_algorithm` must be 'norm', got '{algorithm}'")
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
