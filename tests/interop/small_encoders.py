"""Small encoders with random weights, one for each front end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import build_parts

STEPS = "jepa_audio.steps"
CONVOLUTIONS = [[8, 20, 10], [8, 8, 4], [8, 4, 4], [8, 2, 2]]
BANDS = {"sample_rate": 16000, "hop_length": 256, "f_min_hz": 65.4, "n_bins": 64}


def waveform(**settings: Any) -> dict[str, Any]:
    arguments = {"conv_layers": CONVOLUTIONS, "embed_dim": 16, **settings}
    return {"class_path": f"{STEPS}.front_ends.WaveformFrontEnd", "init_args": arguments}


def spectrogram(name: str, **settings: Any) -> dict[str, Any]:
    patches = {"embed_dim": 16, "patch_frames": 4, "patch_bands": 16, "mean": -3.0, "std": 2.0}
    transform = {"class_path": f"{STEPS}.front_ends.{name}", "init_args": settings}
    return {
        "class_path": f"{STEPS}.front_ends.SpectrogramFrontEnd",
        "init_args": {**patches, "spectrogram": transform},
    }


def transformer(positions: str, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    chosen = {
        "class_path": f"{STEPS}.encoder.positions.{positions}",
        "init_args": arguments or {},
    }
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "positions": chosen, **settings}
    return {"class_path": f"{STEPS}.encoder.transformer.Transformer", "init_args": sizes}


LOG_MEL = {"sample_rate": 16000, "n_fft": 1024, "hop_length": 160, "n_mels": 64}
TIME = {"axes": "time", "normalized": False}
CASES = {
    "waveform": (waveform(), transformer("SinCosPositions", norm="post")),
    "waveform_local": (
        waveform(norm="layer", standardize=False),
        transformer("RotaryPositions", TIME),
    ),
    "two_ears": (
        waveform(num_channels=2, separate_channels=True),
        transformer("BinauralPositions", num_registers=2),
    ),
    "log_mel": (
        spectrogram("transforms.LogMel", **LOG_MEL),
        transformer("RotaryPositions", mlp="swiglu", num_registers=1),
    ),
    "filterbank": (
        spectrogram("filterbank.LearnedFilterbank"),
        transformer("RotaryPositions", {"normalized": False}),
    ),
    "cqt": (spectrogram("transforms.CQT", **BANDS), transformer("RotaryPositions")),
    "cqt_by_octaves": (
        spectrogram("transforms.CQT", **BANDS, algorithm="2010v2"),
        transformer("RotaryPositions", {"axes": "time"}),
    ),
    "vqt": (spectrogram("transforms.VQT", **BANDS, gamma=5.0), transformer("SinCosPositions")),
    "gammatone": (
        spectrogram("transforms.Gammatone"),
        transformer("SinCosPositions", qk_norm=True, layer_scale=0.1),
    ),
}
LEVELLED = ("log_mel", "waveform_local")
"""Encoders that were trained with `data.loudness_dbfs`."""
BY_OCTAVES = ("cqt_by_octaves", "vqt")
"""The logarithm of their quiet bands amplifies the rounding of their low-pass filters."""
WINDOW = 32_000
FAST = ("waveform", "log_mel")
"""The others are tested with `--runslow`."""


def cases(*fast: str) -> list[Any]:
    """The parameters of a test of all front ends."""
    fast = fast or FAST
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in CASES]


def small_encoder(name: str, source: str = "") -> Encoder:
    """The encoder of a case, whose weights are not the initial ones."""
    settings = dict(zip(("front_end", "encoder"), CASES[name], strict=True))
    torch.manual_seed(0)
    front_end, network = build_parts(settings, name)
    for parameter in (*front_end.parameters(), *network.parameters()):
        parameter.data += 0.02 * torch.randn_like(parameter)
    source = source or f"/home/me/runs/{name}/checkpoints/last.ckpt, step 600"
    dbfs = -20.0 if name in LEVELLED else None
    return Encoder(front_end, network, WINDOW, loudness_dbfs=dbfs, settings=settings, source=source)


def clips(num_channels: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Clips of a chord, noise and silence, `[C, S]`."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        time = torch.arange(length) / 16000
        chord = sum(torch.sin(2 * torch.pi * 220 * ratio * time) for ratio in (1.0, 1.25, 1.5)) / 6
        noise = 0.05 * torch.randn(num_channels, length, generator=generator)
        clip = chord + noise
        clip[:, length // 2 : length // 2 + 800] = 0
        made.append(clip)
    return made


def folder_of(module_name: str) -> Path:
    """The folder from which a package is imported."""
    from importlib.util import find_spec

    spec = find_spec(module_name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent
