"""Positions: literal sines and cosines, and rotations that encode only relative positions."""

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


def literal_sin_cos(position: int, width: int, temperature: float) -> list[float]:
    angles = [position / temperature ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def test_sin_cos_on_one_row_encodes_time_over_the_full_width():
    table = SinCosPositions(temperature=500.0).additive(Grid(1, 30), 12, CPU)
    expected = torch.tensor([literal_sin_cos(time, 12, 500.0) for time in range(30)])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_sin_cos_on_a_2d_grid_encodes_time_and_frequency_in_separate_halves():
    table = SinCosPositions().additive(Grid(num_freq=3, num_time=5), 16, CPU)
    expected = [
        literal_sin_cos(time, 8, 1e4) + literal_sin_cos(freq, 8, 1e4)
        for time, freq in product(range(5), range(3))
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "dim"), [("encoder", 48), ("decoder", 24)])
def test_sin_cos_equals_the_published_wavjepa(name: str, dim: int):
    with safe_open(PARITY, "pt") as file:
        published = file.get_tensor(f"state/pos_encoding_{name}")[0]
    torch.testing.assert_close(
        SinCosPositions().additive(Grid(1, 40), dim, CPU), published, rtol=0, atol=1e-6
    )


def test_binaural_positions_share_the_time_half_and_differ_in_the_ear_half():
    table = BinauralPositions().additive(Grid(num_freq=2, num_time=5), 16, CPU)
    for time, ear in product(range(5), range(2)):
        expected = literal_sin_cos(time, 8, 1e4) + [0.0] * 4 + [float(ear)] * 4
        torch.testing.assert_close(table[2 * time + ear], torch.tensor(expected), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="two rows, one per ear"):
        BinauralPositions().additive(Grid(1, 5), 16, CPU)
    with pytest.raises(ValueError, match="multiple of 4"):
        BinauralPositions().check_width(18, 2)


def scores(positions: RotaryPositions, grid: Grid, rng: torch.Generator) -> torch.Tensor:
    """Attention scores of one query and one key at every pair of positions."""
    query, key = torch.randn(2, 1, 16, generator=rng).expand(-1, grid.num_tokens, -1)
    table = positions.rotary(grid, 16, CPU)
    return apply_rot_embed_cat(query, table) @ apply_rot_embed_cat(key, table).T


@pytest.mark.parametrize("axes", ["time", "time_freq"])
@pytest.mark.parametrize("normalized", [False, True])
def test_rotary_attention_depends_only_on_relative_positions(
    axes: str, normalized: bool, rng: torch.Generator
):
    grid = Grid(num_freq=3, num_time=7)
    attention = scores(RotaryPositions(axes, normalized), grid, rng)
    where = grid.coordinates()
    scores_by_offset: dict[tuple[int, int], float] = {}
    for i, j in product(range(grid.num_tokens), repeat=2):
        offset = tuple((where[i] - where[j]).tolist())
        assert attention[i, j].item() == pytest.approx(
            scores_by_offset.setdefault(offset, attention[i, j].item()), abs=1e-3
        )
    across_time = [scores_by_offset[time, 0] for time in range(-6, 7)]
    assert len({round(value, 4) for value in across_time}) == len(across_time)


def test_time_rotation_is_equal_for_all_frequency_rows_of_a_column():
    grid = Grid(num_freq=4, num_time=5)
    table = RotaryPositions("time").rotary(grid, 8, CPU).unflatten(0, (5, 4))
    assert torch.equal(table, table[:, :1].expand_as(table))
    both = RotaryPositions("time_freq").rotary(grid, 8, CPU).unflatten(0, (5, 4))
    assert not torch.allclose(both, both[:, :1].expand_as(both))


@pytest.mark.parametrize("axes", ["time", "time_freq"])
def test_only_normalised_rotary_positions_depend_on_the_clip_length(axes: str):
    short, long = Grid(num_freq=2, num_time=4), Grid(num_freq=2, num_time=9)
    for normalized in (False, True):
        positions = RotaryPositions(axes, normalized)
        start = positions.rotary(long, 8, CPU)[: short.num_tokens]
        assert torch.allclose(positions.rotary(short, 8, CPU), start) is not normalized


def test_positions_are_either_additive_or_rotary():
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
def test_unsuitable_width_raises_an_error(
    positions: SinCosPositions | RotaryPositions, dim: int, message: str
):
    with pytest.raises(ValueError, match=message):
        positions.check_width(dim, 2)


def test_no_float64_is_used_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch):
    """The CPU stands for a device without float64 if `meta` stands for the CPU."""
    from jepa_audio.steps.encoder import positions

    seen: list[torch.device] = []
    to = torch.Tensor.to
    monkeypatch.setattr(positions, "FLOAT64_DEVICES", ("cpu",))
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a: (seen.append(self.device), to(self, *a))[1]
    )
    table = SinCosPositions().additive(Grid(2, 5), 8, torch.device("meta"))
    assert table.device.type == "meta"
    assert seen == [CPU], "float64 stays on the CPU"
    assert table.dtype == torch.float32
