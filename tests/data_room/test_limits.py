"""Trainer settings that limit or repeat batches do what Lightning documents."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from jepa_audio.errors import UserError


class Waveforms(Callback):
    """Keeps row numbers and samples of every training batch, and counts validation batches."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.samples: list[torch.Tensor] = []
        self.num_validated = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows.append(batch.row.tolist())
        self.samples.append(batch.waveform.clone())

    def on_validation_batch_end(self, *args) -> None:
        self.num_validated += 1


def seen_by(tiny_cli: Callable, fit: Callable, *settings: str) -> Waveforms:
    seen = Waveforms()
    fit(tiny_cli("wave", "--data.batch_size=2", *settings), None, seen)
    return seen


@pytest.mark.parametrize(
    ("overfit", "accumulated", "num_repeated"),
    [("2", 1, 2), ("2", 2, 2), ("0.5", 1, 3), ("99", 1, 6)],
)
def test_overfit_batches_repeats_the_same_batches_in_every_epoch(
    tiny_cli: Callable, fit: Callable, overfit: str, accumulated: int, num_repeated: int
):
    """One pass over twelve files has six batches."""
    seen = seen_by(
        tiny_cli,
        fit,
        f"--trainer.overfit_batches={overfit}",
        f"--trainer.accumulate_grad_batches={accumulated}",
        "--trainer.max_steps=7",
    )
    assert len(seen.rows) == 7 * accumulated
    for batch, (rows, samples) in enumerate(zip(seen.rows, seen.samples, strict=True)):
        assert rows == [2 * (batch % num_repeated), 2 * (batch % num_repeated) + 1]
        assert torch.equal(samples, seen.samples[batch % num_repeated])
    assert len({rows[0] for rows in seen.rows}) == num_repeated


def test_an_interrupted_overfitting_run_continues_with_the_next_repeated_batch(
    tiny_cli: Callable, fit: Callable
):
    settings = (
        "--data.batch_size=2",
        "--trainer.overfit_batches=3",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.keep_all=true",
    )
    cli = tiny_cli("wave", *settings)
    whole = fit(cli)
    seen = Waveforms()
    checkpoint = Path(cli.trainer.checkpoint_callback.dirpath) / "step=00000004.ckpt"
    resumed = fit(tiny_cli("wave", *settings), checkpoint, seen)
    assert seen.rows == [[2, 3], [4, 5]]
    assert resumed == {row: whole[row] for row in (2, 4)}, "the losses of steps 5 and 6"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--trainer.overfit_batches=0.1"], "gives 0 micro-batches"),
        (
            ["--trainer.overfit_batches=0.5", "--trainer.accumulate_grad_batches=2"],
            "gives 3 micro-batches",
        ),
        (
            ["--trainer.limit_val_batches=0.1"],
            "`trainer.limit_val_batches` .0.1. of 6 batches is less than one batch",
        ),
    ],
)
def test_a_share_that_gives_no_batches_is_refused(
    tiny_cli: Callable, fit: Callable, wavs: Path, settings: list[str], words: str
):
    with pytest.raises(UserError, match=words):
        seen_by(tiny_cli, fit, f"--data.valid_root={wavs}", *settings)


@pytest.mark.parametrize(("limit", "number"), [("0", 0), ("2", 2), ("0.5", 3), ("1.0", 6)])
def test_limit_val_batches_limits_every_validation(
    tiny_cli: Callable, fit: Callable, wavs: Path, limit: str, number: int
):
    held_out = f"--data.valid_root={wavs}", "--trainer.val_check_interval=3"
    seen = seen_by(tiny_cli, fit, f"--trainer.limit_val_batches={limit}", *held_out)
    assert seen.num_validated == 2 * number


def test_limit_train_batches_does_not_repeat_or_lose_samples(tiny_cli: Callable, fit: Callable):
    seen = seen_by(tiny_cli, fit, "--trainer.limit_train_batches=4", "--trainer.max_steps=10")
    assert [row for rows in seen.rows for row in rows] == list(range(20))
