"""Step 2 of a JEPA: grid → context tokens and target groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

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

    def for_rows(self, grid: Grid, row: Int[Tensor, " B"], rows_per_draw: int, seed: tuple[int, ...]) -> Masks:
        """The masks that belong to some rows of the run, whatever process asks for them.

        Masks are drawn for `rows_per_draw` rows at once, from (`seed`, number of the draw), and each process takes
        its own rows of the draw. With an optimizer step's rows of all ranks and micro-batches in one draw, the number
        of the draw is the optimizer step.

        Args:
            grid: the grid of one clip.
            row: places in the order of the run, as `AudioBatch.row`; they are taken modulo `rows_per_draw`.
            rows_per_draw: rows that are drawn together.
            seed: what else the draw depends on.
        """
        draw = int(row[0]) // rows_per_draw
        entropy = np.random.SeedSequence([*seed, draw]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        return self(grid, rows_per_draw, generator, draw).rows(row % rows_per_draw)
