"""Mixtures: one masker per batch, the curriculum, and construction from a configuration."""

import pytest
import torch
from jsonargparse import ArgumentParser

from jepa_audio.steps.grid import Grid
from jepa_audio.steps.masking import BlockMasker, Masker, MixtureMasker, RandomMasker, SpanMasker
from jepa_audio.steps.masking.numbers import derive_seed

GRID = Grid(2, 30)
# The number of targets identifies the masker.
SHARES = (0.2, 0.5, 0.8)


def make_mixture(**settings) -> MixtureMasker:
    return MixtureMasker(
        [RandomMasker(target_share=share) for share in SHARES], [0.2, 0.5, 0.3], **settings
    )


def measure_shares(masker: MixtureMasker, step: int, num_draws: int = 400) -> torch.Tensor:
    # With the curriculum of one step, the draws of many.
    masks = [masker.at(step)(GRID, torch.tensor([0]), 0, draw) for draw in range(num_draws)]
    counts = [draw.targets.index.shape[-1] for draw in masks]
    return torch.tensor([counts.count(int(60 * share)) for share in SHARES]) / num_draws


def test_maskers_are_drawn_with_their_weights():
    # The standard deviation of a share over 400 draws is at most 0.025.
    assert torch.allclose(
        measure_shares(make_mixture(), step=0), torch.tensor([0.2, 0.5, 0.3]), atol=0.08
    )


def test_weights_of_other_maskers_rise_linearly_from_zero():
    masker = make_mixture(warmup_start=100, warmup_end=300)
    for step in (0, 99, 100):
        assert masker.weights_at(step) == [1, 0, 0]
    assert masker.weights_at(150) == pytest.approx([0.8, 0.125, 0.075])
    assert masker.weights_at(200) == pytest.approx([0.6, 0.25, 0.15])
    for step in (300, 10**6):
        assert masker.weights_at(step) == pytest.approx([0.2, 0.5, 0.3])
    assert torch.equal(measure_shares(masker, step=99, num_draws=100), torch.tensor([1.0, 0, 0]))
    assert torch.allclose(
        measure_shares(masker, step=200), torch.tensor([0.6, 0.25, 0.15]), atol=0.08
    )


def test_equal_warmup_steps_switch_at_once():
    masker = make_mixture(warmup_start=100, warmup_end=100)
    assert masker.weights_at(99) == [1, 0, 0]
    assert masker.weights_at(100) == pytest.approx([0.2, 0.5, 0.3])


def test_masker_of_weight_zero_is_never_drawn():
    masker = MixtureMasker([RandomMasker(target_share=share) for share in SHARES], [0.0, 1.0, 0.0])
    assert measure_shares(masker, step=0)[1] == 1


def test_mixture_of_one_equals_its_masker_with_another_seed():
    row = torch.arange(4)
    masks = MixtureMasker([BlockMasker()], [1.0])(GRID, row, seed=5, step=3)
    expected = BlockMasker()(GRID, row, derive_seed(5, 0), step=3)
    assert torch.equal(masks.context.index, expected.context.index)


def test_all_rows_of_a_step_have_the_same_masker_and_its_expectation():
    masker = make_mixture()
    for step in range(20):
        first, other = (masker(GRID, torch.tensor([row]), 0, step) for row in (0, 1_000_000))
        assert first.targets.index.shape == other.targets.index.shape
        assert first.targets.index.shape[-1] == masker.expected_targets(GRID, 0, step)


def test_the_masker_at_a_step_has_its_probabilities_at_every_step():
    masker = MixtureMasker([make_mixture(warmup_end=100), BlockMasker()], [0.5, 0.5], 0, 200)
    fixed = masker.at(50)
    for step in (0, 10**6):
        assert fixed.weights_at(step) == masker.weights_at(50)
        assert fixed.maskers[0].weights_at(step) == masker.maskers[0].weights_at(50)


def test_the_step_reaches_a_nested_mixture():
    masker = MixtureMasker([make_mixture(warmup_start=10, warmup_end=10)], [1.0])
    assert torch.equal(measure_shares(masker, step=9, num_draws=50), torch.tensor([1.0, 0, 0]))
    assert measure_shares(masker, step=10, num_draws=50)[0] < 1


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ([1.0], {}, r"`maskers` \(2\) and `weights` \(1\) must have the same number"),
        ([0.5, 0.6], {}, r"`weights`.*add up to 1, got \[0.5, 0.6\]"),
        ([1.5, -0.5], {}, r"`weights`.*\[1.5, -0.5\]"),
        ([float("nan"), 1.0], {}, "`weights`.*nan"),
        (
            [0.5, 0.5],
            {"warmup_start": 5, "warmup_end": 4},
            r"`warmup_end` \(4\).*`warmup_start` \(5\)",
        ),
        ([0.5, 0.5], {"warmup_start": -1}, r"`warmup_start` \(-1\)"),
    ],
)
def test_invalid_mixtures_raise_errors(weights, settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureMasker([RandomMasker(), BlockMasker()], weights, **settings)


def test_empty_mixture_raises_an_error():
    with pytest.raises(ValueError, match=r"`maskers` \(0\)"):
        MixtureMasker([], [])


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--masker", type=Masker)
    return parser


def test_configuration_builds_a_mixture(parser):
    path = "jepa_audio.steps.masking"
    config = {
        "class_path": f"{path}.MixtureMasker",
        "init_args": {
            "maskers": [
                {"class_path": f"{path}.RandomMasker", "init_args": {"target_share": [0.4, 0.6]}},
                {"class_path": f"{path}.BlockMasker", "init_args": {"scale": [0.02, 0.03]}},
                {"class_path": f"{path}.SpanMasker"},
            ],
            "weights": [0.5, 0.25, 0.25],
            "warmup_end": 1000,
        },
    }
    built = parser.instantiate_classes(parser.parse_object({"masker": config})).masker
    maskers = [RandomMasker(target_share=(0.4, 0.6)), BlockMasker(scale=(0.02, 0.03)), SpanMasker()]
    assert built == MixtureMasker(maskers, [0.5, 0.25, 0.25], warmup_end=1000)


def test_short_names_are_accepted_and_misspelt_settings_raise_errors(parser):
    built = parser.instantiate_classes(
        parser.parse_args(["--masker=RandomMasker", "--masker.target_share=0.7"])
    )
    assert built.masker == RandomMasker(target_share=0.7)
    with pytest.raises(Exception, match="target_shaer"):
        parser.parse_args(["--masker=RandomMasker", "--masker.target_shaer=0.7"])
