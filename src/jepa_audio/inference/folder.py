"""The folder of an encoder: `model.safetensors` and `config.json`, read without Lightning."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jepa_audio.class_paths import check_class_paths, parse_yaml
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


_MODEL_SETTINGS = ("masker", "targets", "distance", "ema")
_FINE_TUNED = re.compile(r"(.*), fine-tuned in the mode (\S+) on (.+)", re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """Where the weights of an encoder come from.

    Attributes:
        name: name of the run, or of the folder.
        steps: number of optimizer steps of the pretraining; `None` if it is unknown.
        corpus: the training files, as the configuration of the run names them.
        model: settings of the pretraining, such as the masker.
        fine_tuned: mode and task of a fine-tuning; `None` for pretrained weights.
        folder: the folder of the run; `None` if the encoder is from another folder.
    """

    name: str
    steps: int | None = None
    corpus: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    fine_tuned: tuple[str, str] | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        text = self.name + (f", step {self.steps}" if self.steps is not None else "")
        if self.fine_tuned is None:
            return text
        return text + ", fine-tuned in the mode {} on {}".format(*self.fine_tuned)

    @property
    def short_name(self) -> str:
        """A name for a folder."""
        return "-".join([self.name, *reversed(self.fine_tuned or ())]).replace("/", "-")

    def stored(self) -> dict[str, Any]:
        """The values for a file of JSON, without a path of this machine."""
        tuned = None
        if self.fine_tuned is not None:
            tuned = dict(zip(("mode", "task"), self.fine_tuned, strict=True))
        return {
            "name": self.name,
            "steps": self.steps,
            "corpus": list(self.corpus),
            "model": dict(self.model),
            "fine_tuned": tuned,
        }


def find_origin(encoder: Encoder) -> Origin:
    """Run, steps and corpus of an encoder, from the source of `load_encoder`."""
    return _origin_of(encoder.source)


def _origin_of(source: str) -> Origin:
    # A folder and the source that it states, see `read_encoder`.
    for match in re.finditer(r" \(|$", source):
        folder = Path(source[: match.start()])
        if source and is_encoder_folder(folder):
            stated = read_json(folder / CONFIG)[KEY].get("source")
            if source in (str(folder), f"{folder} ({stated})"):
                return _stored_origin(folder)
    if (tuned := _FINE_TUNED.fullmatch(source)) is not None:
        return replace(_origin_of(tuned[1]), fine_tuned=(tuned[2], tuned[3]))
    if (of_run := re.fullmatch(r"(.*?\.ckpt)(?:, step (\d+))?", source)) is not None:
        steps = None if of_run[2] is None else int(of_run[2])
        return _origin_of_checkpoint(Path(of_run[1]), steps)
    return Origin(Path(source.partition(" (")[0]).name or "encoder")


def _origin_of_checkpoint(path: Path, steps: int | None) -> Origin:
    checkpoint = path.absolute()
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    config = run / "config.yaml"
    settings = None
    if config.is_file():
        settings = parse_yaml(config.read_text(encoding="utf-8"), str(config))
    data, model = (_mapping(_mapping(settings).get(key)) for key in ("data", "model"))
    roots = data.get("root")
    roots = roots if isinstance(roots, list) else [roots] if roots else []
    corpus = tuple(Path(str(root)).name or str(root) for root in roots)
    chosen = {name: model[name] for name in _MODEL_SETTINGS if name in model}
    return Origin(run.name, steps, corpus, chosen, folder=run)


def _stored_origin(folder: Path) -> Origin:
    """The origin in a folder of `save_encoder`; earlier versions wrote only the source."""
    settings = read_json(folder / CONFIG)[KEY]
    stored, source = settings.get("origin"), str(settings.get("source") or "")
    if not isinstance(stored, dict):
        is_known = _FINE_TUNED.fullmatch(source) or ".ckpt" in source
        return replace(_origin_of(source), folder=None) if is_known else Origin(folder.name)
    steps, corpus, tuned = (stored.get(key) for key in ("steps", "corpus", "fine_tuned"))
    return Origin(
        " ".join(str(stored.get("name") or folder.name).split()),
        steps if isinstance(steps, int) else None,
        tuple(map(str, corpus)) if isinstance(corpus, list) else (),
        _mapping(stored.get("model")),
        (str(tuned.get("mode")), str(tuned.get("task"))) if isinstance(tuned, dict) else None,
    )


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_parents(path: Path) -> None:
    """Raise `UserError` if a folder that would hold `path` is a file."""
    if wrong := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        raise UserError(f"{wrong[0]} is a file, not a folder: give another place than {path}")


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
    check_parents(folder / CONFIG)
    settings = {
        **encoder.settings,
        "window_samples": encoder.window_samples,
        "loudness_dbfs": encoder.loudness_dbfs,
        "sample_rate": encoder.sample_rate,
        "num_channels": encoder.num_channels,
        "which": encoder.which,
        "source": encoder.source,
        "origin": find_origin(encoder).stored(),
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
