"""Losses in the logs do not depend on micro-batches and processes."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch import Callback

from jepa_audio.steps.masking.source import MaskStream

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")


class Sums(Callback):
    """Keeps sum and number of every micro-batch under its optimizer step."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[dict[str, float]]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.step = trainer.global_step + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        values = {name: float(value) for name, value in outputs["sums"].items()}
        self.by_step.setdefault(self.step, []).append(values)

    def mean(self, step: int, name: str) -> float:
        sums = self.by_step[step]
        return sum(part[name] for part in sums) / sum(part["num_targets"] for part in sums)

    def mean_of_batches(self, step: int, name: str) -> float:
        return sum(part[name] for part in self.by_step[step]) / len(self.by_step[step])


def rows_with(folder: Path, name: str) -> dict[int, dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_the_training_loss_is_the_mean_over_all_micro_batches_beside_its_baselines(
    tiny_cli: Callable, fit: Callable, flavour: str
):
    sums = Sums()
    cli = tiny_cli(
        flavour,
        "--trainer.logger=true",
        "--trainer.log_every_n_steps=2",
        "--monitor.every_n_steps=3",
        "--trainer.accumulate_grad_batches=2",
        "--data.batch_size=2",
        "--model.regularizers+=VICReg",
    )
    fit(cli, None, sums)
    rows = rows_with(Path(cli.trainer.default_root_dir), "train/loss")
    assert set(rows) == {1, 2, 3, 4, 6}, "every 2 steps, and measured steps"
    for step, row in rows.items():
        assert float(row["train/loss"]) == pytest.approx(sums.mean(step, "loss"), rel=1e-6)
        regularizer = sums.mean_of_batches(step, "vicreg_context")
        assert float(row["train/vicreg_context"]) == pytest.approx(regularizer, rel=1e-6)
        for name in ("loss_mean_target", "loss_nearest_context"):
            assert bool(row[f"train/{name}"]) == (step in (1, 3, 6))
            if row[f"train/{name}"]:
                expected = sums.mean(step, name)
                assert float(row[f"train/{name}"]) == pytest.approx(expected, rel=1e-6)
    metrics = cli.trainer.progress_bar_metrics
    assert metrics["train/loss"] == pytest.approx(sums.mean(6, "loss"), rel=1e-6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 files of different levels."""
    folder = tmp_path_factory.mktemp("clips")
    for file in range(35):
        noise = np.random.default_rng(file).standard_normal(600)
        sf.write(folder / f"{file:02}.wav", noise.cumsum() / 100 / (1 + file), 1000)
    return folder


def on(processes: int) -> list[str]:
    strategy = "auto" if processes == 1 else "ddp_fork"
    return [f"--trainer.devices={processes}", f"--trainer.strategy={strategy}"]


@needs_fork
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 2), (18, 3)])
def test_the_validation_loss_does_not_depend_on_the_number_of_processes(
    tiny_cli: Callable, clips: Path, batch_size: int, processes: int
):
    """With 18 clips in a batch, the third process has no batch of its own."""
    losses = []
    for number in (1, processes):
        files = f"--data.valid_root={clips}", f"--data.batch_size={batch_size}"
        cli = tiny_cli("wave", *files, *on(number), "--model.regularizers+=VICReg")
        (metrics,) = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        assert metrics.keys() == {"valid/loss", "valid/vicreg_context"}
        losses.append(metrics)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0]["valid/loss"] == pytest.approx(
        literal_loss(tiny_cli, clips, batch_size), rel=1e-6
    )


@torch.no_grad()
def literal_loss(tiny_cli: Callable, clips: Path, batch_size: int) -> float:
    """The mean of the distances at all target tokens of all clips."""
    cli = tiny_cli("wave", f"--data.valid_root={clips}", f"--data.batch_size={batch_size}")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("validate")
    model, distances = cli.model.eval(), []
    for batch in cli.datamodule.val_dataloader()[0]:
        masks = model.draw_masks(batch, stream=MaskStream.EVALUATION)
        output = model(batch.waveform, masks)
        distances.append(
            model.distance(output.prediction, output.target)[masks.targets.valid_or_true]
        )
    return torch.cat(distances).double().mean().item()


@needs_fork
def test_the_training_loss_does_not_depend_on_the_number_of_processes(tiny_cli: Callable):
    losses = []
    for number in (1, 2):
        rows = "--trainer.max_steps=2", f"--data.batch_size={4 // number}"
        cli = tiny_cli("wave", *rows, *on(number), "--trainer.log_every_n_steps=1")
        cli.trainer.fit(cli.model, cli.datamodule)
        losses.append(float(cli.trainer.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_checkpoints_logs_and_bar_see_the_validation_loss(tiny_cli: Callable, fit: Callable):
    from lightning.pytorch.callbacks import ModelCheckpoint

    cli = tiny_cli(
        "wave",
        "--trainer.logger=true",
        "--trainer.val_check_interval=2",
        "--trainer.num_sanity_val_steps=-1",
        "--trainer.limit_val_batches=2",
        "--data.valid_share=0.9",
        "--data.batch_size=2",
    )
    folder = Path(cli.trainer.default_root_dir)
    best = ModelCheckpoint(folder / "best", monitor="valid/loss", save_top_k=1)
    fit(cli, None, best)
    rows = rows_with(folder, "valid/loss")
    assert len(rows) == 3
    last = cli.trainer.callback_metrics["valid/loss"].item()
    assert float(list(rows.values())[-1]["valid/loss"]) == pytest.approx(last, rel=1e-6)
    assert best.best_model_score.item() == pytest.approx(
        min(float(row["valid/loss"]) for row in rows.values()), rel=1e-6
    )
    assert cli.trainer.progress_bar_metrics["valid/loss"] == pytest.approx(last, rel=1e-6)
