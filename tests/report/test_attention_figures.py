"""Attention maps on spectrograms."""

import numpy as np
import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.report.attention import (
    attention_maps,
    draw_attention,
    find_query,
    half_of,
    outline,
)
from jepa_audio.steps.encoder.attention import attention_weights

RATE, SAMPLES = 1000, 500


@pytest.fixture
def clip() -> torch.Tensor:
    """Quiet noise with a tone of 300 Hz between 0.2 and 0.3 s."""
    time = torch.arange(SAMPLES) / RATE
    noise = 0.01 * torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0))
    return noise + torch.sin(2 * torch.pi * 300 * time) * ((time > 0.2) & (time < 0.3))


@pytest.mark.parametrize("flavour", ["wave", "mel"])
@pytest.mark.parametrize("registers", [0, 2])
def test_maps_are_the_weights_as_multiples_of_uniform_attention(
    tiny_jepa, clip, flavour, registers
):
    jepa = tiny_jepa(flavour, f"--model.encoder.num_registers={registers}").eval()
    grid = jepa.front_end.grid(SAMPLES)
    settings = {"layers": [-1], "heads": [2], "query": (0, 3)}
    query, received = attention_maps(jepa.front_end, jepa.encoder, clip, **settings)
    ((_, weights),) = attention_weights(jepa.encoder, jepa.front_end(clip[None]), grid, [2])
    head = weights[0, 1, registers:] * weights.shape[-1]
    row = head[3 * grid.num_freq, registers:].numpy()
    np.testing.assert_allclose(query.relative.T.ravel(), row, rtol=1e-5)
    mean = head.mean(dim=0)[registers:].numpy()
    np.testing.assert_allclose(received.relative.T.ravel(), mean, rtol=1e-5)
    assert query.query == (0, 3)
    assert received.query is None
    share = weights[0, 1, registers:, :registers].sum(dim=-1).mean()
    note = f" ({share:.0%} to registers)" if registers else ""
    assert received.title == f"layer 2, head 2: received{note}"


def test_without_a_choice_up_to_four_layers_and_the_mean_of_the_heads_are_shown(tiny_jepa, clip):
    jepa = tiny_jepa("wave", "--model.encoder.depth=6").eval()
    maps = attention_maps(jepa.front_end, jepa.encoder, clip, kind="query")
    assert [found.title.partition(":")[0] for found in maps] == [
        f"layer {layer}, mean of heads" for layer in (1, 3, 4, 6)
    ]


def test_the_query_is_the_loudest_token_or_that_at_a_time_and_a_frequency(tiny_jepa, clip):
    mel, wave = tiny_jepa("mel").front_end, tiny_jepa("wave").front_end
    row, column = find_query(mel, clip)
    assert 0.2 <= mel.times(SAMPLES)[column] <= 0.3
    assert row == 3 - 1  # bands 8 to 11 of 16 contain 300 Hz
    assert 0.2 <= wave.times(SAMPLES)[find_query(wave, clip)[1]] <= 0.3
    first, _ = find_query(mel, clip, hz=20.0)
    assert first == 0
    _, column = find_query(wave, clip, seconds=0.45)
    assert abs(wave.times(SAMPLES)[column] - 0.45) < 0.02


def test_impossible_choices_are_refused(tiny_jepa, clip):
    jepa = tiny_jepa("wave").eval()
    parts = jepa.front_end, jepa.encoder, clip
    with pytest.raises(UserError, match=r"`heads` \(3\): the encoder has the heads 1 to 2"):
        attention_maps(*parts, heads=[1, 3])
    with pytest.raises(UserError, match=r"`layers` \(-3\): the encoder has the layers 1 to 2"):
        attention_maps(*parts, layers=[-3])
    with pytest.raises(UserError, match=r"`query_seconds` \(0.6\) must be in the clip of 0.5 s"):
        find_query(jepa.front_end, clip, seconds=0.6)
    with pytest.raises(UserError, match=r"`query_hz` .* no known frequency"):
        find_query(jepa.front_end, clip, hz=100.0)
    for hz in (-5.0, 501.0):
        with pytest.raises(UserError, match=r"`query_hz` .* must be in \[0, 500\]"):
            find_query(tiny_jepa("mel").front_end, clip, hz=hz)


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_figure_has_a_panel_for_each_map_with_units(tiny_jepa, clip, flavour):
    jepa = tiny_jepa(flavour).eval()
    maps = attention_maps(jepa.front_end, jepa.encoder, clip)
    figure = draw_attention(jepa.front_end, clip, maps, "title")
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in panels] == [found.title for found in maps]
    assert panels[-1].get_xlabel() == "time (s)"
    assert panels[0].get_ylabel() == "frequency (kHz)"
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert "query token" in labels
    units = {ax.get_ylabel() for ax in figure.axes} & {
        "attention / uniform attention",
        "attention / uniform",
    }
    assert len(units) == 1
    if flavour == "mel":
        band, lines = panels[0].collections
        assert not lines.get_clip_on(), "edges at the border of the panel are drawn"
        inside = band.get_clip_path()
        assert inside is not None
        cells = inside.get_fully_transformed_path().get_extents()
        covered = panels[0].transData.transform_bbox(lines.get_datalim(panels[0].transData))
        np.testing.assert_allclose(cells.bounds, covered.bounds, rtol=1e-6)
    if flavour == "wave":
        curve = next(ax for ax in figure.axes if ax.lines and not ax.images)
        np.testing.assert_allclose(curve.lines[0].get_ydata(), maps[0].relative[0])


def test_half_of_the_attention_is_that_of_the_fewest_tokens():
    attention = np.array([[0.4, 0.05, 0.15], [0.1, 0.25, 0.05]])
    assert half_of(attention).tolist() == [[True, False, False], [False, True, False]]
    assert half_of(np.array([[0.9, 0.1]])).tolist() == [[True, False]]


def test_outline_has_the_borders_of_the_mask():
    segments = {tuple(map(tuple, segment)) for segment in outline(np.array([[True, True, False]]))}
    assert segments == {
        ((0.0, 0.0), (0.0, 1.0)),
        ((2.0, 0.0), (2.0, 1.0)),
        ((0.0, 0.0), (1.0, 0.0)),
        ((1.0, 0.0), (2.0, 0.0)),
        ((0.0, 1.0), (1.0, 1.0)),
        ((1.0, 1.0), (2.0, 1.0)),
    }
