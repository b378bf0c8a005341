"""Schedules: functions of the optimizer step, for learning rate, momentum and curriculum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds


class Schedule(ABC):
    """A number that depends on the optimizer step and the length of the run alone.

    A resumed run therefore computes the same values as an uninterrupted run.
    """

    @abstractmethod
    def __call__(self, step: int, max_steps: int) -> float:
        """The value at optimizer step `step` (from 0) of a run of `max_steps` steps."""

    def resolved(self, max_steps: int) -> str:
        """What shares of the run are in a run of `max_steps` steps; empty without such shares."""
        return ""


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


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """A learning-rate factor: a linear rise to 1, then constant, then a fall to `end`.

    WSD (Hu et al., 2024, MiniCPM, arXiv:2404.06395, section 4.2). With W = `warmup_share` and
    D = `decay_share` of `max_steps`, in steps, and S = `max_steps`: (s + 1) / W for s < W, 1 for
    W <= s < S - D, and f((s - S + D) / D) afterwards. f(p) is 1 + (`end` - 1) p ("linear"),
    `end` + (1 - `end`) (1 + cos(pi p)) / 2 ("cosine") or `end` ** p ("exponential", as in the
    paper). A checkpoint from before the fall can be continued in a longer run without loss.
    Deviation: W and D are shares of the run, so that a recipe fits runs of other lengths.

    Args:
        warmup_share: share of the run, in [0, 1]; at least one step if it is above 0.
        decay_share: share of the run, in [0, 1]; the paper has 0.1.
        end: factor at step `max_steps`, the end of the run.
        shape: "linear", "cosine" or "exponential"; the last needs an `end` above 0.
    """

    warmup_share: float = 0.05
    decay_share: float = 0.2
    end: float = 0.0
    shape: Literal["linear", "cosine", "exponential"] = "linear"

    def __post_init__(self) -> None:
        check_bounds(self, 0, 1, "warmup_share", "decay_share", "end")
        if self.warmup_share + self.decay_share > 1:
            raise UserError(
                f"`warmup_share` ({self.warmup_share}) and `decay_share` ({self.decay_share}) must "
                "not exceed 1 together"
            )
        if self.shape == "exponential" and self.end <= 0:
            raise UserError(f"`end` ({self.end}) must be above 0 if `shape` is 'exponential'")

    def _num_steps(self, max_steps: int) -> tuple[int, int]:
        """W and D of a run."""
        warmup = max(round(self.warmup_share * max_steps), int(self.warmup_share > 0))
        return warmup, min(round(self.decay_share * max_steps), max_steps - warmup)

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        warmup, decay = self._num_steps(max_steps)
        if step < warmup:
            return (max(step, 0) + 1) / warmup
        if step < max_steps - decay or decay == 0:
            return 1.0
        progress = _progress(step - (max_steps - decay), decay)
        if self.shape == "cosine":
            return _half_cosine(1.0, self.end, progress)
        return self.end**progress if self.shape == "exponential" else 1 + (self.end - 1) * progress

    @override
    def resolved(self, max_steps: int) -> str:
        warmup, decay = self._num_steps(max_steps)
        return (
            f"{warmup} steps of warm-up, {max_steps - warmup - decay} at the full value, {decay} "
            f"of {self.shape} decay to {self.end:g}"
        )


@dataclass(frozen=True)
class LengthScaled(Schedule):
    """A learning-rate schedule times (`reference_steps` / `max_steps`) ** `exponent`.

    The best learning rate of longer runs is smaller. The power law is that of Bjorck et al. (2024,
    arXiv:2409.19913) for language models, where the exponent is 0.32 for the number of tokens;
    with a constant batch this is the number of steps. For audio it is an assumption. Batch size and
    model are not part of the rule.

    Args:
        schedule: the schedule that is scaled.
        reference_steps: `max_steps` of the run in which the learning rate was found.
        exponent: 0 for no scaling.
    """

    schedule: Schedule
    reference_steps: int
    exponent: float = 0.32

    def __post_init__(self) -> None:
        check_bounds(self, 1, math.inf, "reference_steps")
        check_bounds(self, 0, 1, "exponent")

    def _factor(self, max_steps: int) -> float:
        return (self.reference_steps / max_steps) ** self.exponent

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        return self._factor(max_steps) * self.schedule(step, max_steps)

    @override
    def resolved(self, max_steps: int) -> str:
        inner = self.schedule.resolved(max_steps)
        factor = f"times {self._factor(max_steps):.3g}, for {max_steps} steps"
        return f"{factor} instead of {self.reference_steps}" + (f"; {inner}" if inner else "")


@dataclass(frozen=True)
class AveragingWindow(Schedule):
    """The momentum whose averaging window is a share of the run: m = 1 - 1 / n.

    n = share * `max_steps` is the window in steps: the mean age of the weights in the momentum copy
    is n - 1 steps, and their half-life is ln 2 / -ln m, about 0.69 n. The share rises in a straight
    line from `start_share` to `end_share`. Windows are at least one step (momentum 0: a copy of the
    online weights). The same clips in batches of another size are another number of steps; the
    window in clips then stays the same, which is the scaling rule of Busbridge et al. (2023,
    arXiv:2307.13813, m ** k for batches k times as large) to the first order in 1 / n.

    Args:
        start_share: window at step 0 as a share of the run, above 0.
        end_share: window at step `max_steps` as a share of the run, above 0.
    """

    start_share: float = 0.05
    end_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("start_share", "end_share"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(
                    f"`{name}` ({value}) must be above 0 and finite: it is a share of the run"
                )

    def _window(self, step: int, max_steps: int) -> float:
        rise = self.end_share - self.start_share
        share = self.start_share + rise * _progress(step, max_steps)
        return max(share * max_steps, 1.0)

    @override
    def __call__(self, step: int, max_steps: int) -> float:
        return 1 - 1 / self._window(step, max_steps)

    @override
    def resolved(self, max_steps: int) -> str:
        windows = [self._window(step, max_steps) for step in (0, max_steps)]
        momentum = [1 - 1 / window for window in windows]
        text = f"an average over {windows[0]:.4g} to {windows[1]:.4g} steps, momentum "
        text += f"{momentum[0]:.6g} to {momentum[1]:.6g}"
        is_raised = min(self.start_share, self.end_share) * max_steps < 1
        return text + (" (windows are at least one step)" if is_raised else "")
