"""Schedules: functions of the optimizer step, for learning rate, momentum and curriculum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from jepa_audio.errors import UserError


class Schedule(ABC):
    """A number that depends on the optimizer step and the length of the run alone.

    A resumed run therefore computes the same values as an uninterrupted run.
    """

    @abstractmethod
    def __call__(self, step: int, max_steps: int) -> float:
        """The value at optimizer step `step` (from 0) of a run of `max_steps` steps."""


def _progress(step: int, num_steps: int) -> float:
    """The completed share of `num_steps`, in [0, 1]."""
    return min(max(step, 0) / num_steps, 1.0) if num_steps > 0 else 1.0


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Args:
        value: for a learning rate, a factor on the optimizer's `lr`.
    """

    value: float = 1.0

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from `start` to `end`, then constant.

    Args:
        start: value at step 0.
        end: value at step `num_steps` and at all later steps.
        num_steps: optimizer steps from `start` to `end`; `None` for all steps of the run.
    """

    start: float
    end: float
    num_steps: int | None = None

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        progress = _progress(step, max_steps if self.num_steps is None else self.num_steps)
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine period from `start` to `end`, then constant.

    Args:
        start: value at step 0.
        end: value at step `num_steps` and at all later steps.
        num_steps: optimizer steps from `start` to `end`; `None` for all steps of the run.
    """

    start: float
    end: float
    num_steps: int | None = None

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        progress = _progress(step, max_steps if self.num_steps is None else self.num_steps)
        return _half_cosine(self.start, self.end, progress)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A learning-rate factor: a linear rise to 1, then half a cosine period down to `end`.

    Args:
        warmup_steps: optimizer steps of the rise; the factor at step 0 is 1 / `warmup_steps`.
        end: factor at step `max_steps`, the end of the run.
    """

    warmup_steps: int
    end: float = 0.0

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor at step `step`.

        Raises:
            UserError: if the warm-up is not shorter than the run.
        """
        if self.warmup_steps >= max_steps:
            raise UserError(
                f"`warmup_steps` ({self.warmup_steps}) must be below "
                f"`trainer.max_steps` ({max_steps})"
            )
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = _progress(step - self.warmup_steps, max_steps - self.warmup_steps)
        return _half_cosine(1.0, self.end, progress)


@dataclass(frozen=True)
class WarmupConstant(Schedule):
    """A learning-rate factor: a linear rise to 1, then constant.

    Args:
        warmup_steps: optimizer steps of the rise.
    """

    warmup_steps: int

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        return min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps > 0 else 1.0
