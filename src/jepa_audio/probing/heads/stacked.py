"""MLP heads that are trained together: stacked weights, batched products, one optimizer for all.

The 84 heads of a `marble-v1` grid take 50 s on two cores, 111 s in a plain loop over the heads
and 237 s as Lightning fits (`benchmarks/probe_grid.py`, RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.adam import adam

from jepa_audio.errors import UserError
from jepa_audio.probing.heads import HeadInput
from jepa_audio.probing.tasks.base import Protocol

Select = Literal["best", "last"]

# The defaults of `torch.optim.Adam`, except for `fused`.
_ADAM_SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
_ADAM_SETTINGS |= {"amsgrad": False, "maximize": False, "fused": True}


@dataclass(frozen=True)
class MLPSettings:
    """How MLP heads are built and trained.

    Args:
        protocol: learning rates, batch size, epochs, early stopping and plateau schedule.
        hidden: units of the hidden layer.
        dropout: probability of dropping a hidden unit.
        select: epoch whose weights are scored: the best on validation, or the last.
    """

    protocol: Protocol
    hidden: int = 512
    dropout: float = 0.2
    select: Select = "best"


class _BatchedLinear(torch.autograd.Function):
    """Linear maps whose weight gradient is written to the same buffer in every step.

    Autograd would allocate 120 MB in every step for 78 heads on 768 features. The page faults of
    fresh memory can take as long as the product itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "K n I"],
        weight: Float[Tensor, "K O I"],
        bias: Float[Tensor, "K O"],
        gradient: Float[Tensor, "K O I"],
    ) -> Float[Tensor, "K n O"]:
        """Compute the products; `gradient` is the buffer for the backward pass."""
        ctx.save_for_backward(rows, weight)
        ctx.gradient = gradient
        return torch.baddbmm(bias[:, None], rows, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "K n O"]
    ) -> tuple[Float[Tensor, "K n I"] | None, Float[Tensor, "K O I"], Float[Tensor, "K O"], None]:
        """Gradients of rows (if needed), weight and bias."""
        rows, weight = ctx.saved_tensors
        grad_rows = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_rows, torch.bmm(grad.mT, rows, out=ctx.gradient), grad.sum(1), None


