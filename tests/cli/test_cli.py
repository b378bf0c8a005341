"""The commands of a run: misspelt words, useless data, a run that is continued, a full disk."""

from __future__ import annotations

import csv
import multiprocessing
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml

DEMO = Path(__file__).parents[2] / "configs" / "demo" / "wavjepa.yaml"
TINY = (
    "--model.encoder.embed_dim=16",
    "--model.encoder.num_heads=2",
    "--model.encoder.depth=1",
    "--model.targets.top_k=1",
    "--model.predictor.trunk.embed_dim=8",
    "--model.predictor.trunk.num_heads=2",
    "--model.predictor.trunk.depth=1",
    "--model.front_end.init_args.conv_layers=[[8,20,10],[8,8,4],[8,8,8]]",
    "--model.lr_schedule.init_args.warmup_steps=1",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--checkpoint.every_n_train_steps=2",
    "--monitor.every_n_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--trainer.max_stps=5", "trainer.max_steps"),
        ("--model.masker.context_lenght=5", "context_length"),
        ("--model.distance=SmoothL2", "SmoothL1"),
        ("--model.masker=SpanMaskr", "SpanMasker"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_right_word(
    wrong: str, right: str, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    with pytest.raises(SystemExit):
        main(["fit", f"--config={DEMO}", "--data.root=unused", wrong])
    assert f"did you mean '{right}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "`--config wavjepa`; `jepa-audio configs` lists the recipes"),
        ([f"--config={DEMO}"], "missing: `--data.root`"),
        (["demo/wavjepa", "--data.root=unused"], "`--config demo/wavjepa`"),
    ],
)
def test_a_missing_recipe_or_folder_is_named_with_its_option(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    with pytest.raises(SystemExit):
        main(["fit", *options])
    message = capsys.readouterr().err
    assert sentence in message
    assert "fit." not in message


@pytest.mark.parametrize(
    ("text", "key", "sentence"),
    [
        ("encodr:\n    depth: 3", "encodr.depth", "did you mean 'model.encoder'?"),
        ("encoder:\n    depth: many", "encoder.depth", "many, but must be an integer"),
        ("masker:\n    class_path: SpanMaskr", "masker.class_path", "did you mean 'SpanMasker'?"),
        ("masker:\n    SpanMaskr", "masker", "did you mean 'SpanMasker'?"),
        (
            "masker:\n    class_path: jepa_audio.steps.masking.SpanMaskr",
            "masker.class_path",
            "`jepa_audio.steps.masking.SpanMaskr` does not exist; did you mean 'SpanMasker'?",
        ),
        (
            "optimizer:\n    class_path: torch.optim.AdmW\n    init_args: {lr: 1.0}",
            "optimizer.class_path",
            "`torch.optim.AdmW` does not exist; did you mean 'AdamW'?",
        ),
        ("masker:\n    class_path: no_package.Mine", "masker.class_path", "No module named"),
        (
            "masker:\n    init_args: {context_lenght: 5}",
            "masker.init_args.context_lenght",
            "did you mean 'context_length'?",
        ),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_file_line_and_complete_key(
    text: str, key: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    file = tmp_path / "own.yaml"
    file.write_text(f"model:\n  seed: 1\n  {text}\n")
    with pytest.raises(SystemExit):
        main(["fit", f"--config={DEMO}", "--config", str(file), "--data.root=unused"])
    message = capsys.readouterr().err
    assert f"{file}, line 4 (`model.{key}`): " in message
    assert sentence in message


@pytest.mark.parametrize("text", [None, "a: [", "a: &x [*x]", "\xff"])
def test_a_place_is_looked_for_in_any_file(text: str | None, tmp_path: Path):
    from jepa_audio.cli.config_errors import place_of

    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    assert not place_of("Option 'depht' is not accepted", ["fit", "--config", str(file)])


def test_a_place_is_looked_for_in_a_file_that_grows_with_its_aliases(tmp_path: Path):
    from jepa_audio.cli.config_errors import place_of

    keys = [", ".join(f"k{j}: *a{i}" for j in range(9)) for i in range(29)]
    levels = [f"a{i}: &a{i} {{{text}}}" for i, text in enumerate(keys, start=1)]
    (tmp_path / "own.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *levels]))
    assert not place_of("Option 'y' is not accepted", [f"--config={tmp_path / 'own.yaml'}"])


def test_a_mistake_in_the_command_line_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    (tmp_path / "own.yaml").write_text("model: {encoder: {depth: 3}}")
    options = [f"--config={DEMO}", f"--config={tmp_path / 'own.yaml'}", "--data.root=unused"]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--model.encoder.depth=many"])
    assert capsys.readouterr().err.startswith("jepa-audio: `model.encoder.depth` is many, but")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("model: {encoder: {embd_dim: 192}}", "embed_dim"),
        ("modle: {seed: 1}", "model.seed"),
        ("data: {batchsize: 3}", "data.batch_size"),
        ("model: {targets: {topk: 3}}", "model.targets.top_k"),
        ("model: {encodr: {depth: 3}}", "model.encoder"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_word(
    text: str, right: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    (tmp_path / "typo.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(
            ["fit", f"--config={DEMO}", f"--config={tmp_path / 'typo.yaml'}", "--data.root=unused"]
        )
    assert f"did you mean '{right}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "no audio files"),
        (lambda folder: (folder.mkdir(), (folder / "a.wav").write_text("not audio")), "a.wav"),
    ],
    ids=["missing", "empty", "junk"],
)
def test_a_folder_without_usable_audio_ends_in_one_sentence(
    make, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from jepa_audio.cli.main import main

    make(tmp_path / "sounds")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "fit",
                f"--config={DEMO}",
                f"--data.root={tmp_path / 'sounds'}",
                f"--run_dir={tmp_path / 'run'}",
                *TINY,
            ]
        )
    stderr = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1
    assert sentence in stderr
    assert "Traceback" not in stderr


def test_a_run_writes_config_metrics_and_last_checkpoint_and_is_continued(tmp_path: Path):
    from jepa_audio.cli.main import main

    (tmp_path / "sounds").mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).standard_normal(20_000) / 10
        sf.write(tmp_path / "sounds" / f"{i}.wav", noise, 16_000)
    run = [
        "--run_dir",
        str(tmp_path / "run"),
        "--data.root",
        str(tmp_path / "sounds"),
        "--data.valid_share=0.3",
    ]
    main(["fit", f"--config={DEMO}", *run, *TINY, "--trainer.max_steps=4"])
    files = {
        path.relative_to(tmp_path / "run").as_posix()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    assert {"config.yaml", "checkpoints/last.ckpt", "metrics/version_0/metrics.csv"} <= files
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert {
        "valid/loss",
        "collapse/context_rank",
        "train/loss_mean_target",
        "train/loss",
    } <= columns

    main(
        [
            "fit",
            "--config",
            str(tmp_path / "run" / "config.yaml"),
            "--ckpt_path",
            "last",
            "--trainer.max_steps=6",
        ]
    )
    with (tmp_path / "run" / "metrics" / "version_1" / "metrics.csv").open() as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} & {4, 5, 6}


@pytest.mark.parametrize(
    "settings", [["--model.seed=5"], ["--data.seed=5"], ["--model.seed=5", "--data.seed=7"]]
)
def test_seeds_of_model_and_data_are_set_and_logged_separately(settings: list[str], tmp_path: Path):
    from jepa_audio.cli.main import main

    for i in range(4):
        sf.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 20_000), 16_000)
    folders = [f"--data.root={tmp_path}", f"--run_dir={tmp_path / 'run'}"]
    main(["fit", f"--config={DEMO}", *folders, *TINY, "--trainer.max_steps=2", *settings])
    expected = {"model": 0, "data": 0}
    for setting in settings:
        part, _, value = setting.removeprefix("--").partition(".seed=")
        expected[part] = int(value)
    for logged in (tmp_path / "run").rglob("hparams.yaml"):
        values = yaml.safe_load(logged.read_text())
        assert {"model": values["seed"], "data": values["data"]["seed"]} == expected
        assert values["data"]["batch_size"] == 2
    assert len(list((tmp_path / "run").rglob("hparams.yaml"))) == 2


def main_with_file_size_limit(args: list[str], num_bytes: int, stderr: Path) -> None:
    from jepa_audio.cli.main import main

    sys.stderr = stderr.open("w")
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    main(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize(
    "loggers_fail", [False, True], ids=["checkpoint fails", "loggers fail after it"]
)
def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_previous_checkpoint(
    tmp_path: Path, loggers_fail: bool, monkeypatch: pytest.MonkeyPatch
):
    from lightning.pytorch.loggers import CSVLogger

    from jepa_audio.cli.main import main

    for i in range(4):
        sf.write(
            tmp_path / f"{i}.wav", np.random.default_rng(i).standard_normal(20_000) / 10, 16_000
        )
    run = [
        "fit",
        f"--config={DEMO}",
        *TINY,
        f"--data.root={tmp_path}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    main([*run, "--trainer.max_steps=2"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if loggers_fail:
        monkeypatch.setattr(CSVLogger, "finalize", lambda *_: (tmp_path / "run").read_bytes())
    more = [*run, "--trainer.max_steps=6", "--ckpt_path=last"]
    limited = multiprocessing.get_context("fork").Process(
        target=main_with_file_size_limit,
        args=(more, last.stat().st_size - 100, tmp_path / "stderr"),
    )
    limited.start()
    limited.join(60)
    stderr = " ".join((tmp_path / "stderr").read_text().split())
    assert limited.exitcode == 1, stderr
    assert "Traceback" not in stderr
    sentence = stderr.partition("jepa-audio: ")[2]
    for word in (
        "last.ckpt could not be written",
        "File too large",
        "the previous checkpoint is valid",
        "--ckpt_path last",
    ):
        assert word in sentence
    assert torch.load(last, weights_only=True)["global_step"] == 2
    monkeypatch.undo()
    main(more)
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_data_stats_measures_with_the_configuration_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from jepa_audio.cli import models, trainer
    from jepa_audio.cli.main import main

    def measure(front_end, data, num_clips: int) -> None:
        assert num_clips == 2000
        models.stats(front_end, data, num_clips=40)

    monkeypatch.setattr(trainer, "stats", measure)
    for i in range(4):
        sf.write(
            tmp_path / f"{i}.wav", np.random.default_rng(i).standard_normal(40_000) / 10, 16_000
        )
    config = DEMO.with_name("pupujepa.yaml")
    main(["data", "stats", f"--config={config}", f"--data.root={tmp_path}", "--data.num_workers=0"])
    out = capsys.readouterr().out
    mean, std = (float(out.split(f"{name}: ")[1].split()[0]) for name in ("mean", "std"))
    assert -6 < mean < 2
    assert 0.1 < std < 3
