"""The published numbers: what WavJEPA's and PupuJEPA's own code computes with small random weights."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from jepa_audio.front_ends import SpectrogramFrontEnd, WaveformFrontEnd
from jepa_audio.front_ends.transforms import LogMel
from jepa_audio.grid import Grid, Masks, TokenSet
from jepa_audio.losses import MSE
from jepa_audio.positions import Positions, RotaryPositions, SinCosPositions
from jepa_audio.predictor import Predictor
from jepa_audio.targets import Targets
from jepa_audio.transformer import Encoder

TORCH_NAMES = {
    "attn.qkv.": "self_attn.in_proj_",
    "attn.proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
}


class Published(NamedTuple):
    """What one of the files holds."""

    values: dict[str, Tensor]
    state: dict[str, Tensor]
    sizes: dict[str, object]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights under a prefix."""
        return {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}


def load(name: str) -> Published:
    with safe_open(Path(__file__).parent / "data" / f"{name}.safetensors", "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle is no mapping)
        sizes = {key: json.loads(value) for key, value in file.metadata().items()}
    state = {key.removeprefix("state/"): value for key, value in values.items() if key.startswith("state/")}
    return Published(values, state, sizes)


def assert_same(ours: Tensor, published: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest published value."""
    error = (ours.detach() - published).abs().max() / published.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


def encoder_of(sizes: dict[str, object], positions: Positions, norm_eps: float) -> Encoder:
    return Encoder(
        sizes["width"],
        sizes["depth"],
        sizes["heads"],
        positions,
        float(sizes.get("mlp_ratio", 4)),
        mlp=sizes.get("mlp", "gelu"),
        norm=sizes.get("norm", "pre"),
        norm_eps=norm_eps,
    )


def from_torch_names(published: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    blocks = {
        f"blocks.{i}.{ours}{part}": published[f"layers.{i}.{theirs}{part}"]
        for i in range(depth)
        for ours, theirs in TORCH_NAMES.items()
        for part in ("weight", "bias")
    }
    return blocks | {f"norm.{part}": published[f"norm.{part}"] for part in ("weight", "bias")}


class WavJEPA(NamedTuple):
    """Our modules with the published weights, and the published inputs."""

    front_end: WaveformFrontEnd
    encoder: Encoder
    target_encoder: Encoder
    predictor: Predictor
    masks: Masks
    grid: Grid


@pytest.fixture(scope="module")
def wave_numbers() -> Published:
    return load("wavjepa")


@pytest.fixture
def wave(wave_numbers: Published) -> WavJEPA:
    sizes, state = wave_numbers.sizes, wave_numbers.part
    front_end = WaveformFrontEnd(
        [tuple(layer) for layer in sizes["conv_layers"]],
        sizes["encoder"]["width"],
        sizes["sample_rate"],
        standardize=False,  # the published input is normalised already
    )
    convolutions = state("extract_audio.cnn.")
    renamed = {name.replace("0.2.", "0.1."): value for name, value in convolutions.items()}
    front_end.layers.load_state_dict(renamed)
    front_end.norm.load_state_dict(state("feature_norms."))
    front_end.projection.load_state_dict(state("post_extraction_mapper."))
    encoders = []
    for name in ("encoder.", "teacher_encoder."):
        encoder = encoder_of(sizes["encoder"], SinCosPositions(), norm_eps=1e-6)
        encoder.load_state_dict(from_torch_names(state(name), encoder.depth))
        encoders.append(encoder)
    trunk = encoder_of({"norm": "post", **sizes["predictor"]}, SinCosPositions(), norm_eps=1e-6)
    trunk.load_state_dict(from_torch_names(state("decoder."), trunk.depth))
    predictor = Predictor(sizes["encoder"]["width"], trunk)
    predictor.proj_in.load_state_dict(state("encoder_to_decoder_mapper."))
    predictor.proj_out.load_state_dict(state("decoder_to_encoder_mapper."))
    predictor.mask_token = nn.Parameter(state("mask_token")[""].flatten())
    masks = Masks.from_bool(~wave_numbers.values["context_hidden"], wave_numbers.values["targets"])
    return WavJEPA(front_end, *encoders, predictor, masks, Grid(1, sizes["tokens"]))


def wave_targets(wave: WavJEPA, tokens: Tensor, top_k: int) -> Tensor:
    return Targets("clip", top_k, "joint_instance")(wave.target_encoder, tokens.detach(), wave.grid, wave.masks.targets)


def test_wavjepa_front_end(wave: WavJEPA, wave_numbers: Published):
    audio = wave_numbers.values["audio"]
    assert wave.front_end.grid(audio.shape[-1]) == wave.grid
    tokens = wave.encoder.embed(wave.front_end(audio), wave.grid)
    assert_same(tokens, wave_numbers.values["local_features"])


def test_wavjepa_context_encoder_and_predictor(wave: WavJEPA, wave_numbers: Published):
    tokens = wave.front_end(wave_numbers.values["audio"])
    context = wave.encoder(tokens, wave.grid, wave.masks.context)
    seen = torch.arange(context.shape[1]) < wave.masks.context.counts[:, None]
    assert_same(wave.predictor.proj_in(context)[seen], wave_numbers.values["contextual_features"])
    groups = wave.masks.targets.index.shape[1]
    planes = wave_numbers.values["preds"].unflatten(0, (-1, groups))
    asked = torch.arange(wave.masks.targets.index.shape[-1]) < wave.masks.targets.counts[..., None]
    published = wave.masks.targets.gather(planes)[asked]
    assert_same(wave.predictor(context, wave.masks, wave.grid)[asked], published)


def test_wavjepa_targets(wave: WavJEPA, wave_numbers: Published):
    tokens = wave.front_end(wave_numbers.values["audio"])
    everywhere = TokenSet(torch.arange(wave.grid.num_tokens).expand(len(tokens), 1, -1))
    normalized = Targets("clip", wave_numbers.sizes["top_k"], "joint_instance")
    ours = normalized(wave.target_encoder, tokens, wave.grid, everywhere)[:, 0]
    assert_same(ours, wave_numbers.values["teacher_targets"])


def test_wavjepa_representation(wave: WavJEPA, wave_numbers: Published):
    representation = wave.encoder(wave.front_end(wave_numbers.values["audio"]), wave.grid)
    assert_same(representation, wave_numbers.values["representation"])


def test_wavjepa_loss_and_gradients(wave: WavJEPA, wave_numbers: Published):
    tokens = wave.front_end(wave_numbers.values["audio"])
    prediction = wave.predictor(wave.encoder(tokens, wave.grid, wave.masks.context), wave.masks, wave.grid)
    distance = MSE()(prediction, wave_targets(wave, tokens, wave_numbers.sizes["top_k"]))
    if wave.masks.targets.valid is not None:
        distance = distance * wave.masks.targets.valid
    loss = distance.sum() / (wave.masks.targets_per_clip * len(tokens))
    assert_same(loss, wave_numbers.values["loss"])
    loss.backward()
    gradients = {
        "decoder_to_encoder_mapper.bias": wave.predictor.proj_out.bias,
        "encoder.layers.0.self_attn.in_proj_weight": wave.encoder.blocks[0].attn.qkv.weight,
        "extract_audio.cnn.0.0.weight": wave.front_end.layers[0][0].weight,
        "mask_token": wave.predictor.mask_token,
    }
    for name, parameter in gradients.items():
        published = wave_numbers.values[f"grad/{name}"]
        assert_same(parameter.grad.view_as(published), published, tolerance=1e-4)


class PupuJEPA(NamedTuple):
    """Our modules with the published weights, and the published inputs."""

    front_end: SpectrogramFrontEnd
    encoder: Encoder
    target_encoder: Encoder
    predictor: Predictor
    masks: Masks
    grid: Grid


@pytest.fixture(scope="module")
def mel_numbers() -> Published:
    return load("pupujepa")


@pytest.fixture(scope="module")
def mel(mel_numbers: Published) -> PupuJEPA:
    sizes, state, values = mel_numbers.sizes, mel_numbers.part, mel_numbers.values
    num_time, num_freq = sizes["grid"]
    patch_frames, patch_bands = sizes["patch"]
    width = sizes["encoder"]["width"]
    front_end = SpectrogramFrontEnd(LogMel(n_mels=num_freq * patch_bands), width, patch_frames, patch_bands)
    front_end.proj.load_state_dict(state("patch_embed.proj."))
    front_end.norm.load_state_dict(state("patch_embed.norm_layer."))
    encoders = []
    for name in ("student.", "teacher.", "predictor."):
        own = sizes["predictor" if name == "predictor." else "encoder"]
        encoder = encoder_of({"mlp": "swiglu", **own}, RotaryPositions(), norm_eps=1e-5)
        weights = {key: value for key, value in state(name).items() if key.startswith(("blocks.", "norm."))}
        encoder.load_state_dict(weights)
        encoders.append(encoder)
    predictor = Predictor(width, encoders.pop())
    predictor.proj_in.load_state_dict(state("predictor.proj_in."))
    predictor.proj_out.load_state_dict(state("predictor.proj_out."))
    predictor.mask_token = nn.Parameter(state("predictor.mask_token")[""].flatten())
    targets = values["target_index"]
    masks = Masks(TokenSet(values["context_index"]), TokenSet(targets[:, None]), float(targets.shape[1]))
    return PupuJEPA(front_end, *encoders, predictor, masks, Grid(num_freq, num_time))


def test_pupujepa_patches(mel: PupuJEPA, mel_numbers: Published):
    assert_same(mel.front_end.embed_patches(mel_numbers.values["image"]), mel_numbers.values["patch_tokens"])


def test_pupujepa_context_encoder_and_predictor(mel: PupuJEPA, mel_numbers: Published):
    context = mel.encoder(mel_numbers.values["patch_tokens"], mel.grid, mel.masks.context)
    assert_same(context, mel_numbers.values["context_features"])
    assert_same(mel.predictor(context, mel.masks, mel.grid)[:, 0], mel_numbers.values["preds"])


def test_pupujepa_targets(mel: PupuJEPA, mel_numbers: Published):
    tokens = mel_numbers.values["patch_tokens"]
    targets = Targets("targets")(mel.target_encoder, tokens, mel.grid, mel.masks.targets)
    assert_same(targets[:, 0], mel_numbers.values["teacher_targets"])


def test_pupujepa_every_block_of_the_target_encoder(mel: PupuJEPA, mel_numbers: Published):
    tokens = mel_numbers.values["patch_tokens"]
    for i, layer in enumerate(mel.target_encoder.layers(tokens, mel.grid)):
        assert_same(layer, mel_numbers.values[f"teacher_full_block/{i}"])
    assert_same(mel.target_encoder(tokens, mel.grid), mel_numbers.values["teacher_full"])


def test_pupujepa_log_mel(mel_numbers: Published):
    mel = mel_numbers.sizes["mel"]
    band = float(mel["f_min"]), float(mel["f_max"])
    log_mel = LogMel(mel["sample_rate"], mel["n_fft"], None, mel["hop"], mel["n_mels"], *band)
    front_end = SpectrogramFrontEnd(log_mel, 32, mean=mel["mean"], std=mel["std"])
    audio = mel_numbers.values["mel/audio"][:, None]
    assert_same(log_mel(audio)[:, 0], mel_numbers.values["mel/log_mel"], tolerance=1e-4)
    normalized = mel_numbers.values["mel/normalised"].transpose(-1, -2)
    assert_same(front_end.image(audio)[:, 0], normalized, tolerance=1e-4)
