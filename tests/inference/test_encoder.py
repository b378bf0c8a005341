"""Features do not depend on padding, windows cover the whole clip, and times are right."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.folder import save_encoder
from jepa_audio.inference.load import load_encoder
from jepa_audio.inference.windowed import WindowedEncoder
from jepa_audio.steps.encoder.positions import RotaryPositions, SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd, WaveformFrontEnd
from jepa_audio.steps.front_ends.base import Spectrogram
from jepa_audio.steps.front_ends.transforms import CQT, VQT, Gammatone, LogMel
from jepa_audio.steps.grid import TokenSet
from jepa_audio.training.jepa import JEPA

FLAVOURS = ["wave", "mel"]
WINDOW = 300


@pytest.fixture(params=FLAVOURS)
def encoder(request: pytest.FixtureRequest, tiny_jepa: Callable[..., JEPA]) -> Encoder:
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


def test_every_clip_of_a_padded_batch_equals_the_clip_alone(encoder: Encoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    padded_batch = encoder.encode_batch(clips, lengths)
    assert padded_batch.valid.shape == padded_batch.layers[0].shape[:2]
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.encode_batch(clips[row : row + 1, :, :length])
        num_columns = alone.layers[0].shape[1]
        assert alone.valid.all()
        assert padded_batch.valid[row].tolist() == [
            column < num_columns for column in range(padded_batch.valid.shape[1])
        ]
        for layer, expected in zip(padded_batch.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer[row, :num_columns], expected[0], rtol=1e-5, atol=1e-5)
            assert not layer[row, num_columns:].any()


@pytest.mark.parametrize(
    ("positions", "num_passes"),
    [(SinCosPositions(), 1), (RotaryPositions(normalized=False), 1), (RotaryPositions(), 3)],
)
def test_short_clips_of_unequal_length_share_a_pass_if_positions_do_not_depend_on_the_length(
    tiny_jepa: Callable[..., JEPA],
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    positions: SinCosPositions | RotaryPositions,
    num_passes: int,
):
    jepa = tiny_jepa("mel")
    encoder = Encoder.from_jepa(jepa, 640)
    encoder.encoder.positions = positions
    clips = [torch.randn(1, length, generator=rng) for length in (300, 640, 200, 300)]
    alone = [encoder.encode_batch(clip[None]) for clip in clips]
    assert len({each.layers[0].shape[1] for each in alone}) == 3
    passes = []
    forward = Transformer.forward_layers
    monkeypatch.setattr(
        Transformer, "forward_layers", lambda *args: passes.append(1) or forward(*args)
    )
    found = {}
    for rows, features in encoder.encode_clips(clips, None):
        for i, row in enumerate(rows):
            num_columns = int(features.valid[i].sum())
            found[row] = [layer[i, :num_columns] for layer in features.layers]
            assert not any(layer[i, num_columns:].any() for layer in features.layers)
            torch.testing.assert_close(features.times[i, :num_columns], alone[row].times[0])
    assert len(passes) == num_passes
    for row, expected in enumerate(alone):
        for layer, of_clip in zip(found[row], expected.layers, strict=True):
            torch.testing.assert_close(layer, of_clip[0], rtol=1e-5, atol=1e-5)


def test_the_times_of_a_padded_batch_equal_the_times_of_every_clip(encoder: Encoder, clips: Tensor):
    lengths = torch.tensor([640, 300, 200, 300])
    padded_batch = encoder.encode_batch(clips, lengths)
    for row, length in enumerate(lengths.tolist()):
        times = encoder.encode_batch(clips[row : row + 1, :, :length]).times
        torch.testing.assert_close(
            padded_batch.times[row, : times.shape[1]], times[0], msg=f"a clip of {length} samples"
        )


def test_the_layers_are_the_input_of_the_blocks_their_outputs_and_the_final_norm(
    encoder: Encoder, clips: Tensor
):
    clips = clips[..., :WINDOW]
    features = encoder.encode_batch(clips)
    grid = encoder.front_end.grid(WINDOW)
    tokens = encoder.front_end(clips)
    blocks = encoder.encoder.forward_layers(tokens, grid)
    expected = [
        encoder.encoder.add_positions(tokens, grid),
        *blocks[:-1],
        encoder.encoder(tokens, grid),
    ]
    for layer, tokens_of_layer in zip(features.layers, expected, strict=True):
        assert layer.shape == (4, grid.num_time, grid.num_freq, 16)
        torch.testing.assert_close(layer.flatten(1, 2), tokens_of_layer)


def test_every_window_of_a_long_clip_equals_a_short_clip(encoder: Encoder, clips: Tensor):
    features = encoder.encode_batch(clips[..., : 2 * WINDOW])
    for window in range(2):
        short = encoder.encode_batch(clips[..., window * WINDOW : (window + 1) * WINDOW])
        columns = slice(window * short.times.shape[1], (window + 1) * short.times.shape[1])
        for layer, expected in zip(features.layers, short.layers, strict=True):
            torch.testing.assert_close(layer[:, columns], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            features.times[:, columns], short.times + window * WINDOW / encoder.sample_rate
        )


@pytest.mark.parametrize("num_samples", [301, 450, 640])
def test_the_windows_cover_every_sample_of_the_clip_with_the_fewest_columns(
    encoder: Encoder, clips: Tensor, num_samples: int
):
    clip = clips[:1, :, :num_samples]
    before = encoder.encode_batch(clip)
    per_window = encoder.front_end.grid(WINDOW).num_time
    assert abs(before.times.shape[1] - num_samples / WINDOW * per_window) <= 1.5
    for start in range(0, num_samples - 49, 50):
        touched = clip.clone()
        touched[..., start : start + 50] += 1
        after = encoder.encode_batch(touched)
        assert not torch.allclose(after.layers[0], before.layers[0]), (
            f"no token depends on samples {start} to {start + 50}"
        )


@pytest.mark.parametrize("num_samples", [200, 600, 640])
def test_times_increase_and_lie_within_the_clip(encoder: Encoder, clips: Tensor, num_samples: int):
    times = encoder.encode_batch(clips[:1, :, :num_samples]).times[0]
    assert times[0] > 0
    assert times[-1] < num_samples / encoder.sample_rate
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("num_samples", [4000, 32160])
def test_a_time_is_the_centre_of_the_receptive_field_of_the_token(num_samples: int):
    layers = [(2, 10, 5), *[(2, 3, 2)] * 4, (2, 2, 2)]  # wav2vec 2.0's geometry, as WavJEPA has it
    front_end = WaveformFrontEnd(layers, 8)
    encoder = Encoder(front_end, Transformer(8, 1, 2, SinCosPositions()), num_samples)
    times = encoder.encode_batch(torch.zeros(1, 1, num_samples)).times[0]
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


@pytest.mark.parametrize("regions", [1, 3, 7])
def test_pooled_statistics_are_those_of_the_columns_of_each_clip(
    rng: torch.Generator, regions: int
):
    layer = torch.randn(3, 5, 3, 4, generator=rng)
    valid = torch.arange(5) < torch.tensor([[5], [2], [1]])
    features = LayerFeatures((layer,), torch.arange(5.0).expand(3, -1), valid)
    for frequency in ("mean", "concat"):
        (pooled,) = features.pool(frequency, regions, deviation=True, change=True)
        for clip, num_columns in enumerate((5, 2, 1)):
            kept = layer[clip, :num_columns]
            columns = (kept.mean(1) if frequency == "mean" else kept.flatten(1)).numpy()
            # Regions share columns where a clip has fewer of them.
            means = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(columns.T), regions)
            steps = np.abs(np.diff(columns, axis=0)) if num_columns > 1 else np.zeros((1, 1))
            change = np.broadcast_to(steps.mean(0), columns.shape[1:])
            expected = np.concatenate([means.T.flatten(), columns.std(0), change])
            np.testing.assert_allclose(pooled[clip], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"`regions` \(0\)"):
        features.pool(regions=0)


def test_encoding_draws_no_random_numbers_keeps_no_graph_and_uses_evaluation_mode(
    tiny_jepa: Callable[..., JEPA], clips: Tensor
):
    encoder = Encoder.from_jepa(tiny_jepa("wave", "--model.encoder.drop_path=0.9").train(), WINDOW)
    state = torch.get_rng_state()
    first, second = encoder.encode_batch(clips), encoder.encode_batch(clips)
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
    target = Encoder.from_jepa(jepa, WINDOW, "target")
    assert torch.equal(target.encoder.norm.bias, jepa.target_encoder.norm.bias)
    front_end = jepa.target_front_end or jepa.front_end
    assert torch.equal(target.front_end.norm.bias, front_end.norm.bias)


def test_an_encoder_copied_from_a_model_does_not_freeze_the_model(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave").train()
    encoder = Encoder.from_jepa(jepa, WINDOW)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(parameter.requires_grad for parameter in jepa.encoder.parameters())
    assert jepa.encoder.training
    assert not encoder.encoder.training


SHORT = 800  # 0.1 s at 8 kHz
FRONT_ENDS: dict[str, tuple[Callable[[], FrontEnd], int]] = {  # and the number of columns of SHORT
    "wave": (lambda: WaveformFrontEnd([(8, 600, 300), (8, 3, 2)], 16, 8000), 1),
    "mel": (lambda: spectrogram(LogMel(8000, 512, hop_length=80, n_mels=16), 16), 1),
    "gammatone": (lambda: spectrogram(Gammatone(8000, 512, hop_length=80, n_bins=16), 16), 1),
    "cqt": (lambda: spectrogram(CQT(8000, 80, f_min_hz=55.0, n_bins=48), 4), 2),
    "vqt": (lambda: spectrogram(VQT(8000, 64, f_min_hz=55.0, n_bins=48), 4), 3),
}


def spectrogram(transform: Spectrogram, patch_frames: int) -> FrontEnd:
    return SpectrogramFrontEnd(transform, 16, patch_frames, patch_bands=8, mean=-4.0, std=2.0)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_clip_shorter_than_a_token_is_padded_with_zeros_and_has_its_own_columns(name: str):
    make, num_columns = FRONT_ENDS[name]
    encoder = Encoder(make(), Transformer(16, 1, 2, SinCosPositions()), 8000)
    assert SHORT < encoder.min_samples < 8000
    clips = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    features = encoder.encode_batch(clips, torch.tensor([SHORT, 4000]))
    assert features.valid.sum(1).tolist() == [
        num_columns,
        encoder.front_end.grid(4000).num_time,
    ]
    alone = encoder.encode_batch(clips[:1, :, :SHORT])
    torch.testing.assert_close(alone.layers[-1], features.layers[-1][:1, :num_columns])
    padded = torch.nn.functional.pad(clips[:1, :, :SHORT], (0, encoder.min_samples - SHORT))
    expected = encoder.front_end(padded)[0, : num_columns * alone.layers[0].shape[2]]
    tokens = (
        alone.layers[0][0].flatten(0, 1)
        - encoder.encode_batch(padded).layers[0][0].flatten(0, 1)[: len(expected)]
    )
    assert tokens.abs().max() < 1e-5  # the same positions, the same zeros
    torch.testing.assert_close(alone.times[0], encoder.front_end.times(4000)[:num_columns])
    assert all(layer.isfinite().all() for layer in alone.layers)
    tiny = encoder.encode_batch(clips[:1, :, :1])
    assert tiny.valid.tolist() == [[True]]


def test_the_columns_of_the_padding_have_no_influence_on_a_short_clip():
    encoder = Encoder(FRONT_ENDS["cqt"][0](), Transformer(16, 2, 2, SinCosPositions()), 8000)
    clip = torch.randn(1, 1, SHORT, generator=torch.Generator().manual_seed(0))
    tokens = encoder.front_end(torch.nn.functional.pad(clip, (0, encoder.min_samples - SHORT)))
    grid = encoder.front_end.grid(encoder.min_samples)
    kept = TokenSet(torch.arange(2 * grid.num_freq)[None])
    expected = encoder.encoder(tokens, grid, kept)
    torch.testing.assert_close(
        encoder.encode_batch(clip).layers[-1].flatten(1, 2), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("num_samples", [1, 80, 399])
def test_the_published_windowing_encodes_a_clip_shorter_than_a_token(num_samples: int):
    features = wavjepa_geometry().encode_batch(torch.randn(1, 1, num_samples))
    assert 1 <= features.layers[-1].shape[1] <= 4
    assert features.layers[-1].isfinite().all()


def test_a_clip_without_samples_is_refused(encoder: Encoder, clips: Tensor):
    for lengths in ([640, 0, 1, 2], [640, -1, 1, 2]):
        with pytest.raises(UserError, match="0 samples cannot be encoded"):
            encoder.encode_batch(clips, torch.tensor(lengths))


@pytest.fixture(scope="module")
def checkpoint(tiny_cli: Callable) -> tuple[Path, JEPA, dict[str, Tensor]]:
    """(file, the model at its end, the weights before its first step)."""
    cli = tiny_cli("wave", "--trainer.max_steps=3", "--model.seed=5")
    start = {name: value.clone() for name, value in cli.model.state_dict().items()}
    cli.trainer.fit(cli.model, cli.datamodule)
    return Path(cli.trainer.checkpoint_callback.dirpath) / "last.ckpt", cli.model, start


def test_clips_are_scaled_to_the_level_of_the_training(
    tiny_cli: Callable, tmp_path: Path, rng: torch.Generator
):
    cli = tiny_cli("mel", "--trainer.max_steps=1", "--data.loudness_dbfs=-20")
    cli.trainer.fit(cli.model, cli.datamodule)
    encoder = load_encoder(cli.trainer.checkpoint_callback.dirpath)
    encoder = load_encoder(save_encoder(encoder, tmp_path / "saved"))
    assert encoder.loudness_dbfs == -20
    encoder.encoder.positions = SinCosPositions()
    plain = copy.deepcopy(encoder)
    plain.loudness_dbfs = None
    # Two clips shorter than a window, one as long, two longer, one silent.
    lengths = [encoder.window_samples + extra for extra in (-100, -200, 0, 300, 500, -100)]
    clips = [0.01 * (i + 1) * torch.randn(1, n, generator=rng) for i, n in enumerate(lengths)]
    clips[-1] = 1e-6 * clips[-1]
    scaled = [clip * 10 ** (-20 / 20) / clip.square().mean().sqrt() for clip in clips[:-1]]
    scaled.append(clips[-1])
    expected = [plain.encode_batch(clip[None]).layers[-1][0] for clip in scaled]
    together = encoder.encode(clips, 1000)
    for row, latents in enumerate(expected):
        alone = encoder.encode_batch(clips[row][None]).layers[-1][0]
        torch.testing.assert_close(alone, latents, rtol=1e-4, atol=1e-5)
        in_batch = together.layers[-1][row, together.valid[row]]
        torch.testing.assert_close(in_batch, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["context", "target"])
def test_the_encoder_of_a_checkpoint_equals_the_encoder_of_the_run(
    checkpoint: tuple[Path, JEPA, dict[str, Tensor]], clips: Tensor, which: str
):
    file, model, _ = checkpoint
    loaded, trained = load_encoder(file, which), Encoder.from_jepa(model, 500, which)
    assert loaded.window_samples == 500
    assert (loaded.sample_rate, loaded.num_channels) == (1000, 1)
    for a, b in zip(
        loaded.encode_batch(clips).layers, trained.encode_batch(clips).layers, strict=True
    ):
        assert torch.equal(a, b)


def test_the_random_init_baseline_has_the_weights_of_step_0_or_of_another_seed(
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


def test_a_missing_checkpoint_is_a_user_error(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*none\.ckpt"):
        load_encoder(tmp_path / "none.ckpt")


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_every_column_comes_from_the_window_in_which_it_is_farthest_from_the_border(
    tiny_jepa: Callable[..., JEPA], clips: Tensor, overlap: float
):
    encoder = Encoder.from_jepa(tiny_jepa("wave"), WINDOW)
    encoder.overlap = overlap
    features = encoder.encode_batch(clips[:1])
    times = features.times[0]
    hop = round(WINDOW * (1 - overlap))
    starts = [*range(0, 640 - WINDOW, hop), 640 - WINDOW]
    window_times = encoder.front_end.times(WINDOW)
    for column, time in enumerate(times.tolist()):
        windows = [
            start for start in starts if (abs(window_times + start / 1000 - time) < 1e-6).any()
        ]
        best = min(windows, key=lambda start: abs(start + WINDOW / 2 - 1000 * time))
        alone = encoder.encode_batch(clips[:1, :, best : best + WINDOW])
        place = int((alone.times[0] + best / 1000 - time).abs().argmin())
        torch.testing.assert_close(
            features.layers[-1][0, column], alone.layers[-1][0, place], rtol=1e-5, atol=1e-5
        )
    assert (times.diff() > 0).all()


def test_max_windows_does_not_change_the_features(encoder: Encoder, clips: Tensor):
    padded_batch = encoder.encode_batch(clips)
    encoder.max_windows = 1
    for expected, one_by_one in zip(
        padded_batch.layers, encoder.encode_batch(clips).layers, strict=True
    ):
        torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-5)


def test_at_most_max_windows_are_encoded_at_once(encoder: Encoder, clips: Tensor):
    encoder.max_windows = 3
    sizes: list[int] = []
    encoder.encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    encoder.encode_batch(clips)
    encoder.encode_batch(clips[:1])
    assert max(sizes) <= 3


def test_the_published_windowing_refuses_an_overlap(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave")
    with pytest.raises(ValueError, match="`windowing`"):
        Encoder(jepa.front_end, jepa.encoder, WINDOW, windowing="wavjepa", overlap=0.5)


def test_only_the_requested_layers_are_returned(encoder: Encoder, clips: Tensor):
    every = encoder.encode_batch(clips).layers
    last, first = encoder.encode_batch(clips, layers=[-1, 0]).layers
    assert torch.equal(last, every[-1])
    assert torch.equal(first, every[0])


@pytest.mark.parametrize(("overlap", "max_windows"), [(1.0, 1), (-0.1, 1), (0.0, 0)])
def test_settings_out_of_range_are_refused(
    tiny_jepa: Callable[..., JEPA], overlap: float, max_windows: int
):
    jepa = tiny_jepa("wave")
    with pytest.raises(ValueError, match=r"`overlap` .* `max_windows`"):
        Encoder(jepa.front_end, jepa.encoder, WINDOW, overlap=overlap, max_windows=max_windows)
    # Without the check of types in the tests.
    init = getattr(WindowedEncoder.__init__, "__wrapped__", WindowedEncoder.__init__)
    options = {"windowing": "exact", "overlap": 0.5, "max_windows": 1}
    for wrong in ({"overlap": "a"}, {"max_windows": 2.5}, {"max_windows": None}):
        with pytest.raises(UserError, match=r"`overlap` .* `max_windows`"):
            init(object.__new__(WindowedEncoder), None, None, WINDOW, **{**options, **wrong})


def wavjepa_geometry(windowing: str = "wavjepa") -> Encoder:
    """The convolutions and windows of WavJEPA with a small width."""
    layers = [(4, 10, 5), *[(4, 3, 2)] * 4, (4, 2, 2)]
    encoder = Transformer(8, 2, 2, SinCosPositions(), norm="post")
    return Encoder(WaveformFrontEnd(layers, 8), encoder, 32_160, windowing=windowing)


@pytest.mark.parametrize(
    ("num_samples", "num_tokens"),
    [
        *[(160_000, 996), (80_000, 498), (52_800, 329), (16_000, 100), (8_000, 50), (240, 1)],
        *[(32_160, 200), (32_159, 200), (32_158, 200), (64_318, 400), (64_320, 400)],
    ],
)
def test_the_published_windowing_gives_the_published_number_of_tokens(
    num_samples: int, num_tokens: int
):
    features = wavjepa_geometry().encode_batch(torch.randn(1, 1, num_samples))
    assert features.layers[-1].shape[1] == num_tokens
    step = num_samples / 16000 / num_tokens
    torch.testing.assert_close(features.times[0], torch.arange(num_tokens) * step)


def test_the_published_windowing_normalizes_with_its_padding(rng: torch.Generator):
    """A literal implementation, window by window."""
    encoder = wavjepa_geometry()
    clip = torch.randn(1, 1, 40_000, generator=rng) * torch.linspace(0.1, 2, 40_000)
    ours = encoder.encode_batch(clip).layers[-1][0, :, 0]
    padded = torch.zeros(1, 1, 64_318)
    padded[..., :40_000] = clip * 10 ** (-14 / 20) / clip.square().mean().sqrt()
    dropped = int(24_318 / 16000 * 100)
    assert len(ours) == 400 - dropped
    for window in range(2):
        sound = padded[..., 32_159 * window : 32_159 * (window + 1)]
        sound = (sound - sound.mean()) / (sound.std() + 1e-5)
        encoder.front_end.standardize = False
        tokens = encoder.front_end(sound) + SinCosPositions().additive(
            encoder.front_end.grid(32_159), 8, clip.device
        )
        encoder.front_end.standardize = True
        kept = 200 if window == 0 else 200 - dropped
        for block in encoder.encoder.blocks:
            tokens = block(tokens, None, (torch.arange(200) < kept)[None, None, None])
        expected = encoder.encoder.norm(tokens)[0, :kept]
        torch.testing.assert_close(
            ours[200 * window : 200 * window + kept], expected, rtol=1e-4, atol=1e-5
        )


def test_the_published_windowing_of_windows_below_a_second_keeps_their_length():
    encoder = wavjepa_geometry()
    encoder.window_samples = 6_560  # 40 tokens
    features = encoder.encode_batch(torch.randn(1, 1, 9_000))
    assert features.layers[-1].shape[1] == 80 - int((2 * 6_560 - 9_000) / 16000 * int(40 / 0.41))


def test_the_exact_windowing_differs_from_the_published_one_only_near_its_padding(
    rng: torch.Generator,
):
    ours, published = wavjepa_geometry("exact"), wavjepa_geometry()
    ours.window_samples = 32_159
    published.load_state_dict(ours.state_dict())
    clip = torch.randn(1, 1, 40_000, generator=rng)
    exact, literal = ours.encode_batch(clip).layers[-1], published.encode_batch(clip).layers[-1]
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
def test_more_regions_than_rows_or_columns_are_refused(
    rng: torch.Generator, chunks: tuple[int, int]
):
    layer = torch.randn(2, 5, 3, 4, generator=rng)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    with pytest.raises(ValueError, match=r"`freq_chunks` .* `time_chunks`"):
        LayerFeatures((layer,), torch.arange(5.0).expand(2, -1), valid).pool_regions(*chunks)
