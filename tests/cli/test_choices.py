"""Help of options whose values are classes, and sentences for values of a wrong type."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jepa_audio.cli.choices import choices_help
from jepa_audio.cli.config_errors import config_sentence
from jepa_audio.cli.main import main
from jepa_audio.cli.messages import user_message
from jepa_audio.cli.trainer import AudioDataModule  # also imports the classes of the recipes
from jepa_audio.errors import UserError
from jepa_audio.training.jepa import JEPA

DEMO = Path(__file__).parents[2] / "configs" / "demo" / "wavjepa.yaml"
ROOTS = {"model": JEPA, "data": AudioDataModule}
CHOICES = {
    "masker": ["SpanMasker", "BlockMasker", "MixtureMasker"],
    "front_end": ["WaveformFrontEnd", "SpectrogramFrontEnd"],
    "target_front_end": ["SpectrogramPatches", "SpectrogramFrontEnd"],
    "front_end.spectrogram": ["LogMel", "CQT", "Gammatone"],
    "front_end.init_args.spectrogram": ["LogMel", "VQT"],
    "encoder.positions": ["SinCosPositions", "RotaryPositions"],
    "distance": ["MSE", "SmoothL1"],
    "regularizers": ["SIGReg", "VICReg"],
    "ema.momentum": ["Linear", "Cosine"],
    "optimizer": ["AdamW", "SGD"],
    "lr_schedule": ["WarmupCosine", "Constant"],
}


@pytest.mark.parametrize("key", CHOICES)
def test_help_of_a_class_option_lists_the_classes_with_a_line_each(key: str):
    text = choices_help(["fit", f"--model.{key}.help"], ROOTS)
    assert text is not None
    for name in CHOICES[key]:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3
    abstract = r"^ *(Masker|FrontEnd|PatchedSpectrogram|Spectrogram|Positions|Regularizer) "
    assert not re.search(abstract, text, re.MULTILINE), "abstract classes cannot be chosen"


def test_help_of_a_class_lists_its_settings_and_of_an_option_with_one_class_too():
    for words in (["--model.masker.help", "SpanMasker"], ["--model.masker.help=SpanMasker"]):
        assert "context_length" in str(choices_help(words, ROOTS))
    assert "top_k" in str(choices_help(["--model.targets.help"], ROOTS))
    assert "snr_db" in str(choices_help(["--data.scenes.help"], ROOTS))
    assert choices_help(["fit", "--help"], ROOTS) is None
    assert choices_help(["fit", "--model.seed", "3"], ROOTS) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.masker.help", "SpanMaskr"], "did you mean 'SpanMasker'"),
        (["--model.masker.help", "no.such.Class"], "cannot be imported"),
        (["--model.seed.help"], "`model.seed` does not take a class"),
    ],
)
def test_help_of_unknown_classes_ends_in_one_sentence(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        choices_help(words, ROOTS)


def run(*args: str) -> None:
    main(["fit", f"--config={DEMO}", "--data.root=unused", *args])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model.encoder.depth=two"], "`model.encoder.depth` is two, but must be an integer"),
        (["--trainer.limit_val_batches=lots"], "is lots, but must be an integer, a number or null"),
        (["--model.regularizers=SIGReg"], "`model.regularizers` is SIGReg, but must be a list"),
        (["--trainer.precision=17"], "`trainer.precision` is 17, but must be 64, 32, 16, "),
        (
            ["--data.mono=left"],
            "`data.mono` is left, but must be 'mean', 'first', 'random', 'keep'",
        ),
        (["--trainer.default_root_dir=X"], "set `--run_dir` instead"),
        (["--trainer.logger=WandbLogger"], "WandbLogger needs another package: run `pip install "),
        (["--trainer.logger+=WandbLogger"], "WandbLogger needs another package: run `pip install "),
        (["--trainer.strategy=nope"], "invalid strategy name: `strategy='nope'`"),
        (["--model.masker=jepa_audio.steps.masking.base.Masker"], "it does not implement "),
    ],
)
def test_a_value_of_a_wrong_type_is_answered_by_key_value_and_what_is_expected(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run(*args)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "jepa-audio: " in line]
    assert sentence in line


def test_an_abstract_class_of_the_user_is_refused_with_the_methods_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my_masker.py").write_text(
        "from jepa_audio.steps.masking.base import Masker\n"
        "class Half(Masker):\n    def a_method(self):\n        return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        run("--model.masker=my_masker.Half")
    err = capsys.readouterr().err
    missing = sorted(sys.modules["my_masker"].Half.__abstractmethods__)
    assert missing
    assert f"my_masker.Half is abstract: it does not implement {', '.join(missing)}" in err


def test_other_messages_become_one_line():
    assert config_sentence("Problems parsing config: a\n  in line 2") == (
        "Problems parsing config: a in line 2"
    )


CALLBACK = """
from lightning.pytorch import Callback
from jepa_audio.errors import UserError
class Refusing(Callback):
    def __init__(self, number: int = 1):
        raise UserError(f"`number` ({number}) must be 2")
"""


def test_the_reason_of_a_class_in_a_list_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my_callbacks.py").write_text(CALLBACK)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        run("--trainer.callbacks+=my_callbacks.Refusing")
    assert capsys.readouterr().err.endswith("jepa-audio: `number` (1) must be 2\n")


def test_a_bug_in_a_class_of_a_configuration_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    from jepa_audio.training.watching.finite_guard import FiniteGuard

    def faulty(self: FiniteGuard) -> None:
        list(zip([1, 2], [1], strict=True))

    monkeypatch.setattr(FiniteGuard, "__init__", faulty)
    with pytest.raises(ValueError, match="FiniteGuard") as raised:
        run("--trainer.callbacks+=jepa_audio.training.watching.finite_guard.FiniteGuard")
    assert user_message(raised.value) == (None, False)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "/x/table"),
            "/x/table: No space left .* free",
        ),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; check the path"),
    ],
)
def test_errors_of_the_disk_end_in_one_sentence(error: OSError, words: str):
    message, _ = user_message(error)
    assert message is not None

    assert re.search(words, message)
    assert user_message(OSError(2, "No such file", "/x")) == (None, False)
