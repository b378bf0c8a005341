"""Step 6 of a JEPA: the distance between a predicted latent and its target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError


class Distance(ABC):
    """One number for each token; the module averages it over the targets."""

    @abstractmethod
    def __call__(
        self, prediction: Float[Tensor, "*tokens D"], target: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """The distance of each prediction from its target, in float32."""


@dataclass(frozen=True)
class MSE(Distance):
    """Squared error, mean over the channels (WavJEPA)."""

    def __call__(
        self, prediction: Float[Tensor, "*tokens D"], target: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """See `Distance`."""
        return (prediction.float() - target.float()).square().mean(dim=-1)


@dataclass(frozen=True)
class SmoothL1(Distance):
    """Quadratic below `beta`, linear above, mean over the channels (data2vec, Riou et al., 2024, arXiv:2405.08679).

    Args:
        beta: error at which the square turns into a line.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(
                f"`beta` ({self.beta}) must be positive; for a plain L1 loss take a small one"
            )

    def __call__(
        self, prediction: Float[Tensor, "*tokens D"], target: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """See `Distance`."""
        return F.smooth_l1_loss(
            prediction.float(), target.float(), beta=self.beta, reduction="none"
        ).mean(dim=-1)


@dataclass(frozen=True)
class NormalizedMSE(Distance):
    """Squared error of unit vectors, 2 - 2 cos (BYOL; Niizumi et al., 2024, M2D, arXiv:2404.06095)."""

    def __call__(
        self, prediction: Float[Tensor, "*tokens D"], target: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """See `Distance`."""
        return 2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=-1)
