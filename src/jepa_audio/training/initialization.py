"""Draw initial weights that depend only on a seed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.losses import Distance
from jepa_audio.steps.predictor import Predictor


def draw_weights(parts: Iterable[FrontEnd | Transformer | Predictor | Distance], seed: int) -> None:
    """Draw the initial weights of the given modules from one generator, in the given order."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would also change the random state of other devices.
        torch.default_generator.manual_seed(seed)
        for part in parts:
            part.reset_parameters()
