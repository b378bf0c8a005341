import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import (
    Evidence,
    Score,
    append_jsonl,
    current,
    latest,
    load_evidence,
    mean_over_seeds,
    read_jsonl,
    save_evidence,
    table,
)
from tests.probing.rows import a_row, baseline


def shown(rows: list) -> str:
    console = Console(width=80, record=True)
    console.print(table(rows))
    return console.export_text()


def test_rows_come_back_as_they_were_written(tmp_path):
    scores = {"auroc": Score(0.9, 0.8, 0.95, 50), "ap": Score(0.3, 0.2, 0.4, 50)}
    under = {"white_noise": ((30.0, 0.5), (0.0, 0.25))}
    rich = a_row(
        metric="auroc",
        scores=scores,
        robustness=under,
        robustness_area={"white_noise": 0.6},
        decoder="dbn",
    )
    plain = baseline(chance=None, num_test=3)
    path = tmp_path / "probe" / "results.jsonl"
    append_jsonl(path, [rich])
    append_jsonl(path, [plain])
    assert read_jsonl(path) == [rich, plain]
    assert (rich.value, rich.low, rich.high) == (0.9, 0.8, 0.95)


def test_the_best_setting_of_a_layer_is_its_score_and_what_diverged_is_none():
    nan, inf = float("nan"), float("inf")
    row = a_row(valid_grid=((0.1, 0.2), (nan, 0.4), (-inf, 0.3), (nan, -inf)))
    np.testing.assert_array_equal(row.valid_by_layer, (0.2, 0.4, 0.3, nan))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "ap", "scores": {"auroc": Score(1.0, 1.0, 1.0)}}, "holds auroc"),
        ({"settings": (1.0,)}, "of 1 settings"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        a_row(**changes)


def test_a_row_of_an_older_version_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "results.jsonl"
    append_jsonl(path, [a_row()])
    old = {"encoder": "mel", "layer_name": "block 1", "value": 0.3}
    path.write_text(path.read_text() + json.dumps(old) + "\n")
    with pytest.raises(
        ValueError, match=r"results\.jsonl, line 2: .*unknown: layer_name, value.*another --output"
    ):
        read_jsonl(path)


def test_a_line_that_was_cut_off_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_jsonl(path, [a_row(), a_row(seed=1)])
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: not JSON"):
        read_jsonl(path)


def test_a_field_of_another_kind_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_jsonl(path, [a_row()])
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"scores": {"accuracy": {"mean": 1}}})
    )
    with pytest.raises(ValueError, match=r"line 1: not a row of this version.*another --output"):
        read_jsonl(path)


def some_evidence() -> Evidence:
    rng = np.random.default_rng(0)
    answers, truth = rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 3, 4)
    draws = {name: rng.random(10).astype(np.float32) for name in ("accuracy", "file_accuracy")}
    return Evidence(answers, truth, ("é/1.wav", "2", "3", "4"), draws)


def test_evidence_comes_back_as_it_was_saved(tmp_path):
    evidence = some_evidence()
    save_evidence(tmp_path / "new" / "a.npz", evidence)
    read = load_evidence(tmp_path / "new" / "a.npz")
    np.testing.assert_array_equal(read.answers, evidence.answers)
    np.testing.assert_array_equal(read.truth, evidence.truth)
    assert read.uids == evidence.uids
    assert read.draws.keys() == evidence.draws.keys()
    for metric, draws in evidence.draws.items():
        np.testing.assert_array_equal(read.draws[metric], draws)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"], (
        "nothing unfinished is left"
    )


def test_missing_and_damaged_evidence_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone\.npz"):
        load_evidence(tmp_path / "gone.npz")
    path = tmp_path / "half.npz"
    save_evidence(path, some_evidence())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"half\.npz is damaged"):
        load_evidence(path)
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz is damaged or no evidence"):
        load_evidence(tmp_path / "other.npz")


def test_the_last_answer_counts_and_other_weights_are_other_encoders():
    old, new = a_row(chance=0.1), a_row(chance=0.3)
    others = [
        a_row(encoder_hash="1"),
        a_row(seed=1),
        a_row(pooling="concat"),
        a_row(select="last"),
        a_row(head="knn"),
    ]
    assert latest([old, *others, new]) == [*others, new]


