"""Adam for stacked heads, each with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from jepa_audio.probing.heads.stacked import Heads


class StackedAdam:
    """What an optimizer for each head does (`torch.optim.Adam`, its defaults), in one call for each learning rate.

    One by one, optimizers spend as long in Python as in arithmetic.

    Args:
        heads: whose weights are trained.
    """

    def __init__(self, heads: Heads) -> None:
        self.weights = [parameter.detach() for parameter in heads.parameters()]
        self.first, self.second = (
            [torch.zeros_like(weight) for weight in self.weights] for _ in range(2)
        )
        self.steps = [torch.zeros(len(weight), device=weight.device) for weight in self.weights]

    def keep(self, heads: Sequence[int], left: Heads) -> None:
        """Let the other heads go, as `left` has."""
        self.weights = [parameter.detach() for parameter in left.parameters()]
        for tensors in (self.first, self.second, self.steps):
            tensors[:] = [tensor[list(heads)] for tensor in tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """One step of every head, by gradients of all weights."""
        laid = [
            gradient.contiguous() for gradient in gradients
        ]  # fused Adam reads them as the weights lie
        stacked = (self.weights, laid, self.first, self.second, self.steps)
        by_head = [[tensor.unbind() for tensor in tensors] for tensors in stacked]
        for rate in dict.fromkeys(learning_rates):
            heads = [head for head, own in enumerate(learning_rates) if own == rate]
            weights, given, first, second, steps = (
                [t[head] for t in of for head in heads] for of in by_head
            )
            adam(
                weights,
                given,
                first,
                second,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
