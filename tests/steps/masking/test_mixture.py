"""Mixtures: one masker per batch, the curriculum, and construction from a configuration."""

import pytest
import torch
from jsonargparse import ArgumentParser

from jepa_audio.steps.grid import Grid
from jepa_audio.steps.masking import BlockMasker, Masker, MixtureMasker, RandomMasker, SpanMasker

GRID = Grid(2, 30)
# The number of targets identifies the masker.
SHARES = (0.2, 0.5, 0.8)


def make_mixture(**settings) -> MixtureMasker:
    return MixtureMasker(
        [RandomMasker(target_share=share) for share in SHARES], [0.2, 0.5, 0.3], **settings
    )


def measure_shares(masker: MixtureMasker, step: int, num_draws: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = [masker(GRID, 1, generator, step).targets.index.shape[-1] for _ in range(num_draws)]
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


def test_mixture_of_one_equals_its_masker_after_one_random_number():
    source = torch.Generator().manual_seed(0)
    masks = MixtureMasker([BlockMasker()], [1.0])(GRID, 4, source, step=0)
    replay = torch.Generator().manual_seed(0)
    torch.multinomial(torch.ones(1, dtype=torch.float64), 1, generator=replay)
    assert torch.equal(masks.context.index, BlockMasker()(GRID, 4, replay, step=0).context.index)
    assert torch.equal(source.get_state(), replay.get_state())


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
