"""Encoders that the user names: checkpoints with their random-init baselines, or functions."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import load_encoder
from jepa_audio.probing.encoders import Frequency, JEPAEncoder, ProbeEncoder

Windowing = Literal["exact", "wavjepa"]


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoders of a checkpoint are probed, and how they encode.

    Args:
        variants: encoders of the checkpoint, besides its random-init baseline.
        frequency: see `ProbeEncoder`.
        layers: indices of the layers that are probed; all if empty.
        random_seeds: seeds of further random-init baselines, besides that of the run.
        overlap: see `Encoder`.
        windowing: see `Encoder`.
    """

    variants: Sequence[Literal["context", "target"]] = ("context", "target")
    frequency: Frequency = "mean"
    layers: Sequence[int] = ()
    random_seeds: Sequence[int] = ()
    overlap: float = 0.0
    windowing: Windowing = "exact"

    @property
    def name_suffix(self) -> str:
        """End of the encoder's name for windows that are not the default: separate results."""
        if self.windowing != "exact":
            return f" ({self.windowing} windows)"
        return f" (overlap {self.overlap:g})" if self.overlap else ""


def load_jepa_encoder(
    checkpoint: Path,
    variant: Literal["context", "target", "random"],
    options: EncoderOptions,
    random_seed: int | None = None,
) -> JEPAEncoder:
    """One encoder of a checkpoint; "random" is the random-init baseline of the run's own seed.

    `random_seed` replaces that seed.
    """
    overlap, windowing = options.overlap, options.windowing
    frozen = load_encoder(checkpoint, variant, random_seed, overlap=overlap, windowing=windowing)
    name = run_name(checkpoint) + options.name_suffix
    shown_variant = variant if random_seed is None else f"{variant}-{random_seed}"
    encoder = JEPAEncoder(frozen, name, shown_variant, options.frequency)
    encoder.select_layers(options.layers)
    return encoder


def load_encoders(source: str, options: EncoderOptions) -> Iterator[ProbeEncoder]:
    """The random-init baselines and the encoders of a checkpoint, or the encoder of a function.

    Args:
        source: a `.ckpt` file, or `module:function` for a function without arguments that returns
            a `ProbeEncoder`.
        options: for a function, only its `layers` are used.

    Raises:
        UserError: if the checkpoint or the function does not exist, or if the function returns
            something else.
    """
    if _is_function(source):
        encoder = _import_function(source)()
        if not isinstance(encoder, ProbeEncoder):
            raise UserError(
                f"`encoder` is {source}, which returns {type(encoder).__name__}, "
                "not a `ProbeEncoder`"
            )
        yield encoder.select_layers(options.layers)
        return
    checkpoint = Path(source)
    for random_seed in (None, *options.random_seeds):
        yield load_jepa_encoder(checkpoint, "random", options, random_seed)
    for variant in options.variants:
        yield load_jepa_encoder(checkpoint, variant, options)


def check_source(source: str) -> None:
    """Raise the errors of `load_encoders` for a missing checkpoint or function."""
    if _is_function(source):
        _import_function(source)
    elif not Path(source).is_file():
        raise MissingFileError(f"no checkpoint at {source}")


def _is_function(source: str) -> bool:
    return Path(source).suffix != ".ckpt" and ":" in source


def _import_function(source: str) -> Callable[[], object]:
    folder = str(Path.cwd())
    if folder not in sys.path:
        # As `python -m` does: the user's module is in the working directory.
        sys.path.insert(0, folder)
    try:
        function = pkgutil.resolve_name(source)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"`encoder` is {source}: {error}; give a checkpoint, or MODULE:FUNCTION"
        ) from error
    if not callable(function):
        raise UserError(f"`encoder` is {source}, which is {function!r}, not a function")
    return function


def run_name(checkpoint: Path) -> str:
    """NAME for `runs/NAME/checkpoints/last.ckpt`, NAME/STEM for other files of that folder.

    The name of any other file is its stem.
    """
    path = checkpoint.resolve()
    if path.parent.name != "checkpoints":
        return path.stem
    run = path.parent.parent.name
    return run if path.stem == "last" else f"{run}/{path.stem}"
