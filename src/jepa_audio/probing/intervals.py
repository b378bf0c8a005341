"""How sure an accuracy is, and a difference of two on the same clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies on the same clips, with its 95 % interval.

    The interval holds the noise of the choice of clips, and no noise of training seeds.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["ahead", "behind", "not told apart"]:
        """On which side of zero the interval lies."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "not told apart"

    def __str__(self) -> str:
        return f"{self.verdict} ({self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}])"


def bootstrap_interval(
    correct: Bool[np.ndarray, " n"],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap, 95 %, of the share of clips named rightly."""
    return _interval(_bootstrap_means(correct, draws, seed))


def paired_difference(
    correct: Bool[np.ndarray, " n"],
    other: Bool[np.ndarray, " n"],
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """Accuracy minus the other's accuracy, resampling the clips that both have heard."""
    difference = correct.astype(np.int64) - other
    return Difference(float(difference.mean()), *_interval(_bootstrap_means(difference, draws, seed)))


def _bootstrap_means(values: Shaped[np.ndarray, " n"], draws: int, seed: int) -> Float[np.ndarray, " draws"]:
    # How often each distinct value occurs in n draws with replacement is multinomial: no clip is drawn.
    distinct, counts = np.unique(values, return_counts=True)
    resampled = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=draws)
    return resampled @ distinct / len(values)


def _interval(means: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
