"""Laws of frozen features: padding changes nothing, windows leave nothing out, and times are true."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jepa_audio.errors import MissingFileError
from jepa_audio.inference.encoder import Encoder, load_encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.steps.encoder.positions import SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import WaveformFrontEnd
from jepa_audio.training.jepa import JEPA

FLAVOURS = ["wave", "mel"]
WINDOW = 300


@pytest.fixture(params=FLAVOURS)
def frozen(request: pytest.FixtureRequest, tiny_jepa: Callable[..., JEPA]) -> Encoder:
    jepa = tiny_jepa(request.param)
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return Encoder.from_jepa(jepa, WINDOW)


@pytest.fixture
def clips(rng: torch.Generator) -> Tensor:
    return torch.randn(4, 1, 640, generator=rng)


def test_every_clip_of_a_padded_batch_equals_the_clip_alone(frozen: Encoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    together = frozen.encode(clips, lengths)
    assert together.valid.shape == together.layers[0].shape[:2]
    for row, length in enumerate(lengths.tolist()):
        alone = frozen.encode(clips[row : row + 1, :, :length])
        num_columns = alone.layers[0].shape[1]
        assert alone.valid.all()
        assert together.valid[row].tolist() == [
            column < num_columns for column in range(together.valid.shape[1])
        ]
        for whole, own in zip(together.layers, alone.layers, strict=True):
            torch.testing.assert_close(whole[row, :num_columns], own[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(whole[row, num_columns:], torch.zeros_like(whole[row, num_columns:]))


def test_the_times_of_a_padded_batch_are_those_of_every_clip(frozen: Encoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    together = frozen.encode(clips, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = frozen.encode(clips[row : row + 1, :, :length]).times
        torch.testing.assert_close(
            together.times[row, : own.shape[1]], own[0], msg=f"a clip of {length} samples"
        )


def test_the_layers_are_what_enters_the_blocks_what_leaves_them_and_the_final_norm(
    frozen: Encoder, clips: Tensor
):
    clips = clips[..., :WINDOW]
    features = frozen.encode(clips)
    grid = frozen.front_end.grid(WINDOW)
    tokens = frozen.front_end(clips)
    blocks = frozen.encoder.forward_layers(tokens, grid)
    expected = [
        frozen.encoder.add_positions(tokens, grid),
        *blocks[:-1],
        frozen.encoder(tokens, grid),
    ]
    for layer, tokens_of_layer in zip(features.layers, expected, strict=True):
        assert layer.shape == (4, grid.num_time, grid.num_freq, 16)
        torch.testing.assert_close(layer.flatten(1, 2), tokens_of_layer)


def test_a_long_clip_is_encoded_in_windows_that_each_equal_a_short_clip(
    frozen: Encoder, clips: Tensor
):
    features = frozen.encode(clips[..., : 2 * WINDOW])
    for window in range(2):
        own = frozen.encode(clips[..., window * WINDOW : (window + 1) * WINDOW])
        columns = slice(window * own.times.shape[1], (window + 1) * own.times.shape[1])
        for whole, layer in zip(features.layers, own.layers, strict=True):
            torch.testing.assert_close(whole[:, columns], layer, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            features.times[:, columns], own.times + window * WINDOW / frozen.sample_rate
        )


@pytest.mark.parametrize("num_samples", [301, 450, 640])
def test_the_windows_cover_the_clip_and_are_as_few_as_can_be(
    frozen: Encoder, clips: Tensor, num_samples: int
):
    clip = clips[:1, :, :num_samples]
    before = frozen.encode(clip)
    per_window = frozen.front_end.grid(WINDOW).num_time
    assert abs(before.times.shape[1] - num_samples / WINDOW * per_window) <= 1.5
    for start in range(0, num_samples - 49, 50):
        touched = clip.clone()
        touched[..., start : start + 50] += 1
        after = frozen.encode(touched)
        assert not torch.allclose(after.layers[0], before.layers[0]), (
            f"nobody hears {start} to {start + 50}"
        )


@pytest.mark.parametrize("num_samples", [200, 600, 640])
def test_times_increase_and_lie_within_the_clip(frozen: Encoder, clips: Tensor, num_samples: int):
    times = frozen.encode(clips[:1, :, :num_samples]).times[0]
    assert times[0] > 0
    assert times[-1] < num_samples / frozen.sample_rate
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("num_samples", [4000, 32160])
def test_a_time_is_the_middle_of_what_the_token_hears(num_samples: int):
    layers = [(2, 10, 5), *[(2, 3, 2)] * 4, (2, 2, 2)]  # wav2vec 2.0's geometry, as WavJEPA has it
    front_end = WaveformFrontEnd(layers, 8)
    frozen = Encoder(front_end, Transformer(8, 1, 2, SinCosPositions()), num_samples)
    times = frozen.encode(torch.zeros(1, 1, num_samples)).times[0]
    middles = torch.arange(len(times)) * front_end.stride + front_end.receptive_field / 2
    torch.testing.assert_close(times * 16000, middles)


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
    frozen = Encoder.from_jepa(tiny_jepa("wave", "--model.encoder.drop_path=0.9").train(), WINDOW)
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
    own = Encoder.from_jepa(jepa, WINDOW, "target")
    assert torch.equal(own.encoder.norm.bias, jepa.target_encoder.norm.bias)
    assert torch.equal(own.front_end.norm.bias, (jepa.target_front_end or jepa.front_end).norm.bias)


def test_a_frozen_copy_leaves_the_model_free_to_learn(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave").train()
    frozen = Encoder.from_jepa(jepa, WINDOW)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in jepa.encoder.parameters())
    assert jepa.encoder.training
    assert not frozen.encoder.training


def test_a_clip_shorter_than_a_token_is_refused(frozen: Encoder):
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
    loaded, trained = load_encoder(file, which), Encoder.from_jepa(model, 500, which)
    assert loaded.window_samples == 500
    assert (loaded.sample_rate, loaded.num_channels) == (1000, 1)
    for a, b in zip(loaded.encode(clips).layers, trained.encode(clips).layers, strict=True):
        assert torch.equal(a, b)


def test_the_random_twin_has_the_weights_before_the_first_step_or_of_another_seed(
    checkpoint: tuple[Path, JEPA, dict[str, Tensor]],
):
    file, _, start = checkpoint
    twin, other = load_encoder(file, "random"), load_encoder(file, "random", random_seed=6)
    for part, module in (("encoder", twin.encoder), ("front_end", twin.front_end)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, start[f"{part}.{name}"]), name
    assert not torch.equal(
        other.encoder.blocks[0].mlp.fc1.weight, twin.encoder.blocks[0].mlp.fc1.weight
    )


def test_no_checkpoint_is_said_in_one_sentence(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*none\.ckpt"):
        load_encoder(tmp_path / "none.ckpt")


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_overlapping_windows_give_every_column_to_the_window_that_hears_most_around_it(
    tiny_jepa: Callable[..., JEPA], clips: Tensor, overlap: float
):
    frozen = Encoder.from_jepa(tiny_jepa("wave"), WINDOW)
    frozen.overlap = overlap
    features = frozen.encode(clips[:1])
    times = features.times[0]
    hop = round(WINDOW * (1 - overlap))
    starts = [*range(0, 640 - WINDOW, hop), 640 - WINDOW]
    own_times = frozen.front_end.times(WINDOW)
    for column, time in enumerate(times.tolist()):
        heard = [start for start in starts if (abs(own_times + start / 1000 - time) < 1e-6).any()]
        best = min(heard, key=lambda start: abs(start + WINDOW / 2 - 1000 * time))
        alone = frozen.encode(clips[:1, :, best : best + WINDOW])
        place = int((alone.times[0] + best / 1000 - time).abs().argmin())
        torch.testing.assert_close(
            features.layers[-1][0, column], alone.layers[-1][0, place], rtol=1e-5, atol=1e-5
        )
    assert (times.diff() > 0).all()


def test_the_number_of_windows_at_a_time_changes_nothing(frozen: Encoder, clips: Tensor):
    together = frozen.encode(clips)
    frozen.max_windows = 1
    for whole, one_by_one in zip(together.layers, frozen.encode(clips).layers, strict=True):
        torch.testing.assert_close(one_by_one, whole, rtol=1e-5, atol=1e-5)


def test_no_more_windows_than_allowed_are_encoded_at_once(frozen: Encoder, clips: Tensor):
    frozen.max_windows = 3
    sizes: list[int] = []
    frozen.encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    frozen.encode(clips)
    frozen.encode(clips[:1])
    assert max(sizes) <= 3


def test_the_published_windowing_takes_no_overlap(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave")
    with pytest.raises(ValueError, match="`windowing`"):
        Encoder(jepa.front_end, jepa.encoder, WINDOW, windowing="wavjepa", overlap=0.5)


def test_only_the_layers_asked_for_are_kept(frozen: Encoder, clips: Tensor):
    every = frozen.encode(clips).layers
    last, first = frozen.encode(clips, layers=[-1, 0]).layers
    assert torch.equal(last, every[-1])
    assert torch.equal(first, every[0])


@pytest.mark.parametrize(("overlap", "max_windows"), [(1.0, 1), (-0.1, 1), (0.0, 0)])
def test_impossible_windows_are_refused(
    tiny_jepa: Callable[..., JEPA], overlap: float, max_windows: int
):
    jepa = tiny_jepa("wave")
    with pytest.raises(ValueError, match=r"`overlap` .* `max_windows`"):
        Encoder(jepa.front_end, jepa.encoder, WINDOW, overlap=overlap, max_windows=max_windows)


def wavjepa_geometry(windowing: str = "wavjepa") -> Encoder:
    """WavJEPA's convolutions and windows at a width that a test can afford."""
    layers = [(4, 10, 5), *[(4, 3, 2)] * 4, (4, 2, 2)]
    encoder = Transformer(8, 2, 2, SinCosPositions(), norm="post")
    return Encoder(WaveformFrontEnd(layers, 8), encoder, 32_160, windowing=windowing)


