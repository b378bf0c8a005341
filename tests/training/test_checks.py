"""Settings that do not fit together are refused before a Trainer exists or trains."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from jepa_audio.errors import UserError
from jepa_audio.steps.regularizers import SIGReg, VICReg
from jepa_audio.training.checks import check_crop, describe_collapse
from jepa_audio.training.schedules import Constant, Linear

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    sf.write(folder / "a.wav", np.random.default_rng(0).standard_normal(32_000) / 10, 16_000)
    return folder


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("demo/wavjepa", ["--model.encoder.depth=2"], ["targets.top_k` (4)", "encoder.depth` (2)"]),
        ("demo/pupujepa", ["--model.encoder.num_heads=5"], ["num_heads", "embed_dim"]),
        ("demo/pupujepa", ["--model.predictor.trunk.num_heads=32"], ["embed_dim", "multiple of 4"]),
        ("demo/pupujepa", ["--model.front_end.patch_bands=10"], ["patch_bands", "must divide"]),
        ("demo/wavjepa", ["--data.crop_seconds=0.1"], ["target_length", "data.crop_seconds"]),
        ("demo/wavjepa", ["--data.crop_seconds=0.001"], ["data.crop_seconds", "too short"]),
        ("demo/wavjepa", ["--data.crop_seconds=1e9"], ["crop_seconds"]),
        (
            "demo/wavjepa",
            ["--model.encoder.positions=BinauralPositions"],
            ["BinauralPositions", "two rows"],
        ),
        ("demo/wavjepa", ["--trainer.precision=bf16-true"], ["bf16-true", "bf16-mixed"]),
        ("demo/wavjepa", ["--trainer.precision=16-true"], ["16-true", "bf16-mixed"]),
        ("demo/wavjepa", ["--trainer.precision=64-true"], ["64-true", "32-true"]),
        ("demo/wavjepa", ["--trainer.precision=64"], ["64-true", "32-true"]),
        ("demo/wavjepa", ["--trainer.max_epochs=3"], ["max_epochs` (3)", "max_steps"]),
        ("demo/wavjepa", ["--trainer.min_epochs=2"], ["min_epochs` (2)"]),
        ("demo/wavjepa", ["--trainer.min_steps=2"], ["min_steps` (2)", "signals"]),
        (
            "demo/wavjepa",
            ["--trainer.reload_dataloaders_every_n_epochs=1"],
            ["reload_dataloaders_every_n_epochs` (1)"],
        ),
        (
            "demo/wavjepa",
            ["--trainer.check_val_every_n_epoch=2"],
            ["check_val_every_n_epoch` (2)", "val_check_interval"],
        ),
        ("demo/wavjepa", ["--trainer.limit_train_batches=0.5"], ["limit_train_batches` (0.5)"]),
        ("demo/wavjepa", ["--trainer.limit_train_batches=0"], ["limit_train_batches` (0)"]),
        (
            "demo/wavjepa",
            ["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"],
            ["limit_train_batches` (3)", "accumulate_grad_batches` (2)"],
        ),
        (
            "demo/wavjepa",
            ["--trainer.overfit_batches=3", "--trainer.accumulate_grad_batches=2"],
            ["overfit_batches` (3)", "accumulate_grad_batches` (2)"],
        ),
        ("demo/wavjepa", ["--trainer.gradient_clip_val=-1"], ["gradient_clip_val` (-1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_settings_that_do_not_fit_end_in_one_sentence_before_the_model_table(
    recipe: str,
    settings: list[str],
    words: list[str],
    sounds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    from jepa_audio.cli.main import main

    run = [f"--data.root={sounds}", f"--run_dir={tmp_path}", "--trainer.max_steps=60"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", f"--config={CONFIGS / recipe}.yaml", *run, *settings])
    output = capsys.readouterr()
    sentence = " ".join(output.err.split()).rpartition("jepa-audio: ")[2]
    assert ended.value.code in (1, 2)
    assert "Traceback" not in output.err
    assert "Params" not in output.out, "the model table"
    for word in words:
        assert word in sentence


def test_every_masker_of_a_mixture_must_fit_the_crops(tiny_jepa: Callable):
    from jepa_audio.steps.masking import MixtureMasker, RandomMasker, SpanMasker

    jepa = tiny_jepa("wave")
    fits, too_long = RandomMasker(), SpanMasker(target_length=30)
    check_crop(jepa.front_end, MixtureMasker([fits, SpanMasker()], [0.5, 0.5]), [], 500)
    with pytest.raises(UserError, match="target_length"):
        check_crop(jepa.front_end, MixtureMasker([fits, too_long], [0.5, 0.5]), [], 500)


def test_parts_of_different_widths_are_refused(tiny_jepa: Callable):
    jepa = tiny_jepa("wave")
    with pytest.raises(UserError, match=r"`predictor.embed_dim` \(8\) must equal"):
        type(jepa)(
            jepa.front_end,
            jepa.masker,
            jepa.encoder,
            jepa.targets,
            type(jepa.predictor)(8, jepa.predictor.trunk),
            jepa.distance,
            jepa.ema,
            torch.optim.AdamW,
            jepa.lr_schedule,
        )


def test_the_checks_also_hold_for_a_trainer_in_python(tiny_cli: Callable):
    cli = tiny_cli("wave")
    trainer = Trainer(max_epochs=2, logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(UserError, match="max_epochs"):
        trainer.fit(cli.model, cli.datamodule)


@pytest.mark.parametrize(
    ("accumulated", "regularizers", "momentum", "target_gradient", "words"),
    [
        (2, [SIGReg(), VICReg()], Linear(0.9, 1.0), False, "(2): sigreg_context, vicreg_context"),
        (2, [], Linear(0.9, 1.0), False, None),
        (1, [SIGReg()], Constant(0.0), True, None),
        (1, [], Linear(0.9, 1.0), True, "(true) without a regularizer: nothing prevents"),
        (1, [], Constant(0.0), False, "the momentum is 0 and there is no regularizer"),
        (1, [], Linear(0.0, 1.0), False, None),
    ],
)
def test_a_line_states_what_does_not_work_against_a_collapse(
    accumulated, regularizers, momentum, target_gradient, words, caplog
):
    trainer = Trainer(
        accelerator="cpu", max_steps=5, accumulate_grad_batches=accumulated, logger=False
    )
    for command, is_logged in ((TrainerFn.FITTING, bool(words)), (TrainerFn.VALIDATING, False)):
        caplog.clear()
        trainer.state.fn = command
        describe_collapse(trainer, regularizers, momentum, target_gradient)
        assert len(caplog.messages) == is_logged
        if is_logged:
            assert words in caplog.messages[0]
