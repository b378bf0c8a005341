"""Settings that the layouts of both papers read and write: norms, positions of settings, sizes."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from torch import nn

from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop import WeightsError, export_weights, import_weights
from jepa_audio.interop.published import open_published
from jepa_audio.interop.pupujepa import PupuJEPALayout
from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import Grid
from jepa_audio.training.jepa import JEPA
from tests.interop.test_convert import state_of

EPS = [f"--model.{part}.norm_eps=1e-5" for part in ("encoder", "predictor.trunk.init_args")]
QK_NORM = [f"--model.{part}.qk_norm=true" for part in ("encoder", "predictor.trunk.init_args")]


def train(cli: JEPACLI) -> tuple[Path, Path]:
    """The checkpoint of a short run, and a recipe with its settings."""
    cli.trainer.fit(cli.model, cli.datamodule)
    folder = Path(cli.trainer.default_root_dir)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    settings = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    model = {key: value for key, value in settings.items() if not key.startswith("_")}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": model, "data": {"crop_seconds": 99.0}})
    )
    return checkpoint, folder / "recipe.yaml"


def test_the_args_of_pupujepa_hold_all_sizes_of_a_model(
    tmp_path: Path, tiny_cli: Callable[..., JEPACLI]
):
    mel = "--model.front_end.init_args.spectrogram.init_args"
    settings = [f"{mel}.f_min_hz=20", f"{mel}.f_max_hz=480", f"{mel}.win_length=60"]
    cli = tiny_cli("mel", *EPS, *QK_NORM, *settings, "--trainer.max_steps=2")
    checkpoint, recipe = train(cli)
    export_weights("pupujepa", checkpoint, tmp_path / "theirs")
    args = json.loads((tmp_path / "theirs" / "args.json").read_text())
    names = [path.name for path in (tmp_path / "theirs").iterdir()]
    assert sorted(names) == ["args.json", "model.safetensors"]
    assert args["preprocess"] == {
        "sample_rate": 1000,
        "cut_mel_frame": 31,
        "hop_size": 16,
        "n_fft": 64,
        "win_size": 60,
        "fmin": 20.0,
        "fmax": 480.0,
        "n_mels": 16,
        "normalize": True,
        "flip_ft": True,
        "mel_mean": -3.0,
        "mel_std": 2.0,
    }
    assert args["model"]["image_size"] == [31, 16]
    assert args["model"]["patch_size"] == [4, 4]
    assert args["model"]["qk_norm"] is True

    # A recipe with other values: the file decides.
    changed = yaml.safe_load(recipe.read_text())
    front_end = changed["model"]["front_end"]["init_args"]
    front_end["spectrogram"] = {"class_path": "jepa_audio.steps.front_ends.transforms.LogMel"}
    front_end |= {"mean": 7.0, "std": 9.0}
    for part in ("encoder", "predictor"):
        arguments = changed["model"][part]["init_args"]
        arguments.get("trunk", changed["model"][part])["init_args"]["qk_norm"] = False
    recipe.write_text(yaml.safe_dump(changed))
    again = import_weights("pupujepa", tmp_path / "theirs", tmp_path / "again", recipe=recipe)
    clip = torch.randn(1, 1, 480)
    ours, back = (load_encoder(path).encode_batch(clip) for path in (checkpoint, again))
    assert all(torch.equal(*layers) for layers in zip(ours.layers, back.layers, strict=True))
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert config["data"]["crop_seconds"] == 31 * 16 / 1000


def test_norms_of_queries_and_keys_are_those_of_timm():
    """The blocks of the authors' code with a timm that has the setting `qk_norm`."""
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-5)
    options = {"swiglu_mlp": False, "qkv_fused": True, "attn_type": "rope", "qk_norm": True}
    theirs = EvaBlock(32, 2, mlp_ratio=4, norm_layer=norm, num_prefix_tokens=0, **options)
    settings = {"mlp": "gelu", "norm_eps": 1e-5, "qk_norm": True}
    ours = Transformer(32, 1, 2, RotaryPositions(), **settings).eval()
    layout = PupuJEPALayout()
    for name, value in theirs.state_dict().items():
        if name.endswith("norm.weight"):
            value.normal_()
    state = {f"student.blocks.0.{name}": value for name, value in theirs.state_dict().items()}
    state |= {f"student.norm.{name}": value for name, value in ours.norm.state_dict().items()}
    names = {name: layout.published_name(f"encoder.{name}") for name in ours.state_dict()}
    assert set(names.values()) == state.keys()
    ours.load_state_dict({name: state[published] for name, published in names.items()})
    tokens, grid = torch.randn(2, 12, 32), Grid(3, 4)
    rotary = ours.positions.rotary(grid, 16, tokens.device)
    (block,) = ours.forward_layers(tokens, grid)
    torch.testing.assert_close(block, theirs.eval()(tokens, rope=rotary), rtol=1e-5, atol=1e-5)
    published = RotaryEmbeddingCat(16, in_pixels=True, feat_shape=None).get_embed([4, 3])
    assert rotary.shape == published.shape


