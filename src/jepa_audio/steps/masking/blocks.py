"""Rectangles on the plane of time and frequency: the masks of spectrogram models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.random import (
    check_share,
    draw_accepted,
    fill_up,
    floor_share,
    single_group,
)


@dataclass(frozen=True)
class MultiBlockMasker(Masker):
    """Some target blocks, each a group, and as context one large block without them.

    The masks of I-JEPA (Assran et al., 2023, arXiv:2301.08243), with three deviations. A block may
    lie at the last row and column, which the published code never draws. Aspect ratios are relative
    to the grid's own shape, the same thing on I-JEPA's square grid, and a side that the grid clips
    is paid back by the other, so that `scale` holds on a long spectrogram too. Clips keep all their
    context, not the batch's shortest.

    Args:
        num_targets: number of target blocks M; they may overlap.
        target_scale: range of a target block's share of the grid; one draw per call, so groups are
            equal.
        target_aspect: range of the ratio of a target block's share of time to its share of
            frequency.
        context_scale: range of the context block's share of the grid; its aspect is the grid's.
        min_context: rows that keep less than this share of context get new places for their blocks.
    """

    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_context: float = 0.1

    def __post_init__(self) -> None:
        if self.num_targets < 1:
            raise UserError(
                f"`num_targets` must be at least 1, got {self.num_targets}: nothing would be predicted"
            )
        _check_range("target_scale", self.target_scale, 1.0)
        _check_range("target_aspect", self.target_aspect, math.inf)
        _check_range("context_scale", self.context_scale, 1.0)
        if not 0 <= self.min_context < 1:
            raise UserError(
                f"`min_context` must lie in [0, 1), got {self.min_context}: it is a share of the tokens"
            )

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`."""
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
            targets = _place(grid, target_size.expand(num_rows, self.num_targets, 2), generator)
            context = _place(grid, context_size.expand(num_rows, 2), generator)
            return context & ~targets.any(1), targets

        return Masks.from_bool(*draw_accepted(draw, batch_size, self.min_context, self))


