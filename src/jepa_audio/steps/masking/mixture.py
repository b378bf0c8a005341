"""A masker that draws one of several maskers, with a curriculum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker


@dataclass(frozen=True)
class MixtureMasker(Masker):
    """Draws one of several maskers for each batch (PupuJEPA, Gu et al., 2026, arXiv:2606.25713).

    Between `warmup_start` and `warmup_end`, the probabilities of all maskers except the first one
    rise linearly; the first masker has the remaining probability.

    Args:
        maskers: the maskers; training starts with the first one.
        weights: probability of each masker from optimizer step `warmup_end`.
        warmup_start: last optimizer step with only the first masker.
        warmup_end: first optimizer step with `weights`.
    """

    maskers: list[Masker]
    weights: list[float]
    warmup_start: int = 0
    warmup_end: int = 0

    def __post_init__(self) -> None:
        if not self.maskers or len(self.maskers) != len(self.weights):
            raise UserError(
                f"`maskers` ({len(self.maskers)}) and `weights` ({len(self.weights)}) must have "
                "the same number of entries, at least 1"
            )
        is_positive = all(weight >= 0 for weight in self.weights)
        if not is_positive or not math.isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise UserError(f"`weights` must be at least 0 and add up to 1, got {self.weights}")
        if not 0 <= self.warmup_start <= self.warmup_end:
            raise UserError(
                f"`warmup_end` ({self.warmup_end}) must be at least `warmup_start` "
                f"({self.warmup_start}), and both at least 0"
            )

    def weights_at(self, step: int) -> list[float]:
        """The probabilities of the maskers at an optimizer step."""
        num_steps = self.warmup_end - self.warmup_start
        if num_steps:
            ramp = min(max((step - self.warmup_start) / num_steps, 0.0), 1.0)
        else:
            ramp = float(step >= self.warmup_start)
        others = [ramp * weight for weight in self.weights[1:]]
        return [max(1.0 - sum(others), 0.0), *others]

    @override
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        weights = torch.tensor(self.weights_at(step), dtype=torch.float64)
        masker = self.maskers[int(torch.multinomial(weights, 1, generator=generator))]
        return masker(grid, batch_size, generator, step)
