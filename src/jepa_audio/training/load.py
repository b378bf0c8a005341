"""Load the model of a checkpoint of this or an earlier version."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.old_paths import with_current_paths
from jepa_audio.training.jepa import JEPA


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of the `.ckpt` file of a run; the weights are memory-mapped.

    Raises:
        UserError: if the file does not exist or is not a checkpoint of jepa-audio.
    """
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is incomplete or not a checkpoint: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(
            f"{path} is not a checkpoint of jepa-audio, because `state_dict` or "
            "`hyper_parameters` is missing; convert published weights with `jepa-audio import`"
        )
    return content


def load_jepa(checkpoint: Path) -> JEPA:
    """The model of a checkpoint, on the CPU.

    Raises:
        UserError: see `read_checkpoint`.
    """
    settings = with_current_paths(read_checkpoint(checkpoint)["hyper_parameters"])
    return JEPA.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **settings)
