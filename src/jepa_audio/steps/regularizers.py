"""Step 6 of a JEPA: terms of the loss that work against a collapse of the latents."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Masks
from jepa_audio.steps.losses import JEPAOutput
from jepa_audio.steps.masking.numbers import derive_seed

Latents = Literal["context", "prediction", "clip_mean"]


class Regularizer(ABC):
    """A statistic of latents; `weight` times its value is added to the loss.

    In a training step, it is the statistic of one micro-batch over all processes. With gradient
    accumulation, the loss of a step is the mean over its micro-batches. Without gradients, in an
    evaluation, it is the statistic of one batch, because processes may have different numbers of
    batches. All statistics are computed in float32, also under autocast.

    Attributes:
        weight: factor in the loss; with 0, the statistic is not computed.
        latents: the vectors whose statistic is computed. "context": the latents of the context
            encoder at all context tokens. "prediction": the predicted latents at all target
            tokens. "clip_mean": for each mask of a clip, the mean of its context latents. Padding
            is excluded. Latents that depend on nothing but the position in the clip can have a good
            statistic with "context" and "prediction", but hardly with "clip_mean".
    """

    weight: float
    latents: Latents

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"`weight` ({self.weight}) of {type(self).__name__} must be at least 0")

    @property
    def name(self) -> str:
        """The name in the logs, for example `vicreg_context`."""
        return f"{type(self).__name__.lower()}_{self.latents}"

    def __call__(
        self,
        context: Float[Tensor, "Q K D"],
        prediction: Float[Tensor, "Q M L D"],
        target: Float[Tensor, "Q M L T"],
        masks: Masks,
        seed: int,
    ) -> Float[Tensor, ""]:
        """The statistic, without its weight; `seed` is the same on all processes.

        `VICReg` and `SIGReg` do not use `target`. A class that does replaces this method.

        Raises:
            UserError: if a training step has fewer than two vectors.
        """
        vectors, valid = context, masks.context.valid_or_true
        if self.latents == "prediction":
            vectors, valid = prediction, masks.targets.valid_or_true
        if self.latents == "clip_mean":
            vectors = (vectors.float() * valid[..., None]).sum(-2) / valid.sum(-1)[..., None]
            valid = valid.any(-1)
        if torch.is_grad_enabled() and valid.numel() * _num_processes() < 2:
            raise UserError(
                f"{type(self).__name__} of `{self.latents}` needs at least two vectors in a "
                "micro-batch: raise `data.batch_size`"
            )
        return self.measure(vectors.float().flatten(0, -2), valid.flatten(), seed)

    @abstractmethod
    def measure(
        self, vectors: Float[Tensor, "n D"], valid: Bool[Tensor, " n"], seed: int
    ) -> Float[Tensor, ""]:
        """The statistic of the valid vectors of all processes, see `sum_over_processes`."""


@dataclass(frozen=True)
class VICReg(Regularizer):
    """Variance and covariance terms of VICReg (Bardes et al., 2022, arXiv:2105.04906, eq. 1-4).

    variance: mean over channels of max(0, `min_std` - sqrt(variance + `eps`)). covariance: sum of
    the squared covariances of two different channels, divided by the number of channels. The
    invariance term of the paper is the distance of the JEPA. The paper weights invariance,
    variance and covariance 25 : 25 : 1, which the defaults repeat.

    Args:
        weight: factor on (variance + `covariance` * covariance) in the loss.
        latents: "context": latents of all context tokens; "prediction": of all target tokens;
            "clip_mean": mean over the context tokens of each clip.
        covariance: factor on the covariance term.
        min_std: the standard deviation that each channel should have at least (γ of the paper).
        eps: constant that is added to the variance.
    """

    weight: float = 1.0
    latents: Latents = "context"
    covariance: float = 0.04
    min_std: float = 1.0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.covariance >= 0 and self.min_std > 0 and self.eps > 0):
            raise UserError(
                f"`covariance` ({self.covariance}) must be at least 0, `min_std` ({self.min_std}) "
                f"and `eps` ({self.eps}) above 0"
            )

    @override
    def measure(
        self, vectors: Float[Tensor, "n D"], valid: Bool[Tensor, " n"], seed: int
    ) -> Float[Tensor, ""]:
        weight = valid[:, None].float()
        count = sum_over_processes(weight.sum())
        mean = sum_over_processes((vectors * weight).sum(0)) / count
        centred = (vectors - mean) * weight
        # The last batch of an evaluation may have a single vector.
        covariance = sum_over_processes(centred.T @ centred) / (count - 1).clamp(min=1)
        variance = covariance.diagonal()
        hinge = (self.min_std - (variance + self.eps).sqrt()).relu().mean()
        off_diagonal = covariance - variance.diag()
        return hinge + self.covariance * off_diagonal.square().sum() / len(variance)


@dataclass(frozen=True)
class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularisation (LeJEPA, Balestriero & LeCun, arXiv:2511.08544).

    The vectors are projected on random directions. For each direction, the Epps-Pulley statistic
    compares the n projections x with a standard normal distribution:
    n ∫ |mean(exp(i t x)) - φ(t)|² φ(t) dt with φ(t) = exp(-t² / 2), by the trapezoidal rule over
    t from -`max_frequency` to `max_frequency`. The value is the mean over the directions. As in
    the paper, it grows with n, the number of vectors. The directions are drawn from seed and
    optimizer step; all evaluations have the same directions.

    The defaults are those of the published code. The text of the paper has 17 frequencies from -5
    to 5: `max_frequency: 5.0`, `num_frequencies: 9`. The paper's λ is `weight` / (1 + `weight`).

    Args:
        weight: factor in the loss.
        latents: "context": latents of all context tokens; "prediction": of all target tokens;
            "clip_mean": mean over the context tokens of each clip.
        num_projections: number of random directions of an optimizer step.
        max_frequency: largest t of the integral.
        num_frequencies: number of t from 0 to `max_frequency`; negative t have the same values.
    """

    weight: float = 0.05
    latents: Latents = "context"
    num_projections: int = 256
    max_frequency: float = 3.0
    num_frequencies: int = 17

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.num_projections > 0 and self.max_frequency > 0 and self.num_frequencies > 1):
            raise UserError(
                f"`num_projections` ({self.num_projections}) and `max_frequency` "
                f"({self.max_frequency}) must be above 0, `num_frequencies` "
                f"({self.num_frequencies}) above 1"
            )

    @override
    def measure(
        self, vectors: Float[Tensor, "n D"], valid: Bool[Tensor, " n"], seed: int
    ) -> Float[Tensor, ""]:
        weight = valid.float()
        count = sum_over_processes(weight.sum())
        directions = self.directions(vectors.shape[-1], seed)
        if vectors.is_cuda:  # without a wait for the device
            directions = directions.pin_memory().to(vectors.device, non_blocking=True)
        projected = vectors @ directions.to(vectors.device)
        t = torch.linspace(0, self.max_frequency, self.num_frequencies, device=vectors.device)
        step = self.max_frequency / (self.num_frequencies - 1)
        sums: Tensor = _WaveSums.apply(projected, weight, step, self.num_frequencies)
        cosines, sines = (sum_over_processes(sums) / count).unbind(-1)
        normal = torch.exp(-t.square() / 2)[:, None]
        error = (cosines - normal).square() + sines.square()
        return count * 2 * torch.trapezoid(error * normal, t, dim=0).mean()

    def directions(self, dim: int, seed: int) -> Float[Tensor, "D P"]:
        """Unit vectors, the same for the same seed; drawn on the CPU, equal for all devices."""
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(dim, self.num_projections, generator=generator)
        return directions / directions.norm(dim=0)