def publish(folder: Path, config: dict, name: str = "args.json", **extra: torch.Tensor) -> Path:
    """The parity weights of PupuJEPA beside a configuration."""
    state, _ = state_of("pupujepa")
    folder.mkdir()
    save_file({**state, **extra}, folder / "model.safetensors")
    (folder / name).write_text(json.dumps(config))
    return folder


def sizes() -> dict[str, dict]:
    return {key: json.loads(value) for key, value in state_of("pupujepa")[1].items()}


def published_args() -> dict[str, dict]:
    """The released file, for the sizes of the parity weights."""
    mel, encoder, trunk = (sizes()[name] for name in ("mel", "encoder", "predictor"))
    preprocess = {
        "sample_rate": mel["sample_rate"],
        "cut_mel_frame": 512,
        "hop_size": mel["hop"],
        "n_fft": mel["n_fft"],
        "win_size": mel["n_fft"],
        "fmin": mel["f_min"],
        "fmax": mel["f_max"],
        "n_mels": mel["n_mels"],
        "normalize": True,
        "flip_ft": True,
    }
    model = {
        "image_size": [512, mel["n_mels"]],
        "patch_size": sizes()["patch"],
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": encoder["mlp_ratio"],
        "use_swiglu": True,
        "qk_norm": True,
        "decoder_embed_dim": trunk["width"],
        "decoder_depth": trunk["depth"],
        "decoder_num_heads": trunk["heads"],
    }
    return {"preprocess": preprocess, "model": model}


def test_the_released_args_of_pupujepa_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    folder = publish(tmp_path / "release", published_args())
    jepa = JEPA.load_from_checkpoint(import_weights("pupujepa", folder, tmp_path / "ours"))
    assert jepa.encoder.num_heads == sizes()["encoder"]["heads"]
    assert jepa.predictor.trunk.num_heads == sizes()["predictor"]["heads"]
    assert isinstance(jepa.encoder.blocks[0].attn.q_norm, nn.Identity), "as in the tensors"
    assert "`qk_norm` is False for the student, as in its tensors" in caplog.text
    mean = sizes()["mel"]["mean"]
    assert jepa.front_end.mean == mean, "constants of the published code, in the recipe"
    config = yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())
    mel = sizes()["mel"]
    assert config["data"]["crop_seconds"] == 512 * mel["hop"] / mel["sample_rate"]


def test_the_configuration_without_groups_of_earlier_versions_is_read(tmp_path: Path):
    encoder, trunk = sizes()["encoder"], sizes()["predictor"]
    config = {
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "decoder_embed_dim": trunk["width"],
        "decoder_depth": trunk["depth"],
        "decoder_num_heads": trunk["heads"],
        "patch_size": sizes()["patch"],
        "mel_mean": -5.0,
        "mel_std": 3.0,
        "qk_norm": False,
    }
    folder = publish(tmp_path / "old", config, "config.json")
    jepa = JEPA.load_from_checkpoint(import_weights("pupujepa", folder, tmp_path / "ours"))
    assert (jepa.front_end.mean, jepa.front_end.std) == (-5.0, 3.0)
    assert jepa.predictor.trunk.num_heads == trunk["heads"]


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("model", "embed_dim", 10**12, r"its tensors give \d+, but .* `model.embed_dim` 10000"),
        ("model", "depth", 7, r"`model.depth` 7: they are of different models"),
        ("model", "decoder_embed_dim", 5, r"`model.decoder_embed_dim` 5"),
        ("model", "patch_size", [1, 1], r"`model.patch_size` \[1, 1\]"),
        ("model", "num_heads", "two", r"`model.num_heads` .*\('two'\) must be a number"),
        ("model", "num_heads", 1e300, r"`model.num_heads` .*\(1e\+300\) must be a number in"),
        ("model", "num_heads", 1.5, r"`model.num_heads` \(1.5\) must be a whole number"),
        ("preprocess", "n_fft", 10**15, r"`preprocess.n_fft` .* must be a number in"),
        ("preprocess", "sample_rate", True, r"`preprocess.sample_rate` .* must be a number"),
        ("preprocess", "cut_mel_frame", 10**12, r"`preprocess.cut_mel_frame` .* must be a number"),
        ("preprocess", "flip_ft", False, r"`flip_ft: false` .* cannot be expressed"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, group: str, key: str, value: object, message: str
):
    args = published_args()
    args[group][key] = value
    folder = publish(tmp_path / "release", args)
    with pytest.raises(WeightsError, match=message):
        import_weights("pupujepa", folder, tmp_path / "ours")


