"""What is trained: the head alone, the whole encoder, its last blocks, or low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from jepa_audio.errors import UserError, did_you_mean
from jepa_audio.probing.finetuning.network import Backbone, ClipNetwork

MODES = ("head", "full", "last_N", "lora")
LAYER_DECAY, LORA_RANK = 0.75, 8
# All linear layers of the blocks.
_LORA_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@dataclass(frozen=True)
class Tuning:
    """What is trained, and how.

    Args:
        mode: "head", "full", "last_N" (for example "last_4") or "lora".
        layer_decay: factor on the learning rate from each layer to the one before it, in (0, 1];
            `None` for `LAYER_DECAY`. Modes full and last_N.
        lora_rank: rank of the adapters; `None` for `LORA_RANK`. Mode lora.

    Raises:
        UserError: for an unknown mode, or a setting that the mode does not use.
    """

    mode: str
    layer_decay: float | None = None
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"head|full|lora|last_[1-9]\d{0,3}", self.mode):
            known = (*MODES[:2], "last_2", MODES[3])
            raise UserError(
                f"`mode` ({self.mode!r}) must be one of {', '.join(MODES)}, with a number of "
                f"blocks for N, as in last_2{did_you_mean(self.mode, known)}"
            )
        trains_blocks = self.mode == "full" or self.num_blocks is not None
        if self.layer_decay is not None and not (trains_blocks and 0 < self.layer_decay <= 1):
            raise UserError(
                f"`model.layer_decay` ({self.layer_decay}) must be in (0, 1], and only the modes "
                f"full and last_N use it; the mode is {self.mode}"
            )
        if self.lora_rank is not None and (self.mode != "lora" or self.lora_rank < 1):
            raise UserError(
                f"`model.lora_rank` ({self.lora_rank}) must be at least 1, and only the mode lora "
                f"uses it; the mode is {self.mode}"
            )

    @property
    def num_blocks(self) -> int | None:
        """Number of blocks that are trained in the mode last_N."""
        return int(self.mode.removeprefix("last_")) if self.mode.startswith("last_") else None

    def apply(self, backbone: Backbone, seed: int) -> None:
        """Freeze the parameters that are not trained; add adapters drawn from `seed`.

        Raises:
            UserError: if the encoder has fewer blocks than the mode trains, or peft is missing.
        """
        depth = backbone.encoder.depth
        if self.mode == "lora":
            backbone.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                _lora_model(backbone, self.lora_rank or LORA_RANK)
        elif self.mode != "full":
            backbone.requires_grad_(False)
        if self.num_blocks is not None:
            if self.num_blocks > depth:
                raise UserError(
                    f"`mode` is {self.mode}, but the encoder has {depth} blocks: use full to train "
                    "all of them and the front end"
                )
            backbone.encoder.blocks[depth - self.num_blocks :].requires_grad_(True)
            backbone.encoder.norm.requires_grad_(True)

    def parameter_groups(
        self, network: ClipNetwork, lr: float, head_lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Groups of trained parameters with their learning rates and weight decay.

        The final norm has the rate `lr`, the last block `lr` * `layer_decay`, the block before it
        `lr` * `layer_decay`², and so on to the front end (Bao et al., 2022, arXiv:2106.08254).
        Adapters have the rate `lr` in all blocks. Norms, biases and registers have no decay.
        """
        decay = 1.0 if self.mode == "lora" else self.layer_decay or LAYER_DECAY
        groups = param_groups_layer_decay(
            network.backbone,
            weight_decay=weight_decay,
            no_weight_decay_list=("encoder.registers",),
            layer_decay=decay,
        )
        for group in groups:
            group["lr"] = lr * group.pop("lr_scale")
        head = list(network.head.parameters())
        matrices, biases = [p for p in head if p.ndim > 1], [p for p in head if p.ndim < 2]
        return [
            *groups,
            {"params": matrices, "lr": head_lr, "weight_decay": weight_decay},
            {"params": biases, "lr": head_lr, "weight_decay": 0.0},
        ]


def _lora_model(backbone: Backbone, rank: int) -> Any:
    """Put adapters (Hu et al., 2022, arXiv:2106.09685) into all linear layers of the blocks.

    peft replaces the layers in place. An adapter starts as zero, and its output is scaled by 2.
    """
    try:
        from peft import LoraConfig  # noqa: PLC0415 (an extra; the import takes seconds)
        from peft.tuners.lora import LoraModel  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            "`mode` lora needs the package peft: run `pip install 'jepa-audio[finetune]'`"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LORA_TARGETS)
    return LoraModel(backbone.encoder, config, "default")


def merge_adapters(backbone: Backbone) -> None:
    """Add the adapters to the weights of the layers, and remove them; the output is equal."""
    for parent in list(backbone.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "lora_A"):
                layer.merge()  # type: ignore[operator]
                setattr(parent, name, layer.get_base_layer())  # type: ignore[operator]


def freeze_statistics(modules: Iterable[nn.Module]) -> None:
    """Put modules in which no parameter is trained into evaluation mode: no drop path there."""
    for module in modules:
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
