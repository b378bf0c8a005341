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

    A momentum copy is sharded in the same way as its module: the momentum update then works on the
    shards. Children that are already sharded do not change.

    Args:
        module: the parent of the modules to shard. The parent is not sharded, because training
            calls only the children.
        mesh: parameters are replicated along the first axis and sharded along the second axis.
    """
    for child in module.children():
        if isinstance(child, FSDPModule) or not any(True for _ in child.parameters()):
            continue
        for block in (inner for inner in child.modules() if isinstance(inner, Block)):
            fully_shard(block, mesh=mesh)
        # Shard again after a forward pass, because the momentum update comes after a forward pass
        # and needs the shards of a module and of its momentum copy.
        fully_shard(child, mesh=mesh, reshard_after_forward=True)
        if isinstance(child, Transformer):
            # Other code calls this method directly, not only through `forward`.
            register_fsdp_forward_method(child, Transformer.forward_layers.__name__)


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor of a sharded tensor; all processes must call this function.

    Without it, `float` of a sharded sum gives only the part of this process.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is sharded over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded parameters; `JEPA.configure_model` shards the parameters.

    A checkpoint is one file, as in a run without sharding, and such a run can resume from the file.

    Args:
        num_copies: copies of the parameters; "auto" for one copy on each machine.
        num_shards: processes that share one copy; "auto" for all processes of one machine.
            `num_copies` times `num_shards` is the number of all processes.
    """

    def __init__(
        self, num_copies: int | Literal["auto"] = "auto", num_shards: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__(num_copies, num_shards, save_distributed_checkpoint=False)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint of a sharded run.

        `ModelParallelStrategy` expects the optimizer's state in the order of the parameters. The
        checkpoint of a sharded run has this order. In the checkpoint of a run without sharding, the
        state of an optimizer with several parameter groups is ordered by group.

        Raises:
            UserError: if the optimizer's state is ordered by group.
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
