"""Training: what it reaches, processes, resuming, early stopping."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from jepa_audio.probing.finetuning import module as finetuning_module
from jepa_audio.probing.finetuning.run_folder import FineTuneFolder
from jepa_audio.probing.run import probe


def test_a_head_reaches_the_accuracy_of_a_probe(
    make: Callable, checkpoints: dict[str, Path], tones: Path, tmp_path: Path
):
    layer = {"variants": ("context",), "layers": (2,), "frequency": "concat"}
    rows = probe(str(checkpoints["mel"]), str(tones), output=tmp_path, preset="linear", **layer)
    best = max(row.value for row in rows if row.variant == "context")
    model, clips, trainer = make(
        "mel", "head", {"batch_size": 8}, {"max_epochs": 40}, head_lr=0.05, frequency="concat"
    )
    trainer.fit(model, clips)
    trainer.test(model, clips, verbose=False)
    rows, logits = model.results
    accuracy = float(clips.data.scores(logits[:, None], clips.data.splits["test"], rows))
    assert best > 0.8
    assert accuracy >= best - 0.13, "one of eight clips"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_two_processes_learn_the_weights_of_one(
    make: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # AdamW makes a step of full size from the rounding error of a gradient that is 0.
    monkeypatch.setattr(finetuning_module.torch.optim, "AdamW", torch.optim.SGD)
    weights, tests, starts = {}, {}, {}
    augmented = {"mixup": 0.4, "gain_db": 3.0}
    for number in (1, 2):
        strategy = {"strategy": "ddp_fork" if number == 2 else "auto", "devices": number}
        model, clips, trainer = make(
            *("mel", "full", {**augmented, "batch_size": 4 // number}, strategy),
            **{"lr": 0.02, "head_lr": 0.02, "time_mask": 0.4, "freq_mask": 0.4},
        )
        starts = {name: value.clone() for name, value in model.network.state_dict().items()}
        model.results_file = tmp_path / f"{number}.npz"
        trainer.fit(model, clips)
        weights[number] = model.network.state_dict()
        trainer.test(model, clips, verbose=False)
        tests[number] = model.results_file.read_bytes()
    moved = max(float((weights[1][n].float() - starts[n].float()).abs().max()) for n in starts)
    assert moved > 1e-3
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, rtol=1e-4, atol=1e-5, msg=name)
    one, two = (np.load(io.BytesIO(tests[number])) for number in (1, 2))
    assert one["item"].tolist() == two["item"].tolist() == sorted(one["item"].tolist())
    np.testing.assert_allclose(one["logits"], two["logits"], rtol=1e-3, atol=1e-4)


class StopAfter(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            raise ZeroDivisionError


def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(make: Callable, tmp_path: Path):
    def fit(folder: Path, stop: int | None, checkpoint: Path | None = None) -> dict:
        callbacks = FineTuneFolder(folder).checkpoint_callbacks()
        if stop is not None:
            callbacks.append(StopAfter(stop))
        settings = {"max_epochs": 3, "callbacks": callbacks, "enable_checkpointing": True}
        model, clips, trainer = make("mel", "full", {"mixup": 0.4}, settings, time_mask=0.3)
        if stop is None:
            trainer.fit(model, clips, ckpt_path=checkpoint)
        else:
            with pytest.raises(ZeroDivisionError):
                trainer.fit(model, clips)
        return model.state_dict()

    whole = fit(tmp_path / "whole", None)
    fit(tmp_path / "stopped", 1)
    resumed = fit(tmp_path / "stopped", None, FineTuneFolder(tmp_path / "stopped").last)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_training_stops_without_a_better_score(make: Callable, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    stop = EarlyStopping("valid/score", mode="max", patience=2)
    # With a learning rate of 0, the score never changes.
    trainer = {"max_epochs": 20, "callbacks": [stop]}
    model, clips, trainer = make("mel", "head", None, trainer, head_lr=0.0)
    trainer.fit(model, clips)
    assert trainer.current_epoch == 3
    assert "training stops after 3 of 20 epochs" in caplog.text


def test_bf16_trains(make: Callable):
    settings = {"precision": "bf16-mixed", "max_steps": 2}
    model, clips, trainer = make("mel", "full", {"crop_seconds": 0.7}, settings)
    trainer.fit(model, clips)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_logits_that_are_not_finite_end_the_run(make: Callable):
    model, clips, trainer = make("wave", "full", lr=1e30, head_lr=1e30)
    with pytest.raises(ValueError, match=r"not finite after epoch 1: lower `--model.lr`"):
        trainer.fit(model, clips)


def test_a_learning_rate_without_effect_is_refused(make: Callable):
    with pytest.raises(ValueError, match=r"`model.lr` \(0.1\) has no effect in the mode head"):
        make("wave", "head", lr=0.1)
