"""The command `finetune` as users call it: results, folds, resuming and messages."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_audio.cli.finetune import FineTuneCLI, finetune
from jepa_audio.errors import UserError
from jepa_audio.inference.folder import find_origin
from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.finetuning.clips import ClipFormat
from jepa_audio.probing.rows import load_evidence, read_rows
from jepa_audio.probing.tasks import load_task
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.records import Item
from tests.probing.finetuning.conftest import write_tones

SHORT = ("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--data.num_workers=0")


def options(checkpoint: Path, task: Path | str, folder: Path, *more: str) -> list[str]:
    places = f"--output={folder / 'probe'}", f"--run_dir={folder / 'run'}"
    return ["finetune", f"--encoder={checkpoint}", f"--task={task}", *places, *SHORT, *more]


def test_one_command_trains_selects_tests_and_compares_with_the_random_init_baseline(
    checkpoints: dict[str, Path], tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = "--baseline=random", "--data.mixup=0.3", "--model.time_mask=0.2", "--model.lr=0.01"
    finetune(options(checkpoints["mel"], tones, tmp_path, *more))
    baseline, row = read_rows(tmp_path / "probe" / "results.jsonl")
    assert (baseline.variant, row.variant) == ("random", "context")
    assert (row.task, row.preset, row.head) == ("tones", "finetune", "finetune-full")
    assert (row.encoder, row.layer, row.pooling) == ("mel", "block 2", "mean/mean")
    assert row.against_random is not None
    assert (row.num_train, row.num_valid, row.num_test) == (24, 8, 8)
    evidence = load_evidence(tmp_path / "probe" / row.evidence)
    share = (evidence.predictions.argmax(axis=1) == evidence.labels).mean()
    assert row.value == pytest.approx(share)
    with (tmp_path / "run" / "predictions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert np.mean([line["label"] == line["prediction"] for line in lines]) == pytest.approx(share)
    assert sum(float(lines[0][f"p_{name}"]) for name in "abcd") == pytest.approx(1, abs=1e-4)
    assert "finetune-full" in (tmp_path / "probe" / "leaderboard.md").read_text()
    assert "finetune-full" in capsys.readouterr().out
    # The encoder can be loaded; it differs from the pretrained one.
    tuned, start = load_encoder(tmp_path / "run" / "encoder"), load_encoder(checkpoints["mel"])
    assert find_origin(tuned).fine_tuned == ("full", "tones")
    stored = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    for name, value in tuned.encoder.state_dict().items():
        assert torch.equal(value, stored["state_dict"][f"network.backbone.encoder.{name}"])
    assert any(
        not torch.equal(value, start.state_dict()[name])
        for name, value in tuned.state_dict().items()
    )
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    # A second run does not replace the first one; a resumed run repeats nothing.
    with pytest.raises(ValueError, match="holds a run: continue it with `--resume`"):
        finetune(options(checkpoints["mel"], tones, tmp_path, *more))
    with pytest.raises(ValueError, match=r"has other settings \(data.mixup\)"):
        finetune(options(checkpoints["mel"], tones, tmp_path, *more, "--data.mixup=0", "--resume"))
    finetune(options(checkpoints["mel"], tones, tmp_path, *more, "--resume"))
    assert read_rows(tmp_path / "probe" / "results.jsonl")[-1].scores == row.scores


@pytest.mark.filterwarnings("error:Found .* in eval mode")
def test_folds_by_group_score_every_clip_once(
    checkpoints: dict[str, Path],
    tones: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    caplog.set_level("INFO")
    more = "--folds=group", "--num_folds=3", "--mode=head", "--trainer.max_epochs=1"
    (row,) = FineTuneCLI(options(checkpoints["mel"], tones, tmp_path, *more)[1:]).run()
    assert "the column `split` is not used, because of the folds" in caplog.text
    assert row.task == "tones (3 folds by group)"
    assert row.num_test == 40
    evidence = load_evidence(tmp_path / "probe" / row.evidence)
    assert len(set(evidence.uids)) == len(evidence.predictions) == 40
    assert len(list((tmp_path / "run").glob("fold-*/encoder/model.safetensors"))) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"in {tmp_path}/run/fold-0/encoder to {tmp_path}/run/fold-2/encoder")


def test_labels_in_time_are_fine_tuned(
    checkpoints: dict[str, Path], roots: Callable[[str], Path], tmp_path: Path
):
    root = f"--data.root={roots('gtzan_beat')}"
    more = root, "--trainer.max_epochs=1", "--data.batch_size=4", "--mode=last_1"
    (row,) = FineTuneCLI(options(checkpoints["mel"], "gtzan_beat", tmp_path, *more)[1:]).run()
    assert (row.pooling, row.head) == ("frames/mean", "finetune-last_1")
    with np.load(tmp_path / "run" / "predictions.npz") as stored:
        assert len(stored["logits"]) == len(stored["seconds"]) == len(stored["item"])


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_other_kinds_of_labels(
    checkpoints: dict[str, Path], tones: Path, tmp_path: Path, kind: str
):
    table = tones.parent / f"{kind}.csv"
    lines = tones.read_text().splitlines()[1:]
    answers = {"a": ("x", 1.0), "b": ("x|y", 2.0), "c": ("y", 3.0), "d": ("", 4.0)}
    column = ["tags", "label"][kind == "regression"]
    with table.open("w") as file:
        file.write(f"path,{column},split\n")
        for path, label, split, _ in (line.split(",") for line in lines):
            file.write(f"{path},{answers[label][kind == 'regression']},{split}\n")
    more = f"--data.table_kind={kind}", "--data.mixup=0.2", "--model.head=attentive"
    (row,) = FineTuneCLI(options(checkpoints["mel"], table, tmp_path, *more)[1:]).run()
    assert row.metric == ("r2" if kind == "regression" else "auroc")
    assert row.pooling == "frames/mean"
    column = "predicted_label" if kind == "regression" else "p_x"
    with (tmp_path / "run" / "predictions.csv").open() as file:
        values = [float(line[column]) for line in csv.DictReader(file)]
    low, high = (0.5, 4.5) if kind == "regression" else (0, 1)
    assert all(low <= value <= high for value in values)


def test_a_task_of_a_users_module(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_tones.py").write_text(
        "from pathlib import Path\n"
        "from jepa_audio.probing.tasks.table import table_task\n"
        f"def task(): return table_task(Path({str(tones)!r}), 'multiclass')\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("my_tones:task", []).task.name == "tones"
    with pytest.raises(ValueError, match="my_tones:wrong gives int, not a `Task`"):
        load_task("my_tones:wrong", [])
    with pytest.raises(ValueError, match=r"my_tones:tusk: .*give my_package:function"):
        load_task("my_tones:tusk", [])


# Messages


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--model.lyer_decay=0.5",),
            "did you mean 'model.layer_decay'?",
        ),
        (("--mod=full",), "'mod' is unknown; did you mean"),
        (("--folds=gruop",), "gruop"),
    ],
)
def test_a_misspelt_option_has_a_suggestion(
    checkpoints: dict[str, Path],
    tones: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        finetune(options(checkpoints["mel"], tones, tmp_path, *more))
    assert message in capsys.readouterr().err


def test_wrong_tables_and_damaged_files_are_named_before_training(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = write_tones(tmp_path, number=20)
    good = table.read_text()

    def run(text: str) -> None:
        table.write_text(text)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        finetune(options(checkpoints["mel"], table, tmp_path, "--trainer.max_epochs=1"))

    with pytest.raises(ValueError, match=r"tones.csv, line 2.*`?split`?.*must be one of"):
        run(good.replace("00.wav,a,train", "00.wav,a,trian"))
    with pytest.raises(ValueError, match=r"missing\.wav is missing"):
        run(good.replace("00.wav", "missing.wav"))
    # No validation clip has the class d: it is stated, and training goes on.
    run("".join(line for line in good.splitlines(True) if ",d,val" not in line))
    assert "no unit in val has the class d" in caplog.text
    (tmp_path / "01.wav").write_bytes((tmp_path / "01.wav").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"01\.wav"):
        run(good)


def test_a_file_that_cannot_be_decoded_is_named_with_its_row(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    item = Item(tmp_path / "a.wav", "x", "a", "tones.csv, line 3")
    message = r"^tones\.csv, line 3: .*a\.wav.*; repair the file, or remove its row$"
    with pytest.raises(UserError, match=message):
        ClipFormat(1000, 1, 10, Windows(), None).load(item)


@pytest.mark.parametrize(
    ("given", "missing"),
    [([], "missing: `--encoder`, `--task`"), (["--encoder=x"], "missing: `--task`")],
)
def test_missing_arguments_are_named(
    given: list[str], missing: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        finetune(["finetune", *given])
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "--task=nope.csv",
        "--trainer.max_epochs=0",
        "--mode=last_9",
        "--model.lora_rank=0",
        "--folds=group --num_folds=9",
    ],
)
def test_a_start_that_fails_does_not_occupy_the_folder(
    checkpoints: dict[str, Path], tones: Path, tmp_path: Path, wrong: str
):
    cli = FineTuneCLI(options(checkpoints["wave"], tones, tmp_path, *wrong.split())[1:])
    with pytest.raises(
        ValueError, match=r"nope\.csv|trainer\.max_epochs|last_9|lora_rank|num_folds"
    ):
        cli.run()
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_run_are_saved(checkpoints: dict[str, Path], tones: Path, tmp_path: Path):
    finetune(options(checkpoints["wave"], tones, tmp_path, "--mode=head"))
    assert "mode: head" in (tmp_path / "run" / "config.yaml").read_text()
    row = json.loads((tmp_path / "probe" / "results.jsonl").read_text())
    assert (row["head"], row["setting"]) == ("finetune-head", 1e-3)
    # The encoder is the pretrained one.
    assert find_origin(load_encoder(tmp_path / "run" / "encoder")).fine_tuned is None
