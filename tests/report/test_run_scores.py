"""Which probe results belong to a run: by the hash of its weights, or else by its name."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.cli.main import main
from jepa_audio.inference.encoder import state_hash
from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import Score, append_rows
from jepa_audio.report.results import current, read_results, to_table
from jepa_audio.report.run_scores import RunResults, best_scores, results_of_runs
from jepa_audio.report.runs import Run, find_runs, judge_run
from tests.probing.rows import a_row
from tests.report.test_report import FIT, WAVE, write_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `one/a` and `two/a` with different weights."""
    folder = tmp_path_factory.mktemp("scores")
    (folder / "corpus").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).normal(size=6_000)
        sf.write(folder / "corpus" / f"{number}.wav", 0.1 * noise, 8_000)
    for seed, name in enumerate(("one/a", "two/a")):
        config = folder / "a.yaml"
        text = FIT.format(folder=folder, front_end=WAVE, masker="SpanMasker")
        text = text.replace("runs/it", f"runs/{name}").replace("model:", f"model:\n  seed: {seed}")
        config.write_text(text.replace("seed_everything: 0", f"seed_everything: {seed}"))
        main(["fit", "--config", str(config)])
    return folder


def score(value: float) -> dict[str, Score]:
    return {"accuracy": Score(value, value - 0.1, value + 0.1)}


def attributed(folder: Path, results: Path) -> tuple[list[Run], dict[str, RunResults]]:
    runs = find_runs(folder)
    found = results_of_runs(runs, read_results([results]))
    return runs, {run.label: found[run.folder] for run in runs}


def test_runs_of_one_name_have_the_results_of_their_own_weights(place: Path, tmp_path: Path):
    results = tmp_path / "results.jsonl"
    for name, value in (("one", 0.25), ("two", 0.5)):
        for which in ("context", "target"):
            encoder = load_encoder(place / "runs" / name / "a" / "checkpoints/last.ckpt", which)
            weights = {"encoder": "a", "variant": which, "encoder_hash": state_hash(encoder)}
            append_rows(results, [a_row(**weights, scores=score(value), split_checksum="0" * 8)])
    append_rows(results, [a_row(encoder="a", scores=score(0.9))])  # a third run of this name
    runs, found = attributed(place / "runs", results)
    values = {name: best_scores(own.table)["nsynth_pitch"].value for name, own in found.items()}
    assert values == {"one/a": 0.25, "two/a": 0.5}
    assert not any(own.problem for own in found.values())
    verdicts = [judge_run(run, current(found[run.label].table))[1] for run in runs]
    assert all("context encoder on nsynth_pitch" in verdict for verdict in verdicts)


def test_results_of_other_weights_are_left_out_with_a_sentence(place: Path, tmp_path: Path, caplog):
    results = tmp_path / "results.jsonl"
    append_rows(results, [a_row(encoder="a", scores=score(0.9))])
    _, found = attributed(place / "runs" / "one", results)
    assert found["a"].table.empty
    assert "1 of 1 probe results named `a` are of other weights than" in found["a"].problem
    caplog.set_level(logging.WARNING)
    output = tmp_path / "probe" / "runs.png"
    output.parent.mkdir()
    results.rename(output.with_name("results.jsonl"))
    main(["plot", "runs", str(place / "runs"), str(output.parent), "-o", str(output)])
    assert "one/a/checkpoints/last.ckpt and are left out: probe the run again" in caplog.text


def test_without_weights_a_shared_name_has_no_results(tmp_path: Path):
    for folder in ("one", "two"):
        write_metrics(tmp_path / folder / "a", [{"step": 1}])
    results = tmp_path / "results.jsonl"
    append_rows(results, [a_row(encoder="a")])
    _, found = attributed(tmp_path, results)
    assert all(own.table.empty for own in found.values())
    assert "`a` is the name of 2 runs: their probe scores are left out" in found["one/a"].problem
    _, found = attributed(tmp_path / "one", results)
    assert len(found["a"].table) == 1


def test_without_weights_results_from_before_the_run_are_left_out(tmp_path: Path):
    write_metrics(tmp_path / "a", [{"step": 1}])
    results, evidence = tmp_path / "results.jsonl", tmp_path / "evidence" / "0.npz"
    append_rows(results, [a_row(encoder="a")])
    evidence.parent.mkdir()
    evidence.touch()
    assert len(attributed(tmp_path, results)[1]["a"].table) == 1
    os.utime(evidence, (1, 1))
    own = attributed(tmp_path, results)[1]["a"]
    assert own.table.empty
    assert "are older than the run in" in own.problem


def test_the_best_validation_score_decides_not_the_best_test_score():
    better, gap = {"head": "ridge", "valid": 0.6}, Difference(-0.1, -0.2, -0.05)
    rows = [a_row(scores=score(0.8)), a_row(**better, scores=score(0.3), against_random=gap)]
    rows += [a_row(head="knn", valid=float("nan"), scores=score(0.9))]
    found = best_scores(to_table(rows))["nsynth_pitch"]
    assert (found.value, found.against_random) == (0.3, gap)
    assert str(found) == "0.300 (-0.100 to random-init)"
