"""What can be probed: an encoder of a checkpoint, its random-init twin, log-mel statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jepa_audio.encode import FrozenEncoder, load_frozen
from jepa_audio.front_ends.transforms import LogMel

Variant = Literal["context", "target", "random"]
Frequency = Literal["mean", "concat"]


@runtime_checkable
class ProbeEncoder(Protocol):
    """Waveforms → one vector for each layer.

    Attributes:
        name: of the run, or of the baseline.
        variant: which of the run's encoders.
        pooling: what is done to frequency rows; time is always averaged.
        sample_rate: in Hz, of the waveforms it takes.
        num_channels: audio channels that it takes.
        layer_names: one for every vector it gives.
        encoder_hash: of its weights.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def variant(self) -> str: ...  # noqa: D102
    @property
    def pooling(self) -> str: ...  # noqa: D102
    @property
    def sample_rate(self) -> int: ...  # noqa: D102
    @property
    def num_channels(self) -> int: ...  # noqa: D102
    @property
    def layer_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def encoder_hash(self) -> str: ...  # noqa: D102

    def features(self, waveform: Float[Tensor, "B C S"]) -> list[Float[Tensor, "B _"]]:
        """One vector a clip and layer; the clips are equally long, without padding."""


@dataclass(frozen=True)
class PooledEncoder:
    """A frozen encoder, averaged over time.

    Args:
        frozen: front end and encoder.
        name: of the run.
        variant: which encoder of the run it is.
        pooling: "mean" averages the frequency rows too, "concat" keeps them side by side.
    """

    frozen: FrozenEncoder
    name: str
    variant: str
    pooling: Frequency = "mean"

    @staticmethod
    def from_checkpoint(
        checkpoint: Path, variant: Variant, pooling: Frequency = "mean", random_seed: int | None = None
    ) -> PooledEncoder:
        """An encoder of a checkpoint; `random_seed` is that of the twin, `None` for the run's own."""
        frozen = load_frozen(checkpoint, variant, random_seed)
        shown = variant if random_seed is None else f"{variant}-{random_seed}"
        return PooledEncoder(frozen, run_name(checkpoint), shown, pooling)

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return self.frozen.sample_rate

    @property
    def num_channels(self) -> int:
        """Audio channels that it takes."""
        return self.frozen.num_channels

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What enters the first block, then the blocks."""
        return ("input", *(f"block {i + 1}" for i in range(self.frozen.encoder.depth)))

    @cached_property
    def encoder_hash(self) -> str:
        """Of the weights."""
        return state_hash(self.frozen)

    def features(self, waveform: Float[Tensor, "B C S"]) -> list[Float[Tensor, "B _"]]:
        """See `ProbeEncoder`."""
        device = next(self.frozen.parameters()).device
        return self.frozen.encode(waveform.to(device)).pool(self.pooling)


class LogMelStatistics:
    """The baseline without a network: mean, deviation and mean absolute change over time of 64 log-mel bands.

    Args:
        sample_rate: in Hz.
    """

    name = "log-mel"
    variant = "statistics"
    pooling = "concat"
    num_channels = 1
    layer_names = ("statistics",)

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.log_mel = LogMel(sample_rate, n_fft=1024, hop_length=sample_rate // 100, n_mels=64)
        self.encoder_hash = hashlib.sha256(f"{self.name} {sample_rate}".encode()).hexdigest()

    def features(self, waveform: Float[Tensor, "B C S"]) -> list[Float[Tensor, "B _"]]:
        """See `ProbeEncoder`."""
        bands = self.log_mel(waveform).mean(dim=1)  # [B, F, T]
        change = bands.diff(dim=-1).abs().mean(dim=-1)
        return [torch.cat([bands.mean(dim=-1), bands.std(dim=-1, correction=0), change], dim=-1)]


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
