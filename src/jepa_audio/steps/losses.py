"""Step 6 of a JEPA: the distance between a predicted latent and its target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError


class Distance(ABC):
    """A loss value for each token; the training module averages it over the targets."""

    def __call__(
        self, prediction: Float[Tensor, "*tokens D"], target: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """The distance of each prediction from its target, computed in float32."""
        return self.measure(prediction.float(), target.float())

    @abstractmethod
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The distances `[*tokens]` of float32 predictions and targets `[*tokens, D]`."""


@dataclass(frozen=True)
class MSE(Distance):
    """Squared error, averaged over the channels (WavJEPA)."""

    @override
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean(dim=-1)


@dataclass(frozen=True)
class SmoothL1(Distance):
    """Smooth L1: quadratic below `beta`, linear above, averaged over the channels.

    Used by data2vec and by Riou et al. (2024, arXiv:2405.08679).

    Args:
        beta: the error at which the loss changes from quadratic to linear.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"`beta` ({self.beta}) must be positive; use a small value for L1 loss")

    @override
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        errors = F.smooth_l1_loss(prediction, target, beta=self.beta, reduction="none")
        return errors.mean(dim=-1)


@dataclass(frozen=True)
class NormalizedMSE(Distance):
    """Squared error of unit vectors: 2 - 2 cos (BYOL; M2D, 2024, arXiv:2404.06095)."""

    @override
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(prediction, target, dim=-1)


@dataclass(frozen=True)
class JEPAOutput:
    """The result of one forward pass; at padding, `valid` of the token sets in `Masks` is False.

    `distance_sum` is the sum of the distances at all `num_targets` valid target tokens; over all
    batches and processes, sum / count is the exact mean. `loss` divides by an expected count.
    """

    loss: Float[Tensor, ""]
    distance_sum: Float[Tensor, ""]
    num_targets: Int[Tensor, ""]
    context: Float[Tensor, "B K D"]
    prediction: Float[Tensor, "B M L D"]
    target: Float[Tensor, "B M L D"]