@dataclass(frozen=True)
class BlockMasker(Masker):
    """The union of many small blocks as the one target group, and the rest as context.

    PupuJEPA's blocks (Gu et al., 2026, arXiv:2606.25713).

    Args:
        target_share: share of the tokens to predict, met exactly.
        scale: range of a block's share of the grid; the last blocks are no larger than what is
            still free.
        long_aspect: range of time columns per frequency row, for the half of the blocks that run
            along time.
        tall_aspect: the same for the half that run along frequency.
        max_attempts: most blocks drawn per clip; what they leave open is filled with single tokens.
    """

    target_share: float = 0.8
    scale: tuple[float, float] = (0.01, 0.05)
    long_aspect: tuple[float, float] = (2.0, 5.0)
    tall_aspect: tuple[float, float] = (0.2, 0.5)
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        _check_range("scale", self.scale, 1.0)
        _check_range("long_aspect", self.long_aspect, math.inf)
        _check_range("tall_aspect", self.tall_aspect, math.inf)
        _check_attempts(self.max_attempts)

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`."""
        count = _target_count(grid, self.target_share)
        return _covered(self._size, self.max_attempts, grid, count, batch_size, generator)

    def _size(
        self, grid: Grid, uniform: Float[Tensor, "3 B"], free: Int[Tensor, " B"]
    ) -> Int[Tensor, "B 2"]:
        area = (grid.num_tokens * _between(self.scale, uniform[0])).minimum(free)
        is_long = uniform[1] < 0.5
        aspect = torch.where(
            is_long, _between(self.long_aspect, uniform[2]), _between(self.tall_aspect, uniform[2])
        )
        return torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).long()


@dataclass(frozen=True)
class StripeMasker(Masker):
    """The union of stripes across the whole grid as the one target group, and the rest as context.

    PupuJEPA's time-frequency masks (Gu et al., 2026, arXiv:2606.25713). A stripe of time is drawn
    with probability T / (T + F), a stripe of frequency otherwise.

    Args:
        target_share: share of the tokens to predict, met exactly.
        max_time_width: most time columns of a stripe of time, which is no wider than what is still
            free.
        max_freq_width: most frequency rows of a stripe of frequency, likewise.
        max_attempts: most stripes drawn per clip; what they leave open is filled with single
            tokens.
    """

    target_share: float = 0.8
    max_time_width: int = 40
    max_freq_width: int = 1
    max_attempts: int = 150

    def __post_init__(self) -> None:
        check_share("target_share", self.target_share)
        if self.max_time_width < 1 or self.max_freq_width < 1:
            raise UserError(
                f"`max_time_width` ({self.max_time_width}) and `max_freq_width` ({self.max_freq_width}) "
                f"must be at least 1: a stripe has a width"
            )
        _check_attempts(self.max_attempts)

    def __call__(self, grid: Grid, batch_size: int, generator: torch.Generator, step: int) -> Masks:
        """See `Masker`."""
        count = _target_count(grid, self.target_share)
        return _covered(self._size, self.max_attempts, grid, count, batch_size, generator)

    def _size(
        self, grid: Grid, uniform: Float[Tensor, "3 B"], free: Int[Tensor, " B"]
    ) -> Int[Tensor, "B 2"]:
        shape = torch.tensor([grid.num_time, grid.num_freq])
        widest = torch.tensor([self.max_time_width, self.max_freq_width])
        # A stripe of one axis runs along the whole other axis, so a width of 1 costs the other
        # axis' length.
        width = (1 + (uniform[1, :, None] * widest).long()).minimum(
            free[:, None] // shape.flip(0)
        )  # [B, 2]
        is_time = uniform[0] * (grid.num_time + grid.num_freq) < grid.num_time
        is_across = torch.stack([is_time, ~is_time], dim=-1)
        return torch.where(is_across, width, shape)


def _covered(
    draw_size: Callable[[Grid, Tensor, Tensor], Tensor],
    max_attempts: int,
    grid: Grid,
    count: int,
    batch_size: int,
    generator: torch.Generator,
) -> Masks:
    """Blocks, then single tokens up to exactly `count` targets; the rest is context."""
    uniform = torch.rand(max_attempts, 5, batch_size, generator=generator, dtype=torch.float64)
    covered, _ = _grow(draw_size, grid, count, uniform)
    return single_group(fill_up(covered, count, generator))


def _grow(
    draw_size: Callable[[Grid, Tensor, Tensor], Tensor],
    grid: Grid,
    count: int,
    uniform: Float[Tensor, "A 5 B"],
) -> tuple[Bool[Tensor, "B N"], Int[Tensor, "placed B 2"]]:
    """Covers the grid block by block, until a row holds `count` tokens or its next block would overshoot.

    Args:
        draw_size: (grid, uniform `[3, B]`, tokens that may still be covered `[B]`) → (time,
            frequency) extent `[B, 2]`.
        grid: the grid.
        count: tokens to cover, never exceeded.
        uniform: random numbers for A attempts, drawn beforehand: no row depends on when another one
            closes.

    Returns:
        The covered tokens, and the (time, frequency) extent of the block that every attempt placed,
        zero where it covered nothing new.
    """
    shape = torch.tensor([grid.num_time, grid.num_freq])
    batch_size = uniform.shape[-1]
    # Floats with the long axis last: bool products that broadcast are ten times slower on a CPU.
    bare = torch.ones(batch_size, grid.num_freq, grid.num_time)
    free = torch.full((batch_size,), count)
    is_open = torch.ones(batch_size, dtype=torch.bool)
    placed = []
    for attempt in uniform:
        size = draw_size(grid, attempt[:3], free).clamp(min=1).minimum(shape)
        in_time, in_freq = _sides(grid, (attempt[3:].T * (shape - size + 1)).long(), size)
        new = bare * in_time[:, None, :].float() * in_freq[:, :, None].float()
        num_new = new.sum(dim=(1, 2)).long()
        is_open &= num_new <= free
        bare -= new * is_open[:, None, None].float()
        free -= num_new * is_open
        placed.append(size * (is_open & (num_new > 0))[:, None])
        is_open &= free > 0
        if not is_open.any():
            break
    return (bare.mT == 0).flatten(1), torch.stack(placed)


def _place(
    grid: Grid, size: Int[Tensor, "*rows 2"], generator: torch.Generator
) -> Bool[Tensor, "*rows N"]:
    """Blocks of the given (time, frequency) extents, anywhere on the grid with equal probability."""
    shape = torch.tensor([grid.num_time, grid.num_freq])
    start = torch.rand(size.shape, generator=generator, dtype=torch.float64) * (shape - size + 1)
    in_time, in_freq = _sides(grid, start.long(), size)
    return (in_time[..., :, None] & in_freq[..., None, :]).flatten(-2)


def _sides(
    grid: Grid, start: Int[Tensor, "*rows 2"], size: Int[Tensor, "*rows 2"]
) -> tuple[Bool[Tensor, "*rows T"], Bool[Tensor, "*rows F"]]:
    """The time columns and the frequency rows of blocks."""
    end = start + size
    time, freq = torch.arange(grid.num_time), torch.arange(grid.num_freq)
    return (
        (time >= start[..., :1]) & (time < end[..., :1]),
        (freq >= start[..., 1:]) & (freq < end[..., 1:]),
    )


def _block_size(grid: Grid, scale: float, aspect: float) -> Int[Tensor, " 2"]:
    """(time, frequency) extent of a block that covers `scale` of the grid, as nearly as whole tokens can."""
    num_freq = min(max(round(grid.num_freq * math.sqrt(scale / aspect)), 1), grid.num_freq)
    num_time = min(max(round(grid.num_tokens * scale / num_freq), 1), grid.num_time)
    return torch.tensor([num_time, num_freq])


def _between(bounds: tuple[float, float], uniform: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _target_count(grid: Grid, target_share: float) -> int:
    count = floor_share(target_share, grid.num_tokens)
    if count < 1:
        raise UserError(
            f"`target_share` ({target_share}) leaves no target on {grid}: raise it or give longer clips"
        )
    return count


def _check_range(name: str, bounds: tuple[float, float], limit: float) -> None:
    if not 0 < bounds[0] <= bounds[1] <= limit:
        raise UserError(
            f"`{name}` must be (lowest, highest) above 0 and up to {limit}, got {bounds}"
        )


def _check_attempts(max_attempts: int) -> None:
    if max_attempts < 1:
        raise UserError(
            f"`max_attempts` must be at least 1, got {max_attempts}: 0 is what RandomMasker does"
        )
