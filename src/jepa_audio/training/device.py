"""What makes a step faster on a GPU: packed rows, compiled modules, a fused optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.steps.front_ends import FrontEnd

# Compiled versions of a block: encoder, target encoder and predictor, with and without gradients,
# masked, packed and equal rows. Above its limit (8), torch runs a module uncompiled.
_MAX_VERSIONS = 64


def prepare_modules(module: nn.Module, packed: bool, compiled: bool) -> None:
    """Let transformers pack rows of unequal length, and compile their blocks and front ends.

    State-dict keys do not change. A block is compiled once for all numbers of tokens. A front end
    is compiled for the first size of a batch, and once more for all sizes if another one follows.
    """
    for part in module.modules():
        if isinstance(part, Transformer):
            part.packs = packed
        if compiled and isinstance(part, Block):
            part.compile(dynamic=True)  # several methods of a transformer call single blocks
        if compiled and isinstance(part, FrontEnd):
            part.compile()
    if compiled:
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _MAX_VERSIONS)


def move_steps(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Move the numbers of steps of an optimizer to its parameters, where a fused kernel reads them.

    An optimizer that is not fused has them on the CPU, also in its checkpoints.
    """
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"]).to(parameter.device, torch.float32)


def use_fused_kernel(optimizer: Optimizer) -> None:
    """Let Adam and AdamW update all parameters on a GPU in one kernel.

    An optimizer whose settings choose another implementation (`foreach`, `fused`, `capturable`,
    `differentiable`) is not changed, neither is one with sharded parameters.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    names = ("foreach", "fused", "capturable", "differentiable")
    if (
        type(optimizer) not in (Adam, AdamW)
        or any(group[name] for group in groups for name in names)
        or any(group["fused"] is not None or group["foreach"] is not None for group in groups)
        or any(isinstance(p, DTensor) or p.device.type != "cuda" for p in parameters)
    ):
        return
    for settings in (optimizer.defaults, *groups):
        settings["fused"] = True
    # A gradient scaler then leaves it to the kernel to skip a step.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    rank_zero_info(
        "optimizer: the fused kernel updates all parameters; `--model.optimizer.fused false` "
        "chooses the separate ones"
    )
