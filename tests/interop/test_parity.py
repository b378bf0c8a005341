"""Imported models compute the numbers of the published code of WavJEPA and PupuJEPA.

The files hold small weights and the numbers. All sizes are read from the metadata of the files, so
that a file can be replaced by another one of its kind.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_audio.inference.load import load_encoder
from jepa_audio.interop import export_weights, import_weights
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.front_ends.transforms import LogMel
from jepa_audio.steps.grid import Grid, Masks, TokenSet
from jepa_audio.steps.targets import Targets
from jepa_audio.training.jepa import JEPA

DATA = Path(__file__).parent.parent / "data"


class Published(NamedTuple):
    """The content of a file, and the model imported from it."""

    values: dict[str, Tensor]
    sizes: dict[str, object]
    jepa: JEPA


def publish(name: str, folder: Path) -> Published:
    """Import the weights of a file and read its numbers."""
    values, metadata = read(name)
    state = {
        key.removeprefix("state/"): value
        for key, value in values.items()
        if key.startswith("state/")
    }
    save_file(state, folder / f"{name}.safetensors", metadata)
    checkpoint = import_weights(name, folder / f"{name}.safetensors", folder / name)
    sizes = {key: json.loads(value) for key, value in metadata.items()}
    return Published(values, sizes, JEPA.load_from_checkpoint(checkpoint))


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, file.metadata()


def assert_same(ours: Tensor, published: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that all differences are within `tolerance` times the largest published value."""
    error = (ours.detach() - published).abs().max() / published.abs().max()
    assert error <= tolerance, f"the largest difference is {error:.2e} of the largest value"


@pytest.fixture(scope="module")
def wave(tmp_path_factory: pytest.TempPathFactory) -> Published:
    published = publish("wavjepa", tmp_path_factory.mktemp("wavjepa"))
    published.jepa.front_end.standardize = False  # the published input is normalised already
    assert published.jepa.targets.top_k == published.sizes["top_k"]
    return published


@pytest.fixture(scope="module")
def wave_masks(wave: Published) -> Masks:
    return Masks.from_bool(~wave.values["context_hidden"], wave.values["targets"])


def valid(tokens: TokenSet) -> Tensor:
    """True where a token is valid."""
    return torch.arange(tokens.index.shape[-1]) < tokens.counts[..., None]


def test_wavjepa_front_end(wave: Published):
    grid = wave.jepa.front_end.grid(wave.values["audio"].shape[-1])
    assert grid == Grid(1, wave.sizes["tokens"])
    tokens = wave.jepa.encoder.add_positions(wave.jepa.front_end(wave.values["audio"]), grid)
    assert_same(tokens, wave.values["local_features"])


def test_wavjepa_context_predictions_targets_and_loss(wave: Published, wave_masks: Masks):
    output = wave.jepa(wave.values["audio"], wave_masks)
    visible, target = valid(wave_masks.context), valid(wave_masks.targets)
    assert_same(
        wave.jepa.predictor.proj_in(output.context)[visible], wave.values["contextual_features"]
    )
    planes = wave.values["preds"].unflatten(0, target.shape[:2])
    assert_same(output.prediction[target], wave_masks.targets.gather(planes)[target])
    targets = wave.values["teacher_targets"][:, None].expand(-1, target.shape[1], -1, -1)
    assert_same(output.target[target], wave_masks.targets.gather(targets)[target])
    assert_same(output.loss, wave.values["loss"])


def test_wavjepa_targets_of_the_whole_clip(wave: Published):
    tokens = wave.jepa.front_end(wave.values["audio"])
    grid = Grid(1, wave.sizes["tokens"])
    everywhere = TokenSet(torch.arange(grid.num_tokens).expand(len(tokens), 1, -1))
    ours = wave.jepa.targets(wave.jepa.target_encoder, tokens, grid, everywhere)[:, 0]
    assert_same(ours, wave.values["teacher_targets"])


def test_wavjepa_representation(wave: Published):
    grid = Grid(1, wave.sizes["tokens"])
    assert_same(
        wave.jepa.encoder(wave.jepa.front_end(wave.values["audio"]), grid),
        wave.values["representation"],
    )


def test_wavjepa_gradients(wave: Published, wave_masks: Masks):
    jepa = wave.jepa
    jepa.zero_grad()
    jepa.loss(wave.values["audio"], wave_masks).backward()
    gradients = {
        "decoder_to_encoder_mapper.bias": jepa.predictor.proj_out.bias,
        "encoder.layers.0.self_attn.in_proj_weight": jepa.encoder.blocks[0].attn.qkv.weight,
        "extract_audio.cnn.0.0.weight": jepa.front_end.stacks[0][0][0].weight,
        "mask_token": jepa.predictor.mask_token,
    }
    for name, parameter in gradients.items():
        published = wave.values[f"grad/{name}"]
        assert_same(parameter.grad.view_as(published), published, tolerance=1e-4)
    assert all(parameter.grad is None for parameter in jepa.target_encoder.parameters())


