"""Encoders that can be probed: of checkpoints, log-mel statistics and any function."""

from __future__ import annotations

import hashlib
import logging
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder, state_hash
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.folder import stored_variant
from jepa_audio.inference.load import Which, find_encoder, load_encoder, log_chosen
from jepa_audio.inference.pooling import Pooling
from jepa_audio.steps.front_ends.transforms import LogMel

log = logging.getLogger(__name__)

Windowing = Literal["exact", "wavjepa"]


class ProbeEncoder(ABC):
    """A frozen encoder: waveforms → the tokens of every layer, with their times.

    Args:
        name: name of the model in the results.
        variant: which encoder of the model, for example "target".
        sample_rate: in Hz.

    Attributes:
        encoder_hash: hash of the weights.
        settings: settings of the windows of long clips; part of `function_hash`.
        min_samples: samples of the shortest clip that is encoded without padding.
    """

    encoder_hash: str
    settings: str = ""
    min_samples: int = 1

    def __init__(
        self,
        name: str,
        variant: str,
        sample_rate: int,
        num_channels: int,
        layer_names: tuple[str, ...],
    ) -> None:
        self.name, self.variant = name, variant
        self.sample_rate, self.num_channels = sample_rate, num_channels
        self.layer_names = layer_names
        self.layers = tuple(range(len(layer_names)))

    def select_layers(self, layers: Sequence[int]) -> ProbeEncoder:
        """Restrict this encoder to these indices of layers and return it; empty for all layers.

        Raises:
            UserError: if a layer does not exist.
        """
        names = dict(zip(self.layers, self.layer_names, strict=True))
        if not set(layers) <= set(names):
            known = ", ".join(f"{layer} ({name})" for layer, name in names.items())
            raise UserError(f"`layers` is {list(layers)}, {self.name} has {known}")
        if layers:
            self.layers = tuple(layers)
            self.layer_names = tuple(names[layer] for layer in layers)
            self.__dict__.pop("function_hash", None)
        return self

    @abstractmethod
    def encode(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        """Tokens of the layers in `layers`, in that order, with their times in seconds."""

    def to(self, device: torch.device | str) -> ProbeEncoder:
        """Move the weights to a device."""
        return self

    def encode_for_clips(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        """The tokens that are pooled to one vector for each clip."""
        return self.encode(waveform)

    def encode_clips(
        self, clips: Sequence[Float[Tensor, "C _"]], *, per_frame: bool
    ) -> Iterator[tuple[list[int], LayerFeatures]]:
        """Groups of clips of any lengths, as indices, and their features.

        Args:
            clips: at the sample rate of the encoder.
            per_frame: True for the tokens themselves, False for tokens that are pooled.
        """
        by_length: dict[int, list[int]] = {}
        for row, clip in enumerate(clips):
            by_length.setdefault(clip.shape[-1], []).append(row)
        encode = self.encode if per_frame else self.encode_for_clips
        for rows in by_length.values():
            yield rows, encode(torch.stack([clips[row] for row in rows]))

    def poolings(self, requested: Sequence[Pooling]) -> tuple[Pooling, ...]:
        """The poolings under which this encoder is probed if these are requested."""
        return tuple(requested)

    @cached_property
    def function_hash(self) -> str:
        """Hash of the weights and of the features of one second of noise.

        Two networks with the same weights can differ in norms or positions.
        """
        digest = hashlib.sha256(f"{self.encoder_hash} {self.layer_names} {self.settings}".encode())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, self.num_channels, self.sample_rate, generator=generator)
        pooling = Pooling(deviation=True, frequency="concat")
        for layer in pooling(self.encode_for_clips(0.1 * noise)):
            values = layer.double().cpu()
            # Rounding differs between devices and numbers of threads, so only the first digits
            # enter the hash.
            coarse = values / values.abs().amax().clamp_min(1e-12) * 100
            digest.update(coarse.round().to(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


class JEPAEncoder(ProbeEncoder):
    """A frozen encoder of a JEPA: trained, imported, or with random weights."""

    def __init__(self, frozen: Encoder, name: str, variant: str) -> None:
        names = ("input", *(f"block {i + 1}" for i in range(frozen.encoder.depth)))
        super().__init__(name, variant, frozen.sample_rate, frozen.num_channels, names)
        self.frozen, self.encoder_hash = frozen, state_hash(frozen)
        self.min_samples = frozen.min_samples
        self.settings = f"{frozen.window_samples} {frozen.overlap} {frozen.windowing}"
        if frozen.loudness_dbfs is not None:
            self.settings += f" {frozen.loudness_dbfs}"

    @override
    def to(self, device: torch.device | str) -> ProbeEncoder:
        self.frozen.to(device)
        return self

    @override
    def encode(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        device = next(self.frozen.parameters()).device
        return self.frozen.encode_batch(waveform.to(device), layers=self.layers)

    @override
    def encode_clips(
        self, clips: Sequence[Float[Tensor, "C _"]], *, per_frame: bool
    ) -> Iterator[tuple[list[int], LayerFeatures]]:
        device = next(self.frozen.parameters()).device
        return self.frozen.encode_clips([clip.to(device) for clip in clips], self.layers)


class LogMelStatistics(ProbeEncoder):
    """The baseline without a network: statistics of 64 log-mel bands.

    A clip is a grid of one value for each band and frame (10 ms). It is pooled like the tokens of
    an encoder, and as mean, deviation and mean absolute change over time. Bands are never averaged.
    The vector of a time column is the bands and their change since the column before. A clip that
    is too short for the reflect padding of the spectrogram is padded with zeros at its end.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__("log-mel", "statistics", sample_rate, 1, ("statistics",))
        self.log_mel = LogMel(sample_rate, n_fft=1024, hop_length=sample_rate // 100, n_mels=64)
        self.encoder_hash = hashlib.sha256(f"log-mel {sample_rate}".encode()).hexdigest()
        self.min_samples = self.log_mel.min_samples

    @override
    def encode_for_clips(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        """Bands `[B, T, 64, 1]`."""
        waveform = F.pad(waveform, (0, max(0, self.min_samples - waveform.shape[-1])))
        bands = self.log_mel(waveform).mean(dim=1).mT[..., None]  # [B, T, F, 1]
        times = torch.arange(bands.shape[1]) * (self.log_mel.hop_length / self.sample_rate)
        return _layer_features([bands], times)

    @override
    def encode(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        """Bands and their change, `[B, T, 64, 2]`."""
        features = self.encode_for_clips(waveform)
        (bands,) = features.layers
        change = bands.diff(dim=1, prepend=bands[:, :1])
        return replace(features, layers=(torch.cat([bands, change], dim=-1),))

    @override
    def poolings(self, requested: Sequence[Pooling]) -> tuple[Pooling, ...]:
        """The requested poolings without an average of bands, and the statistics of its own."""
        own = Pooling(deviation=True, change=True)
        every = (replace(pooling, frequency="concat") for pooling in (*requested, own))
        return tuple(dict.fromkeys(every))


class FunctionEncoder(ProbeEncoder):
    """Any model: a function `waveform [B, C, S] → [B, T, D]` or `[B, D]`, or a list of layers.

    The function runs in inference mode, on clips of one length at a time. The T columns are assumed
    to divide the clip into equal parts. A layer named "input" is not part of the weighted sum.

    Args:
        function: the model, on any device.
        name: name in the results.
        sample_rate: in Hz.
        layer_names: one name for each layer; by default "layer 0", "layer 1" and so on.
        encoder_hash: hash of the weights; by default from the state of a module, or from `name`.

    Raises:
        UserError: if the number of names is not the number of layers.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor | Sequence[Tensor]],
        name: str,
        sample_rate: int,
        *,
        num_channels: int = 1,
        layer_names: Sequence[str] = (),
        encoder_hash: str = "",
    ) -> None:
        self.function = function
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)
            encoder_hash = encoder_hash or state_hash(function)
        self.encoder_hash = encoder_hash or hashlib.sha256(name.encode()).hexdigest()
        num_layers = len(self._call(torch.zeros(1, num_channels, sample_rate)))
        names = tuple(layer_names) or tuple(f"layer {i}" for i in range(num_layers))
        if len(names) != num_layers:
            raise UserError(f"`layer_names` has {len(names)} names, {name} has {num_layers} layers")
        super().__init__(name, "function", sample_rate, num_channels, names)

    @override
    def to(self, device: torch.device | str) -> ProbeEncoder:
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self

    @override
    def encode(self, waveform: Float[Tensor, "B C S"]) -> LayerFeatures:
        layers = self._call(waveform)
        if len({layer.shape[:2] for layer in layers}) > 1 or len(layers[0]) != len(waveform):
            raise UserError(
                f"{self.name} gives layers of shapes {[tuple(layer.shape) for layer in layers]}; "
                f"they must be [{len(waveform)}, T, D] with the same T"
            )
        num_columns = layers[0].shape[1]
        seconds_per_column = waveform.shape[-1] / self.sample_rate / num_columns
        times = (torch.arange(num_columns) + 0.5) * seconds_per_column
        return _layer_features([layers[layer][:, :, None] for layer in self.layers], times)

    @torch.inference_mode()
    def _call(self, waveform: Tensor) -> list[Tensor]:
        """Layers `[B, T, D]` on the CPU."""
        if isinstance(self.function, nn.Module):
            waveform = waveform.to(next(self.function.parameters(), waveform).device)
        output = self.function(waveform)
        layers = [output] if isinstance(output, Tensor) else list(output)
        return [(layer[:, None] if layer.ndim == 2 else layer).float().cpu() for layer in layers]


def _layer_features(layers: Sequence[Tensor], times: Float[Tensor, " T"]) -> LayerFeatures:
    times = times.expand(len(layers[0]), -1)
    return LayerFeatures(tuple(layers), times, torch.ones_like(times, dtype=torch.bool))


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoders of a checkpoint are probed, and how they encode; see the command `probe`."""

    variants: Sequence[Literal["context", "target"]] = ("context", "target")
    layers: Sequence[int] = ()
    random_seeds: Sequence[int] = ()
    overlap: float = 0.0
    windowing: Windowing = "exact"


def load_encoders(source: str, options: EncoderOptions) -> Iterator[ProbeEncoder]:
    """The random-init baselines and the encoders of a model, or the encoder of a function.

    The call checks that the model or the function exists. The iterator loads one encoder at a time.

    Args:
        source: what `load_encoder` takes: a checkpoint, the folder of a run, an exported folder or
            a name on the Hub; or `module:function` for a function without arguments that returns a
            `ProbeEncoder`.
        options: an exported folder has one variant, which is probed for any `variants`; for a
            function, only the `layers` are used.

    Raises:
        MissingFileError: if the model does not exist.
        UserError: if the function does not exist, or if it returns something else.
    """
    if _is_function(source):
        return _function_encoders(source, options.layers)
    path, name = find_encoder(source), source_name(source)
    log_chosen(source, path)
    variants: Sequence[str] = options.variants
    if path.is_dir():
        variants = (stored_variant(path),)
        if variants[0] not in options.variants:
            log.warning("%s holds only the %s encoder, which is probed", source, variants[0])
    seeds = (None, *options.random_seeds)
    return chain(
        (load_jepa_encoder(path, "random", options, seed, name) for seed in seeds),
        (load_jepa_encoder(path, cast(Which, each), options, None, name) for each in variants),
    )


def load_jepa_encoder(
    path: Path,
    variant: Which,
    options: EncoderOptions,
    random_seed: int | None = None,
    name: str | None = None,
) -> ProbeEncoder:
    """One encoder of a checkpoint or of an exported folder.

    Args:
        path: the file or the folder.
        variant: "random" is the random-init baseline.
        options: see `EncoderOptions`.
        random_seed: seed of the random-init baseline, by default the seed of the run.
        name: name in the results; by default `run_name` of the path.
    """
    overlap, windowing = options.overlap, options.windowing
    frozen = load_encoder(
        path, variant, overlap=overlap, windowing=windowing, random_seed=random_seed
    )
    name = run_name(path) if name is None else name
    # Windows that are not the default give other results, so they need another name.
    if windowing != "exact":
        name += f" ({windowing} windows)"
    elif overlap:
        name += f" (overlap {overlap:g})"
    shown_variant = variant if random_seed is None else f"{variant}-{random_seed}"
    encoder = JEPAEncoder(frozen, name, shown_variant)
    return encoder.select_layers(options.layers)


def source_name(source: str) -> str:
    """The name of a source of `load_encoders` in the results."""
    path = Path(source).expanduser()
    if path.suffix == ".ckpt":
        return run_name(path)
    return run_name(find_encoder(source)) if path.is_dir() else source


def run_name(path: Path) -> str:
    """NAME for `runs/NAME/checkpoints/last.ckpt`, NAME/STEM for other files of that folder.

    The name of any other file is its stem, that of a folder is its own.
    """
    path = path.resolve()
    if path.parent.name != "checkpoints":
        return path.name if path.is_dir() else path.stem
    run = path.parent.parent.name
    return run if path.stem == "last" else f"{run}/{path.stem}"


def _is_function(source: str) -> bool:
    return Path(source).suffix != ".ckpt" and ":" in source and not Path(source).exists()


def _function_encoders(source: str, layers: Sequence[int]) -> Iterator[ProbeEncoder]:
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

    def call() -> Iterator[ProbeEncoder]:
        encoder = function()
        if not isinstance(encoder, ProbeEncoder):
            kind = type(encoder).__name__
            raise UserError(f"`encoder` is {source}, which returns {kind}, not a `ProbeEncoder`")
        yield encoder.select_layers(layers)

    return call()
