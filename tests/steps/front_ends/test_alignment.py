"""Tokens of one front end at the columns of another one: equal to loops, exact for any sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends import (
    FrontEnd,
    SpectrogramFrontEnd,
    SpectrogramPatches,
    WaveformFrontEnd,
)
from jepa_audio.steps.front_ends.alignment import (
    AlignedColumns,
    aligned_tokens,
    aligned_width,
    column_weights,
)
from jepa_audio.steps.front_ends.transforms import CQT, LogMel
from tests.oracles.other_targets_literal import patch_targets, source_columns


def wave(stride: int = 20, **settings) -> WaveformFrontEnd:
    layers = [(8, 10, 5), (8, 8, stride // 5)]
    return WaveformFrontEnd(layers, 16, sample_rate=1000, **settings)


def mel(hop: int, n_fft: int = 64, center: bool = False) -> LogMel:
    return LogMel(1000, n_fft=n_fft, hop_length=hop, n_mels=8, center=center)


patches = partial(SpectrogramPatches, mean=-3.0, std=2.0)
embedded = partial(SpectrogramFrontEnd, embed_dim=16, patch_bands=4, mean=-3.0, std=2.0)
PAIRS: dict[str, tuple[FrontEnd, FrontEnd]] = {
    "one frame per token": (patches(mel(20)), wave()),
    "several frames per token": (patches(mel(7)), wave()),
    "centres on midpoints": (patches(mel(10, center=True)), wave()),
    "one frame for several tokens": (patches(mel(50)), wave()),
    "a patch of frames for each token": (patches(mel(10), patch_frames=2, patch_bands=4), wave()),
    "constant-Q": (patches(CQT(1000, 20, 62.5, 24, 12)), wave()),
    "spectrogram in": (patches(mel(8)), embedded(mel(16), patch_frames=4)),
    "waveform out": (wave(10), embedded(mel(16), patch_frames=4)),
    "one column": (patches(mel(16)), embedded(mel(16), patch_frames=30)),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[FrontEnd, FrontEnd]:
    return PAIRS[request.param]


def test_columns_are_those_of_a_loop_with_exact_fractions(pair: tuple[FrontEnd, FrontEnd]):
    source, front_end = pair
    for num_samples in (500, 503, 517, 2000):
        weights = column_weights(source, front_end, num_samples)
        sizes = (front_end.grid(num_samples).num_time, source.grid(num_samples).num_time)
        assert weights.shape == sizes
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(sizes[0]))
        if sizes[0] == 1:
            assert (weights > 0).all()
            continue
        for row, chosen in zip(
            weights, source_columns(source, front_end, num_samples), strict=True
        ):
            assert row.nonzero()[:, 0].tolist() == chosen
            assert row[chosen].unique().numel() == 1


def test_tokens_are_the_means_of_patches_for_every_frequency_row(
    pair: tuple[FrontEnd, FrontEnd], rng: torch.Generator
):
    source, front_end = pair
    waveform = torch.randn(2, 1, 500, generator=rng)
    grid = front_end.grid(500)
    tokens = aligned_tokens(source, front_end, waveform)
    assert tokens.shape == (2, grid.num_tokens, aligned_width(source, front_end))
    if isinstance(source, SpectrogramPatches) and grid.num_time > 1:
        for clip, found in zip(waveform, tokens, strict=True):
            expected = patch_targets(source, front_end, clip).repeat_interleave(grid.num_freq, 0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_float32_also_under_autocast(rng: torch.Generator):
    source, front_end = PAIRS["several frames per token"]
    waveform = torch.randn(2, 1, 500, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        found = aligned_tokens(source, front_end, waveform)
    assert torch.equal(found, aligned_tokens(source, front_end, waveform))


def test_columns_that_are_counted_do_not_depend_on_the_padding(
    pair: tuple[FrontEnd, FrontEnd], rng: torch.Generator
):
    source, front_end = pair
    if front_end.grid(500).num_time == 1:
        pytest.skip("a shorter clip has no column")
    if isinstance(front_end, WaveformFrontEnd):
        front_end = wave(norm="layer", standardize=False)
    if isinstance(source, WaveformFrontEnd):
        source = wave(10, norm="layer", standardize=False)
    columns = AlignedColumns.of(source, front_end, 500)
    lengths = torch.arange(490, 501)
    for length, count in zip(lengths.tolist(), columns(lengths).tolist(), strict=True):
        waveform = torch.randn(1, 1, 500, generator=rng)
        other = waveform.clone()
        other[..., length:] = torch.randn(500 - length, generator=rng)
        kept = count * front_end.grid(500).num_freq
        ours, theirs = (front_end(clip)[:, :kept] for clip in (waveform, other))
        torch.testing.assert_close(ours, theirs)
        ours, theirs = (aligned_tokens(source, front_end, clip) for clip in (waveform, other))
        torch.testing.assert_close(ours[:, :kept], theirs[:, :kept])
    assert count >= front_end.grid(500).num_time - 6  # constant-Q kernels are long


def test_a_clip_without_a_column_of_both_is_refused():
    source, front_end = patches(mel(16), patch_frames=8), wave(norm="layer", standardize=False)
    columns = AlignedColumns.of(source, front_end, 500)
    with pytest.raises(UserError, match=r"raise `data.min_seconds`"):
        columns(torch.tensor([500, 100]))


def test_front_ends_of_different_waveforms_are_refused():
    other = SpectrogramPatches(LogMel(2000, n_fft=64, hop_length=16, n_mels=8))
    with pytest.raises(UserError, match=r"`target_front_end` has `sample_rate` 2000, `front_end`"):
        aligned_width(other, wave())
    with pytest.raises(UserError, match=r"`target_front_end` has `num_channels` 1, `front_end`"):
        aligned_width(patches(mel(16)), wave(num_channels=2))
