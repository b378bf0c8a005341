"""Many heads at once: those that read the same rows share one matrix product a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Heads(nn.Module):
    """Heads of one hidden layer that read the same rows: linear, ReLU, dropout, linear.

    All heads begin with the same weights, those that `torch.nn.Linear` draws, as separate runs of one seed do; a unit
    that is dropped is dropped in all of them. So each is exactly what it would be by itself.

    Args:
        in_features: width of what the hidden layer reads.
        hidden: units of the hidden layer.
        num_outputs: numbers a head gives.
        num_heads: heads.
        dropout: probability.
        generator: draws the weights, then the dropout of every step.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_outputs: int,
        num_heads: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.generator, self.dropout, self.hidden = generator, dropout, hidden
        self.inner_weight, self.inner_bias = self._drawn(num_heads, hidden, in_features)
        self.outer_weight, self.outer_bias = self._drawn(num_heads, num_outputs, hidden)

    def _drawn(self, num_heads: int, num_outputs: int, num_inputs: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias of a linear map, the same for all heads."""
        bound = 1 / math.sqrt(num_inputs)
        shapes = ((num_outputs, num_inputs), (num_outputs,))
        drawn = [torch.empty(shape).uniform_(-bound, bound, generator=self.generator) for shape in shapes]
        weight, bias = (nn.Parameter(one.expand(num_heads, *one.shape).clone()) for one in drawn)
        return weight, bias

    @property
    def num_heads(self) -> int:
        """Those still there."""
        return len(self.outer_bias)

    @abstractmethod
    def hidden_units(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K H"]:
        """What the hidden layer says of rows of one or several layers of features, before its ReLU."""

    def forward(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K C"]:
        """Logits of every head."""
        units = self.hidden_units(rows).relu()
        if self.training and self.dropout:
            kept = torch.rand(len(units), 1, self.hidden, generator=self.generator) >= self.dropout
            units = units * (kept / (1 - self.dropout)).to(units.device)
        return _read_apart(units.transpose(0, 1), self.outer_weight, self.outer_bias)

    def keep(self, heads: Sequence[int]) -> None:
        """Let the other heads go."""
        for parameter in self.parameters():
            parameter.data = parameter.data[list(heads)]

    def state_of(self, head: int) -> dict[str, Tensor]:
        """A copy of one head's weights, of leading size 1."""
        return {name: parameter.detach()[head : head + 1].clone() for name, parameter in self.named_parameters()}


class LayerHeads(Heads):
    """Heads on one layer of features: a single product for all of them."""

    def hidden_units(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K H"]:
        """See `Heads`."""
        (layer,) = rows
        products = F.linear(layer, self.inner_weight.flatten(0, 1), self.inner_bias.flatten())
        return products.unflatten(1, (self.num_heads, self.hidden))


class MixHeads(Heads):
    """Heads on a sum of layers whose weights, a softmax, each head learns for itself.

    Args:
        num_layers: how many are mixed.
        in_features: width of each of them.
        hidden: see `Heads`.
        num_outputs: see `Heads`.
        num_heads: see `Heads`.
        dropout: see `Heads`.
        generator: see `Heads`; draws the mixing logits (normal) last.
    """

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        hidden: int,
        num_outputs: int,
        num_heads: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(in_features, hidden, num_outputs, num_heads, dropout, generator)
        drawn = torch.empty(num_layers).normal_(generator=generator)
        self.mixing = nn.Parameter(drawn.expand(num_heads, -1).clone())

    def hidden_units(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K H"]:
        """See `Heads`."""
        mixed = torch.einsum("kl,lnd->knd", self.mixing.softmax(dim=1), torch.stack(list(rows)))
        return _read_apart(mixed, self.inner_weight, self.inner_bias)


class ReduceHeads(Heads):
    """Heads on all layers side by side, made as narrow as one of them by a linear map: MARBLE v2's default.

    Args:
        in_features: width of all layers together.
        reduced: width of what the hidden layer reads.
        hidden: see `Heads`.
        num_outputs: see `Heads`.
        num_heads: see `Heads`.
        dropout: see `Heads`.
        generator: see `Heads`.
    """

    def __init__(
        self,
        in_features: int,
        reduced: int,
        hidden: int,
        num_outputs: int,
        num_heads: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(reduced, hidden, num_outputs, num_heads, dropout, generator)
        self.reduce_weight, self.reduce_bias = self._drawn(num_heads, reduced, in_features)

    def hidden_units(self, rows: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K H"]:
        """See `Heads`."""
        side_by_side = torch.cat(list(rows), dim=1)
        products = F.linear(side_by_side, self.reduce_weight.flatten(0, 1), self.reduce_bias.flatten())
        reduced = products.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        return _read_apart(reduced, self.inner_weight, self.inner_bias)


def _read_apart(
    rows: Float[Tensor, "K n I"], weight: Float[Tensor, "K O I"], bias: Float[Tensor, "K O"]
) -> Float[Tensor, "n K O"]:
    """A linear map for each head, on rows of its own."""
    # In this order of factors the gradient of the weight comes as the weight lies in memory.
    return torch.baddbmm(bias[:, :, None], weight, rows.mT).permute(2, 0, 1)
