"""Step 2 of a JEPA: the interface of a masker, grid → context tokens and target groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Int
from torch import Tensor

from jepa_audio.steps.grid import Grid, Masks


class Masker(ABC):
    """Draws the context tokens and the target groups of every clip of a batch.

    A masker is a frozen dataclass that contains only settings, and no random state or counter.
    """

    @abstractmethod
    def __call__(self, grid: Grid, rows: Int[Tensor, " B"], seed: int, step: int) -> Masks:
        """Draw the masks of the given rows of an optimizer step, on the CPU.

        The mask of a row is a function of (`seed`, `step`, row): it does not depend on the other
        rows and on the process. What all rows of a step share, for example the masker that a
        mixture draws, is a function of (`seed`, `step`).

        Args:
            grid: the grid of a clip.
            rows: indices in the order of the run, see `AudioBatch.row`.
            seed: any integer.
            step: the optimizer step, for maskers that change during training.

        Raises:
            UserError: if clips of this grid cannot be masked with these settings.
        """

    @abstractmethod
    def expected_targets(self, grid: Grid, seed: int, step: int) -> float:
        """Expected number of target tokens of a clip, over all groups, in the masks of a step.

        The loss is divided by this number. It is the same on all processes, because it depends on
        no row.
        """

    def at(self, step: int) -> Masker:
        """The masker without a curriculum that draws masks like this one at an optimizer step."""
        return self
