"""Step 6 of a JEPA: the distance between a prediction and its target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.classes import MAX_TEMPERATURE, MIN_TEMPERATURE, Codebook
from jepa_audio.steps.grid import Grid, TokenSet


class Distance(ABC):
    """A loss value for each token; the training module averages it over the targets."""

    def set_widths(self, embed_dim: int, target_dim: int) -> int:
        """Prepare for targets of width `target_dim`; return the width that predictions must have.

        Predictions have the width `embed_dim` if any width is possible.
        """
        return target_dim

    def reset_parameters(self) -> None:  # noqa: B027 (most distances have no weights)
        """Draw the initial weights from torch's global generator."""

    def at_targets(
        self,
        prediction: Float[Tensor, "Q M L D"],
        target: Float[Tensor, "Q M L T"],
        where: TokenSet,
        grid: Grid,
    ) -> Float[Tensor, "Q M L"]:
        """The distance at the target tokens `where` of a grid; at padding, any finite number."""
        return self(prediction, target)

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


class CrossEntropy(nn.Module, Distance):
    """Cross-entropy of predicted classes, for targets that are classes.

    A codebook turns the targets into classes; their width is free. A head turns the predictions
    into the logits of the classes.

    Args:
        codebook: target latents → classes.
        temperature: `None`: the head is a linear layer (BEST-RQ). A number: logits are the cosine
            similarities of the prediction and a learned vector of each class, divided by it (CAPI,
            arXiv:2502.08769: 0.12; CAPI also learns the lengths of these vectors).
    """

    head: nn.Linear

    def __init__(self, codebook: Codebook, temperature: float | None = None) -> None:
        super().__init__()
        self.codebook, self.temperature = codebook, temperature
        check_bounds(self, MIN_TEMPERATURE, MAX_TEMPERATURE, "temperature")

    @override
    def set_widths(self, embed_dim: int, target_dim: int) -> int:
        self.head = nn.Linear(embed_dim, self.codebook.num_classes, bias=self.temperature is None)
        self.codebook.set_width(target_dim)
        return embed_dim

    @override
    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if self.temperature is None:
            nn.init.zeros_(self.head.bias)
        self.codebook.reset_parameters()

    @override
    def at_targets(
        self, prediction: Tensor, target: Tensor, where: TokenSet, grid: Grid
    ) -> Float[Tensor, "Q M L"]:
        return self(prediction, target, where, grid)

    def forward(
        self,
        prediction: Float[Tensor, "Q M L D"],
        target: Float[Tensor, "Q M L T"],
        where: TokenSet,
        grid: Grid,
    ) -> Float[Tensor, "Q M L"]:
        """The cross-entropy at the target tokens `where`, in nats.

        The gradient also contains that of the codebook's own loss, which does not change the value.
        """
        classes = self.codebook(target, where, grid)
        distance = self.measure(self.logits(prediction), classes.target)
        if classes.loss is None:
            return distance
        return distance + (classes.loss - classes.loss.detach())

    def logits(self, prediction: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens C"]:
        """The logits of the classes, float32."""
        if self.temperature is None:
            return self.head(prediction).float()
        prediction = F.normalize(prediction.float(), dim=-1)
        vectors = F.normalize(self.head.weight.float(), dim=-1)
        return F.linear(prediction, vectors).float() / self.temperature

    @override
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The cross-entropies `[*tokens]` of logits `[*tokens, C]` and the classes of the tokens.

        The classes are indices `[*tokens]` or probabilities `[*tokens, C]`.
        """
        classes = target.flatten(0, prediction.dim() - 2)
        losses = F.cross_entropy(prediction.flatten(0, -2), classes, reduction="none")
        return losses.view(prediction.shape[:-1])


@dataclass(frozen=True)
class JEPAOutput:
    """The result of one forward pass; at padding, `valid` of the token sets in `Masks` is False.

    `distance_sum` is the sum of the distances at all `num_targets` valid target tokens; over all
    batches and processes, sum / count is the exact mean. `loss` divides by an expected count, and
    contains the weighted `regularizers`, whose values are stored by name without their weights.
    Predictions and targets have the same width, unless the distance allows others.
    """

    loss: Float[Tensor, ""]
    distance_sum: Float[Tensor, ""]
    num_targets: Int[Tensor, ""]
    context: Float[Tensor, "Q K D"]
    prediction: Float[Tensor, "Q M L W"]
    target: Float[Tensor, "Q M L T"]
    regularizers: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)

    @property
    def sums(self) -> dict[str, Float[Tensor, ""]]:
        """What is added over micro-batches and processes for the logs."""
        sums = {"loss": self.distance_sum.detach(), "num_targets": self.num_targets}
        return sums | {name: value.detach() for name, value in self.regularizers.items()}
