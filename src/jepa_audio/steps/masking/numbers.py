"""Random numbers as a function of (seed, step, row, index), for any number of rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt32, UInt64

# The constants of SplitMix64, and an odd constant for the keys of streams.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_STREAM = 0xD1342543DE82EF95
_MODULUS = 1 << 64
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_TO_UNIT = 2.0**-53
# What all rows of a step share is drawn with this row number, which no row has.
_SHARED_ROW = -1


@dataclass(frozen=True)
class RowNumbers:
    """One stream of random numbers for each row; number i of a row is a hash of (key, i).

    The hash is SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195), a generator that can
    jump to any index. Numbers of a row do not depend on the other rows of the batch, and no state
    is kept.

    Attributes:
        keys: the key of each row, a hash of (seed, step, row).
    """

    keys: UInt64[np.ndarray, " R"]

    @staticmethod
    def of(seed: int, step: int, rows: Int64[np.ndarray, " R"]) -> RowNumbers:
        """The numbers of the given rows of an optimizer step."""
        key = np.uint64(derive_seed(seed, step))
        return RowNumbers(_mix(key + rows.astype(np.uint64) * _GAMMA))

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, rows: slice | np.ndarray) -> RowNumbers:
        """The numbers of the selected rows."""
        return RowNumbers(self.keys[rows])

    def stream(self, number: int) -> RowNumbers:
        """Other numbers of the same rows, independent for each stream number."""
        offset = np.uint64((number + 1) * _STREAM % _MODULUS)
        return RowNumbers(_mix(self.keys + offset))

    def streams(self, count: int, first: int = 0) -> RowNumbers:
        """The numbers of the streams from `first` on, `count` for every row, R * count rows."""
        offsets = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(_STREAM)
        return RowNumbers(_mix(self.keys[:, None] + offsets).ravel())

    def bits(self, count: int, first: int = 0) -> UInt64[np.ndarray, "R K"]:
        """Numbers `first` to `first + count - 1` of every row, 64 random bits each."""
        index = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GAMMA
        return _mix(self.keys[:, None] + index)

    def halves(self, count: int, first: int = 0) -> UInt32[np.ndarray, "R K"]:
        """The halves of `bits`, 32 random bits each; `count` and `first` must be even."""
        return self.bits(count // 2, first // 2).view(np.uint32)

    def uniform(self, count: int, first: int = 0) -> Float64[np.ndarray, "R K"]:
        """Numbers in [0, 1) with 53 random bits."""
        return (self.bits(count, first) >> np.uint64(11)) * _TO_UNIT


def derive_seed(seed: int, number: int) -> int:
    """A seed for another purpose: a hash of (seed, number)."""
    key = _mix_one(_mix_one(seed + int(_GAMMA)) + number)
    return _mix_one(key + int(_GAMMA))


def step_uniform(seed: int, step: int, count: int) -> Float64[np.ndarray, " K"]:
    """Numbers in [0, 1) that all rows of an optimizer step share."""
    key = _mix_one(derive_seed(seed, step) + _SHARED_ROW * int(_GAMMA))
    bits = [_mix_one(key + index * int(_GAMMA)) for index in range(1, count + 1)]
    return (np.array(bits, dtype=np.uint64) >> np.uint64(11)) * _TO_UNIT


def _mix_one(bits: int) -> int:
    """`_mix` of one number, of which the last 64 bits count."""
    bits %= _MODULUS
    bits = (bits ^ bits >> 30) * int(_FIRST_FACTOR) % _MODULUS
    bits = (bits ^ bits >> 27) * int(_SECOND_FACTOR) % _MODULUS
    return bits ^ bits >> 31


def _mix(bits: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Hash every number in place (the finaliser of SplitMix64)."""
    bits ^= bits >> _SHIFTS[0]
    bits *= _FIRST_FACTOR
    bits ^= bits >> _SHIFTS[1]
    bits *= _SECOND_FACTOR
    bits ^= bits >> _SHIFTS[2]
    return bits
