"""Load the encoder of a run, a checkpoint, an exported folder, or a model of the Hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

from jepa_audio.errors import MAX_SECONDS, MissingFileError, UserError
from jepa_audio.files import similar_name
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import (
    CONFIG,
    WEIGHTS,
    build_parts,
    is_encoder_folder,
    read_encoder,
)
from jepa_audio.training.run.load import missing_checkpoint, read_checkpoint, read_settings
from jepa_audio.training.run.weights import checked_tensors, limited_parameters, load_state

log = logging.getLogger(__name__)

Which = Literal["context", "target", "random"]
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")


def load_encoder(
    what: str | os.PathLike[str],
    which: Which = "context",
    *,
    trust: Sequence[str] = (),
    overlap: float = 0.0,
    windowing: Literal["exact", "wavjepa"] = "exact",
    max_windows: int = 64,
    random_seed: int | None = None,
) -> Encoder:
    """A pretrained encoder, or its random-init baseline, on the CPU.

    Args:
        what: the folder of a run (its last checkpoint is used), a `.ckpt` file of `jepa-audio fit`
            or `jepa-audio import`, a folder of `save_encoder` or `jepa-audio export`, or the name
            of a model on the Hugging Face Hub: "user/name" or "user/name@revision".
        which: "context" for the context encoder, "target" for the target encoder, "random" for the
            context encoder with its weights of step 0.
        trust: modules whose classes the file may name, besides jepa_audio and torch.optim.
        overlap: see `Encoder`.
        windowing: see `Encoder`.
        max_windows: see `Encoder`.
        random_seed: seed of the random weights; `None` for the seed of the run.

    Raises:
        UserError: if nothing can be loaded, with the nearest names; or if a file is damaged or
            names other classes.
    """
    if which not in ("context", "target", "random"):
        raise UserError(f"`which` ({which!r}) must be 'context', 'target' or 'random'")
    if not isinstance(what, str | os.PathLike):
        raise UserError(
            f"`what` ({what!r}) must be the path of a run, a checkpoint or an exported folder, or "
            "a name on the Hugging Face Hub"
        )
    options: dict[str, Any] = {
        "overlap": overlap,
        "windowing": windowing,
        "max_windows": max_windows,
    }
    path = find_encoder(os.fspath(what))
    log_chosen(os.fspath(what), path)
    if path.is_dir():
        encoder, seed = read_encoder(path, trust=trust, **options), 0
        if which == "target" and encoder.which != "target":
            raise UserError(f"{path} holds the {encoder.which} encoder, not the target encoder")
        if which == "context" and encoder.which == "target":
            log.warning("%s holds the target encoder, which is loaded", path)
    else:
        encoder, seed = _read_checkpoint(path, which, trust, options)
    if which != "random":
        return encoder
    return encoder.random_twin(seed if random_seed is None else random_seed)


def _read_checkpoint(
    path: Path, which: Which, trust: Sequence[str], options: dict[str, Any]
) -> tuple[Encoder, int]:
    """An encoder of a checkpoint, and the seed of the run."""
    content = read_checkpoint(path, trust)
    settings, source = read_settings(path, content, trust, ("front_end", "encoder"))
    tensors = checked_tensors(path, content["state_dict"])
    with limited_parameters(path, sum(tensor.numel() for tensor in tensors.values())):
        front_end, encoder = build_parts(settings, source)
    prefix = "target_" if which == "target" else ""
    has_own = any(name.startswith("target_front_end.") for name in tensors)
    # Another front end, which makes targets alone, is stored under another name.
    own_front_end = prefix if has_own else ""
    load_state(front_end, path, tensors, f"{own_front_end}front_end.")
    load_state(encoder, path, tensors, f"{prefix}encoder.")
    stored = {name: settings[name] for name in ("front_end", "encoder")}
    step = content.get("global_step")
    loaded = Encoder(
        front_end,
        encoder,
        _crop_samples(path, content, front_end.sample_rate),
        loudness_dbfs=_loudness(path, content),
        settings=stored,
        source=f"{path}, step {step}" if step is not None else str(path),
        which="target" if which == "target" else "context",
        **options,
    )
    seed = settings.get("seed", 0)
    return loaded, seed if isinstance(seed, int) else 0


def num_crop_samples(checkpoint: Path, sample_rate: int, trust: Sequence[str] = ()) -> int:
    """Samples of a training crop of the run that wrote a checkpoint.

    Raises:
        UserError: if the checkpoint does not contain `crop_seconds`, or an impossible value.
    """
    return _crop_samples(checkpoint, read_checkpoint(checkpoint, trust), sample_rate)


def _crop_samples(checkpoint: Path, content: dict[str, Any], sample_rate: int) -> int:
    settings = content.get("datamodule_hyper_parameters", {})
    seconds = settings.get("crop_seconds") if isinstance(settings, dict) else None
    if seconds is None:
        raise UserError(
            f"{checkpoint} does not contain `crop_seconds`, the length of a training crop: "
            "use a checkpoint of `jepa-audio fit` or `jepa-audio import`"
        )
    if not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise UserError(
            f"{checkpoint}: `crop_seconds` ({seconds!r}) must be a number in (0, {MAX_SECONDS}]"
        )
    return round(seconds * sample_rate)


def find_encoder(what: str) -> Path:
    """The checkpoint or the exported folder that `what` names; a model of the Hub is downloaded.

    Args:
        what: see `load_encoder`.

    Raises:
        UserError: if there is none, with the nearest names.
    """
    path = Path(what).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if path.is_file():
        _check_kind(path)
        return path
    if path.is_dir():
        return _find_in_folder(path)
    hub_name = _HUB_NAME.fullmatch(what)
    if hub_name and path.suffix != ".ckpt" and not path.parent.exists():
        return _download(hub_name[1], hub_name[2])
    raise _missing(path)


def _check_kind(file: Path) -> None:
    """Refuse a file of another kind, such as the `config.yaml` of a run; others may be damaged."""
    if file.suffix == ".ckpt" or is_zipfile(file):
        return
    remedy = "the folder of a run, a checkpoint or an exported folder"
    with suppress(UserError):
        _find_in_folder(file.parent)
        remedy = f"the folder {file.parent}"
    raise UserError(f"{file} is not a checkpoint (.ckpt): give {remedy}")


def log_chosen(what: str, path: Path) -> None:
    """Name the checkpoint that was chosen in the folder of a run."""
    if path.suffix == ".ckpt" and not what.endswith(".ckpt"):
        log.info("%s: the encoder of %s is used", what, path.name)


def _loudness(checkpoint: Path, content: dict[str, Any]) -> float | None:
    """The level of the clips in training, in dBFS; `None` without such a setting."""
    settings = content.get("datamodule_hyper_parameters", {})
    dbfs = settings.get("loudness_dbfs") if isinstance(settings, dict) else None
    if dbfs is not None and not (isinstance(dbfs, int | float) and isfinite(dbfs)):
        raise UserError(f"{checkpoint}: `loudness_dbfs` ({dbfs!r}) must be a finite number")
    return dbfs if dbfs is None else float(dbfs)


def _find_in_folder(folder: Path) -> Path:
    if is_encoder_folder(folder):
        return folder
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    found = sorted(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if found:
        last = checkpoints / "last.ckpt"
        return last if last.is_file() else found[-1]
    if any(folder.glob("*.safetensors")) or (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds weights of another layout, or none: `jepa-audio import LAYOUT "
            f"{folder}` converts published weights to a checkpoint that can be loaded"
        )
    runs = sorted(path.parent.parent for path in folder.glob("*/checkpoints/last.ckpt"))
    hint = f"; it has runs: give {' or '.join(map(str, runs[:3]))}" if runs else ""
    raise UserError(
        f"{folder} is neither the folder of a run (checkpoints/last.ckpt) nor of an exported "
        f"encoder ({CONFIG} and {WEIGHTS}){hint}"
    )


def _missing(path: Path) -> MissingFileError:
    """The error for a path that does not exist, with the nearest name that exists."""
    hint = similar_name(path)
    if path.suffix == ".ckpt":
        return MissingFileError(f"{missing_checkpoint(path)}{hint}")
    return MissingFileError(f"there is no encoder at {path}{hint}")


def _download(name: str, revision: str | None) -> Path:
    """The files of a model of the Hub, in the cache of `huggingface_hub`."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS])
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise MissingFileError(
            f"there is no folder {name}, and the Hugging Face Hub cannot be reached, nor does its "
            f"cache hold this model: check the connection and HF_HUB_OFFLINE ({reason[:200]})"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MissingFileError(
            f"there is no folder {name}, and the Hugging Face Hub does not give a model of this "
            f"name: {reason[:200]}"
        ) from error
    return _find_in_folder(Path(folder))
