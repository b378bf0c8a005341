"""A tiny pretrained checkpoint of each kind, and labelled tones."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile as sf
from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from jepa_audio.probing.finetuning.data import LabelledClips
    from jepa_audio.probing.finetuning.module import FineTuning

RATE = 1000


@pytest.fixture(scope="session")
def checkpoints(
    tiny_cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A checkpoint of a raw waveform and of a spectrogram encoder."""
    paths = {}
    for flavour in ("wave", "mel"):
        cli = tiny_cli(flavour, "--trainer.max_steps=1")
        cli.trainer.fit(cli.model, cli.datamodule)
        paths[flavour] = tmp_path_factory.mktemp("pretrained") / f"{flavour}.ckpt"
        cli.trainer.save_checkpoint(paths[flavour])
    return paths


def write_tones(folder: Path, number: int = 40, classes: str = "abcd") -> Path:
    """Tones whose frequency is their class, in five groups; every third one is longer than a crop.

    Returns:
        A table with the columns path, label, split and group.
    """
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        kind = i % len(classes)
        time = np.arange(500 if i % 3 else 800) / RATE
        tone = np.sin(2 * np.pi * (60 + 90 * kind + rng.uniform(-5, 5)) * time)
        sf.write(folder / f"{i:02}.wav", 0.3 * tone + 0.01 * rng.standard_normal(len(time)), RATE)
        split = ("train", "train", "train", "val", "test")[i // 4 % 5]
        rows.append((f"{i:02}.wav", classes[kind], split, f"artist {i // 8}"))
    table = folder / "tones.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split", "group"), *rows])
    return table


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture
def make(
    checkpoints: dict[str, Path], tones: Path, tmp_path: Path
) -> Callable[..., tuple[FineTuning, LabelledClips, Trainer]]:
    """`make("wave", "full", data={...}, trainer={...}, lr=0.1)`: module, data module, Trainer."""

    def objects(
        flavour: str,
        mode: str,
        data: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[FineTuning, LabelledClips, Trainer]:
        from jepa_audio.probing.finetuning.data import LabelledClips
        from jepa_audio.probing.finetuning.module import FineTuning

        defaults = {"task": str(tones), "batch_size": 4, "num_workers": 0}
        clips = LabelledClips(**(defaults | (data or {})))
        model = FineTuning(str(checkpoints[flavour]), mode, **settings)
        clips.select(0, model.pretrained)
        model.set_task(clips)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        common = {"accelerator": "cpu", "use_distributed_sampler": False, "max_epochs": 2}
        common |= {"enable_checkpointing": False, "default_root_dir": tmp_path}
        return model, clips, Trainer(**(quiet | common | (trainer or {})))

    return objects
