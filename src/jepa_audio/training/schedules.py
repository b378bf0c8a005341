"""Schedules: pure functions of the optimizer step, used for the learning rate, the momentum and the curriculum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from jepa_audio.errors import UserError


class Schedule(ABC):
    """A number that depends on the optimizer step alone, so that a resumed run is the same run."""

    @abstractmethod
    def __call__(self, step: int, max_steps: int) -> float:
        """The value at optimizer step `step` (from 0) of a run of `max_steps` steps."""


def _progress(step: int, num_steps: int) -> float:
    return min(max(step, 0) / num_steps, 1.0) if num_steps > 0 else 1.0


@dataclass(frozen=True)
class Constant(Schedule):
    """One value for the whole run.

    Args:
        value: the value; for a learning rate a factor on the optimizer's `lr`.
    """

    value: float = 1.0

    def __call__(self, step: int, max_steps: int) -> float:
        """See `Schedule`."""
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` in a straight line, then constant.

    Args:
        start: value at step 0.
        end: value from step `num_steps` on.
        num_steps: optimizer steps of the ramp; `None` for the whole run.
    """

    start: float
    end: float
    num_steps: int | None = None

    def __call__(self, step: int, max_steps: int) -> float:
        """See `Schedule`."""
        num_steps = max_steps if self.num_steps is None else self.num_steps
        return self.start + (self.end - self.start) * _progress(step, num_steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine, then constant.

    Args:
        start: value at step 0.
        end: value from step `num_steps` on.
        num_steps: optimizer steps of the ramp; `None` for the whole run.
    """

    start: float
    end: float
    num_steps: int | None = None

    def __call__(self, step: int, max_steps: int) -> float:
        """See `Schedule`."""
        num_steps = max_steps if self.num_steps is None else self.num_steps
        return self.end + (self.start - self.end) * 0.5 * (
            1 + math.cos(math.pi * _progress(step, num_steps))
        )


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A linear rise from 0 to 1, then half a cosine down to `end` at the last step: a learning-rate factor.

    Args:
        warmup_steps: optimizer steps of the rise; the first step already moves (factor 1 /
            `warmup_steps`).
        end: factor at the end of the run.
    """

    warmup_steps: int
    end: float = 0.0

    def __call__(self, step: int, max_steps: int) -> float:
        """See `Schedule`; `ValueError` if the warm-up does not end before the run does."""
        if self.warmup_steps >= max_steps:
            raise UserError(
                f"`warmup_steps` ({self.warmup_steps}) must be below `trainer.max_steps` ({max_steps})"
            )
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = _progress(step - self.warmup_steps, max_steps - self.warmup_steps)
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupConstant(Schedule):
    """A linear rise from 0 to 1, then constant: a learning-rate factor.

    Args:
        warmup_steps: optimizer steps of the rise.
    """

    warmup_steps: int

    def __call__(self, step: int, max_steps: int) -> float:
        """See `Schedule`."""
        return min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps > 0 else 1.0
