"""Step 2 of a JEPA: grid → context tokens and target groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, TokenSet


class Masker(ABC):
    """Draws, for every clip of a batch, the tokens that are seen and the groups of tokens to predict.

    A masker is a frozen dataclass: it holds settings, and neither a random state, nor a device, nor
    a counter.
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
            UserError: if no clip of this grid can be masked in this way.
        """

    def for_rows(
        self,
        grid: Grid,
        row: Int[Tensor, " B"],
        rows_per_draw: int,
        seed: tuple[int, ...],
        num_time: Int[Tensor, " B"] | None = None,
    ) -> Masks:
        """The masks that belong to some rows of the run, whatever process asks for them.

        Masks are drawn for `rows_per_draw` rows at once, from (`seed`, number of the draw), and
        each process takes its own rows of the draw. With an optimizer step's rows of all ranks and
        micro-batches in one draw, the number of the draw is the optimizer step.

        Args:
            grid: the grid of one clip.
            row: places in the order of the run, as `AudioBatch.row`; they are taken modulo
                `rows_per_draw`.
            rows_per_draw: rows that are drawn together.
            seed: what else the draw depends on.
            num_time: time columns of each clip that are no padding: tokens beyond are neither
                context nor target. A clip that so loses all its context or a whole target group
                gets masks of its own, drawn for its grid.
        """
        draw = int(row[0]) // rows_per_draw
        masks = self(grid, rows_per_draw, _generator(*seed, draw), draw).rows(row % rows_per_draw)
        if num_time is None or bool((num_time == grid.num_time).all()):
            return masks
        present = torch.arange(grid.num_tokens) // grid.num_freq < num_time[:, None]  # [B, N]
        context = masks.context.to_mask(grid.num_tokens) & present
        targets = masks.targets.to_mask(grid.num_tokens) & present[:, None]
        lost = ~(context.any(-1) & targets.any(-1).all(-1))
        for clip in lost.nonzero()[:, 0].tolist():
            own = Grid(grid.num_freq, int(num_time[clip]))
            try:
                alone = self(own, 1, _generator(*seed, draw, int(row[clip])), draw)
            except UserError as error:
                too_short = f"a clip of {own.num_time} time columns is too short to be masked, raise `data.min_seconds`"
                raise UserError(f"{too_short}: {error}") from error
            context[clip, : own.num_tokens] = alone.context.to_mask(own.num_tokens)[0]
            targets[clip, :, : own.num_tokens] = alone.targets.to_mask(own.num_tokens)[0]
        everywhere = torch.arange(grid.num_tokens).expand(len(present), -1)
        sets = TokenSet.from_mask(context), TokenSet.from_mask(targets)
        return Masks(*sets, float(targets.sum()) / len(targets), TokenSet(everywhere, present))


def _generator(*entropy: int) -> torch.Generator:
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    )
