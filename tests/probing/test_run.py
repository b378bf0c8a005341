"""`probe` from checkpoint to results: baselines, comparisons, options and errors."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import Tensor

from jepa_audio.cli.main import main
from jepa_audio.errors import MissingFileError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import save_encoder
from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.clips import UnusableClipsError
from jepa_audio.probing.encoders import (
    EncoderOptions,
    FunctionEncoder,
    LogMelStatistics,
    load_encoders,
    load_jepa_encoder,
    run_name,
    state_hash,
)
from jepa_audio.probing.intervals import difference
from jepa_audio.probing.presets import LinearPreset, preset_of
from jepa_audio.probing.rows import ProbeRow, load_evidence, read_rows
from jepa_audio.probing.run import probe
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import ProbeData
from jepa_audio.report.page import write_leaderboard

RATE, PITCHES, FAMILIES = 1000, (60, 62, 64, 65), ("bass", "reed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sine for a bass, two for a reed; the pitch is in the frequency; three lengths."""
    root, noise = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for split, size in {"train": 40, "valid": 16, "test": 24}.items():
        audio = root / f"nsynth-{split}" / "audio"
        audio.mkdir(parents=True)
        notes = {}
        for i in range(size):
            pitch, family = PITCHES[i % 4], FAMILIES[i // 4 % 2]
            time = np.arange(600 + 40 * (i % 3)) / RATE
            wave = np.sin(2 * np.pi * 50 * (pitch - 59) * time)
            wave += (family == "reed") * np.sin(2 * np.pi * 450 * time)
            sf.write(
                audio / f"note_{i:03}.wav",
                0.3 * wave + 0.01 * noise.standard_normal(len(time)),
                RATE,
            )
            notes[f"note_{i:03}"] = {"pitch": pitch, "instrument_family_str": family}
        (audio.parent / "examples.json").write_text(json.dumps(notes))
    return root


@pytest.fixture
def checkpoint(tiny_cli: Callable, fit: Callable, tmp_path: Path) -> tuple[Path, str]:
    """The checkpoint of a run of three steps, and the hash of its initial weights."""
    cli = tiny_cli("mel", "--trainer.max_steps=3")
    window = round(0.5 * RATE)
    before = state_hash(
        Encoder(cli.model.front_end, cli.model.encoder, window).requires_grad_(True)
    )
    cli.model.target_encoder.requires_grad_(False)
    cli.model.train()
    fit(cli)
    path = tmp_path / "runs" / "mel" / "checkpoints" / "last.ckpt"
    cli.trainer.save_checkpoint(path)
    return path, before


def check_rows(rows: list[ProbeRow], folder: Path) -> None:
    for row in rows:
        assert row.score.low <= row.value <= row.score.high
        assert (row.num_train, row.num_valid, row.num_test) == (30, 16, 24)
        place = row.layers.index(row.layer), row.settings.index(row.setting)
        assert row.valid_grid[place[0]][place[1]] == max(map(max, row.valid_grid))
        evidence = load_evidence(folder / row.evidence)
        right = evidence.predictions.argmax(axis=1) == evidence.labels
        assert right.mean() == pytest.approx(row.value)
        assert np.percentile(evidence.draws["accuracy"], 2.5) == pytest.approx(row.score.low)


def test_every_encoder_is_compared_with_the_initial_weights_of_its_run(
    checkpoint: tuple[Path, str], corpus: Path, tmp_path: Path
):
    path, before = checkpoint
    tasks, output = ["nsynth_pitch", "nsynth_instrument"], tmp_path / "probe"
    settings = {"preset": "linear", "random_seeds": (7,), "frequency": "concat", "max_train": 30}
    rows = probe(str(path), tasks, corpus, output, **settings)
    assert read_rows(output / "results.jsonl") == rows
    assert [(row.encoder, row.variant) for row in rows[::4]] == [
        ("mel", "random"),
        ("mel", "random-7"),
        ("mel", "context"),
        ("mel", "target"),
        ("log-mel", "statistics"),
        ("log-mel", "statistics"),
    ]
    assert {row.pooling for row in rows[:-8]} == {"mean/concat"}
    assert {row.pooling for row in rows[-8:]} == {"mean/concat", "mean_std_change/concat"}
    assert {(row.task, row.head) for row in rows} == {
        (task, head) for task in tasks for head in ("logistic", "knn")
    }
    assert {row.variant for row in rows if row.against_random} == {"context", "target"}
    hashes = {row.variant: row.encoder_hash for row in rows}
    assert hashes["random"] == before
    assert len(set(hashes.values())) == 5
    check_rows(rows, output)
    twins = {(row.task, row.head): row for row in rows if row.variant == "random"}
    for row in rows:
        if row.against_random is not None:
            twin = twins[row.task, row.head]
            draws = [
                load_evidence(output / each.evidence).draws["accuracy"] for each in (row, twin)
            ]
            expected = difference(row.value, twin.value, *draws)
            assert row.against_random.value == pytest.approx(expected.value)
            assert (row.against_random.low, row.against_random.high) == pytest.approx(
                (expected.low, expected.high)
            )
    assert len(list((output / "features").iterdir())) == 6, "both tasks share the features"
    write_leaderboard(output / "results.jsonl")
    text = (output / "leaderboard.md").read_text()
    assert all(word in text for word in ("nsynth_pitch", "nsynth_instrument", "log-mel", "random"))


def test_poolings_are_compared_with_the_baseline_of_the_same_pooling(
    checkpoint: tuple[Path, str],
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    settings = {"preset": "linear", "variants": ("context",), "max_train": 30}
    options = {"pooling": "mean,regions_40_std", "frequency": "mean"}
    rows = probe(str(checkpoint[0]), "nsynth_pitch", corpus, tmp_path, **settings, **options)
    assert read_rows(tmp_path / "results.jsonl") == rows
    poolings = {"mean/mean", "regions_40_std/mean"}
    logistic = [row for row in rows if row.head == "logistic"]
    by_key = {(row.variant, row.pooling): row for row in logistic}
    assert by_key.keys() == {(v, p) for v in ("random", "context") for p in poolings} | {
        ("statistics", f"{p}/concat") for p in ("mean", "regions_40_std", "mean_std_change")
    }
    for pooling in poolings:
        row, twin = by_key["context", pooling], by_key["random", pooling]
        assert row.against_random is not None
        assert row.against_random.value == pytest.approx(row.value - twin.value)
    assert len({row.evidence for row in rows}) == len(rows)
    lines = [message for message in caplog.messages if "fewer time columns" in message]
    assert len(lines) == 1
    assert "than regions_40_std/mean has regions (40): a column of such a window" in lines[0]
    write_leaderboard(tmp_path / "results.jsonl")
    text = (tmp_path / "leaderboard.md").read_text()
    assert all(f"mel context, {pooling}" in text for pooling in poolings)


def test_checkpoints_of_one_run_share_the_probe_of_their_baseline(
    checkpoint: tuple[Path, str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    last, _ = checkpoint
    step = last.with_name("step=3.ckpt")
    shutil.copy(last, step)
    fitted = []
    fit = LinearPreset.fit
    monkeypatch.setattr(LinearPreset, "fit", lambda *args: fitted.append(args) or fit(*args))
    settings = {"preset": "linear", "variants": ("target",), "max_train": 30}
    rows = probe(f"{step},{last}", "nsynth_pitch", corpus, tmp_path / "both", **settings)
    # One baseline, two encoders, two poolings of log-mel statistics.
    assert len(fitted) == 5
    of_step, of_last = (
        [replace(row, encoder="", evidence="") for row in rows if row.encoder == name]
        for name in ("mel/step=3", "mel")
    )
    assert of_step == of_last
    assert [row.variant for row in of_last] == ["random", "random", "target", "target"]
    assert read_rows(tmp_path / "both" / "results.jsonl") == rows


def test_the_command_accepts_lists_with_commas_and_prints_the_scores(
    checkpoint: tuple[Path, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "probe"
    paths = f"--encoder {checkpoint[0]} --data {corpus} --output {output}"
    options = "--tasks nsynth_pitch,nsynth_instrument --variants [context] --max_train 30"
    main(["probe", *paths.split(), *options.split(), "--layers", "[1, 2]"])
    printed = capsys.readouterr().out
    rows = read_rows(output / "results.jsonl")
    assert {row.preset for row in rows} == {"marble-v1"}
    assert {row.layers for row in rows if row.encoder == "mel"} == {
        ("block 1", "block 2", "weighted sum")
    }
    assert rows[0].settings == (5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
    check_rows(rows, output)
    assert "nsynth_pitch" in printed
    assert f"{rows[0].value:.3f}" in printed


def test_only_marble_v2_can_select_the_last_epoch():
    assert preset_of("marble-v2", "last").select == "last"
    with pytest.raises(ValueError, match="only the preset marble-v2 has this option"):
        preset_of("marble-v1", "last")


def table_of(corpus: Path, folder: Path) -> Path:
    lines = ["path,label,split"]
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        audio = corpus / f"nsynth-{split}" / "audio"
        lines += [f"{path},{i // 4 % 2},{name}" for i, path in enumerate(sorted(audio.iterdir()))]
    (folder / "mine.csv").write_text("\n".join(lines))
    return folder / "mine.csv"


def no_encoder() -> str:
    return "none"


def spectrum() -> FunctionEncoder:
    """An oracle: the strong parts of the spectrum."""

    def layers(waveform: Tensor) -> list[Tensor]:
        magnitude = torch.fft.rfft(waveform[:, 0, :600]).abs()[:, 1:300]
        strong = (magnitude > magnitude.amax(dim=1, keepdim=True) / 2).float()
        return [torch.ones(len(waveform), 1, 30), strong.unfold(1, 9, 9).amax(-1)[:, None, :30]]

    return FunctionEncoder(layers, "spectrum", RATE, layer_names=("nothing", "spectrum"))


def test_a_function_is_probed_on_a_table(corpus: Path, tmp_path: Path):
    rows = probe(
        "tests.probing.test_run:spectrum",
        str(table_of(corpus, tmp_path)),
        [],
        tmp_path,
        preset="linear",
    )
    row = rows[0]
    assert (row.encoder, row.variant, row.task, row.layer) == (
        "spectrum",
        "function",
        "mine",
        "spectrum",
    )
    assert row.value == 1
    assert row.against_random is None
    assert row.chance == 0.5


def test_truncated_files_of_all_splits_are_named_in_one_message(corpus: Path, tmp_path: Path):
    shutil.copytree(corpus, tmp_path / "corpus")
    table = table_of(tmp_path / "corpus", tmp_path)
    bad = [tmp_path / f"corpus/nsynth-{split}/audio" for split in ("test", "train")]
    bad = [sorted(folder.iterdir())[1] for folder in bad]
    for file in bad:
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UnusableClipsError, match=r"^2 clips cannot be used") as raised:
        probe("tests.probing.test_run:spectrum", str(table), [], tmp_path, preset="linear")
    text = str(raised.value)
    assert all(str(file) in text for file in bad)
    assert "mine.csv" in text


def test_heads_trained_on_clean_clips_are_scored_on_degraded_ones(corpus: Path, tmp_path: Path):
    rows, clean = (
        probe(
            "tests.probing.test_run:spectrum",
            "nsynth_pitch",
            corpus,
            tmp_path / folder,
            preset="linear",
            robustness=names,
        )
        for folder, names in (("degraded", ["gain", "high_pass", "low_pass"]), ("clean", False))
    )
    row = rows[0]
    assert row.scores == clean[0].scores
    assert row.robustness is not None
    assert row.robustness_area is not None
    assert row.value == 1
    assert row.robustness["gain"] == ((10.0, 1.0), (-10.0, 1.0), (-20.0, 1.0), (-30.0, 1.0))
    assert row.robustness_area["gain"] == 1
    levels = [level for level, _ in row.robustness["high_pass"]]
    assert levels == [125.0, 250.0, 500.0, 1000.0, 2000.0]
    scores = [score for _, score in row.robustness["high_pass"]]
    assert 1 > scores[0] > scores[-1]
    assert row.robustness_area["high_pass"] == pytest.approx(
        (0.5 + sum(scores[:-1]) + scores[-1] / 2) / 5
    )
    levels = {level for level, _ in row.robustness["low_pass"]}
    assert levels == {8000.0, 4000.0, 2000.0, 1000.0, 500.0}
    assert {score for _, score in row.robustness["low_pass"]} == {1.0}
    assert len(list((tmp_path / "degraded" / "features").iterdir())) == 3 * (1 + 4 + 5), (
        "conditions that change nothing are not encoded"
    )


def test_invalid_options_raise_errors_before_anything_is_encoded(corpus: Path, tmp_path: Path):
    def check_error(match: str, error: type[Exception] = ValueError, **settings: object) -> None:
        known = {
            "encoder": "tests.probing.test_run:spectrum",
            "tasks": "nsynth_pitch",
            "data": corpus,
            "output": tmp_path / "out",
        }
        with pytest.raises(error, match=match):
            probe(**known | settings)
        assert not (tmp_path / "out").exists()

    check_error(
        r"no task 'gtzan_genres'; there are gtzan_genre.*; did you mean 'gtzan_genre'\?$",
        tasks="gtzan_genres",
    )
    check_error("different names", encoder="a/x.ckpt,b/x.ckpt")
    check_error(
        "`preset` is 'marble', must be one of marble-v1, linear, attentive, marble-v2",
        preset="marble",
    )
    check_error(
        "`robustness` has unknown conditions rain; the known ones are white_noise",
        robustness=["rain"],
    )
    check_error(
        "no checkpoint at a/x.ckpt",
        MissingFileError,
        encoder="tests.probing.test_run:spectrum,a/x.ckpt",
    )
    check_error("`tasks` must have different names", tasks="nsynth_pitch,nsynth_pitch")
    check_error("give a checkpoint, or MODULE:FUNCTION", encoder="nowhere:nothing")
    check_error("no attribute 'nobody'", encoder="tests.probing.test_run:nobody")
    check_error("is 1000, not a function", encoder="tests.probing.test_run:RATE")
    check_error("`select` is 'last'", preset="linear", select="last")
    check_error("`pooling` must be left out", preset="attentive", pooling="mean")
    check_error("nsynth_pitch has no protocol marble-v2, it has marble-v1", preset="marble-v2")
    check_error("at least one unit", max_train=0)
    check_error("returns str, not a `ProbeEncoder`", encoder="tests.probing.test_run:no_encoder")
    check_error("GTZANGenre|genres", MissingFileError, tasks="gtzan_genre")


def test_a_run_has_the_name_of_its_folder():
    assert run_name(Path("runs/wave/checkpoints/last.ckpt")) == "wave"
    assert run_name(Path("runs/wave/checkpoints/step=100.ckpt")) == "wave/step=100"
    assert run_name(Path("models/wave.ckpt")) == "wave"


def test_the_folder_of_a_run_and_an_exported_folder_are_probed_as_their_checkpoint(
    checkpoint: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = tmp_path / "wave"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint[0], run / "checkpoints" / "last.ckpt")
    of_file = list(load_encoders(str(run / "checkpoints" / "last.ckpt"), EncoderOptions()))
    of_run = list(load_encoders(str(run), EncoderOptions()))
    assert [(e.name, e.variant, e.function_hash) for e in of_run] == [
        (e.name, e.variant, e.function_hash) for e in of_file
    ]
    exported = save_encoder(load_encoder(run, "target"), tmp_path / "wave-v1.0")
    of_folder = list(load_encoders(str(exported), EncoderOptions(variants=("context",))))
    assert "holds only the target encoder, which is probed" in caplog.text
    assert [(e.name, e.variant) for e in of_folder] == [
        ("wave-v1.0", "random"),
        ("wave-v1.0", "target"),
    ]
    (target,) = (e for e in of_file if e.variant == "target")
    assert of_folder[1].function_hash == target.function_hash


def test_encoders_that_compute_different_features_have_different_hashes(
    checkpoint: tuple[Path, str],
):
    path = checkpoint[0]
    default = EncoderOptions()
    encoders = [load_jepa_encoder(path, variant, default) for variant in ("target", "random")]
    encoders += [
        load_jepa_encoder(path, "context", options)
        for options in (
            default,
            EncoderOptions(layers=(1,)),
            EncoderOptions(overlap=0.5),
            EncoderOptions(windowing="wavjepa"),
        )
    ]
    encoders.append(LogMelStatistics(RATE))
    shorter = load_jepa_encoder(path, "context", default)
    shorter.frozen.window_samples //= 2
    hashes = [encoder.function_hash for encoder in (*encoders, shorter)]
    assert len(set(hashes)) == len(hashes)
    assert hashes[2] == load_jepa_encoder(path, "context", default).function_hash
    names = [encoder.name for encoder in encoders[2:6]]
    assert names == ["mel", "mel", "mel (overlap 0.5)", "mel (wavjepa windows)"]


def test_windows_of_long_clips_are_options_of_the_command(
    checkpoint: tuple[Path, str], corpus: Path, tmp_path: Path
):
    settings = {"preset": "linear", "variants": ("context",)}
    usual, overlapping = (
        probe(str(checkpoint[0]), "nsynth_pitch", corpus, tmp_path, overlap=overlap, **settings)
        for overlap in (0.0, 0.5)
    )
    assert {row.encoder for row in usual} == {"mel", "log-mel"}
    assert {row.encoder for row in overlapping} == {"mel (overlap 0.5)", "log-mel"}
    assert usual[0].encoder_hash == overlapping[0].encoder_hash
    assert len(list((tmp_path / "features").iterdir())) == 6, "log-mel statistics are shared"
    with pytest.raises(ValueError, match="`overlap`"):
        probe(str(checkpoint[0]), "nsynth_pitch", corpus, tmp_path, overlap=1.0, **settings)


def test_records_of_nsynth_match_examples_json(corpus: Path):
    pitch, family = (
        ProbeData.load(TASKS[name], corpus) for name in ("nsynth_pitch", "nsynth_instrument")
    )
    assert pitch.labels.names == ("60", "62", "64", "65")
    assert family.labels.names == ("bass", "reed")
    assert [item.label for item in family.splits["train"].items[:5]] == ["bass"] * 4 + ["reed"]
    subsets = [task.with_train(10, seed=1).splits["train"] for task in (pitch, family)]
    assert [item.path for item in subsets[0].items] == [item.path for item in subsets[1].items]
    assert len(subsets[0].uids) == 10
    assert subsets[0].uids != pitch.with_train(10, seed=2).splits["train"].uids


def test_short_clips_are_padded_and_counted_in_the_rows_and_in_one_line(
    checkpoint: tuple[Path, str],
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    short = shutil.copytree(corpus, tmp_path / "short")
    sf.write(short / "nsynth-test" / "audio" / "note_003.wav", np.full(9, 0.1), RATE)
    settings = {"preset": "linear", "variants": ["context"]}
    rows = probe(str(checkpoint[0]), "nsynth_pitch", short, tmp_path / "probe", **settings)
    assert {row.num_padded for row in rows} == {1}
    lines = [message for message in caplog.messages if "zero padding" in message]
    assert len(lines) == 2, "one for the front end of the run, one for log-mel statistics"
    assert lines[0].startswith("nsynth_pitch: 1 windows are shorter than one token (")