def test_a_report_takes_the_last_weights_of_a_name_on_the_last_records():
    old = [a_row(encoder_hash="old", seed=seed, chance=0.1) for seed in (0, 1)]
    new = [a_row(encoder_hash="new", seed=0, chance=0.3)]
    assert current([*old, *new]) == new
    other_records = [a_row(encoder_hash="new", seed=0, split_checksum="2")]
    assert current([*old, *new, *other_records]) == other_records
    rates = [baseline(encoder_hash="16000"), baseline(encoder_hash="24000")]
    assert current(rates) == rates, "a baseline for each sample rate"


def test_seeds_are_averaged_and_nothing_else_is():
    first = a_row(
        scores={"accuracy": Score(0.2, 0.1, 0.3)}, against_random=Difference(0.0, -0.1, 0.1)
    )
    second = a_row(
        seed=1,
        scores={"accuracy": Score(0.4, 0.3, 0.5)},
        against_random=Difference(0.2, 0.1, 0.3),
        layer="block 2",
    )
    knn = a_row(head="knn")
    (mean, seeds), (other, one) = mean_over_seeds([first, knn, second])
    assert (seeds, one, other) == (2, 1, knn)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.3, 0.2, 0.4))
    gap = mean.against_random
    assert (gap.value, gap.low, gap.high, gap.verdict) == (
        pytest.approx(0.1),
        0.0,
        pytest.approx(0.2),
        "no significant difference",
    )
    assert mean.layer == "block 1, block 2"


def test_curves_under_conditions_are_averaged_level_by_level():
    curves = [
        {"gain": ((10.0, 0.4), (-10.0, 0.2)), "mp3": ((64.0, 0.3),)},
        {"gain": ((10.0, 0.6), (-10.0, 0.0))},
    ]
    areas = [{"gain": 0.3, "mp3": 0.3}, {"gain": 0.5}]
    rows = [a_row(seed=i, robustness=curves[i], robustness_area=areas[i]) for i in range(2)]
    ((mean, _),) = mean_over_seeds(rows)
    assert mean.robustness == {"gain": ((10.0, pytest.approx(0.5)), (-10.0, pytest.approx(0.1)))}
    assert mean.robustness_area == {"gain": pytest.approx(0.4)}
    ((without, _),) = mean_over_seeds([a_row(seed=0), a_row(seed=1)])
    assert without.robustness is None


def test_other_sizes_and_layers_are_other_questions():
    rows = [
        a_row(),
        a_row(num_train=5),
        a_row(layers=("input",), valid_grid=((0.1, 0.2),), layer="input"),
    ]
    assert latest(rows) == rows
    assert latest([*rows, a_row(valid=0.9)]) == [*rows[1:], a_row(valid=0.9)]
    assert len(mean_over_seeds(rows)) == 3


def test_scores_that_are_no_numbers_are_written_as_null(tmp_path: Path):
    diverged = a_row(valid_grid=((-np.inf, 0.2), (0.3, 0.4), (0.2, 0.3), (0.35, np.nan)))
    append_jsonl(tmp_path / "results.jsonl", [diverged])
    assert "Infinity" not in (tmp_path / "results.jsonl").read_text()
    (row,) = read_jsonl(tmp_path / "results.jsonl")
    assert np.isnan(row.valid_grid[0][0])
    assert row.valid_by_layer == (0.2, 0.4, 0.3, 0.35)
    assert replace(row, valid_grid=diverged.valid_grid) == diverged


def test_the_table_fits_80_columns_and_tells_won_and_lost():
    name = "a-run-whose-name-says-all-that-was-ever-set/step-000100000"
    rows = [
        a_row(encoder=name, variant="random", against_random=None),
        a_row(encoder=name),
        a_row(task="mtt", metric="auroc", against_random=Difference(-0.1, -0.15, -0.05)),
        a_row(task="mtt", metric="auroc", against_random=Difference(-0.1, -0.15, -0.05), seed=1),
        baseline(),
    ]
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    folded = "".join(text.split())
    assert name in "".join(line[2:29].strip() for line in text.splitlines()), "no name is cut"
    for said in (
        "+0.100ahead",
        "[+0.050,+0.150]",
        "-0.100behind",
        "[0.300,0.400]",
        "chance0.200",
        "2seeds",
    ):
        assert said in folded
    assert "mtt: auroc; linear, logistic, best epoch" in text


def test_names_with_brackets_are_no_markup():
    assert "run [red]1[/red]" in shown([a_row(encoder="run [red]1[/red]")])
