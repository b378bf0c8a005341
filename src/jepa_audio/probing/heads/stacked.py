"""Many heads at once: every map of theirs is one batched product."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Shape:
    """Of heads that are trained together.

    Args:
        hidden: units of the hidden layer.
        num_outputs: numbers a head gives.
        num_heads: heads.
        dropout: probability with which a hidden unit is dropped.
    """

    hidden: int
    num_outputs: int
    num_heads: int
    dropout: float


class _Products(torch.autograd.Function):
    """Linear maps whose weights' gradient is written to the same memory in every step.

    Autograd would ask for fresh memory, 120 MB for 78 heads on 768 features. The system hands it
    out page by page, which can take a core as long as the product itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "K n I"],
        weight: Float[Tensor, "K O I"],
        bias: Float[Tensor, "K O"],
        gradient: Float[Tensor, "K O I"],
    ) -> Float[Tensor, "K n O"]:
        """The products; `gradient` is the memory."""
        ctx.save_for_backward(rows, weight)
        ctx.gradient = gradient
        return torch.baddbmm(bias[:, None], rows, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, given: Float[Tensor, "K n O"]
    ) -> tuple[Float[Tensor, "K n I"] | None, Float[Tensor, "K O I"], Float[Tensor, "K O"], None]:
        """Gradients of rows (if wanted), weight and bias."""
        rows, weight = ctx.saved_tensors
        of_rows = torch.bmm(given, weight) if ctx.needs_input_grad[0] else None
        return of_rows, torch.bmm(given.mT, rows, out=ctx.gradient), given.sum(1), None


class LinearMaps(nn.Module):
    """A linear map for each head. All begin with the same weights, those that `torch.nn.Linear` draws.

    The gradient of the weights is valid until the next backward pass.

    Args:
        in_features: numbers a map reads.
        out_features: numbers it gives.
        num_heads: maps.
        generator: draws the weights.
    """

    def __init__(
        self, in_features: int, out_features: int, num_heads: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        shapes = ((out_features, in_features), (out_features,))
        drawn = [
            torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in shapes
        ]
        self.weight, self.bias = (
            nn.Parameter(one.expand(num_heads, *one.shape).clone()) for one in drawn
        )
        self.register_buffer(
            "gradient", torch.empty_like(self.weight, requires_grad=False), persistent=False
        )

    def forward(self, rows: Float[Tensor, "K n I"]) -> Float[Tensor, "K n O"]:
        """What every head says of rows of its own."""
        return _Products.apply(rows, self.weight, self.bias, self.gradient)


class Heads(nn.Module):
    """Heads of one hidden layer on the same windows: linear, ReLU, dropout, linear.

    All heads begin alike, as separate runs of one seed do; a unit that is dropped is dropped in all
    of them. So each is exactly what it would be by itself.

    Args:
        in_features: width of what the hidden layer reads.
        shape: see `Shape`.
        generator: draws the weights, then the dropout of every step.
    """

    def __init__(self, in_features: int, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.generator, self.dropout, self.hidden = generator, shape.dropout, shape.hidden
        self.inner = LinearMaps(in_features, shape.hidden, shape.num_heads, generator)
        self.outer = LinearMaps(shape.hidden, shape.num_outputs, shape.num_heads, generator)

    @property
    def num_heads(self) -> int:
        """Those still there."""
        return len(self.outer.bias)

    @abstractmethod
    def read(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "K n I"]:
        """What the hidden layer of every head reads of rows of one or several layers of features."""

    def forward(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K C"]:
        """Logits of every head."""
        units = self.inner(self.read(rows))
        if self.training and self.dropout:
            kept = (
                torch.rand(units.shape[1:], generator=self.generator)
                .ge_(self.dropout)
                .div_(1 - self.dropout)
            )
            units = units.mul_(kept.to(units.device))  # before ReLU: the same
        return self.outer(units.relu_()).transpose(0, 1)

    def keep(self, heads: Sequence[int]) -> None:
        """Let the other heads go."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data = tensor.data[list(heads)]

    def state_of(self, head: int) -> dict[str, Tensor]:
        """A copy of one head's weights, of leading size 1."""
        return {
            name: parameter.detach()[head : head + 1].clone()
            for name, parameter in self.named_parameters()
        }


class LayerHeads(Heads):
    """Heads on one layer of features each.

    Args:
        layer_of: for every head, which of the layers it reads.
        in_features: width of the layers.
        shape: see `Shape`.
        generator: see `Heads`.
    """

    def __init__(
        self, layer_of: Sequence[int], in_features: int, shape: Shape, generator: torch.Generator
    ) -> None:
        super().__init__(in_features, shape, generator)
        self.layer_of = list(layer_of)

    def read(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "K n I"]:
        """See `Heads`."""
        if len(rows) == 1:
            return rows[0].expand(self.num_heads, -1, -1)
        return torch.stack([rows[layer] for layer in self.layer_of])

    def keep(self, heads: Sequence[int]) -> None:
        """See `Heads`."""
        super().keep(heads)
        self.layer_of = [self.layer_of[head] for head in heads]


class MixHeads(Heads):
    """Heads on a sum of layers whose weights, a softmax, each head learns for itself.

    Args:
        num_layers: how many are mixed.
        in_features: width of each of them.
        shape: see `Shape`.
        generator: see `Heads`; draws the mixing logits (normal) last.
    """

    def __init__(
        self, num_layers: int, in_features: int, shape: Shape, generator: torch.Generator
    ) -> None:
        super().__init__(in_features, shape, generator)
        drawn = torch.empty(num_layers).normal_(generator=generator)
        self.mixing = nn.Parameter(drawn.expand(shape.num_heads, -1).clone())

    def read(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "K n I"]:
        """See `Heads`."""
        return torch.einsum("kl,lnd->knd", self.mixing.softmax(dim=1), torch.stack(list(rows)))


class ReduceHeads(Heads):
    """Heads on all layers side by side, made as narrow as one of them by a linear map: MARBLE v2's default.

    Args:
        in_features: width of all layers together.
        reduced: width of what the hidden layer reads.
        shape: see `Shape`.
        generator: see `Heads`.
    """

    def __init__(
        self, in_features: int, reduced: int, shape: Shape, generator: torch.Generator
    ) -> None:
        super().__init__(reduced, shape, generator)
        self.reduce = LinearMaps(in_features, reduced, shape.num_heads, generator)

    def read(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "K n I"]:
        """See `Heads`."""
        return self.reduce(torch.cat(list(rows), dim=1).expand(self.num_heads, -1, -1))
