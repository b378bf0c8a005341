"""What can be probed: encoders of a checkpoint, their random-init twins, log-mel statistics, anybody's function."""

from __future__ import annotations

import hashlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import Encoder, load_encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.steps.front_ends.transforms import LogMel

Variant = Literal["context", "target", "random"]
Frequency = Literal["mean", "concat"]
Output = Tensor | Sequence[Tensor]


class ProbeEncoder(ABC):
    """Waveforms → every layer's tokens in time: the one thing a probe wants of a model.

    Args:
        name: of the model, in the results.
        variant: which of its encoders.
        sample_rate: in Hz, of the waveforms it takes.
        num_channels: audio channels that it takes.
        layer_names: one for every layer it gives.
        frequency: how the tokens of one time become one vector: "mean" averages the frequency rows,
            "concat" keeps them side by side.
    """

    def __init__(
        self,
        name: str,
        variant: str,
        sample_rate: int,
        num_channels: int,
        layer_names: tuple[str, ...],
        frequency: Frequency = "mean",
    ) -> None:
        self.name, self.variant = name, variant
        self.sample_rate, self.num_channels = sample_rate, num_channels
        self.layer_names, self.frequency = layer_names, frequency
        self.layers = tuple(range(len(layer_names)))

    def keep(self, layers: Sequence[int]) -> ProbeEncoder:
        """Give these layers alone, by their places; all of them if there are none.

        Raises:
            UserError: if there is no such layer.
        """
        if not set(layers) <= set(self.layers):
            known = ", ".join(
                f"{layer} ({name})"
                for layer, name in zip(self.layers, self.layer_names, strict=True)
            )
            raise UserError(f"`layers` is {list(layers)}, {self.name} has {known}")
        if layers:
            self.layer_names = tuple(self.layer_names[self.layers.index(layer)] for layer in layers)
            self.layers = tuple(layers)
            self.__dict__.pop("function_hash", None)
        return self

    @property
    @abstractmethod
    def encoder_hash(self) -> str:
        """Of what makes it what it is: its weights."""

    @abstractmethod
    def encode(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> LayerFeatures:
        """Every layer's tokens with their times in seconds; columns beyond a clip's length are marked, and zero.

        Of those in `layers` alone, in that order.
        """

    @property
    def settings(self) -> str:
        """What changes its vectors of long clips, beyond weights and network."""
        return ""

    def to(self, device: torch.device | str) -> ProbeEncoder:
        """Move the weights."""
        return self

    def clip_vectors(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> list[Float[Tensor, "B _"]]:
        """One vector a clip and layer: the mean over the clip's own columns."""
        return self.encode(waveform, lengths).pool(self.frequency)

    def vectors_in_time(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> tuple[list[Float[Tensor, "B T _"]], LayerFeatures]:
        """One vector a column and layer, and the features that tell which column is when."""
        features = self.encode(waveform, lengths)
        return features.over_time(self.frequency), features

    @cached_property
    def function_hash(self) -> str:
        """Of the weights and of what they do: two networks with the same weights may differ in norm or positions.

        A second of noise is heard, the same for all.
        """
        digest = hashlib.sha256(
            f"{self.encoder_hash} {self.frequency} {self.layer_names} {self.settings}".encode()
        )
        noise = torch.randn(
            1, self.num_channels, self.sample_rate, generator=torch.Generator().manual_seed(0)
        )
        for layer in self.clip_vectors(0.1 * noise):
            values = layer.double().cpu()
            # Devices and numbers of threads round otherwise; what they agree on tells functions
            # apart well enough.
            coarse = values / values.abs().amax().clamp_min(1e-12) * 100
            digest.update(coarse.round().to(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


class JEPAEncoder(ProbeEncoder):
    """A frozen encoder of ours: trained here, imported, or with its weights drawn anew.

    Args:
        frozen: front end and encoder.
        name: of the run.
        variant: which encoder of the run it is.
        frequency: see `ProbeEncoder`.
    """

    def __init__(
        self, frozen: Encoder, name: str, variant: str, frequency: Frequency = "mean"
    ) -> None:
        names = ("input", *(f"block {i + 1}" for i in range(frozen.encoder.depth)))
        super().__init__(name, variant, frozen.sample_rate, frozen.num_channels, names, frequency)
        self.frozen = frozen

    @staticmethod
    def from_checkpoint(
        checkpoint: Path,
        variant: Variant,
        frequency: Frequency = "mean",
        random_seed: int | None = None,
    ) -> JEPAEncoder:
        """An encoder of a checkpoint; `random_seed` is that of the twin, `None` for the run's own."""
        frozen = load_encoder(checkpoint, variant, random_seed)
        shown = variant if random_seed is None else f"{variant}-{random_seed}"
        return JEPAEncoder(frozen, run_name(checkpoint), shown, frequency)

    @cached_property
    def encoder_hash(self) -> str:
        """Of the weights."""
        return state_hash(self.frozen)

    @property
    def settings(self) -> str:
        """How long clips are cut into windows."""
        return f"{self.frozen.window_samples} {self.frozen.overlap} {self.frozen.windowing}"

    def to(self, device: torch.device | str) -> JEPAEncoder:
        """Move the weights."""
        self.frozen.to(device)
        return self

    def encode(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> LayerFeatures:
        """See `ProbeEncoder`."""
        return self.frozen.encode(
            waveform.to(next(self.frozen.parameters()).device), lengths, self.layers
        )


class LogMelStatistics(ProbeEncoder):
    """The baseline without a network: 64 log-mel bands.

    A clip is their mean, deviation and mean absolute change over time; a column in time is the
    bands and their change.

    Args:
        sample_rate: in Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__("log-mel", "statistics", sample_rate, 1, ("statistics",), "concat")
        self.log_mel = LogMel(sample_rate, n_fft=1024, hop_length=sample_rate // 100, n_mels=64)

    @property
    def encoder_hash(self) -> str:
        """Of its one setting."""
        return hashlib.sha256(f"{self.name} {self.sample_rate}".encode()).hexdigest()

    def encode(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> LayerFeatures:
        """The bands `[B, T, 64, 2]`: their level, and its change since the column before."""
        if lengths is not None and (lengths != waveform.shape[-1]).any():
            raise UserError("log-mel statistics take clips of one length at a time")
        bands = self.log_mel(waveform).mean(dim=1).mT  # [B, T, F]
        change = bands.diff(dim=1, prepend=bands[:, :1])
        times = torch.arange(bands.shape[1]) * (self.log_mel.hop_length / self.sample_rate)
        valid = torch.ones(bands.shape[:2], dtype=torch.bool)
        return LayerFeatures(
            (torch.stack([bands, change], dim=-1),), times.expand(len(bands), -1), valid
        )

    def clip_vectors(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> list[Float[Tensor, "B _"]]:
        """The statistics of the bands over time."""
        bands, change = self.encode(waveform, lengths).layers[0].unbind(dim=-1)  # [B, T, F]
        change = change[:, 1:] if change.shape[1] > 1 else change
        return [
            torch.cat(
                [bands.mean(dim=1), bands.std(dim=1, correction=0), change.abs().mean(dim=1)],
                dim=-1,
            )
        ]


class FunctionEncoder(ProbeEncoder):
    """Anybody's model: a function `waveform [B, C, S] → [B, T, D]`, or `[B, D]`, or a list of these, one a layer.

    Columns are taken to share a clip's time equally. The function gets clips of one length at a
    time. A layer that is named "input" is none of the blocks, and not in their weighted sum.

    Args:
        function: on any device; runs in inference mode.
        name: in the results.
        sample_rate: in Hz, of the waveforms it takes.
        num_channels: audio channels that it takes.
        layer_names: one for every layer; numbered if not given.
        encoder_hash: of the weights; for a module it is computed, for another function the name
            stands for it.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Output],
        name: str,
        sample_rate: int,
        *,
        num_channels: int = 1,
        layer_names: Sequence[str] = (),
        encoder_hash: str = "",
    ) -> None:
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)
            encoder_hash = encoder_hash or state_hash(function)
        self.function, self._hash = (
            function,
            encoder_hash or hashlib.sha256(name.encode()).hexdigest(),
        )
        num_layers = len(self._layers(torch.zeros(1, num_channels, sample_rate)))
        names = tuple(layer_names) or tuple(f"layer {i}" for i in range(num_layers))
        if len(names) != num_layers:
            raise UserError(
                f"`layer_names` holds {len(names)} names, {name} gives {num_layers} layers"
            )
        super().__init__(name, "function", sample_rate, num_channels, names)

    @property
    def encoder_hash(self) -> str:
        """As given or computed."""
        return self._hash

    def to(self, device: torch.device | str) -> FunctionEncoder:
        """Move the weights of a module; another function is called as it is."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self

    @torch.inference_mode()
    def encode(
        self, waveform: Float[Tensor, "B C S"], lengths: Int[Tensor, " B"] | None = None
    ) -> LayerFeatures:
        """See `ProbeEncoder`."""
        if lengths is not None and (lengths != waveform.shape[-1]).any():
            raise UserError("a function takes clips of one length at a time")
        layers = self._layers(waveform)
        steps = {layer.shape[1] for layer in layers}
        if len(steps) > 1 or any(layer.shape[0] != len(waveform) for layer in layers):
            raise UserError(
                f"{self.name} gives layers of shapes {[tuple(layer.shape) for layer in layers]}; "
                f"they must be [{len(waveform)}, T, D] with one T"
            )
        (num_columns,) = steps
        times = (torch.arange(num_columns) + 0.5) * (
            waveform.shape[-1] / self.sample_rate / num_columns
        )
        valid = torch.ones(len(waveform), num_columns, dtype=torch.bool)
        kept = tuple(layers[layer][:, :, None] for layer in self.layers)
        return LayerFeatures(kept, times.expand(len(waveform), -1), valid)

    @torch.inference_mode()
    def _layers(self, waveform: Tensor) -> list[Tensor]:
        if (
            isinstance(self.function, nn.Module)
            and (weight := next(self.function.parameters(), None)) is not None
        ):
            waveform = waveform.to(weight.device)
        output = self.function(waveform)
        layers = [output] if isinstance(output, Tensor) else list(output)
        return [(layer[:, None] if layer.ndim == 2 else layer).float().cpu() for layer in layers]


def encoders_of(
    source: str,
    variants: Sequence[Literal["context", "target"]],
    frequency: Frequency,
    random_seeds: Sequence[int] = (),
    layers: Sequence[int] = (),
) -> Iterator[ProbeEncoder]:
    """What a user names: the encoders of a checkpoint behind their random-init twins, or what a function returns.

    Args:
        source: a `.ckpt`, or `module:function` for a function without arguments that returns a
            `ProbeEncoder`.
        variants: which encoders of a checkpoint.
        frequency: see `ProbeEncoder`.
        random_seeds: of further twins, beside the run's own.
        layers: see `ProbeEncoder.keep`.

    Raises:
        UserError: if there is no such checkpoint.
        UserError: if the function is not there or returns something else.
    """
    if _is_function(source):
        yield _called(source).keep(layers)
        return
    checkpoint = Path(source)
    for random_seed in (None, *random_seeds):
        yield JEPAEncoder.from_checkpoint(checkpoint, "random", frequency, random_seed).keep(layers)
    for variant in variants:
        yield JEPAEncoder.from_checkpoint(checkpoint, variant, frequency).keep(layers)


def check_source(source: str) -> None:
    """Whether there is what a user names; the errors are those of `encoders_of`."""
    if _is_function(source):
        _named(source)
    elif not Path(source).is_file():
        raise MissingFileError(f"no checkpoint at {source}")


def _is_function(source: str) -> bool:
    return Path(source).suffix != ".ckpt" and ":" in source


def _named(source: str) -> Callable[[], object]:
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    if (
        here not in sys.path
    ):  # as `python -m` would have it: a user's module lies where the command is given
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"`encoder` is {source}: {error}; give a checkpoint, or MODULE:FUNCTION"
        ) from error
    if not callable(function):
        raise UserError(f"`encoder` is {source}, which is {function!r}, and no function")
    return function


def _called(source: str) -> ProbeEncoder:
    encoder = _named(source)()
    if not isinstance(encoder, ProbeEncoder):
        raise UserError(
            f"`encoder` is {source}, which returns {type(encoder).__name__}, not a `ProbeEncoder`"
        )
    return encoder


def run_name(checkpoint: Path) -> str:
    """NAME for `runs/NAME/checkpoints/last.ckpt`; other files than the last one add their own name."""
    path = checkpoint.resolve()
    if path.parent.name != "checkpoints":
        return path.stem
    run = path.parent.parent.name
    return run if path.stem == "last" else f"{run}/{path.stem}"


def state_hash(module: nn.Module) -> str:
    """sha256 of the names, types, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
