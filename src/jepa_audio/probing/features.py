"""Audio files → frozen features in memory, kept on disk so that a second probe is instant."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from rich.progress import track
from torch import Tensor

from jepa_audio.data.read import read
from jepa_audio.data.resample import resample
from jepa_audio.probing.encoders import ProbeEncoder

_READERS = 4  # threads; decoding and resampling let go of the interpreter


def load_waveform(path: Path, sample_rate: int, num_channels: int) -> Float32[Tensor, "C S"]:
    """A whole file as an encoder takes it: one channel is the mean of all, a mono file fills every channel.

    Raises:
        ValueError: if the file has several channels, but not `num_channels`.
    """
    samples, rate = read(path)
    waveform = torch.from_numpy(samples)
    if num_channels == 1:
        waveform = waveform.mean(dim=0, keepdim=True)
    elif len(waveform) not in (1, num_channels):
        raise ValueError(f"{path} has {len(waveform)} channels, the encoder takes {num_channels}: give 1 or as many")
    return resample(waveform, rate, sample_rate).expand(num_channels, -1)


def load_waveforms(paths: Sequence[Path], sample_rate: int, num_channels: int) -> list[Float32[Tensor, "C _"]]:
    """Files in the order given."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: load_waveform(path, sample_rate, num_channels), paths))


@torch.inference_mode()
def features_of(encoder: ProbeEncoder, waveforms: Sequence[Tensor]) -> list[Float32[np.ndarray, "n _"]]:
    """Features of some clips, equally long ones at a time: nothing is ever padded."""
    lengths = np.array([waveform.shape[-1] for waveform in waveforms])
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    order = np.argsort(np.concatenate(groups))
    parts = [encoder.features(torch.stack([waveforms[row] for row in rows.tolist()])) for rows in groups]
    return [torch.cat(layer).float().cpu().numpy()[order] for layer in zip(*parts, strict=True)]


def extract(
    encoder: ProbeEncoder, paths: Sequence[Path], batch_size: int, description: str
) -> list[Float32[np.ndarray, "n _"]]:
    """Features of files, one array for each layer."""
    layers: list[np.ndarray] = []
    starts = range(0, len(paths), batch_size)
    for start in track(starts, description, transient=True):
        waveforms = load_waveforms(paths[start : start + batch_size], encoder.sample_rate, encoder.num_channels)
        batch = features_of(encoder, waveforms)
        if not layers:
            layers = [np.empty((len(paths), layer.shape[1]), dtype=np.float32) for layer in batch]
        for whole, part in zip(layers, batch, strict=True):
            whole[start : start + len(part)] = part
    return layers


def cached_features(
    encoder: ProbeEncoder, paths: Sequence[Path], folder: Path, batch_size: int, description: str = "features"
) -> list[Float32[np.ndarray, "n _"]]:
    """Features of files, from `folder` if the same encoder has seen the same files before."""
    file = folder / f"{_function_hash(encoder, paths[0])}-{data_hash(paths)}-{encoder.pooling}.npz"
    if file.is_file():
        with np.load(file) as stored:
            return [stored[str(layer)] for layer in range(len(stored.files))]
    layers = extract(encoder, paths, batch_size, description)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {str(i): layer for i, layer in enumerate(layers)}
    unfinished = file.with_suffix(".partial")
    with unfinished.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    unfinished.rename(file)
    return layers


def data_hash(paths: Sequence[Path]) -> str:
    """Of the files' names, sizes and times of change, in order."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _function_hash(encoder: ProbeEncoder, path: Path) -> str:
    # Weights do not tell the function: the random-init twins of a pre-norm and a post-norm encoder have the
    # same weights, as have two that differ in window or positions; what they say of a clip tells them apart.
    digest = hashlib.sha256(encoder.encoder_hash.encode())
    for layer in features_of(encoder, [load_waveform(path, encoder.sample_rate, encoder.num_channels)]):
        digest.update(layer.tobytes())
    return digest.hexdigest()[:16]
