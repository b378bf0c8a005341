"""Random numbers of rows: uniform, independent, and functions of (seed, step, row, index)."""

import numpy as np
import pytest

from jepa_audio.steps.masking.numbers import RowNumbers, derive_seed, step_uniform


def numbers(seed: int = 0, step: int = 0, num_rows: int = 64) -> RowNumbers:
    return RowNumbers.of(seed, step, np.arange(num_rows))


def test_the_numbers_of_a_key_are_those_of_splitmix64():
    # The first outputs of the published generator for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert RowNumbers(np.array([1234567], np.uint64)).bits(3)[0].tolist() == expected


def test_numbers_do_not_depend_on_the_other_rows_or_on_how_many_are_drawn():
    whole = numbers().bits(10)
    some = np.array([7, 3, 60])
    assert np.array_equal(RowNumbers.of(0, 0, some).bits(10), whole[some])
    assert np.array_equal(numbers().rows(some).bits(4, first=6), whole[some, 6:])
    assert np.array_equal(numbers().stream(2).rows(some).bits(3), numbers().stream(2).bits(3)[some])
    assert np.array_equal(numbers().halves(4, first=6), whole.view(np.uint32)[:, 6:10])


SOURCES = {
    "index": lambda: numbers(num_rows=1).uniform(65536)[0],
    "row": lambda: numbers(num_rows=65536).uniform(1)[:, 0],
    "step": lambda: np.array([step_uniform(3, step, 1)[0] for step in range(4096)]),
    "seed": lambda: np.array([step_uniform(seed, 3, 1)[0] for seed in range(4096)]),
    "stream": lambda: numbers(num_rows=1).streams(65536).uniform(1)[:, 0],
    "derived seed": lambda: np.array([derive_seed(5, n) / 2**64 for n in range(4096)]),
    "half": lambda: numbers(num_rows=1).halves(65536)[0] / 2**32,
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


def test_every_bit_is_set_in_half_of_the_numbers():
    bits = np.unpackbits(numbers(num_rows=256).bits(64).view(np.uint8), bitorder="little")
    share = bits.reshape(-1, 64).mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / 128


def test_what_a_step_shares_are_the_numbers_of_a_row_that_does_not_exist():
    shared = RowNumbers.of(7, 9, np.array([-1])).uniform(3)[0]
    assert np.array_equal(step_uniform(7, 9, 3), shared)
    streams = numbers(num_rows=3).streams(4).keys.reshape(3, 4)
    assert all(np.array_equal(streams[:, n], numbers(num_rows=3).stream(n).keys) for n in range(4))


def test_rows_steps_seeds_and_streams_give_different_numbers():
    keys = [
        *numbers().keys,
        *numbers(step=1).keys,
        *numbers(seed=1).keys,
        *numbers().stream(0).keys,
        *numbers().stream(1).keys,
        *numbers(seed=-1, step=2**40).keys,
    ]
    assert len({int(key) for key in keys}) == len(keys)
