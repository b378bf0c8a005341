"""Published files are imported and exported bit by bit; other files are refused with a remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop import WeightsError, export_weights, import_weights
from jepa_audio.interop.convert import load_weights
from jepa_audio.interop.layout import SizeHints
from jepa_audio.interop.published import open_published, parse_conv_layers
from jepa_audio.recipes import find_recipe
from jepa_audio.steps.grid import Masks
from jepa_audio.training.jepa import JEPA

DATA = Path(__file__).parent.parent / "data"
LAYOUTS = ("wavjepa", "pupujepa")


def state_of(layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The published weights of a parity file and its metadata."""
    with safe_open(DATA / f"{layout}.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("state/")]  # noqa: SIM118 (not a mapping)
        return {
            name.removeprefix("state/"): file.get_tensor(name) for name in names
        }, file.metadata()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def published(layout: str, tmp_path: Path) -> Path:
    state, metadata = state_of(layout)
    save_file(state, tmp_path / "published.safetensors", metadata)
    return tmp_path / "published.safetensors"


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_import_of_export_is_the_same_bit_for_bit(layout: str, published: Path, tmp_path: Path):
    checkpoint = import_weights(layout, published, tmp_path / "ours")
    file = export_weights(layout, checkpoint, tmp_path / "theirs")
    again = import_weights(layout, tmp_path / "theirs", tmp_path / "again")
    assert_equal(weights_of(again), weights_of(checkpoint))
    ours, theirs = open_published(file).tensors, state_of(layout)[0]
    assert ours.keys() == theirs.keys(), "exactly the published names are written"
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=1e-6 if "pos_encoding" in name else 0
        )