class StackedLinear(nn.Module):
    """One linear map for each head; all start with the same weights, drawn as in `nn.Linear`.

    The gradient of the weights is valid until the next backward pass.
    """

    def __init__(
        self, in_features: int, out_features: int, num_heads: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        shapes = ((out_features, in_features), (out_features,))
        drawn = [torch.empty(size).uniform_(-bound, bound, generator=generator) for size in shapes]
        self.weight, self.bias = (
            nn.Parameter(tensor.expand(num_heads, *tensor.shape).clone()) for tensor in drawn
        )
        buffer = torch.empty_like(self.weight, requires_grad=False)
        self.register_buffer("gradient", buffer, persistent=False)

    def forward(self, rows: Float[Tensor, "K n I"]) -> Float[Tensor, "K n O"]:
        """Apply each head's map to that head's rows."""
        return _BatchedLinear.apply(rows, self.weight, self.bias, self.gradient)


class StackedHeads(nn.Module):
    """Heads with one hidden layer (linear, ReLU, dropout, linear), trained on the same batches.

    All heads start with the same weights and drop the same units, as in separate runs with one
    seed. So the result for each head is that of a separate run.

    Args:
        inputs: several inputs of kind "layer", or one input of another kind.
        widths: widths of all layers of the inputs.
        heads_per_input: heads on each input, adjacent in the stack.
        seed: of the weights and of the dropout.

    Raises:
        UserError: if layers of different widths are to be summed or stacked.
    """

    def __init__(
        self,
        inputs: Sequence[HeadInput],
        widths: Sequence[int],
        num_outputs: int,
        heads_per_input: int,
        settings: MLPSettings,
        seed: int,
    ) -> None:
        super().__init__()
        self.kind, self.hidden, self.dropout = inputs[0].kind, settings.hidden, settings.dropout
        if self.kind != "reduce" and len(set(widths)) > 1:
            raise UserError(f"{inputs[0].name} needs layers of one width, got {list(widths)}")
        self.layer_of = [i for i in range(len(inputs)) for _ in range(heads_per_input)]
        self.generator = torch.Generator().manual_seed(seed)
        num_heads, width = len(self.layer_of), max(widths)
        self.inner = StackedLinear(width, self.hidden, num_heads, self.generator)
        self.outer = StackedLinear(self.hidden, num_outputs, num_heads, self.generator)
        if self.kind == "mix":
            drawn = torch.empty(len(widths)).normal_(generator=self.generator)
            self.mixing = nn.Parameter(drawn.expand(num_heads, -1).clone())
        elif self.kind == "reduce":
            self.reduce = StackedLinear(sum(widths), width, num_heads, self.generator)

    @property
    def num_heads(self) -> int:
        """Number of heads that are still trained."""
        return len(self.layer_of)

    def forward(self, layers: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n K C"]:
        """Logits of every head from rows of all layers of the inputs."""
        if self.kind == "mix":
            mixing = self.mixing.softmax(dim=1)
            rows = torch.einsum("kl,lnd->knd", mixing, torch.stack([*layers]))
        elif self.kind == "reduce":
            rows = self.reduce(torch.cat([*layers], dim=1).expand(self.num_heads, -1, -1))
        elif len(layers) == 1:
            rows = layers[0].expand(self.num_heads, -1, -1)
        else:
            rows = torch.stack([layers[layer] for layer in self.layer_of])
        units = self.inner(rows)
        if self.training and self.dropout:
            # The mask is applied before ReLU, in place: the result is the same.
            uniform = torch.rand(units.shape[1:], generator=self.generator)
            mask = uniform.ge_(self.dropout).div_(1 - self.dropout)
            units = units.mul_(mask.to(units.device))
        return self.outer(units.relu_()).transpose(0, 1)

    def keep(self, heads: Sequence[int]) -> None:
        """Remove all other heads."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data = tensor.data[list(heads)]
        self.layer_of = [self.layer_of[head] for head in heads]

    def state_of(self, head: int) -> dict[str, Tensor]:
        """A copy of the weights of one head, with a leading dimension of 1."""
        return {
            name: parameter.detach()[head : head + 1].clone()
            for name, parameter in self.named_parameters()
        }


class StackedAdam:
    """`torch.optim.Adam` with its defaults and one learning rate for each head.

    One fused call updates all heads of a learning rate. Separate optimizers would spend as much
    time in Python as in arithmetic.
    """

    def __init__(self, heads: StackedHeads) -> None:
        self.weights = [parameter.detach() for parameter in heads.parameters()]
        self.first_moments = [torch.zeros_like(weight) for weight in self.weights]
        self.second_moments = [torch.zeros_like(weight) for weight in self.weights]
        self.steps = [torch.zeros(len(weight), device=weight.device) for weight in self.weights]

    def keep(self, indices: Sequence[int], heads: StackedHeads) -> None:
        """Remove all other heads; `heads` has removed them already."""
        self.weights = [parameter.detach() for parameter in heads.parameters()]
        for tensors in (self.first_moments, self.second_moments, self.steps):
            tensors[:] = [tensor[list(indices)] for tensor in tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """Update every head; `gradients` has one stacked tensor for each parameter."""
        # Fused Adam assumes that gradients have the memory layout of the weights.
        contiguous = [gradient.contiguous() for gradient in gradients]
        states = (self.weights, contiguous, self.first_moments, self.second_moments, self.steps)
        by_head = [[tensor.unbind() for tensor in tensors] for tensors in states]
        for rate in dict.fromkeys(learning_rates):
            heads = [head for head, other in enumerate(learning_rates) if other == rate]
            weights, grads, first, second, steps = (
                [tensor[head] for tensor in tensors for head in heads] for tensors in by_head
            )
            adam(weights, grads, first, second, [], steps, lr=rate, **_ADAM_SETTINGS)
