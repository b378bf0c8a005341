"""Read checkpoints; this module does not import Lightning, which takes seconds."""

from __future__ import annotations

import errno
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from jepa_audio.class_paths import check_class_paths, check_size, nested_values
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.old_paths import with_current_paths
from jepa_audio.training.run.stored_objects import stand_ins
from jepa_audio.training.run.weights import WeightsError

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
    ArithmeticError,
    AssertionError,
    struct.error,
)


class DamagedCheckpointError(WeightsError):
    """A file that is not a complete checkpoint; the message names the file and the damage."""


def read_torch_file(path: Path, mmap: bool = False, trust: Sequence[str] = ()) -> Any:
    """The content of a file of `torch.save`, without running code of the file.

    Args:
        path: the file.
        trust: modules whose objects are accepted; a `StoredObject` replaces each of them.
        mmap: read tensors when they are used; refuses files of torch 1.5 and earlier.

    Raises:
        DamagedCheckpointError: if torch cannot read the file.
    """
    try:
        with safe_globals(stand_ins(path, trust)):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _TORCH_ERRORS as error:
        raise DamagedCheckpointError(f"{path} {damage(path, error)}") from error


def read_checkpoint(path: Path, trust: Sequence[str] = ()) -> dict[str, Any]:
    """The content of the `.ckpt` file of a run; the weights are memory-mapped.

    Raises:
        MissingFileError: if the file does not exist.
        DamagedCheckpointError: if the file is not a checkpoint of jepa-audio.
    """
    if not path.is_file():
        raise missing_checkpoint(path)
    # Otherwise torch could take the file for one of torch 1.5, which cannot be memory-mapped.
    if not zipfile.is_zipfile(path):
        raise DamagedCheckpointError(f"{path} {damage(path)}")
    content = read_torch_file(path, mmap=True, trust=trust)
    needed = ("state_dict", "hyper_parameters")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), dict) for name in needed
    ):
        raise DamagedCheckpointError(
            f"{path} is not a checkpoint of jepa-audio, because `state_dict` or "
            "`hyper_parameters` is missing; convert published weights with `jepa-audio import`"
        )
    return content


def missing_checkpoint(path: Path) -> MissingFileError:
    """The error for a path that is not a file; for the folder of a run, it names `last.ckpt`."""
    last = path / "checkpoints" / "last.ckpt"
    hint = f"; this is the folder of a run: give {last}" if last.is_file() else ""
    return MissingFileError(f"no checkpoint at {path}{hint}")


def check_sums(path: Path) -> None:
    """Read a checkpoint completely and compare the checksums, which torch does not compare.

    Raises:
        DamagedCheckpointError: if a part of the file has changed since it was written.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise DamagedCheckpointError(f"{path} {damage(path, error)}") from error
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


def read_settings(
    checkpoint: Path,
    content: dict[str, Any],
    trust: Sequence[str] = (),
    built: Sequence[str] | None = None,
) -> tuple[dict[str, Any], str]:
    """The hyper-parameters in the content of a checkpoint, and their name in messages.

    Args:
        checkpoint: the file.
        content: its content.
        trust: modules whose classes it may name.
        built: the parts of a model that will be built; `None` for all. The classes of this package
            in other parts are not imported: those of training import Lightning.

    Raises:
        UserError: if they name classes of other modules, see `check_class_paths`.
    """
    source = f"{checkpoint}, hyper-parameters"
    check_size(content["hyper_parameters"], nested_values, source)
    settings = with_current_paths(content["hyper_parameters"])
    # Lightning stores the function that builds the model; it is always `build_jepa`.
    settings.pop("_instantiator", None)
    used = settings.keys() if built is None else set(built)
    check_class_paths({k: v for k, v in settings.items() if k in used}, source, trust)
    others = {k: v for k, v in settings.items() if k not in used}
    check_class_paths(others, source, (*trust, "jepa_audio", "torch.optim"))
    return settings, source


def damage(path: Path, error: BaseException | None = None) -> str:
    """What is wrong with a file that torch cannot read.

    The advice in torch's own messages, to let the file run code, is left out.
    """
    # torch also raises EINVAL, for a file that is cut short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"cannot be read: {error.strerror or error}"
    if path.stat().st_size == 0:
        return "is damaged: the file is empty"
    if name := re.search(r"GLOBAL (\S+)", str(error)):
        module = name[1].rpartition(".")[0] or "builtins"
        remedy = f"; if you trust the file, `--trust {module}` opens it without these objects"
        return (
            f"would run code ({name[1]}) when it is opened, and is refused: it contains objects "
            f"other than weights and settings{'' if 'is blocked' in str(error) else remedy}"
        )
    if not zipfile.is_zipfile(path):
        return f"is damaged: {_other_content(path)}"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"is damaged: {_other_content(path) if 'weights_only' in reason else reason}"


def _other_content(path: Path) -> str:
    """What a file contains that should contain weights, from its first bytes."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; run `git lfs pull`"
    return "it is incomplete, or contains objects other than weights and plain values"
