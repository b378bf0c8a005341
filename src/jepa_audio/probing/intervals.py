"""Bootstrap intervals of scores, and of differences of two scores on the same units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jepa_audio.errors import UserError


@dataclass(frozen=True)
class Difference:
    """The difference of two scores on the same units, with its 95 % interval.

    The interval covers the choice of units, but not the noise of training seeds.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["ahead", "behind", "no significant difference"]:
        """On which side of zero the interval is."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "no significant difference"

    def __str__(self) -> str:
        return f"{self.verdict} ({self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}])"


def draw_counts(num_units: int, draws: int = 2000, seed: int = 0) -> Int[np.ndarray, "draws units"]:
    """How often each unit occurs in bootstrap resamples; see `Metric.resampled`.

    Scores that are resampled with the same number of units and the same seed are paired. All
    results of probes have the default seed, so any two can be compared on the same resamples. The
    first n draws do not depend on the number of draws.

    Raises:
        UserError: if there is no unit or no draw.
    """
    if min(num_units, draws) < 1:
        raise UserError(f"`num_units` ({num_units}) and `draws` ({draws}) must be at least 1")
    rng = np.random.default_rng(seed)
    # No count exceeds the number of units. With int16, 2,000 draws of 10,000 units take 40 MB.
    counts = np.empty((draws, num_units), dtype=np.int16 if num_units < 2**15 else np.int32)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, num_units, num_units), minlength=num_units)
    return counts


def interval(draws: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """The 95 % percentile interval of a score on resamples (Efron, 1979).

    Draws that could not be scored (NaN) are left out. Both ends are NaN if no draw is left.
    """
    scored = draws[~np.isnan(draws)]
    if len(scored) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(scored, (2.5, 97.5))
    return float(low), float(high)


def difference(
    value: float,
    other: float,
    draws: Float[np.ndarray, " draws"],
    other_draws: Float[np.ndarray, " draws"],
) -> Difference:
    """`value` minus `other`, two scores on the same units, with an interval.

    `draws` and `other_draws` are the scores on the same resamples, in the same order.
    """
    return Difference(value - other, *interval(draws - other_draws))
