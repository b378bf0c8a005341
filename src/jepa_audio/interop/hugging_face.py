"""Write an encoder as a folder that the transformers library loads without this package."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path, read_json, write_text
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import (
    CONFIG,
    KEY,
    WEIGHTS,
    check_parents,
    find_origin,
    save_encoder,
)
from jepa_audio.interop.model_card import model_card
from jepa_audio.interop.one_file import PACKAGE, OneFile

MODEL_FILE = "modeling_jepa_audio"
_MODEL = f"{PACKAGE}.interop.transformers_model"
_AUTO_CLASSES = {
    "AutoConfig": "JEPAAudioConfig",
    "AutoModel": "JEPAAudioModel",
    "AutoFeatureExtractor": "JEPAAudioFeatureExtractor",
}


def export_hugging_face(
    encoder: Encoder, output: Path, *, licence: str | None = None, scores: Sequence[str] = ()
) -> Path:
    """Write an encoder for `AutoModel.from_pretrained(output, trust_remote_code=True)`.

    The folder has the files of `save_encoder`, one Python file with the model, the settings of the
    feature extractor, and a model card. `load_encoder(output)` reads it, too.

    Args:
        encoder: an encoder with settings, see `save_encoder`.
        output: a folder that is empty or does not exist.
        licence: the licence of the weights, an identifier of the Hub such as "cc-by-4.0".
        scores: lines of the table of probe results, "| task | ... |".

    Returns:
        The folder.

    Raises:
        UserError: if the folder is not empty, or if code of the model cannot be copied.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: give another folder with `-o`")
    check_parents(output)
    if encoder.windowing != "exact":
        raise UserError(
            f"an exported model has `windowing` 'exact', not {encoder.windowing!r}: load the "
            "encoder without `windowing`"
        )
    if licence is not None and not re.fullmatch(r"[\w.+-]+", licence):
        raise UserError(f"`license` ({licence!r}) must be an identifier such as 'cc-by-4.0'")
    # Before any file is written: it can fail.
    code = model_code(encoder)
    unfinished = output.with_name(f".{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    _write_folder(encoder, unfinished, code, licence, scores)
    unfinished.replace(output)
    return output


def _write_folder(
    encoder: Encoder, folder: Path, code: str, licence: str | None, scores: Sequence[str]
) -> None:
    save_encoder(encoder, folder)
    _complete_weights(folder / WEIGHTS)
    origin = find_origin(encoder)
    config = read_json(folder / CONFIG)
    # Without the path on this machine.
    config[KEY]["source"] = str(origin)
    _write_json(folder / CONFIG, {**_auto_settings(), **config})
    extractor = {
        "feature_extractor_type": _AUTO_CLASSES["AutoFeatureExtractor"],
        "auto_map": {"AutoFeatureExtractor": _auto_map()["AutoFeatureExtractor"]},
        "feature_size": encoder.num_channels,
        "sampling_rate": encoder.sample_rate,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }
    _write_json(folder / "preprocessor_config.json", extractor)
    write_text(folder / f"{MODEL_FILE}.py", code)
    write_text(folder / "README.md", model_card(encoder, origin, licence, scores))


def model_code(encoder: Encoder) -> str:
    """The Python file of a model, with the classes of this encoder and of transformers.

    Raises:
        UserError: if a class was made outside of a module, or if its code cannot be copied.
    """
    assert encoder.settings is not None
    used = [_import_class(path) for path in _class_paths(dict(encoder.settings))]
    # The classes of a user's package are copied, too.
    packages = {PACKAGE, *(cls.__module__.partition(".")[0] for cls in used)}
    file = OneFile(packages - {"__main__", "torch", "timm"})
    for cls in used:
        file.add(cls.__module__, cls.__name__)
    for name in ("JEPAAudioConfig", "JEPAAudioModel", "JEPAAudioFeatureExtractor"):
        file.add(_MODEL, name)
    return file.text(
        "An encoder of audio, for `AutoModel.from_pretrained(..., trust_remote_code=True)`.\n\n"
        f"Written by jepa-audio {version('jepa-audio')} from its own code (Apache-2.0).\n"
    )


def _auto_map() -> dict[str, str]:
    return {auto: f"{MODEL_FILE}.{name}" for auto, name in _AUTO_CLASSES.items()}


def _auto_settings() -> dict[str, Any]:
    return {
        "architectures": [_AUTO_CLASSES["AutoModel"]],
        "auto_map": _auto_map(),
        "dtype": "float32",
        "model_type": "jepa_audio",
    }


def _complete_weights(path: Path) -> None:
    """Add the entry that transformers needs to the metadata of a file of weights."""
    tensors = load_file(path)
    with atomic_path(path) as unfinished:
        save_file(tensors, unfinished, {"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _class_paths(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        if isinstance(settings.get("class_path"), str):
            yield settings["class_path"]
        for value in settings.values():
            yield from _class_paths(value)


def _import_class(path: str) -> type:
    """The class of a path; it was checked when the encoder was loaded."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
