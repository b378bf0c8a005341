"""A masker that draws one of several maskers, with a curriculum."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.numbers import derive_seed, step_uniform


@dataclass(frozen=True)
class MixtureMasker(Masker):
    """Draws one of several maskers for each step (PupuJEPA, Gu et al., 2026, arXiv:2606.25713).

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
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        masker, its_seed = self._draw_masker(seed, step)
        return masker(grid, rows, its_seed, step)

    @override
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        """The expectation of the masker that this step draws."""
        masker, its_seed = self._draw_masker(seed, step)
        return masker.expected_targets(grid, its_seed, step)

    @override
    def at(self, step: int) -> Masker:
        maskers = [masker.at(step) for masker in self.maskers]
        return MixtureMasker(maskers, self.weights_at(step))

    def _draw_masker(self, seed: int, step: int) -> tuple[Masker, int]:
        """The masker of a step, and a seed for what it draws itself."""
        cumulated = list(accumulate(self.weights_at(step)))
        number = float(step_uniform(seed, step, 1)[0]) * cumulated[-1]
        return self.maskers[bisect_right(cumulated, number)], derive_seed(seed, 0)
