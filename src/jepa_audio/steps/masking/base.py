"""Step 2 of a JEPA: the interface of a masker, grid → context tokens and target groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks, TokenSet


class Masker(ABC):
    """Draws the context tokens and the target groups of every clip of a batch.

    A masker is a frozen dataclass that contains only settings, and no random state or counter.
    """

    @abstractmethod
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """Draw masks for `batch_size` clips on the CPU.

        `generator` is the only source of random numbers. `step` is the optimizer step, for maskers
        that change during training.

        Raises:
            UserError: if clips of this grid cannot be masked with these settings.
        """

    def for_rows(
        self,
        grid: Grid,
        row: Int[Tensor, " B"],
        rows_per_draw: int,
        seed: tuple[int, ...],
        num_time: Int[Tensor, " B"] | None = None,
    ) -> Masks:
        """Draw the masks of the given rows of the run; the result is the same on every process.

        The masks of `rows_per_draw` rows are drawn together, with a generator that depends on
        `seed` and the index of the draw. Each process takes its rows of the draw. If a draw has all
        rows of an optimizer step (of all ranks and micro-batches), the index of the draw is the
        number of the optimizer step.

        Args:
            grid: the grid of a clip without padding.
            row: indices in the order of the run, see `AudioBatch.row`.
            rows_per_draw: number of rows that are drawn together.
            seed: integers that the masks depend on.
            num_time: number of time columns of each clip before its padding. Tokens in the padding
                are neither context nor target. If a clip loses all context tokens or all tokens of
                a target group, its masks are drawn again for its shorter grid.

        Raises:
            UserError: if a clip is too short to be masked.
        """
        draw = int(row[0]) // rows_per_draw
        masks = self(grid, rows_per_draw, _make_generator(*seed, draw), draw).rows(
            row % rows_per_draw
        )
        if num_time is None or bool((num_time == grid.num_time).all()):
            return masks
        index = torch.arange(grid.num_tokens)
        present = index // grid.num_freq < num_time[:, None]  # [B, N]
        context = masks.context.to_mask(grid.num_tokens) & present
        targets = masks.targets.to_mask(grid.num_tokens) & present[:, None]
        is_empty = ~(context.any(-1) & targets.any(-1).all(-1))
        for clip in is_empty.nonzero()[:, 0].tolist():
            short_grid = Grid(grid.num_freq, int(num_time[clip]))
            num_tokens = short_grid.num_tokens
            try:
                redrawn = self(short_grid, 1, _make_generator(*seed, draw, int(row[clip])), draw)
            except UserError as error:
                raise UserError(
                    f"a clip of {short_grid.num_time} time columns is too short to be masked, "
                    f"raise `data.min_seconds`: {error}"
                ) from error
            context[clip, :num_tokens] = redrawn.context.to_mask(num_tokens)[0]
            targets[clip, :, :num_tokens] = redrawn.targets.to_mask(num_tokens)[0]
        part = Masks.from_bool(context, targets)
        all_tokens = TokenSet(index.expand(len(present), -1), present)
        return Masks(part.context, part.targets, part.targets_per_clip, all_tokens)


def _make_generator(*entropy: int) -> torch.Generator:
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