def lightning(path: Path, **changes: object) -> Path:
    """The parity weights of WavJEPA in a checkpoint, with hyper-parameters as in the authors'."""
    state, metadata = state_of("wavjepa")
    encoder, trunk = (json.loads(metadata[name]) for name in ("encoder", "predictor"))
    layers = {"activation": nn.GELU(), "layer_norm_eps": 1e-6}
    hyper = {
        "transformer_encoder_layers_cfg": {"nhead": encoder["heads"], **layers, **changes},
        "transformer_decoder_layers_cfg": {"nhead": trunk["heads"], **layers},
        "process_audio_seconds": json.loads(metadata["seconds"]),
        "resample_sr": json.loads(metadata["sample_rate"]),
        "average_top_k_layers": 1,
        "lr": 0.1,
    }
    torch.save({"state_dict": state, "hyper_parameters": hyper}, path)
    return path


def test_strides_are_those_that_give_the_positions_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    file = lightning(tmp_path / "a.ckpt")
    jepa = JEPA.load_from_checkpoint(import_weights("wavjepa", file, tmp_path / "ours"))
    expected = json.loads(state_of("wavjepa")[1]["conv_layers"])
    assert [list(layer) for layer in jepa.front_end.conv_layers] == expected
    assert "does not contain strides; its positions fit" in caplog.text
    assert "not used, the recipe decides: lr" in caplog.text
    assert (jepa.targets.top_k, jepa.targets.normalization) == (1, "none"), "one block, as it is"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": nn.ReLU()}, r"has GELU as activation, but the encoder has .*ReLU"),
        ({"activation": nn.GELU("tanh")}, r"has GELU as activation"),
        ({"activation": "relu"}, r"has GELU as activation, but the encoder has 'relu'"),
        ({"d_model": 10**9}, r"`transformer_encoder_layers_cfg.d_model` 1000000000"),
        ({"norm_first": "x"}, r"`norm_first` \('x'\) must be true or false"),
        ({"nhead": 0}, r"nhead.* must be a number in \[1"),
    ],
)
def test_hyper_parameters_that_the_layout_cannot_express_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
):
    file = lightning(tmp_path / "a.ckpt", **changes)
    with pytest.raises(WeightsError, match=message):
        import_weights("wavjepa", file, tmp_path / "ours")


@pytest.mark.parametrize("activation", [nn.GELU(), nn.functional.gelu, "gelu"])
def test_every_way_to_name_the_activation_is_read(tmp_path: Path, activation: object):
    import_weights(
        "wavjepa", lightning(tmp_path / "a.ckpt", activation=activation), tmp_path / "ours"
    )


def test_norms_before_the_branches_are_imported_and_exported(tmp_path: Path):
    file = lightning(tmp_path / "a.ckpt", norm_first=True)
    checkpoint = import_weights("wavjepa", file, tmp_path / "ours")
    export_weights("wavjepa", checkpoint, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["encoder_layers_cfg"]["norm_first"] is True
    assert config["decoder_layers_cfg"]["norm_first"] is False
    again = import_weights("wavjepa", tmp_path / "theirs", tmp_path / "again")
    clip = torch.randn(1, 1, 6_000)
    ours, back = (load_encoder(path).encode_batch(clip).layers[-1] for path in (checkpoint, again))
    assert torch.equal(ours, back)


def test_convolutions_of_another_model_in_the_configuration_are_refused(tmp_path: Path):
    state, _ = state_of("wavjepa")
    save_file(state, tmp_path / "model.safetensors")
    config = {
        "extractor_config": {"conv_layers_spec": "[(512, 10, 5)]"},
        "encoder_layers_cfg": {"nhead": 2},
        "decoder_layers_cfg": {"nhead": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"its configuration has '\[\(512, 10, 5\)\]': they are"):
        import_weights("wavjepa", tmp_path, tmp_path / "ours")


def test_a_shape_that_the_file_does_not_store_is_refused(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"`a` has shape \[1000000, 1000000\], but the file"):
        open_published(tmp_path / "a.ckpt")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "HTML": lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>404</html>"),
    "LFS": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "no JSON": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b"[", 1)),
    "long header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_ends_in_one_sentence(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
):
    file = tmp_path / name
    tensors = load_file(Path(__file__).parents[1] / "data" / "wavjepa_hub" / "model.safetensors")
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    before = file.read_bytes()
    damage(file)
    if file.read_bytes() == before or (name == "model.ckpt" and damage is DAMAGES["no JSON"]):
        pytest.skip("not a damage of this format")
    with pytest.raises(WeightsError) as error:
        import_weights("wavjepa", tmp_path, tmp_path / "ours")
    message = str(error.value)
    assert message.startswith(f"{file} ")
    assert "\n" not in message
    assert "weights_only" not in message
