"""Tokens of one front end at the time columns of another one, for targets of another front end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import FrontEnd
from jepa_audio.steps.grid import ColumnCount


def aligned_width(source: FrontEnd, front_end: FrontEnd) -> int:
    """The width of the tokens of `aligned_tokens`: D of `source` * its frequency rows.

    Raises:
        UserError: if the two front ends do not take the same waveform.
    """
    for name in ("sample_rate", "num_channels"):
        ours, other = getattr(front_end, name), getattr(source, name)
        if ours != other:
            raise UserError(
                f"`target_front_end` has `{name}` {other}, `front_end` has {ours}: both get the "
                "same waveform, set the same value"
            )
    return source.embed_dim * source.grid(source.min_samples).num_freq


def aligned_tokens(
    source: FrontEnd, front_end: FrontEnd, waveform: Float[Tensor, "B C S"]
) -> Float[Tensor, "B N T"]:
    """Tokens of `source` on the grid of `front_end`, see `column_weights`.

    The frequency rows of `source` are concatenated, lowest first. All frequency rows of the grid of
    `front_end` get the same values.
    """
    num_samples = waveform.shape[-1]
    tokens = rearrange(
        source(waveform), "b (t f) d -> b t (f d)", f=source.grid(num_samples).num_freq
    )
    weights = column_weights(source, front_end, num_samples, tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        columns = weights @ tokens.float()
    return repeat(columns, "b t d -> b (t f) d", f=front_end.grid(num_samples).num_freq)


def column_weights(
    source: FrontEnd, front_end: FrontEnd, num_samples: int, device: str | torch.device = "cpu"
) -> Float[Tensor, "T U"]:
    """The weight of each of the U columns of `source` in each of the T columns of `front_end`.

    A column is the interval between the midpoints to the centres of its neighbours. The result is
    the mean of the columns of `source` with centres in this interval; a centre on a midpoint is in
    the later interval. If `source` has no centre there, because its columns are longer, the result
    is its column with the nearest centre, the earlier one of two.

    Raises:
        UserError: if the clip is too short for one of them.
    """
    # Centres are multiples of half a sample: in quarters, midpoints are exact whole numbers.
    ours, others = (
        (4 * part.sample_rate * part.times(num_samples).double()).round().long().tolist()
        for part in (front_end, source)
    )
    return _weights(tuple(ours), tuple(others), device)


# Otherwise a GPU would wait for a copy of the weights in each step.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _weights(
    centres: tuple[int, ...], source_centres: tuple[int, ...], device: str | torch.device
) -> Float[Tensor, "T U"]:
    """The weights for centres in quarters of a sample; see `column_weights`."""
    ours, others = torch.tensor(centres), torch.tensor(source_centres)
    middle = (ours[1:] + ours[:-1]) // 2
    # The first and the last interval extend to the same distance on both sides of the centre.
    first, last = 2 * ours[:1] - middle[:1], 2 * ours[-1:] - middle[-1:]
    if not len(middle):
        first, last = others[:1], others[-1:] + 1
    low, high = torch.cat([first, middle]), torch.cat([middle, last])
    inside = (others >= low[:, None]) & (others < high[:, None])
    nearest = (others - ours[:, None]).abs().argmin(dim=1, keepdim=True)
    inside |= ~inside.any(dim=1, keepdim=True) & (torch.arange(len(others)) == nearest)
    return (inside / inside.sum(dim=1, keepdim=True)).to(device)


@dataclass(frozen=True)
class AlignedColumns:
    """For padded clips, the number of columns for which neither of two front ends sees the padding.

    Attributes:
        columns: of the front end of the input.
        source_columns: of the front end of the targets.
        last: the last column of the targets' front end that each column of the input's contains.
    """

    columns: ColumnCount
    source_columns: ColumnCount
    last: tuple[int, ...]

    @staticmethod
    def of(source: FrontEnd, front_end: FrontEnd, num_samples: int) -> AlignedColumns:
        """The columns for the targets of `source` in clips of `num_samples` with their padding."""
        used = column_weights(source, front_end, num_samples) > 0
        last = (used * torch.arange(used.shape[1])).amax(dim=1)
        return AlignedColumns(front_end.columns, source.columns, tuple(last.tolist()))

    def __call__(self, num_samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The number for clips of `num_samples` before their padding.

        Raises:
            UserError: if a clip has no such column.
        """
        present = self.source_columns(num_samples)
        columns = torch.searchsorted(torch.tensor(self.last), present)
        columns = torch.minimum(columns, self.columns(num_samples))
        if int(columns.min()) < 1:
            raise UserError(
                f"a clip of {int(num_samples.min())} samples is shorter than one token and its "
                "target: raise `data.min_seconds`"
            )
        return columns
