"""The literal step of a recipe."""

from __future__ import annotations

from torch import nn

from jepa_audio.training.jepa import JEPA
from tests.oracles.pupujepa_literal import LiteralPupuJEPA
from tests.oracles.wavjepa_literal import LiteralWavJEPA


def literal_of(jepa: JEPA, num_samples: int) -> nn.Module:
    """The literal WavJEPA or PupuJEPA with the weights of `jepa`, for clips of one length."""
    if jepa.targets.view == "targets":
        return LiteralPupuJEPA(jepa, num_samples)
    return LiteralWavJEPA(jepa)
