"""Laws of intervals, and of the rows and tables that show them."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jepa_audio.probing.intervals import Difference, bootstrap_interval, paired_difference
from jepa_audio.probing.results import ProbeRow, append_jsonl, markdown, read_jsonl, table


def literal_bootstrap(values: np.ndarray, draws: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return np.percentile(means, [2.5, 97.5])


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    better = rng.random(400) < 0.7
    return better, better & (rng.random(400) < 0.8)


def test_the_interval_is_that_of_clips_drawn_one_by_one(answers: tuple[np.ndarray, np.ndarray]):
    better, worse = answers
    np.testing.assert_allclose(bootstrap_interval(better), literal_bootstrap(better, 4000), atol=0.008)
    difference = paired_difference(better, worse)
    literal = literal_bootstrap(better.astype(int) - worse, 4000)
    np.testing.assert_allclose((difference.low, difference.high), literal, atol=0.008)


def test_a_clear_difference_is_told_from_none(answers: tuple[np.ndarray, np.ndarray]):
    better, worse = answers
    assert paired_difference(better, better) == Difference(0.0, 0.0, 0.0)
    assert paired_difference(better, better).verdict == "not told apart"
    other = np.random.default_rng(2).permutation(better)
    assert paired_difference(better, other).verdict == "not told apart"
    assert paired_difference(better, worse).verdict == "ahead"
    assert paired_difference(worse, better).verdict == "behind"
    assert paired_difference(worse, better).value == pytest.approx(worse.mean() - better.mean())


def test_pairing_tells_more_than_two_intervals(answers: tuple[np.ndarray, np.ndarray]):
    better, _ = answers
    slightly_worse = better.copy()
    slightly_worse[np.flatnonzero(better)[:8]] = False
    assert bootstrap_interval(better)[0] < bootstrap_interval(slightly_worse)[1]
    assert paired_difference(better, slightly_worse).verdict == "ahead"


def test_the_same_seed_gives_the_same_interval(answers: tuple[np.ndarray, np.ndarray]):
    assert bootstrap_interval(answers[0], seed=3) == bootstrap_interval(answers[0], seed=3)
    assert bootstrap_interval(answers[0], seed=3) != bootstrap_interval(answers[0], seed=4)


@pytest.fixture
def rows() -> list[ProbeRow]:
    row = ProbeRow(
        encoder="wave",
        variant="random",
        encoder_hash="0123",
        task="nsynth_pitch",
        preset="linear",
        head="linear",
        pooling="mean",
        layer=2,
        layer_name="block 2",
        setting=1e-3,
        metric="accuracy",
        value=0.5,
        low=0.45,
        high=0.55,
        valid_value=0.52,
        valid_by_layer=(0.4, 0.5, 0.52),
        num_train=100,
        num_valid=50,
        num_test=60,
        num_classes=7,
        chance=0.2,
        seed=0,
        against_random=None,
        split_checksum="abc",
        versions={"torch": "2"},
    )
    lost = dataclasses.replace(row, variant="context", value=0.4, against_random=Difference(-0.1, -0.15, -0.05))
    won = dataclasses.replace(lost, task="nsynth_instrument", against_random=Difference(0.1, 0.05, 0.15))
    unclear = dataclasses.replace(won, head="knn", against_random=Difference(0.01, -0.05, 0.15))
    return [row, lost, won, unclear]


def test_rows_come_back_from_the_file_as_they_were(rows: list[ProbeRow], tmp_path: Path):
    path = tmp_path / "new" / "results.jsonl"
    append_jsonl(path, rows[:1])
    append_jsonl(path, rows[1:])
    assert read_jsonl(path) == rows


def test_the_table_shows_lost_won_and_undecided_tasks_in_a_line_for_each_encoder_and_head(
    rows: list[ProbeRow],
):
    lines = [line for line in markdown(rows).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert "0.500 [0.450, 0.550] |" in lines[2]
    assert "behind (-0.100 [" in lines[3]
    assert "ahead (+0.100 [+0.050, +0.150])" in lines[3]
    assert "not told apart (+0.010 [" in lines[4]
    text = io.StringIO()
    Console(width=80, file=text).print(table(rows))
    cells = [[cell.strip() for cell in line.split("│")] for line in text.getvalue().splitlines()]
    verdict = next(number for number, line in enumerate(cells) if "ahead" in line)
    column = cells[verdict].index("ahead")
    assert cells[verdict + 1][column] == "(+0.100 [+0.050, +0.150])", "in full, on a narrow terminal"
