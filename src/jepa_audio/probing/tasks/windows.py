"""How a labelled segment is cut into the windows that an encoder encodes."""

from __future__ import annotations

from dataclasses import dataclass

from jepa_audio.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Consecutive windows without overlap.

    Args:
        seconds: length of a window; `None` for the whole segment.
        min_ratio: a shorter last window is kept if it has at least this share of `seconds`.
        first_seconds: use this much of the segment; `None` for all of it.
    """

    seconds: float | None = None
    min_ratio: float = 1.0
    first_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= 1 or min(self.seconds or 1, self.first_seconds or 1) <= 0:
            raise UserError(
                f"`min_ratio` ({self.min_ratio}) must be in (0, 1], `seconds` ({self.seconds}) and "
                f"`first_seconds` ({self.first_seconds}) positive or None"
            )

    def spans(self, num_samples: int, sample_rate: int) -> list[tuple[int, int]]:
        """First sample and end (exclusive) of every window of a segment of `num_samples`.

        A segment shorter than the shortest window is still one window, so that every unit is
        scored. Windows are not padded: see `LayerFeatures`.
        """
        if self.first_seconds is not None:
            num_samples = min(num_samples, round(self.first_seconds * sample_rate))
        length = num_samples if self.seconds is None else int(self.seconds * sample_rate)
        if length < 1 or num_samples < length:
            return [(0, num_samples)]
        spans = [(start, start + length) for start in range(0, num_samples - length + 1, length)]
        end = spans[-1][1]
        if (num_samples - end) / length >= self.min_ratio:
            spans.append((end, num_samples))
        return spans
