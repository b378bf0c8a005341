"""Parameters sharded over the processes (FSDP2), for models that do not fit on one device."""

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
    """Shard every child of a module, and every transformer block separately.

    A momentum copy is sharded like its module, so that the momentum update works on the shards.
    Children that are sharded already stay unchanged.

    Args:
        module: its children are sharded, not the module itself, because only they are called.
        mesh: parameters are replicated along its first axis and sharded along its second.
    """
    for child in module.children():
        if isinstance(child, FSDPModule) or not any(True for _ in child.parameters()):
            continue
        for block in (inner for inner in child.modules() if isinstance(inner, Block)):
            fully_shard(block, mesh=mesh)
        # Shard again after a forward pass: the momentum update, which follows one, needs the
        # shards of both copies.
        fully_shard(child, mesh=mesh, reshard_after_forward=True)
        if isinstance(child, Transformer):
            # This method is called directly too, like `forward`.
            register_fsdp_forward_method(child, Transformer.forward_layers.__name__)


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor of a sharded one; all processes must call this.

    `float` of a sharded sum gives the share of this process.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter is sharded over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded parameters; `JEPA.configure_model` shards them.

    A checkpoint is one file, like that of every other run; an unsharded run can resume from it.

    Args:
        num_copies: copies of the parameters; "auto" for one on each machine.
        num_shards: processes that share one copy; "auto" for those of one machine. `num_copies`
            times `num_shards` is the number of all processes.
    """

    def __init__(
        self, num_copies: int | Literal["auto"] = "auto", num_shards: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__(num_copies, num_shards, save_distributed_checkpoint=False)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, except for one of an unsharded run.

        `ModelParallelStrategy` expects the optimizer's state in the order of the parameters. An
        optimizer with several groups orders it by group, unless Lightning saved it from a sharded
        run.

        Raises:
            UserError: if the optimizer's state is ordered by group and would be read wrongly.
        """
        path = self.broadcast(checkpoint_path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for state in content.get("optimizer_states", []):
            groups = state["param_groups"]
            order = [index for group in groups for index in group["params"]]
            if len(groups) > 1 and order == sorted(order):
                raise UserError(
                    f"{path} is the checkpoint of a run without sharding, and a sharded run cannot "
                    "resume from it: use `--trainer.strategy ddp`, or start a sharded run from "
                    f"its weights with `--weights {path}`"
                )
        return super().load_checkpoint(path, weights_only)