def active(regularizers: Sequence[Regularizer]) -> list[Regularizer]:
    """The regularizers with a weight above 0.

    Raises:
        UserError: if two of them have the same name in the logs.
    """
    chosen = [regularizer for regularizer in regularizers if regularizer.weight]
    for name, count in Counter(regularizer.name for regularizer in chosen).items():
        if count > 1:
            raise UserError(
                f"`regularizers` has {name} {count} times: keep one of them, or set other `latents`"
            )
    return chosen


def regularized(
    output: JEPAOutput, regularizers: Sequence[Regularizer], masks: Masks, seed: int
) -> JEPAOutput:
    """Add the weighted statistics to the loss of `output`, and store them in it.

    Args:
        output: the latents, and the loss without regularizers.
        regularizers: see `active`; without one, `output` is returned unchanged.
        masks: the masks of `output`; random directions depend on their optimizer step.
        seed: seed of the run.
    """
    if not regularizers:
        return output
    loss, values = output.loss, {}
    step = masks.step or 0 if torch.is_grad_enabled() else 0
    latents = output.context, output.prediction, output.target
    with torch.autocast(loss.device.type, enabled=False):
        for regularizer in regularizers:
            value = regularizer(*latents, masks, derive_seed(seed, step))
            loss = loss + regularizer.weight * value
            values[regularizer.name] = value
    return replace(output, loss=loss, regularizers=values)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes in a training step, else the tensor itself.

    The gradient of a loss that every process computes from the sum is exact where the gradients of
    parameters are averaged over the processes, as DDP and FSDP do. All processes must call this
    function in the same order.
    """
    if not torch.is_grad_enabled() or _num_processes() == 1:
        return tensor
    return _AllReduce.apply(tensor)


class _AllReduce(torch.autograd.Function):
    """The sum over processes, and of gradients; torch's own function is deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _num_processes() -> int:
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1


class _WaveSums(torch.autograd.Function):
    """Weighted sums of cos(t x) and sin(t x) over projections x `[n, P]`: `[frequencies, P, 2]`.

    The frequencies t are multiples of `step`, so that exp(i t x) are powers of exp(i `step` x).
    Autograd would keep all powers, which are many times larger than the latents.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, step: float, count: int) -> Tensor:
        ctx.save_for_backward(projected, weight)
        ctx.step = step
        turn = torch.polar(torch.ones_like(projected), projected * step)
        wave = weight[:, None] * torch.ones_like(turn)
        sums = [wave.sum(0)]
        for _ in range(count - 1):
            wave = wave * turn
            sums.append(wave.sum(0))
        return torch.view_as_real(torch.stack(sums))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        projected, weight = ctx.saved_tensors
        turn = torch.polar(torch.ones_like(projected), projected * ctx.step)
        # d cos(t x) = -t sin(t x) and d sin(t x) = t cos(t x): imaginary parts of a polynomial.
        factors = torch.complex(-gradients[0][..., 0], gradients[0][..., 1])
        total = torch.zeros_like(turn)
        for index in range(len(factors) - 1, 0, -1):
            total = (total + index * factors[index]) * turn
        return ctx.step * weight[:, None] * total.imag, None, None, None
