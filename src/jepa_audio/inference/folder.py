"""The folder of an encoder: `model.safetensors` and `config.json`, read without Lightning."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jepa_audio.class_paths import check_class_paths
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import atomic_path, read_json, write_text
from jepa_audio.inference.encoder import Encoder
from jepa_audio.old_paths import with_current_paths
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.training.run.weights import WeightsError, limited_parameters, load_state

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEY = "jepa_audio"
"""The key of `config.json` with all that `read_encoder` reads; other keys are for others."""


def save_encoder(encoder: Encoder, directory: str | Path) -> Path:
    """Write the weights and the settings of an encoder to a folder, and return the folder.

    `load_encoder(directory)` reads it. The files are replaced if they exist.

    Raises:
        UserError: if the encoder was made without a configuration.
    """
    if encoder.settings is None:
        raise UserError(
            "this encoder was made from modules without a configuration, so its settings are not "
            "known: load it with `load_encoder`, or give its `settings`"
        )
    folder = Path(directory)
    settings = {
        **encoder.settings,
        "window_samples": encoder.window_samples,
        "loudness_dbfs": encoder.loudness_dbfs,
        "sample_rate": encoder.sample_rate,
        "num_channels": encoder.num_channels,
        "which": encoder.which,
        "source": encoder.source,
    }
    state = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as unfinished:
        save_file({name: value.clone() for name, value in state.items()}, unfinished)
    write_text(folder / CONFIG, json.dumps({KEY: settings}, indent=2) + "\n")
    return folder


def is_encoder_folder(folder: Path) -> bool:
    """Whether a folder holds the files of `save_encoder`."""
    if not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        return False
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and isinstance(config.get(KEY), dict)


def stored_variant(folder: Path) -> str:
    """Which encoder a folder of `save_encoder` holds: "context", "target" or "random"."""
    return str(read_json(folder / CONFIG)[KEY].get("which", "context"))


def read_encoder(directory: str | Path, *, trust: Sequence[str] = (), **options: Any) -> Encoder:
    """The encoder in a folder of `save_encoder`, on the CPU.

    Args:
        directory: the folder.
        trust: modules whose classes `config.json` may name, see `check_class_paths`.
        options: `overlap`, `windowing` and `max_windows` of the `Encoder`.

    Raises:
        UserError: if a file is missing, damaged, does not fit the other one, or names classes of
            other modules.
    """
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder} holds no encoder: {name} is missing")
    source = f"{folder / CONFIG}, `{KEY}`"
    config = read_json(folder / CONFIG)
    settings = config.get(KEY) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{folder / CONFIG} has no object `{KEY}`: it is of another program")
    settings = dict(settings)
    origin, which = str(settings.pop("source", "")), settings.pop("which", "context")
    window_samples = settings.get("window_samples")
    if not isinstance(window_samples, int) or not 0 < window_samples < 1 << 40:
        raise UserError(f"{source}: `window_samples` ({window_samples!r}) must be a whole number")
    loudness = settings.get("loudness_dbfs")
    if loudness is not None and not isinstance(loudness, int | float):
        raise UserError(f"{source}: `loudness_dbfs` ({loudness!r}) must be a number or null")
    parts = with_current_paths({name: settings.get(name) for name in ("front_end", "encoder")})
    check_class_paths(parts, source, trust)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    with limited_parameters(path, sum(tensor.numel() for tensor in tensors.values())):
        front_end, network = build_parts(parts, source)
    load_state(front_end, path, tensors, "front_end.")
    load_state(network, path, tensors, "encoder.")
    encoder = Encoder(
        front_end,
        network,
        window_samples,
        loudness_dbfs=None if loudness is None else float(loudness),
        settings=parts,
        source=f"{folder} ({origin})" if origin else str(folder),
        which=which if which in ("target", "random") else "context",
        **options,
    )
    for name in ("sample_rate", "num_channels"):
        if settings.get(name) not in (None, getattr(encoder, name)):
            raise UserError(
                f"{source}: `{name}` ({settings[name]!r}) differs from the front end's "
                f"{getattr(encoder, name)}"
            )
    return encoder


def build_parts(settings: Mapping[str, Any], source: str) -> tuple[FrontEnd, Transformer]:
    """The front end and the encoder of stored settings, with initial weights.

    Args:
        settings: class paths and arguments under "front_end" and "encoder"; others are not used.
        source: where they come from, for the error message.

    Raises:
        WeightsError: if this version has no such settings.
    """
    from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--front_end", type=FrontEnd)
    parser.add_argument("--encoder", type=Transformer)
    chosen = {name: settings.get(name) for name in ("front_end", "encoder")}
    if missing := [name for name, value in chosen.items() if not isinstance(value, Mapping)]:
        raise WeightsError(f"{source}: they do not describe a model: `{missing[0]}` is missing")
    try:
        # The parser changes the settings in place.
        parsed = parser.parse_object(copy.deepcopy(chosen))
        # jsonargparse 4.53 renames this method.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        built = instantiate(parsed)
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{source}: they do not describe a model: {reason}") from error
    return built.front_end, built.encoder
