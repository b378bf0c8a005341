"""Augmentations of training clips: gain, time shift, mixup and SpecAugment.

All random numbers of a clip are drawn from (seed, epoch, clip), so that they do not depend on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F
from torchaudio.functional import mask_along_axis

from jepa_audio.errors import UserError, check_bounds
from jepa_audio.probing.tasks.labels import UNKNOWN, Labels
from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd


def check_options(
    group: str, settings: object, low: int | float, high: int | float, *names: str
) -> None:
    """`check_bounds`, whose message has the keys of the options, such as `data.mixup`."""
    keys = {f"{group}.{name}": getattr(settings, name) for name in names}
    check_bounds(SimpleNamespace(**keys), low, high, *keys)


@dataclass(frozen=True)
class SpecAugment:
    """Replace one interval of time and one of frequency by zeros in each window.

    This is SpecAugment (Park et al., 2019, arXiv:1904.08779) without time warping. The normalised
    log spectrogram is masked, whose mean is 0. For a front end without a spectrogram, the tokens
    are masked, in time only.

    Args:
        time: largest length of the interval of time, as a share of a window.
        frequency: largest width of the interval of frequency, as a share of the bands.
    """

    time: float
    frequency: float

    def __post_init__(self) -> None:
        keys = {"time_mask": self.time, "freq_mask": self.frequency}
        check_options("model", SimpleNamespace(**keys), 0, 1, *keys)

    def check(self, front_end: FrontEnd) -> None:
        """Raise `UserError` if the front end has no frequencies to mask."""
        if self.frequency and not isinstance(front_end, SpectrogramFrontEnd):
            raise UserError(
                f"`model.freq_mask` ({self.frequency}) must be 0: {type(front_end).__name__} has "
                "no spectrogram whose bands could be masked; use `model.time_mask`"
            )

    def tokens(
        self, front_end: FrontEnd, waveform: Float[Tensor, "B C S"], seeds: Sequence[int]
    ) -> Float[Tensor, "B N D"]:
        """Tokens of clips; each clip is masked at random positions that its seed determines."""
        if isinstance(front_end, SpectrogramFrontEnd):
            image = front_end.image(waveform)  # [B, C, T, F]
            return front_end.embed_patches(self._mask(image, seeds, time_axis=1))
        tokens, grid = front_end(waveform), front_end.grid(waveform.shape[-1])
        columns = tokens.unflatten(1, (grid.num_time, grid.num_freq)).flatten(2)  # [B, T, F * D]
        return self._mask(columns, seeds, time_axis=0).view_as(tokens)

    def _mask(self, batch: Tensor, seeds: Sequence[int], time_axis: int) -> Tensor:
        masked = []
        with torch.random.fork_rng(devices=[]):
            for clip, seed in zip(batch, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                for axis, share in ((time_axis, self.time), (time_axis + 1, self.frequency)):
                    if share:
                        clip = mask_along_axis(clip, round(share * clip.shape[axis]), 0.0, axis)  # noqa: PLW2901
                masked.append(clip)
        return torch.stack(masked)


def soft_targets(labels: Labels, targets: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows C"]:
    """Targets as numbers that can be averaged: a row with an unknown class has only zeros."""
    if labels.kind != "class":
        return targets
    known = (targets != UNKNOWN)[:, None]
    return F.one_hot(targets.clamp_min(0), labels.num_outputs) * known.float()


def loss_of(
    labels: Labels, logits: Float[Tensor, "rows C"], targets: Shaped[Tensor, "rows ..."]
) -> tuple[Tensor, Tensor]:
    """Mean loss over the rows with a label, and the number of these rows.

    The targets are those of `Labels.row_targets`, or a mixture of two `soft_targets`: the loss of
    a mixture is the mixture of the losses, as in mixup (Zhang et al., 2018, arXiv:1710.09412), for
    numbers up to a constant. Rows count by the share of the mixture that has a class.
    """
    if labels.kind != "class":
        size = logits.new_tensor(float(len(logits)))
        return labels.losses(logits[:, None], targets)[0], size
    if not targets.is_floating_point():
        return labels.losses(logits[:, None], targets)[0], (targets != UNKNOWN).sum().float()
    size = targets.sum()
    return -(targets * logits.log_softmax(dim=-1)).sum() / size.clamp_min(1e-9), size
