"""Parameters divided over the processes (FSDP2), for models that one device does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.transformer import Block, Transformer


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every part of a module, and every transformer block in it on its own; sharded parts are left as they are.

    A copy is sharded like what it is a copy of, so that the momentum update works on the shards.

    Args:
        module: its parts are sharded, not itself: they are what is called.
        mesh: replicated along its first axis, sharded along its second.
    """
    for part in module.children():
        if isinstance(part, FSDPModule) or not any(True for _ in part.parameters()):
            continue
        for block in (inner for inner in part.modules() if isinstance(inner, Block)):
            fully_shard(block, mesh=mesh)
        # Not left whole after a forward pass: the momentum update, which follows one, wants shards
        # of both copies.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if isinstance(part, Transformer):
            register_fsdp_forward_method(part, "layers")  # it is called by this name too


def whole(tensor: Tensor) -> Tensor:
    """The tensor as if nothing were sharded; every process has to ask for it. `float` of a sharded sum is one share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether a process holds but its share of some parameter."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for parameters divided over processes, as `JEPA.configure_model` divides them.

    A checkpoint is one file, as that of any other run; a run that is not sharded goes on with it,
    too.

    Args:
        num_copies: of the parameters; "auto" for one on each machine.
        num_shards: processes that share a copy; "auto" for those of a machine. Copies times shards
            are all processes.
    """

    def __init__(
        self, num_copies: int | Literal["auto"] = "auto", num_shards: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__(num_copies, num_shards, save_distributed_checkpoint=False)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `ModelParallelStrategy`, which takes the optimizer's state to be in the order of the parameters.

        That of an optimizer with groups is in the order of the groups, unless Lightning saved it
        from a sharded run.

        Raises:
            UserError: if the checkpoint is of a run that was not sharded, and would be read
                wrongly.
        """
        path = self.broadcast(checkpoint_path)
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(
            "optimizer_states", []
        )
        for groups in (state["param_groups"] for state in states):
            order = [index for group in groups for index in group["params"]]
            if len(groups) > 1 and order == sorted(order):
                raise UserError(
                    f"{path} is of a run without sharding and cannot be resumed by one with: resume it with "
                    f"`--trainer.strategy ddp`, or begin a sharded run from its weights with `--weights {path}`"
                )
        return super().load_checkpoint(path, weights_only)
