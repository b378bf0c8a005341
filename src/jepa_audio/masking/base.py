"""Step 2 of a JEPA: grid → context tokens and target groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from jepa_audio.grid import Grid, Masks


class Masker(ABC):
    """Draws, for every clip of a batch, the tokens that are seen and the groups of tokens to predict.

    A masker is a frozen dataclass: it holds settings, and neither a random state, nor a device, nor a counter.
    """

    @abstractmethod
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """Masks for `batch_size` clips on the CPU.

        Args:
            grid: the grid of one clip.
            batch_size: number of clips B.
            generator: the only source of randomness.
            step: optimizer step, for maskers that change while training.

        Raises:
            ValueError: if no clip of this grid can be masked in this way.
        """
