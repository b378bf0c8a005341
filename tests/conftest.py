"""Shared fixtures: small runs and models from the command line, and a folder of short files."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch import Callback

# The fixtures import the package, because the hook that checks shapes is not yet installed here.
if TYPE_CHECKING:
    from jepa_audio.cli.trainer import JEPACLI
    from jepa_audio.steps.grid import AudioBatch, Grid, Masks
    from jepa_audio.training.jepa import JEPA

torch.set_num_threads(1)

SAMPLE_RATE = 1000
SECONDS = 0.5

WAVE = """
model:
  front_end: {class_path: WaveformFrontEnd, init_args: {conv_layers: [[8, 10, 5], [8, 8, 4]],
      sample_rate: 1000}}
  masker: {class_path: SpanMasker, init_args: {context_length: 3, target_length: 3, num_groups: 2}}
  encoder: {embed_dim: 16, depth: 2, num_heads: 2, positions: SinCosPositions, norm: post}
  targets: {top_k: 2, normalization: instance}
  predictor: {trunk: {embed_dim: 8, depth: 1, num_heads: 2, positions: SinCosPositions, norm: post}}
"""
MEL = """
model:
  front_end:
    class_path: SpectrogramFrontEnd
    init_args:
      spectrogram: {class_path: LogMel, init_args: {sample_rate: 1000, n_fft: 64, hop_length: 16,
          n_mels: 16}}
      patch_frames: 4
      patch_bands: 4
      mean: -3.0
      std: 2.0
  masker: {class_path: BlockMasker, init_args: {target_share: 0.6, scale: [0.05, 0.2]}}
  encoder: {embed_dim: 16, depth: 2, num_heads: 2, positions: RotaryPositions, mlp: swiglu}
  targets: {view: targets}
  predictor: {trunk: {embed_dim: 8, depth: 1, num_heads: 2, positions: RotaryPositions, mlp:
      swiglu}}
"""
COMMON = f"""
  distance: MSE
  ema: {{momentum: {{class_path: Linear, init_args: {{start: 0.9, end: 1.0}}}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}
  lr_schedule: {{class_path: WarmupCosine, init_args: {{warmup_steps: 1}}}}
data: {{crop_seconds: {SECONDS}, batch_size: 4, num_workers: 0, valid_share: 0.0}}
trainer:
  accelerator: cpu
  max_steps: 6
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""
FLAVOURS = {"wave": WAVE + COMMON, "mel": MEL + COMMON}
# Targets of another front end: patches of two frames of a log-mel spectrogram, in two rows.
LOG_MEL = (
    "spectrogram: {class_path: LogMel, init_args: {sample_rate: 1000, n_fft: 64, hop_length: 8, "
    "n_mels: 8}}, patch_frames: 2, mean: -3.0, std: 2.0"
)
LOG_MEL_TARGETS = (
    "--model.target_front_end={class_path: SpectrogramPatches, init_args: {"
    f"{LOG_MEL}, patch_bands: 4}}}}",
    "--model.targets.top_k=0",
    "--model.targets.view=clip",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    from jepa_audio.cli.messages import EXPECTED_WARNINGS

    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--runslow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --runslow"))


@pytest.fixture(scope="session", autouse=True)
def without_fsync() -> Iterator[None]:
    """Files of tests need not survive a power failure; waiting for the disk takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(sf.SoundFile, "flush", lambda _: None)  # closing writes everything
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def wavs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of 0.8 to 1.2 s, each one a different chord with low noise."""
    folder = tmp_path_factory.mktemp("wavs")
    noise = np.random.default_rng(0)
    for file in range(12):
        time = np.arange(round((0.8 + 0.03 * file) * SAMPLE_RATE)) / SAMPLE_RATE
        chord = (
            sum(np.sin(2 * np.pi * (40 + 30 * file) * ratio * time) for ratio in (1, 1.25, 1.5)) / 6
        )
        sf.write(
            folder / f"{file:02}.wav", chord + 0.02 * noise.standard_normal(len(time)), SAMPLE_RATE
        )
    return folder


@pytest.fixture(scope="session")
def tiny_cli(wavs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., JEPACLI]:
    """`tiny_cli("wave", "--model.encoder.depth=3")`: the objects of a run in a new folder."""
    folder = tmp_path_factory.mktemp("configs")
    for flavour, text in FLAVOURS.items():
        (folder / f"{flavour}.yaml").write_text(text)

    def make(flavour: str, *settings: str) -> JEPACLI:
        from jepa_audio.cli.trainer import JEPACLI

        run_dir = f"--run_dir={tmp_path_factory.mktemp('run')}"
        common = [f"--config={folder / flavour}.yaml", f"--data.root={wavs}", run_dir]
        return JEPACLI([*common, *settings], run=False)

    return make


@pytest.fixture(scope="session")
def tiny_jepa(tiny_cli: Callable[..., JEPACLI]) -> Callable[..., JEPA]:
    """`tiny_jepa("mel", "--model.seed=1")`: only the module, a new copy at every call."""

    @functools.cache
    def model(flavour: str, *settings: str) -> JEPA:
        return tiny_cli(flavour, *settings).model

    def make(flavour: str, *settings: str) -> JEPA:
        return copy.deepcopy(model(flavour, *settings))

    return make


@pytest.fixture
def batch(rng: torch.Generator) -> AudioBatch:
    """Four clips of noise, each one with a different change of level."""
    from jepa_audio.steps.grid import AudioBatch

    slope = torch.linspace(0.2, 1.0, round(SECONDS * SAMPLE_RATE)) ** torch.arange(4)[:, None, None]
    return AudioBatch(
        slope * torch.randn(4, 1, round(SECONDS * SAMPLE_RATE), generator=rng), torch.arange(4)
    )


@pytest.fixture
def ragged(rng: torch.Generator) -> Callable[[Grid, int, int], Masks]:
    """`ragged(grid, batch, groups)`: random disjoint masks; all rows have different lengths."""
    from jepa_audio.steps.grid import Masks

    def make(grid: Grid, batch_size: int, groups: int) -> Masks:
        # A random permutation of 0 to N - 1.
        order = torch.rand(batch_size, grid.num_tokens, generator=rng).argsort(-1)
        size = grid.num_tokens // (groups + 2)
        length = size - torch.arange(batch_size)[:, None]
        targets = [(order >= size * g) & (order < size * g + (length - g)) for g in range(groups)]
        return Masks.from_bool(order >= grid.num_tokens - length, torch.stack(targets, dim=1))

    return make


class Losses(Callback):
    """Stores the loss of every micro-batch under the index of its first row."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values[int(batch.row[0])] = float(outputs["loss"])


@pytest.fixture
def fit() -> Callable[..., dict[int, float]]:
    """`fit(cli, ckpt_path)`: train; returns first row → loss of every micro-batch."""

    def run(cli: JEPACLI, ckpt_path: Path | None = None, *callbacks: Callback) -> dict[int, float]:
        losses = Losses()
        cli.trainer.callbacks += [losses, *callbacks]
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path)
        return losses.values

    return run


@pytest.fixture
def symbolic_sizes() -> Iterator[None]:
    """No checks of types: while torch.export follows the code, a size is a symbol and no `int`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
