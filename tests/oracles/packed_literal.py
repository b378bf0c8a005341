"""Attention within packed rows as a loop over the rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_rows(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each row `[n, heads, d]` alone; shapes as in `packing`."""
    outputs = []
    for first, end in pairwise(ends.tolist()):
        assert end - first <= longest
        parts = (part[first:end].transpose(0, 1) for part in (query, key, value))
        q, k, v = parts
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs) if outputs else F.pad(query, (0, 0))
