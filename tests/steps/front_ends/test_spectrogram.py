"""The spectrogram front end."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends.base import Spectrogram
from jepa_audio.steps.front_ends.spectrogram import SpectrogramFrontEnd, measure_statistics
from jepa_audio.steps.front_ends.transforms import CQT, VQT, Gammatone, LogMel
from jepa_audio.steps.grid import Grid

DATA = Path(__file__).parents[2] / "data"
RATE = 8000
spectrogram_front_end = partial(SpectrogramFrontEnd, mean=-4.0, std=2.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mel(center: bool = False) -> LogMel:
    return LogMel(RATE, n_fft=256, hop_length=80, n_mels=24, center=center)


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize(
    "spectrogram",
    [
        mel(),
        mel(center=True),
        Gammatone(RATE, n_fft=256, hop_length=77, n_bins=24),
        CQT(RATE, 77, f_min_hz=220.0, n_bins=24),
    ],
    ids=["mel", "mel, centred", "gammatone", "cqt"],
)
def test_number_of_tokens_equals_the_grid(spectrogram: Spectrogram, num_channels: int) -> None:
    front_end = spectrogram_front_end(
        spectrogram, 16, patch_frames=3, patch_bands=8, num_channels=num_channels
    )
    for num_samples in (719, 720, 721, 1999, 4001):
        tokens = front_end(noise(2, num_channels, num_samples))
        assert tokens.shape == (2, front_end.grid(num_samples).num_tokens, 16)


def test_grid_of_pupujepa() -> None:
    front_end = spectrogram_front_end(LogMel(), 8)
    assert front_end.grid(245_760) == Grid(num_freq=8, num_time=256)
    assert front_end.stride == 960  # 25 Hz at 24 kHz


def test_frames_after_the_last_complete_patch_have_no_influence() -> None:
    front_end = spectrogram_front_end(mel(), 8, patch_bands=8)
    image = noise(1, 1, 11, 24)
    assert torch.equal(front_end.embed_patches(image), front_end.embed_patches(image[:, :, :8]))


def test_token_i_is_the_patch_at_its_grid_coordinates() -> None:
    front_end = spectrogram_front_end(mel(), 8, patch_frames=4, patch_bands=6, num_channels=2)
    image = noise(1, 2, 12, 24)
    tokens = front_end.embed_patches(image)[0]
    for i, (time, freq) in enumerate(Grid(num_freq=4, num_time=3).coordinates().tolist()):
        patch = image[0, :, 4 * time : 4 * time + 4, 6 * freq : 6 * freq + 6]
        embedded = front_end.proj.weight.flatten(1) @ patch.flatten() + front_end.proj.bias
        torch.testing.assert_close(tokens[i], front_end.norm(embedded))


def test_patch_tokens_equal_the_published_pupujepa() -> None:
    with safe_open(DATA / "pupujepa.safetensors", "pt") as file:
        sizes = {key: json.loads(value) for key, value in file.metadata().items()}
        image, expected = file.get_tensor("image"), file.get_tensor("patch_tokens")
        saved = {
            f"{ours}.{kind}": file.get_tensor(f"state/patch_embed.{theirs}.{kind}")
            for ours, theirs in (("proj", "proj"), ("norm", "norm_layer"))
            for kind in ("weight", "bias")
        }
    frames, bands = sizes["patch"]
    spectrogram = LogMel(n_mels=image.shape[-1])
    front_end = spectrogram_front_end(spectrogram, sizes["encoder"]["width"], frames, bands)
    front_end.load_state_dict(saved)
    torch.testing.assert_close(
        front_end.embed_patches(image), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


def test_image_is_normalised_with_time_before_frequency() -> None:
    spectrogram, waveform = mel(), noise(2, 1, 2000)
    mean, std = measure_statistics(spectrogram, [waveform])
    front_end = spectrogram_front_end(spectrogram, 8, patch_bands=8, mean=mean, std=std)
    image = front_end.image(waveform)
    assert torch.equal(front_end(waveform), front_end.embed_patches(image))
    torch.testing.assert_close(image, (spectrogram(waveform).mT - mean) / (std + 1e-8))
    assert abs(image.mean()) < 1e-4
    assert abs(image.std() - 1) < 1e-3


def test_without_mean_and_std_no_image_is_computed() -> None:
    front_end = SpectrogramFrontEnd(mel(), 8, patch_bands=8)
    with pytest.raises(UserError, match="`mean` and `std` of the front end are unknown"):
        front_end(noise(1, 1, 2000))
    for mean, std in ((1.0, None), (None, 1.0), (0.0, 0.0), (0.0, float("nan")), (0.0, -1.0)):
        with pytest.raises(UserError, match="`std`"):
            SpectrogramFrontEnd(mel(), 8, patch_bands=8, mean=mean, std=std)


def test_every_parameter_has_a_gradient_and_only_weights_are_saved() -> None:
    front_end = spectrogram_front_end(mel(), 8, patch_bands=8, num_channels=2)
    (front_end(noise(2, 2, 2000)) * noise(8, seed=1)).square().sum().backward()
    for name, parameter in front_end.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert set(front_end.state_dict()) == {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert set(spectrogram_front_end(mel(), 8, patch_bands=8, norm=False).state_dict()) == {
        "proj.weight",
        "proj.bias",
    }


def test_tokens_are_float32_under_autocast() -> None:
    front_end = spectrogram_front_end(mel(), 8, patch_bands=8, mean=-4.0, std=1.0)
    waveform = noise(2, 1, 2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, image = front_end(waveform), front_end.image(waveform)
    assert tokens.dtype == torch.float32
    assert torch.equal(image, front_end.image(waveform))
    torch.testing.assert_close(tokens, front_end(waveform), rtol=0.05, atol=0.05)


def test_patch_embedding_is_xavier_uniform_over_the_flattened_patch() -> None:
    torch.manual_seed(0)
    front_end = spectrogram_front_end(mel(), 64, patch_frames=4, patch_bands=8, num_channels=2)
    bound = (6 / (2 * 4 * 8 + 64)) ** 0.5
    for _ in range(2):
        assert 0.95 * bound < front_end.proj.weight.abs().max() <= bound
        assert not front_end.proj.bias.any()
        torch.nn.init.constant_(front_end.proj.weight, 7.0)
        torch.nn.init.constant_(front_end.proj.bias, 7.0)
        front_end.reset_parameters()


@pytest.mark.parametrize("batches", [[8], [1, 7], [3, 1, 2, 2]])
def test_statistics_do_not_depend_on_batch_sizes(batches: list[int]) -> None:
    spectrogram, waveform = mel(), noise(8, 1, 1000)
    values = spectrogram(waveform).double()
    mean, std = measure_statistics(spectrogram, waveform.split(batches))
    assert mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert std == pytest.approx(values.std(correction=0).item(), rel=1e-12)


def test_statistics_weight_clips_by_their_number_of_frames() -> None:
    spectrogram = mel()
    clips = [0.01 * noise(1, 1, 400), noise(1, 1, 5000, seed=1)]
    values = torch.cat([spectrogram(clip).double().flatten() for clip in clips])
    assert measure_statistics(spectrogram, iter(clips)) == pytest.approx(
        (values.mean().item(), values.std(correction=0).item()), rel=1e-12
    )


def test_statistics_without_clips_raise_an_error() -> None:
    with pytest.raises(ValueError, match="`waveforms` must contain at least one clip"):
        measure_statistics(mel(), [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: spectrogram_front_end(LogMel(), 8, patch_bands=15),
            r"`patch_bands` \(15\) must divide the number of bands \(128\): use 8, 16 or 32",
        ),
        (lambda: spectrogram_front_end(LogMel(), 8, patch_frames=0), r"`patch_frames` \(0\)"),
        (lambda: spectrogram_front_end(LogMel(), 8, patch_bands=0), r"`patch_bands` \(0\)"),
        (lambda: spectrogram_front_end(LogMel(), 8, std=0.0), r"`std` \(0.0\) must be positive"),
        (
            lambda: spectrogram_front_end(mel(), 8, patch_bands=8).grid(319),
            r"319 samples .* it has 3",
        ),
        (
            lambda: spectrogram_front_end(mel(), 8, patch_bands=8)(noise(1, 1, 319)),
            r"319 samples is too short",
        ),
        (
            lambda: spectrogram_front_end(mel(), 8, patch_bands=8).grid(10),
            r"10 samples is too short for LogMel",
        ),
    ],
)
def test_invalid_settings_raise_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SETTINGS: dict[str, Callable[[], Spectrogram]] = {
    "mel": mel,
    "mel, centred": lambda: mel(center=True),
    "mel, short window": lambda: LogMel(RATE, 256, win_length=200, hop_length=77, n_mels=24),
    "gammatone": lambda: Gammatone(RATE, n_fft=256, hop_length=77, n_bins=24),
    "cqt": lambda: CQT(RATE, 77, f_min_hz=110.0, n_bins=48),
    "cqt, 24 bins per octave": lambda: CQT(RATE, 80, f_min_hz=220.0, n_bins=48, bins_per_octave=24),
    "cqt of 4 octaves": lambda: CQT(RATE, 96, f_min_hz=110.0, n_bins=48, algorithm="2010v2"),
    "cqt of 1 octave": lambda: CQT(RATE, 100, f_min_hz=880.0, n_bins=12, algorithm="2010v2"),
    "vqt": lambda: VQT(RATE, 96, f_min_hz=110.0, n_bins=48, gamma=0.0),
    "vqt, short low windows": lambda: VQT(RATE, 64, f_min_hz=55.0, n_bins=60, gamma=20.0),
}


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_declared_column_is_free_of_padding_and_few_others_are(
    make: Callable[[], Spectrogram],
) -> None:
    front_end = spectrogram_front_end(make(), 16, patch_frames=1, patch_bands=12)
    padded, other_end = noise(1, 1, 8000), 30 * noise(1, 1, 8000, seed=1)
    for num_samples in (6000, 6001, 6039, 6100):
        changed = torch.cat([padded[..., :num_samples], other_end[..., num_samples:]], dim=-1)
        (num_columns,) = front_end.columns(torch.tensor([num_samples])).tolist()
        moves = (front_end.image(changed) - front_end.image(padded)).abs().amax(dim=(0, 1, 3))
        assert moves[:num_columns].max() < 1e-5
        # The ends of windows and of nnAudio's half-band filters have almost no weight.
        assert moves[num_columns + 15] > 1e-5


def test_the_shortest_clip_has_one_more_sample_than_the_longest_one_without_a_token() -> None:
    for make in SETTINGS.values():
        front_end = spectrogram_front_end(make(), 16, patch_frames=3, patch_bands=12)
        assert front_end.grid(front_end.min_samples).num_time >= 1
        with pytest.raises(UserError, match="too short"):
            front_end.grid(front_end.min_samples - 1)
