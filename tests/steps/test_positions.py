"""Laws of positions: sines and cosines to the letter, and rotations that tell only relative places."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.layers import apply_rot_embed_cat

from jepa_audio.steps.encoder.positions import BinauralPositions, RotaryPositions, SinCosPositions
from jepa_audio.steps.grid import Grid

CPU = torch.device("cpu")
PARITY = Path(__file__).parents[1] / "data" / "wavjepa.safetensors"


def literal_sin_cos(place: int, width: int, temperature: float) -> list[float]:
    angles = [place / temperature ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def test_one_row_of_tokens_tells_the_time_with_its_whole_width():
    table = SinCosPositions(temperature=500.0).additive(Grid(1, 30), 12, CPU)
    expected = torch.tensor([literal_sin_cos(time, 12, 500.0) for time in range(30)])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_a_plane_tells_time_with_one_half_and_frequency_with_the_other():
    table = SinCosPositions().additive(Grid(num_freq=3, num_time=5), 16, CPU)
    expected = [
        literal_sin_cos(time, 8, 1e4) + literal_sin_cos(freq, 8, 1e4)
        for time, freq in product(range(5), range(3))
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "dim"), [("encoder", 48), ("decoder", 24)])
def test_the_table_is_that_of_the_published_wavjepa(name: str, dim: int):
    with safe_open(PARITY, "pt") as file:
        published = file.get_tensor(f"state/pos_encoding_{name}")[0]
    torch.testing.assert_close(
        SinCosPositions().additive(Grid(1, 40), dim, CPU), published, rtol=0, atol=1e-6
    )


def test_two_ears_share_the_time_and_differ_in_the_other_half():
    table = BinauralPositions().additive(Grid(num_freq=2, num_time=5), 16, CPU)
    for time, ear in product(range(5), range(2)):
        expected = literal_sin_cos(time, 8, 1e4) + [0.0] * 4 + [float(ear)] * 4
        torch.testing.assert_close(table[2 * time + ear], torch.tensor(expected), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="two rows, one per ear"):
        BinauralPositions().additive(Grid(1, 5), 16, CPU)
    with pytest.raises(ValueError, match="multiple of 4"):
        BinauralPositions().check_width(18, 2)


def scores(positions: RotaryPositions, grid: Grid, rng: torch.Generator) -> torch.Tensor:
    """What the same query and the same key say to each other, for every pair of places."""
    query, key = torch.randn(2, 1, 16, generator=rng).expand(-1, grid.num_tokens, -1)
    table = positions.rotary(grid, 16, CPU)
    return apply_rot_embed_cat(query, table) @ apply_rot_embed_cat(key, table).T


@pytest.mark.parametrize("axes", ["time", "time_freq"])
@pytest.mark.parametrize("normalized", [False, True])
def test_attention_depends_on_relative_places_only(
    axes: str, normalized: bool, rng: torch.Generator
):
    grid = Grid(num_freq=3, num_time=7)
    attention = scores(RotaryPositions(axes, normalized), grid, rng)
    where = grid.coordinates()
    seen: dict[tuple[int, int], float] = {}
    for i, j in product(range(grid.num_tokens), repeat=2):
        offset = tuple((where[i] - where[j]).tolist())
        assert attention[i, j].item() == pytest.approx(
            seen.setdefault(offset, attention[i, j].item()), abs=1e-3
        )
    across_time = [seen[time, 0] for time in range(-6, 7)]
    assert len({round(value, 4) for value in across_time}) == len(across_time)


def test_over_time_alone_all_frequency_rows_of_a_column_are_turned_alike():
    grid = Grid(num_freq=4, num_time=5)
    table = RotaryPositions("time").rotary(grid, 8, CPU).unflatten(0, (5, 4))
    assert torch.equal(table, table[:, :1].expand_as(table))
    both = RotaryPositions("time_freq").rotary(grid, 8, CPU).unflatten(0, (5, 4))
    assert not torch.allclose(both, both[:, :1].expand_as(both))


@pytest.mark.parametrize("axes", ["time", "time_freq"])
def test_counted_places_mean_the_same_in_a_longer_clip_and_normalised_ones_do_not(axes: str):
    short, long = Grid(num_freq=2, num_time=4), Grid(num_freq=2, num_time=9)
    for normalized in (False, True):
        positions = RotaryPositions(axes, normalized)
        start = positions.rotary(long, 8, CPU)[: short.num_tokens]
        assert torch.allclose(positions.rotary(short, 8, CPU), start) is not normalized


def test_additive_and_rotary_positions_do_not_mix():
    assert SinCosPositions().rotary(Grid(1, 4), 8, CPU) is None
    assert RotaryPositions().additive(Grid(1, 4), 8, CPU) is None


@pytest.mark.parametrize(
    ("positions", "dim", "message"),
    [
        (SinCosPositions(), 18, r"`embed_dim` \(18\)"),
        (RotaryPositions("time"), 6, r"6 / 2 = 3\) must be a multiple of 2"),
        (RotaryPositions("time_freq"), 12, r"12 / 2 = 6\) must be a multiple of 4"),
    ],
)
def test_a_width_that_cannot_be_told_is_refused(
    positions: SinCosPositions | RotaryPositions, dim: int, message: str
):
    with pytest.raises(ValueError, match=message):
        positions.check_width(dim, 2)
