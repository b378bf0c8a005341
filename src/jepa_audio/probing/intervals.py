"""How sure a score is, and a difference of two on the same units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jepa_audio.errors import UserError

_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Difference:
    """A difference of two scores on the same units, with its 95 % interval.

    The interval holds the noise of the choice of units, and no noise of training seeds.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["ahead", "behind", "no significant difference"]:
        """On which side of zero the interval lies."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "no significant difference"

    def __str__(self) -> str:
        return f"{self.verdict} ({self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}])"


def draw_counts(num_units: int, draws: int = 2000, seed: int = 0) -> Int[np.ndarray, "draws units"]:
    """How often each unit occurs in resamplings of all units with replacement; see `Metric.resampled`.

    The same number of units and the same seed give the same resamplings: two scores that are
    resampled by them are paired. More draws go on where fewer ended.

    Raises:
        UserError: if there is no unit or no draw.
    """
    if min(num_units, draws) < 1:
        raise UserError(f"`num_units` ({num_units}) and `draws` ({draws}) must be at least 1")
    rng = np.random.default_rng(seed)
    # No count exceeds the number of units. The small type is for the memory: 2000 draws of 10,000
    # units are 40 MB.
    counts = np.empty((draws, num_units), dtype=np.int16 if num_units < 2**15 else np.int32)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, num_units, num_units), minlength=num_units)
    return counts


def interval(draws: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """Percentile interval, 95 %, of a score on resamplings (Efron, 1979).

    Resamplings that could not be scored (NaN) are left out; if that is all of them, so are both
    ends.
    """
    scored = draws[~np.isnan(draws)]
    if len(scored) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(scored, _PERCENTILES)
    return float(low), float(high)


def difference(
    value: float,
    other: float,
    draws: Float[np.ndarray, " draws"],
    other_draws: Float[np.ndarray, " draws"],
) -> Difference:
    """`value` minus `other`, both scores of the same units.

    Args:
        value: on the units as they are.
        other: the same of what it is compared with.
        draws: the first score on resamplings.
        other_draws: the second on the same resamplings, in the same order.
    """
    return Difference(value - other, *interval(draws - other_draws))
