import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import (
    Evidence,
    ProbeRow,
    Score,
    append_rows,
    load_evidence,
    read_rows,
    save_evidence,
)
from jepa_audio.report import results
from jepa_audio.report.results import read_results, terminal_table, to_table
from tests.probing.rows import a_row, baseline


def latest(rows: list[ProbeRow]) -> list[ProbeRow]:
    return results.latest(to_table(rows))["row"].tolist()


def current(rows: list[ProbeRow]) -> list[ProbeRow]:
    return results.current(to_table(rows))["row"].tolist()


def mean_over_seeds(rows: list[ProbeRow]) -> list[tuple[ProbeRow, int]]:
    table = results.mean_over_seeds(to_table(rows))
    return list(zip(table["row"], table["num_seeds"], strict=True))


def shown(rows: list) -> str:
    console = Console(width=80, record=True)
    console.print(terminal_table(rows))
    return console.export_text()


def test_rows_are_read_as_written(tmp_path):
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
    append_rows(path, [rich])
    append_rows(path, [plain])
    assert read_rows(path) == [rich, plain]
    assert (rich.value, rich.score.low, rich.score.high) == (0.9, 0.8, 0.95)


def test_score_of_a_layer_is_its_best_finite_setting():
    nan, inf = float("nan"), float("inf")
    row = a_row(valid_grid=((0.1, 0.2), (nan, 0.4), (-inf, 0.3), (nan, -inf)))
    np.testing.assert_array_equal(row.valid_by_layer, (0.2, 0.4, 0.3, nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "ap", "scores": {"auroc": Score(1.0, 1.0, 1.0)}}, "holds auroc"),
        ({"settings": (1.0,)}, "of 1 settings"),
    ],
)
def test_inconsistent_rows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_row(**changes)


def test_row_of_another_version_is_named_with_a_remedy(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, [a_row()])
    old = {"encoder": "mel", "layer_name": "block 1", "value": 0.3}
    path.write_text(path.read_text() + json.dumps(old) + "\n")
    with pytest.raises(
        ValueError, match=r"results\.jsonl, line 2: .*unknown: layer_name, value.*another --output"
    ):
        read_rows(path)


def test_field_of_a_wrong_type_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, [a_row()])
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"scores": {"accuracy": {"mean": 1}}, "checksum": None}
        )
    )
    with pytest.raises(ValueError, match=r"line 1: not a row of this version.*another --output"):
        read_rows(path)


def some_evidence() -> Evidence:
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 3, 4)
    draws = {name: rng.random(10).astype(np.float32) for name in ("accuracy", "file_accuracy")}
    return Evidence(predictions, labels, ("é/1.wav", "2", "3", "4"), draws)


def test_evidence_is_read_as_saved(tmp_path):
    evidence = some_evidence()
    save_evidence(tmp_path / "new" / "a.npz", evidence)
    read = load_evidence(tmp_path / "new" / "a.npz")
    np.testing.assert_array_equal(read.predictions, evidence.predictions)
    np.testing.assert_array_equal(read.labels, evidence.labels)
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
    with pytest.raises(ValueError, match=r"other\.npz is damaged or not evidence"):
        load_evidence(tmp_path / "other.npz")


def test_latest_results_replace_earlier_ones_of_the_same_weights_only():
    old, new = a_row(chance=0.1), a_row(chance=0.3)
    others = [
        a_row(encoder_hash="1"),
        a_row(seed=1),
        a_row(pooling="mean/concat"),
        a_row(select="last"),
        a_row(head="knn"),
    ]
    assert latest([old, *others, new]) == [*others, new]


def test_current_results_are_of_the_last_weights_on_the_last_records():
    old = [a_row(encoder_hash="old", seed=seed, chance=0.1) for seed in (0, 1)]
    new = [a_row(encoder_hash="new", seed=0, chance=0.3)]
    assert current([*old, *new]) == new
    other_records = [a_row(encoder_hash="new", seed=0, split_checksum="2")]
    assert current([*old, *new, *other_records]) == other_records
    rates = [baseline(encoder_hash="16000"), baseline(encoder_hash="24000")]
    assert current(rates) == rates, "a baseline for each sample rate"


def test_only_seeds_are_averaged():
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
    assert (mean.value, mean.score.low, mean.score.high) == pytest.approx((0.3, 0.2, 0.4))
    difference = mean.against_random
    assert (difference.value, difference.low, difference.high, difference.verdict) == (
        pytest.approx(0.1),
        0.0,
        pytest.approx(0.2),
        "no significant difference",
    )
    assert mean.layer == "block 1, block 2"


def test_robustness_curves_are_averaged_by_level():
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


def test_results_with_other_sizes_or_layers_are_kept():
    rows = [
        a_row(),
        a_row(num_train=5),
        a_row(layers=("input",), valid_grid=((0.1, 0.2),), layer="input"),
    ]
    assert latest(rows) == rows
    assert latest([*rows, a_row(valid=0.9)]) == [*rows[1:], a_row(valid=0.9)]
    assert len(mean_over_seeds(rows)) == 3


def test_scores_that_are_not_finite_are_written_as_null(tmp_path: Path):
    diverged = a_row(valid_grid=((-np.inf, 0.2), (0.3, 0.4), (0.2, 0.3), (0.35, np.nan)))
    append_rows(tmp_path / "results.jsonl", [diverged])
    assert "Infinity" not in (tmp_path / "results.jsonl").read_text()
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert np.isnan(row.valid_grid[0][0])
    assert row.valid_by_layer == (0.2, 0.4, 0.3, 0.35)
    assert replace(row, valid_grid=diverged.valid_grid) == diverged


def test_the_table_of_one_result_has_a_title():
    title = shown([a_row(task="mtt", metric="auroc")])
    assert "mtt: auroc;" in title
    assert "('" not in title


def test_terminal_table_fits_80_columns_and_shows_both_verdicts():
    name = "a-run-whose-name-contains-every-setting-of-it/step-000100000"
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
    for text_part in (
        "+0.100ahead",
        "[+0.050,+0.150]",
        "-0.100behind",
        "[0.300,0.400]",
        "chance0.200",
        "2seeds",
    ):
        assert text_part in folded
    assert "mtt: auroc; linear, logistic, best epoch" in text


def test_brackets_in_names_are_no_markup():
    assert "run [red]1[/red]" in shown([a_row(encoder="run [red]1[/red]")])


def test_results_of_several_files_are_one_table_and_the_newest_file_counts(tmp_path):
    paths = [tmp_path / name / "results.jsonl" for name in ("a", "b")]
    append_rows(paths[1], [a_row(chance=0.3)])
    append_rows(paths[0], [a_row(chance=0.1), a_row(task="mtt")])
    os.utime(paths[1], ns=(0, paths[0].stat().st_mtime_ns + 1))
    table = results.latest(read_results(paths))
    assert [row.chance for row in table["row"]] == [0.2, 0.3]
    assert table["folder"].tolist() == [tmp_path / "a", tmp_path / "b"]