@pytest.mark.parametrize(
    ("num_samples", "num_tokens"),
    [(160_000, 996), (32_160, 202), (32_159, 200), (64_320, 402), (16_000, 101)],
)
def test_the_published_windowing_gives_the_published_number_of_tokens(
    num_samples: int, num_tokens: int
):
    features = wavjepa_geometry().encode(torch.randn(1, 1, num_samples))
    assert features.layers[-1].shape[1] == num_tokens
    step = num_samples / 16000 / num_tokens
    torch.testing.assert_close(features.times[0], torch.arange(num_tokens) * step)


def test_the_published_windowing_hears_its_padding(rng: torch.Generator):
    """A literal second version, window by window, against ours."""
    frozen = wavjepa_geometry()
    clip = torch.randn(1, 1, 40_000, generator=rng) * torch.linspace(0.1, 2, 40_000)
    ours = frozen.encode(clip).layers[-1][0, :, 0]
    padded = torch.zeros(1, 1, 64_320)
    padded[..., :40_000] = clip * 10 ** (-14 / 20) / clip.square().mean().sqrt()
    surplus = int(24_320 / 16000 * 99)
    assert len(ours) == 400 - surplus
    for window in range(2):
        sound = padded[..., 32_160 * window : 32_160 * (window + 1)]
        sound = (sound - sound.mean()) / (sound.std() + 1e-5)
        frozen.front_end.standardize = False
        tokens = frozen.front_end(sound) + SinCosPositions().additive(
            frozen.front_end.grid(32_160), 8, clip.device
        )
        frozen.front_end.standardize = True
        heard = 200 if window == 0 else 200 - surplus
        for block in frozen.encoder.blocks:
            tokens = block(tokens, None, (torch.arange(200) < heard)[None, None, None])
        expected = frozen.encoder.norm(tokens)[0, :heard]
        torch.testing.assert_close(
            ours[200 * window : 200 * window + heard], expected, rtol=1e-4, atol=1e-5
        )