def test_weights_of_a_loss_are_drawn_at_an_import_and_not_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    state, metadata = state_of("wavjepa")
    save_file(state, tmp_path / "published.safetensors", metadata)
    recipe = yaml.safe_load(find_recipe("wavjepa").read_text())
    codebook = {"class_path": "RandomProjection", "init_args": {"num_classes": 8}}
    recipe["model"]["distance"] = {
        "class_path": "CrossEntropy",
        "init_args": {"codebook": codebook},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    file = tmp_path / "published.safetensors"
    checkpoint = import_weights("wavjepa", file, tmp_path / "ours", recipe=tmp_path / "recipe.yaml")
    weights = weights_of(checkpoint)
    assert weights["distance.head.weight"].shape[0] == 8
    assert weights["distance.head.weight"].std() > 0
    with caplog.at_level("INFO"):
        exported = export_weights("wavjepa", checkpoint, tmp_path / "theirs")
    assert "`distance` is not exported" in caplog.text
    assert open_published(exported).tensors.keys() == state.keys()


def test_a_run_is_exported_and_imported_again(
    tmp_path: Path, tiny_cli: Callable[..., JEPACLI], fit
):
    final = (
        "--model.encoder.final_norm_eps=1e-5",
        "--model.predictor.trunk.init_args.final_norm_eps=1e-5",
    )
    cli = tiny_cli(
        "wave", *final, "--model.encoder.norm_eps=1e-3", "--model.predictor.trunk.init_args.depth=2"
    )
    fit(cli)
    checkpoint = Path(cli.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    export_weights("wavjepa", checkpoint, tmp_path / "theirs")
    recipe = Path(cli.trainer.default_root_dir) / "recipe.yaml"
    configuration = torch.load(checkpoint, weights_only=True)
    model = {k: v for k, v in configuration["hyper_parameters"].items() if not k.startswith("_")}
    model["encoder"]["init_args"]["norm_eps"] = 1e-6  # the file holds another value
    recipe.write_text(yaml.safe_dump({"model": model, "data": {"crop_seconds": 0.5}}))
    again = import_weights("wavjepa", tmp_path / "theirs", tmp_path / "again", recipe=recipe)
    assert_equal(weights_of(again), configuration["state_dict"])
    clip = torch.randn(1, 1, 500)
    ours, back = (load_encoder(path).encode_batch(clip).layers[-1] for path in (checkpoint, again))
    assert torch.equal(ours, back)


def test_the_statistics_of_the_log_mel_are_exported_and_imported_again(tmp_path: Path):
    state, metadata = state_of("pupujepa")
    save_file(state, tmp_path / "published.safetensors", metadata)
    recipe = yaml.safe_load((Path(__file__).parents[2] / "configs" / "pupujepa.yaml").read_text())
    recipe["model"]["front_end"]["init_args"]["mean"] = -9.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    own = import_weights(
        "pupujepa",
        tmp_path / "published.safetensors",
        tmp_path / "ours",
        recipe=tmp_path / "recipe.yaml",
    )
    export_weights("pupujepa", own, tmp_path / "theirs")
    again = JEPA.load_from_checkpoint(
        import_weights("pupujepa", tmp_path / "theirs", tmp_path / "again")
    )
    assert again.front_end.mean == -9.0


def test_a_run_is_not_overwritten(layout: str, published: Path, tmp_path: Path):
    import_weights(layout, published, tmp_path / "ours")
    with pytest.raises(
        WeightsError,
        match=r"last.ckpt exists and is not overwritten: give another folder with `-o`",
    ):
        import_weights(layout, published, tmp_path / "ours")


def test_a_broken_configuration_and_a_missing_recipe_are_named(
    layout: str, published: Path, tmp_path: Path
):
    with pytest.raises(MissingFileError, match=r"nowhere.yaml' is neither a file nor"):
        import_weights(layout, published, tmp_path / "ours", recipe=tmp_path / "nowhere.yaml")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        import_weights(layout, published, tmp_path / "ours")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"config.json is not a JSON object"):
        import_weights(layout, published, tmp_path / "ours")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_prefixes_and_the_structure_of_lightning_checkpoints_are_removed(
    layout: str, published: Path, tmp_path: Path, wrapper: str
):
    state, metadata = state_of(layout)
    packed = {name.replace(".", f".{wrapper}", 1): value for name, value in state.items()}
    if layout == "wavjepa":
        packed["resampler_48k.kernel"] = torch.zeros(3, 1, 5)
    sizes = {name: json.loads(value) for name, value in metadata.items()}
    torch.save(
        {"state_dict": packed, "hyper_parameters": sizes, "epoch": 3}, tmp_path / "lightning.ckpt"
    )
    direct = import_weights(layout, published, tmp_path / "direct")
    assert_equal(
        weights_of(import_weights(layout, tmp_path / "lightning.ckpt", tmp_path / "b")),
        weights_of(direct),
    )


def test_sizes_are_read_from_the_hugging_face_configuration(tmp_path: Path):
    state, metadata = state_of("wavjepa")
    sizes = {name: json.loads(value) for name, value in metadata.items()}
    num_heads = sizes["encoder"]["heads"], sizes["predictor"]["heads"]
    strides = [stride for _, _, stride in sizes["conv_layers"]]
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(
        {f"model.{name}": value for name, value in state.items()}, folder / "model.safetensors"
    )
    spec = " + ".join(f"[{tuple(layer)}]" for layer in sizes["conv_layers"])
    config = {
        "extractor_config": {"conv_layers_spec": spec},
        "encoder_layers_cfg": {"nhead": num_heads[0]},
        "decoder_layers_cfg": {"nhead": num_heads[1]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    jepa = JEPA.load_from_checkpoint(import_weights("wavjepa", folder, tmp_path / "ours"))
    assert (jepa.encoder.num_heads, jepa.predictor.trunk.num_heads) == num_heads
    assert [layer[2] for layer in jepa.front_end.conv_layers] == strides


def test_a_missing_number_of_heads_is_an_option(layout: str, published: Path, tmp_path: Path):
    state, _ = state_of(layout)
    save_file(state, published)
    with pytest.raises(WeightsError, match=r"number of attention heads .*--num_heads N"):
        import_weights(layout, published, tmp_path / "ours")
    hints = SizeHints(num_heads=2, predictor_num_heads=2, conv_strides=(5, 2, 2, 2, 2, 2))
    jepa = JEPA.load_from_checkpoint(
        import_weights(layout, published, tmp_path / "ours", hints=hints)
    )
    assert jepa.encoder.num_heads == 2
    with pytest.raises(WeightsError, match="do not divide the width"):
        import_weights(
            layout, published, tmp_path / "odd", hints=SizeHints(num_heads=5, predictor_num_heads=2)
        )


def test_missing_strides_are_an_option(tmp_path: Path):
    state, metadata = state_of("wavjepa")
    metadata.pop("conv_layers")
    save_file(state, tmp_path / "published.safetensors", metadata)
    with pytest.raises(WeightsError, match="--conv_strides"):
        import_weights("wavjepa", tmp_path / "published.safetensors", tmp_path / "ours")
    with pytest.raises(WeightsError, match=r"`conv_strides` has 2 values, .* 6 convolutions"):
        hints = SizeHints(conv_strides=(5, 2))
        import_weights(
            "wavjepa", tmp_path / "published.safetensors", tmp_path / "ours", hints=hints
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, name: state.pop(name), r"missing \(1\): {name}"),
        (
            lambda state, name: state.update({"stranger": torch.zeros(2)}),
            r"unknown \(1\): stranger",
        ),
        (
            lambda state, name: state.update({name: state[name][:-1]}),
            r"of another shape \(1\): {name} \[",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_differences_are_refused_and_listed(
    layout: str, published: Path, tmp_path: Path, damage, message: str
):
    state, metadata = state_of(layout)
    name = "encoder.layers.1.linear2.bias" if layout == "wavjepa" else "student.blocks.1.norm2.bias"
    damage(state, name)
    save_file({name: value.contiguous() for name, value in state.items()}, published, metadata)
    with pytest.raises(WeightsError, match=message.format(name=name)):
        import_weights(layout, published, tmp_path / "ours")


def test_other_positions_are_refused(tmp_path: Path):
    state, metadata = state_of("wavjepa")
    state["pos_encoding_decoder"] = state["pos_encoding_decoder"] + 0.1
    save_file(state, tmp_path / "published.safetensors", metadata)
    with pytest.raises(
        WeightsError, match=r"`pos_encoding_decoder`.*differs from the table of SinCosPositions by"
    ):
        import_weights("wavjepa", tmp_path / "published.safetensors", tmp_path / "ours")


class RunsCode:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("the file ran its code",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "callbacks": RunsCode()}, tmp_path / "pickle.ckpt"
    )
    with pytest.raises(WeightsError, match=r"would run code .* is refused"):
        open_published(tmp_path / "pickle.ckpt")
    assert "ran its code" not in capsys.readouterr().out


def test_damaged_missing_and_empty_files_are_refused(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "short.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    (tmp_path / "short.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "text.ckpt").write_bytes(b"nothing of the kind")
    for name in ("short.safetensors", "short.ckpt", "text.ckpt"):
        with pytest.raises(WeightsError, match=rf"{name} is (damaged|not a complete)"):
            open_published(tmp_path / name)
    with pytest.raises(MissingFileError, match="no file of weights at"):
        open_published(tmp_path / "nowhere.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="has no file of weights"):
        open_published(tmp_path / "empty")
    torch.save({"state_dict": {"a": "text"}}, tmp_path / "words.pt")
    with pytest.raises(WeightsError, match="has no tensors"):
        open_published(tmp_path / "words.pt")


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("[(512,10,5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        ([[8, 4, 2]], [(8, 4, 2)]),
    ],
)
def test_fairseq_layers(spec: str | list, layers: list):
    assert parse_conv_layers(spec) == layers


@pytest.mark.parametrize("spec", ["__import__('os').getcwd()", "[(1, 2)]", "(", "[x for x in ()]"])
def test_fairseq_layers_are_not_evaluated(spec: str):
    with pytest.raises(WeightsError, match=r"not a list of \(channels, kernel, stride\)"):
        parse_conv_layers(spec)


@pytest.mark.parametrize("part_of_file", ["student", "teacher"])
def test_missing_parts_are_replaced_with_a_warning(
    tmp_path: Path, part_of_file: str, caplog: pytest.LogCaptureFixture
):
    state, metadata = state_of("pupujepa")
    subset = {
        name: value
        for name, value in state.items()
        if name.startswith((f"{part_of_file}.", "patch_embed."))
    }
    save_file(subset, tmp_path / "subset.safetensors", metadata)
    weights = weights_of(
        import_weights("pupujepa", tmp_path / "subset.safetensors", tmp_path / "ours")
    )
    for part in ("encoder", "target_encoder"):
        assert torch.equal(
            weights[f"{part}.blocks.1.mlp.fc1.weight"],
            state[f"{part_of_file}.blocks.1.mlp.fc1.weight"],
        )
    assert "the model gets a copy" in caplog.text
    assert "has no predictor: its weights are drawn" in caplog.text
    JEPA.load_from_checkpoint(tmp_path / "ours" / "checkpoints" / "last.ckpt")


def test_a_file_without_an_encoder_is_refused(tmp_path: Path):
    state, metadata = state_of("pupujepa")
    save_file(
        {"patch_embed.proj.weight": state["patch_embed.proj.weight"]},
        tmp_path / "part.safetensors",
        metadata,
    )
    with pytest.raises(WeightsError, match=r"does not contain `teacher.norm.weight`"):
        import_weights("pupujepa", tmp_path / "part.safetensors", tmp_path / "ours")


@pytest.mark.parametrize(
    ("flavour", "layout_name", "setting", "message"),
    [
        ("wave", "wavjepa", "--model.encoder.mlp=swiglu", "`mlp`"),
        ("wave", "wavjepa", "--model.encoder.num_registers=2", "`num_registers`"),
        ("wave", "wavjepa", "--model.target_front_end=momentum", "target_front_end: momentum"),
        ("mel", "wavjepa", "--model.seed=0", "a WaveformFrontEnd"),
        ("wave", "pupujepa", "--model.seed=0", "a SpectrogramFrontEnd"),
        ("mel", "pupujepa", "--model.encoder.qk_norm=true", "of the encoder: `norm_eps`"),
        ("mel", "pupujepa", "--model.front_end.init_args.norm=false", "`norm_eps`"),
        ("mel", "pupujepa", "--model.encoder.positions.normalized=false", "`positions`"),
        ("wave", "wavjepa", "--model.encoder.positions.temperature=100", "`positions`"),
        ("wave", "wavjepa", "--model.encoder.final_norm_eps=1e-3", "`final_norm_eps`"),
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_refused(
    flavour: str,
    layout_name: str,
    setting: str,
    message: str,
    tmp_path: Path,
    tiny_cli: Callable[..., JEPACLI],
):
    cli = tiny_cli(flavour, setting, "--trainer.max_steps=2")
    cli.trainer.fit(cli.model, cli.datamodule)
    with pytest.raises(WeightsError, match=message):
        export_weights(
            layout_name, Path(cli.trainer.default_root_dir) / "checkpoints" / "last.ckpt", tmp_path
        )


def test_a_run_from_weights_starts_at_their_loss(
    tmp_path: Path, tiny_cli: Callable[..., JEPACLI], fit
):
    trained = tiny_cli("wave", "--trainer.max_steps=20")
    fit(trained)
    checkpoint = Path(trained.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    further = tiny_cli("wave", "--data.seed=5")
    load_weights(further.model, checkpoint)
    reference = JEPA.load_from_checkpoint(checkpoint)
    first: list[tuple[Tensor, Masks]] = []
    forward = further.model.forward
    further.model.forward = lambda waveform, masks: (
        first.append((waveform, masks)) or forward(waveform, masks)
    )
    losses = fit(further)
    reference.train()
    assert losses[0] == pytest.approx(float(reference.loss(*first[0]).detach()), rel=1e-6)
    fresh = tiny_cli("wave", "--data.seed=5")
    assert losses[0] != fit(fresh)[0]


def test_the_command_line_imports_trains_further_and_exports(
    wavs: Path,
    tmp_path: Path,
    tiny_cli: Callable[..., JEPACLI],
    monkeypatch: pytest.MonkeyPatch,
    capsys,
):
    state, metadata = state_of("wavjepa")
    save_file(state, tmp_path / "published.safetensors", metadata)
    monkeypatch.chdir(tmp_path)
    main(["import", "wavjepa", "published.safetensors", "-o", "imported"])
    assert "jepa-audio fit --config imported/config.yaml" in capsys.readouterr().out
    small = [
        "--data.root",
        str(wavs),
        "--data.batch_size=2",
        "--data.num_workers=0",
        "--trainer.max_steps=2",
    ]
    small += ["--model.lr_schedule.init_args.warmup_steps=1"]
    small += [
        "--model.targets.top_k=2",
        "--trainer.logger=false",
        "--trainer.precision=32-true",
        "--run_dir=further",
    ]
    quiet = [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
    ]
    main(["fit", "--config", "imported/config.yaml", *small, *quiet, "--data.crops_per_clip=1"])
    before, after = (
        weights_of(Path("imported/checkpoints/last.ckpt")),
        weights_of(Path("further/checkpoints/last.ckpt")),
    )
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < change < 1e-2, "two steps away from the imported weights"
    main(["export", "wavjepa", "further/checkpoints/last.ckpt", "-o", "published"])
    assert load_file("published/model.safetensors").keys() == {f"model.{name}" for name in state}


def test_weights_of_another_model_are_refused(
    tmp_path: Path, tiny_cli: Callable[..., JEPACLI], fit
):
    cli = tiny_cli("wave", "--trainer.max_steps=2")
    fit(cli)
    other = tiny_cli("wave", "--model.encoder.depth=3")
    with pytest.raises(WeightsError, match=r"missing \(\d+\): encoder.blocks.2"):
        load_weights(other.model, Path(cli.trainer.default_root_dir) / "checkpoints" / "last.ckpt")
    with pytest.raises(MissingFileError, match=r"no checkpoint at nowhere.ckpt"):
        load_weights(other.model, Path("nowhere.ckpt"))


@pytest.fixture
def nat(tmp_path: Path) -> dict[str, Tensor]:
    """The mono model with a stack of convolutions for each ear, in the names of WavJEPA-Nat."""
    state, _ = state_of("wavjepa")
    ears = {name: value for name, value in state.items() if name.startswith("extract_audio.cnn.")}
    both = {
        name: value
        for name, value in state.items()
        if name not in ears and "pos_encoding" not in name
    }
    for ear in (0, 1):
        for name, value in ears.items():
            both[name.replace("cnn.", f"cnns.{ear}.")] = value + 0.01 * ear
    return both


def test_wavjepa_nat_is_imported_and_exported(nat: dict[str, Tensor], tmp_path: Path):
    save_file(nat, tmp_path / "nat.safetensors", state_of("wavjepa")[1])
    checkpoint = import_weights("wavjepa", tmp_path / "nat.safetensors", tmp_path / "ours")
    jepa = JEPA.load_from_checkpoint(checkpoint)
    assert jepa.front_end.num_channels == 2
    assert torch.equal(
        jepa.front_end.stacks[1][2][0].weight, nat["extract_audio.cnns.1.2.0.weight"]
    )
    export_weights("wavjepa", checkpoint, tmp_path / "theirs")
    written = open_published(tmp_path / "theirs").tensors
    assert written.keys() - nat.keys() == {"pos_encoding_encoder", "pos_encoding_decoder"}
    assert all(torch.equal(written[name], value) for name, value in nat.items())
    left, right = written["pos_encoding_encoder"][0].chunk(2)
    width = left.shape[1]
    assert torch.equal(left[:, : width // 2], right[:, : width // 2])
    assert not left[:, width // 2 :].any()
    assert right[:, -width // 4 :].eq(1).all()
    assert_equal(
        weights_of(import_weights("wavjepa", tmp_path / "theirs", tmp_path / "again")),
        weights_of(checkpoint),
    )


def test_the_names_of_the_layout_match_the_transformer_of_torch():
    """Torch's encoder with the same weights by the names of the layout has the same output."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True
    )
    theirs = nn.TransformerEncoder(
        layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False
    ).eval()
    from jepa_audio.interop.wavjepa import WavJEPALayout
    from jepa_audio.steps.encoder.positions import SinCosPositions
    from jepa_audio.steps.encoder.transformer import Transformer
    from jepa_audio.steps.grid import Grid

    ours = Transformer(
        8, 2, 2, SinCosPositions(), norm="post", norm_eps=1e-6, final_norm_eps=1e-5
    ).eval()
    names = {name: WavJEPALayout().published_name(f"encoder.{name}") for name in ours.state_dict()}
    state = theirs.state_dict()
    ours.load_state_dict(
        {name: state[published.removeprefix("encoder.")] for name, published in names.items()}
    )
    tokens, grid = torch.randn(2, 5, 8), Grid(1, 5)
    torch.testing.assert_close(
        ours(tokens, grid), theirs(ours.add_positions(tokens, grid)), rtol=1e-5, atol=1e-6
    )
