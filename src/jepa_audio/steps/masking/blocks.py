"""Maskers that draw rectangles on the time-frequency grid, for spectrogram models."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.sampling import (
    add_random_tokens,
    check_min_context,
    check_range,
    check_share,
    draw_accepted,
    floor_share,
    single_group,
)


@dataclass(frozen=True)
class MultiBlockMasker(Masker):
    """Each target group is a block; the context is one large block without the targets.

    These are the masks of I-JEPA (Assran et al., 2023, arXiv:2301.08243), with three deviations:

    - Blocks can contain the last row and column; the published code never draws these.
    - Aspect ratios are relative to the shape of the grid, which is square in I-JEPA. If the grid
      limits one side of a block, the other side grows, so that the block has the drawn share.
    - Clips keep all context tokens; I-JEPA reduces them to the smallest number in the batch.

    Args:
        num_targets: number of target blocks M; blocks may overlap.
        target_scale: range of the share of the grid that a target block covers; one share is drawn
            per call, for all groups.
        target_aspect: range of the ratio (share of the time columns) / (share of the frequency
            rows) of a target block.
        context_scale: range of the share of the grid that the context block covers; the block has
            the aspect ratio of the grid.
        min_context: smallest share of context tokens; the masks of other clips are drawn again.
    """

    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_context: float = 0.1

    def __post_init__(self) -> None:
        check_bounds(self, 1, math.inf, "num_targets")
        check_range("target_scale", self.target_scale, 1.0)
        check_range("target_aspect", self.target_aspect)
        check_range("context_scale", self.context_scale, 1.0)
        check_min_context(self.min_context)

    @override
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        uniform = torch.rand(3, generator=generator, dtype=torch.float64)
        ranges = torch.tensor(
            [self.target_scale, self.target_aspect, self.context_scale], dtype=torch.float64
        )
        target_scale, target_aspect, context_scale = torch.lerp(
            ranges[:, 0], ranges[:, 1], uniform
        ).tolist()
        target_size = _block_size(grid, target_scale, target_aspect)
        context_size = _block_size(grid, context_scale, 1.0)

        def draw(num_rows: int) -> tuple[Tensor, Tensor]:
            sizes = target_size.expand(num_rows, self.num_targets, 2)
            targets = _draw_blocks(grid, sizes, generator)
            context = _draw_blocks(grid, context_size.expand(num_rows, 2), generator)
            return context & ~targets.any(1), targets

        return Masks.from_bool(*draw_accepted(draw, batch_size, self.min_context, self))


class _UnionMasker(Masker):
    """One target group, the union of rectangles; all other tokens are context.

    Subclasses define the settings `target_share` and `max_attempts`, and the sizes.
    """

    target_share: float
    max_attempts: int

    @override
    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        count = floor_share(self.target_share, grid.num_tokens)
        if count < 1:
            raise UserError(
                f"`target_share` ({self.target_share}) gives no target on {grid}: raise "
                "`target_share` or `data.crop_seconds`"
            )
        size = (self.max_attempts, 5, batch_size)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        covered, _ = self._cover(grid, count, uniform)
        return single_group(add_random_tokens(covered, count, generator))

    @abstractmethod
    def _draw_size(self, grid: Grid, uniform: Tensor, missing: Tensor) -> Tensor:
        """The (time, frequency) sizes `[B, 2]` of the next rectangles.

        `uniform` `[3, B]` are random numbers in [0, 1). `missing` `[B]` is the number of target
        tokens that each clip still needs.
        """

    def _cover(
        self, grid: Grid, count: int, uniform: Float[Tensor, "A 5 B"]
    ) -> tuple[Bool[Tensor, "B N"], Int[Tensor, "placed B 2"]]:
        """Add rectangles to every clip until the next one would exceed `count` covered tokens.

        `uniform` contains the random numbers of all A attempts: three for the size and two for the
        position of a rectangle. They are drawn in advance, so that the masks of a clip do not
        depend on the number of attempts of other clips.

        Returns:
            The covered tokens, and the (time, frequency) size of the rectangle of every attempt.
            The size is 0 if the attempt covered no new token.
        """
        shape = torch.tensor([grid.num_time, grid.num_freq])
        batch_size = uniform.shape[-1]
        # The masks are floats, and the long axis (time) is last. Products of broadcast bools are
        # ten times slower on a CPU.
        uncovered = torch.ones(batch_size, grid.num_freq, grid.num_time)
        missing = torch.full((batch_size,), count)
        takes_more = torch.ones(batch_size, dtype=torch.bool)
        placed = []
        for attempt in uniform:
            size = self._draw_size(grid, attempt[:3], missing).clamp(min=1).minimum(shape)
            in_time, in_freq = _extents(grid, (attempt[3:].T * (shape - size + 1)).long(), size)
            new = uncovered * in_time[:, None, :].float() * in_freq[:, :, None].float()
            num_new = new.sum(dim=(1, 2)).long()
            takes_more &= num_new <= missing
            uncovered -= new * takes_more[:, None, None].float()
            missing -= num_new * takes_more
            placed.append(size * (takes_more & (num_new > 0))[:, None])
            takes_more &= missing > 0
            if not takes_more.any():
                break
        return (uncovered.mT == 0).flatten(1), torch.stack(placed)


@dataclass(frozen=True)
class BlockMasker(_UnionMasker):
    """One target group, the union of many small blocks; all other tokens are context.

    These are the block masks of PupuJEPA (Gu et al., 2026, arXiv:2606.25713).

    Args:
        target_share: exact share of target tokens.
        scale: range of the share of the grid that a block covers; the last blocks are not larger
            than the number of missing target tokens.
        long_aspect: range of the ratio time columns / frequency rows of the blocks that are long in
            time, which are half of the blocks.
        tall_aspect: range of this ratio for the blocks that are long in frequency.
        max_attempts: maximum number of blocks per clip; single random tokens complete the share.
    """

    target_share: float = 0.8
    scale: tuple[float, float] = (0.01, 0.05)
    long_aspect: tuple[float, float] = (2.0, 5.0)
    tall_aspect: tuple[float, float] = (0.2, 0.5)
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_range("scale", self.scale, 1.0)
        check_range("long_aspect", self.long_aspect)
        check_range("tall_aspect", self.tall_aspect)
        check_bounds(self, 1, math.inf, "max_attempts")

    @override
    def _draw_size(self, grid: Grid, uniform: Tensor, missing: Tensor) -> Tensor:
        area = (grid.num_tokens * _interpolate(self.scale, uniform[0])).minimum(missing)
        aspect = torch.where(
            uniform[1] < 0.5,
            _interpolate(self.long_aspect, uniform[2]),
            _interpolate(self.tall_aspect, uniform[2]),
        )
        return torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).long()


@dataclass(frozen=True)
class StripeMasker(_UnionMasker):
    """One target group, the union of stripes across the grid; all other tokens are context.

    These are the time-frequency masks of PupuJEPA (Gu et al., 2026, arXiv:2606.25713). A stripe
    covers complete time columns with probability T / (T + F), and complete frequency rows
    otherwise. The last stripes are not larger than the number of missing target tokens.

    Args:
        target_share: exact share of target tokens.
        max_time_width: maximum number of time columns of a stripe.
        max_freq_width: maximum number of frequency rows of a stripe.
        max_attempts: maximum number of stripes per clip; single random tokens complete the share.
    """

    target_share: float = 0.8
    max_time_width: int = 40
    max_freq_width: int = 1
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        check_bounds(self, 1, math.inf, "max_time_width", "max_freq_width", "max_attempts")

    @override
    def _draw_size(self, grid: Grid, uniform: Tensor, missing: Tensor) -> Tensor:
        shape = torch.tensor([grid.num_time, grid.num_freq])
        max_width = torch.tensor([self.max_time_width, self.max_freq_width])
        # One column has `num_freq` tokens and one row has `num_time` tokens.
        largest = missing[:, None] // shape.flip(0)  # [B, 2]
        width = (1 + (uniform[1, :, None] * max_width).long()).minimum(largest)
        is_time = uniform[0] * (grid.num_time + grid.num_freq) < grid.num_time
        return torch.where(torch.stack([is_time, ~is_time], dim=-1), width, shape)


def _draw_blocks(
    grid: Grid, size: Int[Tensor, "*rows 2"], generator: torch.Generator
) -> Bool[Tensor, "*rows N"]:
    """Draw a block of each (time, frequency) size; all positions have the same probability."""
    shape = torch.tensor([grid.num_time, grid.num_freq])
    start = torch.rand(size.shape, generator=generator, dtype=torch.float64) * (shape - size + 1)
    in_time, in_freq = _extents(grid, start.long(), size)
    return (in_time[..., :, None] & in_freq[..., None, :]).flatten(-2)


def _extents(
    grid: Grid, start: Int[Tensor, "*rows 2"], size: Int[Tensor, "*rows 2"]
) -> tuple[Bool[Tensor, "*rows T"], Bool[Tensor, "*rows F"]]:
    """Masks of the time columns and of the frequency rows that each block covers."""
    end = start + size
    time, freq = torch.arange(grid.num_time), torch.arange(grid.num_freq)
    return (
        (time >= start[..., :1]) & (time < end[..., :1]),
        (freq >= start[..., 1:]) & (freq < end[..., 1:]),
    )


def _block_size(grid: Grid, scale: float, aspect: float) -> Int[Tensor, " 2"]:
    """The (time, frequency) size of a block that covers about the share `scale` of the grid."""
    num_freq = min(max(round(grid.num_freq * math.sqrt(scale / aspect)), 1), grid.num_freq)
    num_time = min(max(round(grid.num_tokens * scale / num_freq), 1), grid.num_time)
    return torch.tensor([num_time, num_freq])


def _interpolate(bounds: tuple[float, float], uniform: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
