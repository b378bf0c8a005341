"""Laws of frozen features: padding changes nothing, windows leave nothing out, and times are true."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jepa_audio.encode import FrozenEncoder, LayerFeatures, load_frozen
from jepa_audio.front_ends import WaveformFrontEnd
from jepa_audio.jepa import JEPA
from jepa_audio.positions import SinCosPositions
from jepa_audio.transformer import Encoder

FLAVOURS = ["wave", "mel"]
WINDOW = 300


@pytest.fixture(params=FLAVOURS)
def frozen(request: pytest.FixtureRequest, tiny_jepa: Callable[..., JEPA]) -> FrozenEncoder:
    jepa = tiny_jepa(request.param)
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return FrozenEncoder.from_jepa(jepa, WINDOW)


@pytest.fixture
def clips(rng: torch.Generator) -> Tensor:
    return torch.randn(4, 1, 640, generator=rng)


def test_every_clip_of_a_padded_batch_equals_the_clip_alone(frozen: FrozenEncoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    together = frozen.encode(clips, lengths)
    assert together.valid.shape == together.layers[0].shape[:2]
    for row, length in enumerate(lengths.tolist()):
        alone = frozen.encode(clips[row : row + 1, :, :length])
        num_columns = alone.layers[0].shape[1]
        assert alone.valid.all()
        assert together.valid[row].tolist() == [column < num_columns for column in range(together.valid.shape[1])]
        for whole, own in zip(together.layers, alone.layers, strict=True):
            torch.testing.assert_close(whole[row, :num_columns], own[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(whole[row, num_columns:], torch.zeros_like(whole[row, num_columns:]))


def test_the_times_of_a_padded_batch_are_those_of_every_clip(frozen: FrozenEncoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    together = frozen.encode(clips, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = frozen.encode(clips[row : row + 1, :, :length]).times
        torch.testing.assert_close(together.times[row, : own.shape[1]], own[0], msg=f"a clip of {length} samples")


def test_the_layers_are_what_enters_the_blocks_what_leaves_them_and_the_final_norm(
    frozen: FrozenEncoder, clips: Tensor
):
    clips = clips[..., :WINDOW]
    features = frozen.encode(clips)
    grid = frozen.front_end.grid(WINDOW)
    tokens = frozen.front_end(clips)
    blocks = frozen.encoder.layers(tokens, grid)
    expected = [frozen.encoder.embed(tokens, grid), *blocks[:-1], frozen.encoder(tokens, grid)]
    for layer, tokens_of_layer in zip(features.layers, expected, strict=True):
        assert layer.shape == (4, grid.num_time, grid.num_freq, 16)
        torch.testing.assert_close(layer.flatten(1, 2), tokens_of_layer)


def test_a_long_clip_is_encoded_in_windows_that_each_equal_a_short_clip(frozen: FrozenEncoder, clips: Tensor):
    features = frozen.encode(clips[..., : 2 * WINDOW])
    for window in range(2):
        own = frozen.encode(clips[..., window * WINDOW : (window + 1) * WINDOW])
        columns = slice(window * own.times.shape[1], (window + 1) * own.times.shape[1])
        for whole, layer in zip(features.layers, own.layers, strict=True):
            torch.testing.assert_close(whole[:, columns], layer, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.times[:, columns], own.times + window * WINDOW / frozen.sample_rate)


@pytest.mark.parametrize("num_samples", [301, 450, 640])
def test_the_windows_cover_the_clip_and_are_as_few_as_can_be(frozen: FrozenEncoder, clips: Tensor, num_samples: int):
    clip = clips[:1, :, :num_samples]
    before = frozen.encode(clip)
    per_window = frozen.front_end.grid(WINDOW).num_time
    assert abs(before.times.shape[1] - num_samples / WINDOW * per_window) <= 1.5
    for start in range(0, num_samples - 49, 50):
        touched = clip.clone()
        touched[..., start : start + 50] += 1
        after = frozen.encode(touched)
        assert not torch.allclose(after.layers[0], before.layers[0]), f"nobody hears {start} to {start + 50}"


@pytest.mark.parametrize("num_samples", [200, 600, 640])
def test_times_increase_and_lie_within_the_clip(frozen: FrozenEncoder, clips: Tensor, num_samples: int):
    times = frozen.encode(clips[:1, :, :num_samples]).times[0]
    assert times[0] > 0
    assert times[-1] < num_samples / frozen.sample_rate
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("num_samples", [4000, 32160])
def test_a_time_is_the_middle_of_what_the_token_hears_to_within_a_column(num_samples: int):
    layers = [(2, 10, 5), *[(2, 3, 2)] * 4, (2, 2, 2)]  # wav2vec 2.0's geometry, as WavJEPA has it
    front_end = WaveformFrontEnd(layers, 8)
    frozen = FrozenEncoder(front_end, Encoder(8, 1, 2, SinCosPositions()), num_samples)
    times = frozen.encode(torch.zeros(1, 1, num_samples)).times[0]
    middles = torch.arange(len(times)) * front_end.stride + front_end.receptive_field / 2
    assert ((times * 16000 - middles).abs() < front_end.stride).all()


def test_pooling_is_the_literal_mean_over_the_columns_of_each_clip(rng: torch.Generator):
    layer = torch.randn(2, 5, 3, 4, generator=rng)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    features = LayerFeatures((layer,), torch.arange(5.0).expand(2, -1), valid)
    rows = [layer[0].mean(0), layer[1, :2].mean(0)]
    (mean,), (concat,) = features.pool("mean"), features.pool("concat")
    torch.testing.assert_close(mean, torch.stack([row.mean(0) for row in rows]))
    torch.testing.assert_close(concat, torch.stack([row.flatten() for row in rows]))


def test_encoding_draws_nothing_keeps_no_graph_and_is_always_in_evaluation_mode(
    tiny_jepa: Callable[..., JEPA], clips: Tensor
):
    frozen = FrozenEncoder.from_jepa(tiny_jepa("wave", "--model.encoder.drop_path=0.9").train(), WINDOW)
    state = torch.get_rng_state()
    first, second = frozen.encode(clips), frozen.encode(clips)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("target_front_end", ["shared", "momentum"])
def test_the_target_encoder_comes_with_the_front_end_that_it_reads(
    tiny_jepa: Callable[..., JEPA], target_front_end: str
):
    jepa = tiny_jepa("wave", f"--model.target_front_end={target_front_end}")
    for i, part in enumerate((jepa.front_end, jepa.encoder, *jepa.target_modules.values())):
        torch.nn.init.constant_(part.norm.bias, i)
    own = FrozenEncoder.from_jepa(jepa, WINDOW, "target")
    assert torch.equal(own.encoder.norm.bias, jepa.target_encoder.norm.bias)
    assert torch.equal(own.front_end.norm.bias, (jepa.target_front_end or jepa.front_end).norm.bias)


def test_a_frozen_copy_leaves_the_model_free_to_learn(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave").train()
    frozen = FrozenEncoder.from_jepa(jepa, WINDOW)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in jepa.encoder.parameters())
    assert jepa.encoder.training
    assert not frozen.encoder.training


def test_a_clip_shorter_than_a_token_is_refused(frozen: FrozenEncoder):
    with pytest.raises(ValueError, match="too short"):
        frozen.encode(torch.zeros(1, 1, 40))


@pytest.fixture(scope="module")
def checkpoint(tiny_cli: Callable) -> tuple[Path, JEPA, dict[str, Tensor]]:
    """(file, the model at its end, the weights before its first step)."""
    cli = tiny_cli("wave", "--trainer.max_steps=3", "--model.seed=5")
    start = {name: value.clone() for name, value in cli.model.state_dict().items()}
    cli.trainer.fit(cli.model, cli.datamodule)
    return Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt", cli.model, start


@pytest.mark.parametrize("which", ["context", "target"])
def test_the_encoder_of_a_checkpoint_is_the_encoder_of_the_run(
    checkpoint: tuple[Path, JEPA, dict[str, Tensor]], clips: Tensor, which: str
):
    file, model, _ = checkpoint
    loaded, trained = load_frozen(file, which), FrozenEncoder.from_jepa(model, 500, which)
    assert loaded.window_samples == 500
    assert (loaded.sample_rate, loaded.num_channels) == (1000, 1)
    for a, b in zip(loaded.encode(clips).layers, trained.encode(clips).layers, strict=True):
        assert torch.equal(a, b)


def test_the_random_twin_has_the_weights_before_the_first_step_or_of_another_seed(
    checkpoint: tuple[Path, JEPA, dict[str, Tensor]],
):
    file, _, start = checkpoint
    twin, other = load_frozen(file, "random"), load_frozen(file, "random", random_seed=6)
    for part, module in (("encoder", twin.encoder), ("front_end", twin.front_end)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, start[f"{part}.{name}"]), name
    assert not torch.equal(other.encoder.blocks[0].mlp.fc1.weight, twin.encoder.blocks[0].mlp.fc1.weight)


def test_no_checkpoint_is_said_in_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.ckpt"):
        load_frozen(tmp_path / "none.ckpt")
