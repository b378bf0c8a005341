"""Random numbers of rows: uniform, independent, and functions of (seed, step, row, index)."""

import numpy as np
import pytest
import torch

from jepa_audio.steps import kernels
from jepa_audio.steps.masking.numbers import derive_seed, row_keys, step_uniform
from tests.oracles import masks_literal


def keys_of(seed: int = 0, step: int = 0, num_rows: int = 64) -> list[int]:
    return row_keys(seed, step, torch.arange(num_rows)).tolist()


def stream(key: int, number: int) -> int:
    return int(kernels.stream(np.uint64(key), number))


def uniform(key: int, index: int) -> float:
    return kernels.uniform(np.uint64(key), index)


def test_the_numbers_of_a_key_are_those_of_splitmix64():
    # The first outputs of the published generator for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, i) for i in range(3)] == [(bits >> 11) / 2**53 for bits in expected]
    assert int(kernels.mix(np.uint64(1234567 + 0x9E3779B97F4A7C15))) == expected[0]


def test_compiled_numbers_equal_those_of_python_integers():
    for seed, step, row in [(0, 0, 0), (-1, 2**40, 7), (2**63, 5, 2**62 + 1), (3, 4, -1)]:
        (key,) = row_keys(seed, step, torch.tensor([row])).tolist()
        assert key == masks_literal.row_key(seed, step, row)
        assert stream(key, 1000) == masks_literal.stream(key, 1000)
        assert uniform(key, 10**6) == masks_literal.uniform(key, 10**6)


def test_keys_do_not_depend_on_the_other_rows():
    some = torch.tensor([7, 3, 60])
    assert row_keys(0, 0, some).tolist() == [keys_of()[row] for row in some]
    assert row_keys(0, 0, torch.arange(64)[::3]).tolist() == keys_of()[::3]


KEY = keys_of()[0]
SOURCES = {
    "index": lambda: np.array([uniform(KEY, index) for index in range(16384)]),
    "row": lambda: np.array([uniform(key, 0) for key in keys_of(num_rows=16384)]),
    "step": lambda: np.array([step_uniform(3, step, 1)[0] for step in range(4096)]),
    "seed": lambda: np.array([step_uniform(seed, 3, 1)[0] for seed in range(4096)]),
    "stream": lambda: np.array([uniform(stream(KEY, n), 0) for n in range(16384)]),
    "derived seed": lambda: np.array([derive_seed(5, n) / 2**64 for n in range(4096)]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_consecutive_values_of_each_argument_give_uniform_and_independent_numbers(source: str):
    values = SOURCES[source]()
    assert values.min() >= 0
    assert values.max() < 1
    # Neighbours, in a table of 16 x 16 cells: chi-square with 255 degrees of freedom (± 22.6).
    cells = (values[:-1:2] * 16).astype(int) * 16 + (values[1::2] * 16).astype(int)
    counts = np.bincount(cells, minlength=256)
    expected = len(cells) / 256
    assert ((counts - expected) ** 2 / expected).sum() == pytest.approx(255, abs=5 * 22.6)
    for lag in (1, 2, 64):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 5 / len(values) ** 0.5


def test_every_bit_is_set_in_half_of_the_keys():
    keys = row_keys(0, 0, torch.arange(16384))
    share = np.unpackbits(keys.view(np.uint8), bitorder="little").reshape(-1, 64).mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / 128


def test_what_a_step_shares_are_the_numbers_of_a_row_that_does_not_exist():
    (key,) = row_keys(7, 9, torch.tensor([-1])).tolist()
    assert step_uniform(7, 9, 3).tolist() == [uniform(key, index) for index in range(3)]


def test_rows_steps_seeds_and_streams_give_different_numbers():
    keys = [
        *keys_of(),
        *keys_of(step=1),
        *keys_of(seed=1),
        *[stream(key, number) for key in keys_of() for number in (0, 1)],
        *keys_of(seed=-1, step=2**40),
    ]
    assert len(set(keys)) == len(keys)
