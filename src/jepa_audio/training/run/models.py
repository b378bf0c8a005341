"""Build the model of some settings, and load the model of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import instantiate_module

from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.load import read_checkpoint, read_settings
from jepa_audio.training.run.weights import (
    WeightsError,
    checked_tensors,
    limited_parameters,
    load_state,
)


def build_jepa(settings: Mapping[str, Any], source: str) -> JEPA:
    """The model of some settings, with initial weights.

    Raises:
        WeightsError: if this version has no such settings.
    """
    try:
        # The parser changes the settings in place.
        return instantiate_module(JEPA, copy.deepcopy(dict(settings)))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{source}: they do not describe a model: {reason}") from error


def load_jepa(checkpoint: Path, trust: Sequence[str] = ()) -> JEPA:
    """The model of a checkpoint, on the CPU.

    Args:
        checkpoint: the `.ckpt` file of a run or of an import.
        trust: modules whose classes the checkpoint may name, see `check_class_paths`.

    Raises:
        UserError: see `read_checkpoint`; also if the checkpoint names classes of other modules, or
            if its weights do not fit its hyper-parameters.
    """
    content = read_checkpoint(checkpoint, trust)
    settings, source = read_settings(checkpoint, content, trust)
    tensors = checked_tensors(checkpoint, content["state_dict"])
    with limited_parameters(checkpoint, sum(tensor.numel() for tensor in tensors.values())):
        jepa = build_jepa(settings, source)
    load_state(jepa, checkpoint, tensors)
    return jepa
