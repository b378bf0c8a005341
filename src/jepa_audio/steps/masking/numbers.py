"""Random numbers as a function of (seed, step, row, index): SplitMix64, see `steps/kernels.py`.

SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195) can jump to any index. No state is
kept, and the numbers of a row do not depend on the other rows of the batch.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int, UInt64
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64
# What all rows of a step share is drawn with this row number, which no row has.
_SHARED_ROW = -1


def row_keys(seed: int, step: int, rows: Int[Tensor, " R"]) -> UInt64[np.ndarray, " R"]:
    """The key of each row, from which its random numbers follow: a hash of (seed, step, row)."""
    from jepa_audio.steps import kernels  # noqa: PLC0415

    return kernels.row_keys(
        np.uint64(derive_seed(seed, step)), np.ascontiguousarray(rows.numpy(), np.int64)
    )


def derive_seed(seed: int, number: int) -> int:
    """A seed for another purpose: a hash of (seed, number)."""
    key = _mix(_mix(seed + _GAMMA) + number)
    return _mix(key + _GAMMA)


def step_uniform(seed: int, step: int, count: int) -> Float64[np.ndarray, " K"]:
    """Numbers in [0, 1) that all rows of an optimizer step share."""
    key = _mix(derive_seed(seed, step) + _SHARED_ROW * _GAMMA)
    bits = [_mix(key + index * _GAMMA) >> 11 for index in range(1, count + 1)]
    return np.array(bits) * 2.0**-53


def _mix(bits: int) -> int:
    """Hash a number, of which the last 64 bits count (the finaliser of SplitMix64)."""
    bits %= _MODULUS
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % _MODULUS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % _MODULUS
    return bits ^ bits >> 31