@pytest.fixture(scope="module")
def mel(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish("pupujepa", tmp_path_factory.mktemp("pupujepa"))


@pytest.fixture(scope="module")
def mel_masks(mel: Published) -> Masks:
    targets = mel.values["target_index"]
    return Masks(
        TokenSet(mel.values["context_index"]), TokenSet(targets[:, None]), float(targets.shape[1])
    )


def mel_grid(mel: Published) -> Grid:
    num_time, num_freq = mel.sizes["grid"]
    return Grid(num_freq, num_time)


def test_pupujepa_patches(mel: Published):
    assert_same(mel.jepa.front_end.embed_patches(mel.values["image"]), mel.values["patch_tokens"])


def test_pupujepa_context_encoder_and_predictor(mel: Published, mel_masks: Masks):
    context = mel.jepa.encoder(mel.values["patch_tokens"], mel_grid(mel), mel_masks.context)
    assert_same(context, mel.values["context_features"])
    assert_same(mel.jepa.predictor(context, mel_masks, mel_grid(mel))[:, 0], mel.values["preds"])


def test_pupujepa_targets(mel: Published, mel_masks: Masks):
    assert mel.jepa.targets == Targets("targets"), "the targets of the recipe"
    ours = mel.jepa.targets(
        mel.jepa.target_encoder, mel.values["patch_tokens"], mel_grid(mel), mel_masks.targets
    )
    assert_same(ours[:, 0], mel.values["teacher_targets"])


def test_pupujepa_every_block_of_the_target_encoder(mel: Published):
    tokens, encoder = mel.values["patch_tokens"], mel.jepa.target_encoder
    for i, layer in enumerate(encoder.forward_layers(tokens, mel_grid(mel))):
        assert_same(layer, mel.values[f"teacher_full_block/{i}"])
    assert_same(encoder(tokens, mel_grid(mel)), mel.values["teacher_full"])


def test_pupujepa_log_mel_of_the_recipe(mel: Published):
    front_end, audio = mel.jepa.front_end, mel.values["mel/audio"][:, None]
    assert_same(front_end.spectrogram(audio)[:, 0], mel.values["mel/log_mel"], tolerance=1e-4)
    normalized = mel.values["mel/normalised"].transpose(-1, -2)
    assert_same(front_end.image(audio)[:, 0], normalized, tolerance=1e-4)


def test_pupujepa_log_mel_of_the_metadata(mel: Published):
    mel_sizes = mel.sizes["mel"]
    band = float(mel_sizes["f_min"]), float(mel_sizes["f_max"])
    log_mel = LogMel(
        mel_sizes["sample_rate"],
        mel_sizes["n_fft"],
        None,
        mel_sizes["hop"],
        mel_sizes["n_mels"],
        *band,
    )
    front_end = SpectrogramFrontEnd(log_mel, 32, mean=mel_sizes["mean"], std=mel_sizes["std"])
    audio = mel.values["mel/audio"][:, None]
    assert_same(log_mel(audio)[:, 0], mel.values["mel/log_mel"], tolerance=1e-4)
    assert_same(
        front_end.image(audio)[:, 0], mel.values["mel/normalised"].transpose(-1, -2), tolerance=1e-4
    )


def test_a_lightning_checkpoint_of_the_authors_is_imported_without_options(tmp_path: Path):
    values, metadata = read("wavjepa_lightning")
    checkpoint = import_weights("wavjepa", DATA / "wavjepa_lightning.ckpt", tmp_path)
    jepa = JEPA.load_from_checkpoint(checkpoint)
    sizes = {key: json.loads(value) for key, value in metadata.items()}
    assert jepa.encoder.num_heads == sizes["num_heads"]
    assert jepa.targets.top_k == sizes["top_k"]
    assert [list(layer) for layer in jepa.front_end.conv_layers] == sizes["conv_layers"]
    jepa.front_end.standardize = False  # the audio is normalised already
    audio = values["audio"]
    masks = Masks.from_bool(~values["context_hidden"], values["targets"])
    assert_same(jepa.loss(audio, masks).reshape(1), values["loss"].reshape(1))
    grid = jepa.front_end.grid(audio.shape[-1])
    assert_same(jepa.encoder(jepa.front_end(audio), grid), values["representation"])


HUB_LENGTHS = sorted(
    int(name.removeprefix("features/")) for name in read("wavjepa_hub")[0] if "features/" in name
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_weights("wavjepa", DATA / "wavjepa_hub", tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("num_samples", HUB_LENGTHS)
def test_a_hugging_face_folder_gives_the_features_of_the_authors_class(hub: Path, num_samples: int):
    values, _ = read("wavjepa_hub")
    encoder = load_encoder(hub, windowing="wavjepa")
    features = encoder.encode_batch(values["audio"][..., :num_samples], layers=[-1])
    assert_same(features.layers[0][:, :, 0], values[f"features/{num_samples}"])
    assert_same(features.times * 1000, values[f"milliseconds/{num_samples}"])


def test_a_hugging_face_folder_is_exported_as_it_was(hub: Path, tmp_path: Path):
    export_weights("wavjepa", hub, tmp_path)
    config, published = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path, DATA / "wavjepa_hub")
    )
    # `auto_map` names the code of the class; the authors' folder was written without it.
    assert {**published, "auto_map": config["auto_map"]} == config
    assert all(name.startswith("labhamlet/wavjepa-base--") for name in config["auto_map"].values())
    files = (folder / "model.safetensors" for folder in (tmp_path, DATA / "wavjepa_hub"))
    tensors, expected = map(load_file, files)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 if "pos_encoding" in name else 0
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=tolerance)
