"""Read checkpoints, and load the model of a checkpoint of this or an earlier version."""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.old_paths import with_current_paths
from jepa_audio.training.jepa import JEPA

# What torch raises for a file that it did not write, that is incomplete, or that has other objects.
_TORCH_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
)


class DamagedCheckpointError(UserError):
    """A file that is not a complete checkpoint; the message names the file and the damage."""


def read_torch_file(path: Path, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`, without running code of the file.

    Args:
        path: the file.
        mmap: read tensors when they are used; refuses files of torch 1.5 and earlier.

    Raises:
        DamagedCheckpointError: if torch cannot read the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _TORCH_ERRORS as error:
        raise DamagedCheckpointError(f"{path} {_damage(path, error)}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of the `.ckpt` file of a run; the weights are memory-mapped.

    Raises:
        MissingFileError: if the file does not exist.
        DamagedCheckpointError: if the file is not a checkpoint of jepa-audio.
    """
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}")
    # Otherwise torch could take the file for one of torch 1.5, which cannot be memory-mapped.
    if not zipfile.is_zipfile(path):
        raise DamagedCheckpointError(f"{path} {_damage(path)}")
    content = read_torch_file(path, mmap=True)
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise DamagedCheckpointError(
            f"{path} is not a checkpoint of jepa-audio, because `state_dict` or "
            "`hyper_parameters` is missing; convert published weights with `jepa-audio import`"
        )
    return content


def check_sums(path: Path) -> None:
    """Read a checkpoint completely and compare the checksums, which torch does not compare.

    Raises:
        DamagedCheckpointError: if a part of the file has changed since it was written.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise DamagedCheckpointError(f"{path} {_damage(path, error)}") from error
    if damaged is not None:
        raise DamagedCheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")


def find_whole_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a folder and its optimizer step, if there is one."""
    whole = max(_whole_checkpoints(folder), default=None)
    return None if whole is None else (whole[2], whole[0])


def _whole_checkpoints(folder: Path) -> Iterator[tuple[int, float, Path]]:
    for path in folder.glob("*.ckpt"):
        try:
            step = int(read_checkpoint(path)["global_step"])
            check_sums(path)
        except (UserError, KeyError, TypeError):
            continue
        yield step, path.stat().st_mtime, path


def load_jepa(checkpoint: Path) -> JEPA:
    """The model of a checkpoint, on the CPU.

    Raises:
        UserError: see `read_checkpoint`.
    """
    settings = with_current_paths(read_checkpoint(checkpoint)["hyper_parameters"])
    return JEPA.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **settings)


def _damage(path: Path, error: BaseException | None = None) -> str:
    """What is wrong with a file that torch cannot read.

    The advice in torch's own messages, to let the file run code, is left out.
    """
    # torch also raises EINVAL, for a file that is cut short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"cannot be read: {error.strerror or error}"
    if path.stat().st_size == 0:
        return "is damaged: the file is empty"
    if name := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"would run code ({name[1]}) when it is opened, and is refused: it holds other objects "
            "than weights and settings"
        )
    if not zipfile.is_zipfile(path):
        return "is damaged: it is incomplete, or is not a checkpoint"
    return f"is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}"
