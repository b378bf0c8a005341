"""`benchmarks/ablations.py`: reading trials, and scores of groups that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.ablations import compare, held_out_correct, read_trials
from sklearn.linear_model import Ridge

from jepa_audio.errors import UserError

TRIALS = """
defaults: {recipe: demo/wavjepa, options: [--data.batch_size=8], seeds: [0, 1]}
trials:
  default: {}
  long spans: {options: [--model.masker.target_length=10], seeds: [2]}
"""


def test_trials_are_defaults_with_changes_for_every_seed(tmp_path: Path):
    (tmp_path / "trials.yaml").write_text(TRIALS)
    trials = list(read_trials(tmp_path / "trials.yaml"))
    assert [(trial.name, trial.seed, trial.options) for trial in trials] == [
        ("demo/wavjepa, default", 0, ("--data.batch_size=8",)),
        ("demo/wavjepa, default", 1, ("--data.batch_size=8",)),
        ("demo/wavjepa, long spans", 2, ("--data.batch_size=8", "--model.masker.target_length=10")),
    ]
    assert [trial.seed for trial in read_trials(tmp_path / "trials.yaml", [7])] == [7, 7]


def test_a_trial_of_several_recipes_is_run_for_each(tmp_path: Path):
    recipes = TRIALS.replace("recipe: demo/wavjepa", "recipes: [small/waveform, demo/wavjepa]")
    (tmp_path / "trials.yaml").write_text(recipes)
    trials = list(read_trials(tmp_path / "trials.yaml"))
    assert len({trial.folder for trial in trials}) == len(trials) == 6
    assert [trial.recipe for trial in trials[:3]] == [*["small/waveform"] * 2, "demo/wavjepa"]
    assert trials[0].name == "small/waveform, default"


def test_an_unknown_key_of_a_trial_is_refused(tmp_path: Path):
    (tmp_path / "trials.yaml").write_text(TRIALS.replace("{options", "{option"))
    with pytest.raises(UserError, match="unknown key 'option' in the trial 'long spans'"):
        list(read_trials(tmp_path / "trials.yaml"))


@pytest.mark.parametrize("penalty", [0.3, 30.0])
def test_scores_equal_ridge_regression_that_is_fitted_without_each_group(penalty: float):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 12))
    labels, groups = rng.integers(0, 4, 60), rng.integers(0, 5, 60)
    vectors += 0.7 * rng.normal(size=(4, 12))[labels]
    own = held_out_correct(vectors, labels, groups, penalty)
    alpha = penalty * np.trace(vectors @ vectors.T) / (100 * len(vectors))
    for group in range(5):
        held_out = groups == group
        model = Ridge(alpha).fit(vectors[~held_out], np.eye(4)[labels[~held_out]])
        expected = model.predict(vectors[held_out]).argmax(1) == labels[held_out]
        np.testing.assert_array_equal(own[held_out], expected)
    assert 0 < own.sum() < 60


def test_the_interval_of_a_difference_is_that_of_the_same_clips():
    better = compare("1" * 70 + "0" * 30, "1" * 60 + "0" * 40)
    assert better.value == pytest.approx(0.1)
    assert better.verdict == "ahead"
    # The same scores on other clips: the interval is far wider.
    other = compare("1" * 70 + "0" * 30, "0" * 40 + "1" * 60)
    assert other.high - other.low > 2 * (better.high - better.low)
    assert other.verdict == "no significant difference"
