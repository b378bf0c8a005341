"""Hashes of names: they choose splits and orders, and name tables in the cache."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from jaxtyping import Float64


def name_hashes(names: pa.ChunkedArray) -> Float64[np.ndarray, " N"]:
    """A hash in [0, 1) of each name: the first 8 bytes of BLAKE2b, divided by 2^64."""
    empty, digests = hashlib.blake2b(digest_size=8), []
    for name in names.cast(pa.binary()).to_pylist():
        state = empty.copy()  # faster than a new one
        state.update(name)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), dtype=">u8") / 2.0**64


def short_digest(text: str) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