def test_the_exact_windowing_differs_from_the_published_one_only_where_that_pads(
    rng: torch.Generator,
):
    ours, published = wavjepa_geometry("exact"), wavjepa_geometry()
    published.load_state_dict(ours.state_dict())
    clip = torch.randn(1, 1, 40_000, generator=rng)
    exact, literal = ours.encode(clip).layers[-1], published.encode(clip).layers[-1]
    assert exact.shape[1] in (248, 249)
    torch.testing.assert_close(exact[:, :120], literal[:, :120], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(exact[:, 220:245], literal[:, 220:245], atol=1e-2)


@pytest.mark.parametrize(("freq_chunks", "time_chunks"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_region_pooling_is_adaptive_average_pooling_of_every_clip(
    rng: torch.Generator, freq_chunks: int, time_chunks: int
):
    layer = torch.randn(2, 5, 3, 4, generator=rng)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    features = LayerFeatures((layer,), torch.arange(5.0).expand(2, -1), valid)
    (pooled,) = features.pool_regions(freq_chunks, time_chunks)
    for clip, num_columns in ((0, 5), (1, 3)):
        plane = layer[clip, :num_columns].permute(2, 1, 0)  # [D, F, T]
        expected = torch.nn.functional.adaptive_avg_pool2d(plane, (freq_chunks, time_chunks))
        torch.testing.assert_close(pooled[clip], expected.permute(1, 2, 0).flatten())


@pytest.mark.parametrize("chunks", [(4, 1), (0, 1), (1, 4)])
def test_more_regions_than_there_are_are_refused(rng: torch.Generator, chunks: tuple[int, int]):
    layer = torch.randn(2, 5, 3, 4, generator=rng)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    with pytest.raises(ValueError, match=r"`freq_chunks` .* `time_chunks`"):
        LayerFeatures((layer,), torch.arange(5.0).expand(2, -1), valid).pool_regions(*chunks)
