"""WavJEPA's published layout: its Lightning checkpoints and its Hugging Face files, WavJEPA-Nat's too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jepa_audio.interop.layout import (
    Layout,
    Settings,
    SizeHints,
    arguments,
    check_blocks,
    encoder_sizes,
    first_block,
)
from jepa_audio.interop.published import Published, WeightsError, conv_layers_of
from jepa_audio.steps.encoder.positions import BinauralPositions, SinCosPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import WaveformFrontEnd
from jepa_audio.steps.grid import Grid
from jepa_audio.training.jepa import JEPA

_BLOCK = (
    ("attn.qkv.", "self_attn.in_proj_"),
    ("attn.proj.", "self_attn.out_proj."),
    ("mlp.fc1.", "linear1."),
    ("mlp.fc2.", "linear2."),
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
)
_ENCODERS = (
    ("encoder", "encoder"),
    ("target_encoder", "teacher_encoder"),
    ("predictor.trunk", "decoder"),
)
_FINAL_NORM_EPS = 1e-5  # torch's default, which the published code leaves
_LAYERS = ("layers", "linear2.weight")
_TABLES = {"pos_encoding_encoder": "encoder", "pos_encoding_decoder": "predictor.trunk"}
_NAMES = (
    (r"^front_end\.norm\.", "feature_norms."),
    (r"^front_end\.projection\.", "post_extraction_mapper."),
    *(
        (
            rf"^{re.escape(ours)}\.blocks\.(\d+)\.{re.escape(part)}",
            rf"{theirs}.layers.\1.{published}",
        )
        for ours, theirs in _ENCODERS
        for part, published in _BLOCK
    ),
    *((rf"^{re.escape(ours)}\.norm\.", f"{theirs}.norm.") for ours, theirs in _ENCODERS),
    (r"^predictor\.proj_in\.", "encoder_to_decoder_mapper."),
    (r"^predictor\.proj_out\.", "decoder_to_encoder_mapper."),
    (r"^predictor\.mask_token$", "mask_token"),
)


class WavJEPALayout(Layout):
    """`labhamlet/wavjepa`: torch's own transformer, layers of convolution, dropout, norm, GELU, tables of positions."""

    recipe = "wavjepa"
    ears = 1
    stack = "cnn"
    positions = SinCosPositions()
    names = (
        (r"^front_end\.stacks\.0\.(\d+)\.0\.", r"extract_audio.cnn.\1.0."),
        (r"^front_end\.stacks\.0\.(\d+)\.1\.", r"extract_audio.cnn.\1.2."),
        *_NAMES,
    )
    formula_names = tuple(_TABLES)
    prefix = "model."  # of the Hugging Face files
    ignored = r"resampler_\w+\.kernel$"  # of torchaudio's transforms, which later Lightning checkpoints hold

    def variant_of_file(self, published: Published) -> Layout:
        """WavJEPA-Nat's, if there is more than one stack."""
        separate = any(name.startswith("extract_audio.cnns.") for name in published.tensors)
        return WavJEPANatLayout() if separate else WavJEPALayout()

    def variant_of_model(self, jepa: JEPA) -> Layout:
        """WavJEPA-Nat's, if every channel has a stack of its own."""
        separate = isinstance(jepa.front_end, WaveformFrontEnd) and len(jepa.front_end.stacks) == 2
        return WavJEPANatLayout() if separate else WavJEPALayout()

    def sizes(self, published: Published, given: SizeHints, recipe: Settings) -> Settings:
        """See `Layout`."""
        part = "encoder" if "encoder.norm.weight" in published.tensors else "teacher_encoder"
        encoder = _transformer(published, part, "encoder", given.num_heads, "--num_heads")
        width = encoder["embed_dim"]
        predictor: Settings = {"embed_dim": width}
        if "decoder.norm.weight" in published.tensors:
            heads = given.predictor_num_heads
            predictor["trunk"] = _transformer(
                published, "decoder", "decoder", heads, "--predictor_num_heads"
            )
        front_end = self._front_end(published, given, arguments(recipe["model"]["front_end"]))
        return {
            "model": {
                "front_end": {**front_end, "embed_dim": width},
                "encoder": encoder,
                "predictor": predictor,
            },
            "data": _clip_length(published, front_end, recipe),
        }

    def _front_end(self, published: Published, given: SizeHints, recipe: Settings) -> Settings:
        stack = f"extract_audio.{self.stack}"
        count = published.layers(rf"{re.escape(stack)}\.(\d+)\.0\.weight")
        shapes = [published.shape(f"{stack}.{i}.0.weight", 3) for i in range(max(count, 1))]
        told = published.told(
            "extractor_config.conv_layers_spec", "conv_layers_spec", "conv_layers"
        )
        spec = (
            conv_layers_of(told)
            if told is not None
            else [tuple(layer) for layer in recipe["conv_layers"]]
        )
        kernels = [(channels, kernel) for channels, _, kernel in shapes]
        if given.conv_strides is not None:
            strides = list(given.conv_strides)
        elif [layer[:2] for layer in spec] == kernels:
            strides = [stride for _, _, stride in spec]
        else:
            raise WeightsError(
                f"{published.path} does not tell the strides of its convolutions of (channels, kernel) {kernels}, "
                "which are not the recipe's: give `--conv_strides [5, 2, ...]`"
            )
        if len(strides) != len(kernels):
            raise WeightsError(
                f"{len(strides)} strides were given for the {len(kernels)} convolutions of {published.path}"
            )
        return {
            "conv_layers": [
                [*kernel, stride] for kernel, stride in zip(kernels, strides, strict=True)
            ],
            "bias": f"{stack}.0.0.bias" in published.tensors,
            "num_channels": shapes[0][1] * self.ears,
            "separate_channels": self.ears > 1,
        }

    def formulas(self, jepa: JEPA, num_samples: int) -> Mapping[str, Tensor]:
        """The tables of positions, one row for each token."""
        grid = jepa.front_end.grid(num_samples)
        return {name: _table(jepa.get_submodule(part), grid) for name, part in _TABLES.items()}

    def check_formulas(self, published: Published) -> None:
        """See `Layout`."""
        for name in _TABLES.keys() & published.tensors.keys():
            _, num_tokens, width = published.shape(name, 3)
            grid = Grid(self.ears, num_tokens // self.ears)
            ours = self.positions.additive(grid, width, torch.device("cpu"))
            gap = float((_channel_major(ours, grid) - published.tensors[name]).abs().max())
            if gap > 1e-5:
                own = type(self.positions).__name__
                raise WeightsError(
                    f"`{name}` of {published.path} is not the table of {own}: off by {gap:.1e}"
                )

    def config(self, jepa: JEPA) -> Settings:
        """See `Layout`; the groups of the Hugging Face file."""
        front_end = jepa.front_end
        if not isinstance(front_end, WaveformFrontEnd) or not any(
            isinstance(m, nn.GroupNorm) for m in front_end.modules()
        ):
            raise WeightsError(
                "WavJEPA's layout holds a WaveformFrontEnd with `norm: group`, this model has another one"
            )
        groups: dict[str, Any] = {
            "extractor_config": {
                "conv_layers_spec": str([tuple(layer) for layer in front_end.conv_layers]),
                "in_channels": front_end.num_channels,
                "dropout": 0.0,
                "mode": "default",
                "conv_bias": "stacks.0.0.0.bias" in front_end.state_dict(),
                "depthwise": False,
            }
        }
        for name, encoder in (("encoder", jepa.encoder), ("decoder", jepa.predictor.trunk)):
            check_blocks(
                name,
                encoder,
                pre_norm=False,
                gated=False,
                positions=(self.positions,),
                final_norm_eps=_FINAL_NORM_EPS,
            )
            layers = {
                "d_model": encoder.embed_dim,
                "nhead": encoder.num_heads,
                "dim_feedforward": encoder.get_parameter("blocks.0.mlp.fc1.bias").numel(),
                "layer_norm_eps": first_block(encoder).norm1.eps,
                "norm_first": False,
                "dropout": 0.0,
                "batch_first": True,
                "bias": True,
            }
            groups |= {f"{name}_layers_cfg": layers, f"{name}_cfg": {"num_layers": encoder.depth}}
        return {"model_type": "wavjepa", "model_size": "base", **groups}


class WavJEPANatLayout(WavJEPALayout):
    """WavJEPA-Nat: a stack of convolutions for each ear, tokens of the left one before those of the right one."""

    recipe = "wavjepa_nat"
    ears = 2
    stack = "cnns.0"
    positions = BinauralPositions()
    names = (
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.0\.", r"extract_audio.cnns.\1.\2.0."),
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.1\.", r"extract_audio.cnns.\1.\2.2."),
        *_NAMES,
    )


def _transformer(
    published: Published, part: str, told: str, heads: int | None, flag: str
) -> Settings:
    """Sizes of the transformer `part`, of which the configuration speaks as of the `told`."""
    ours = "encoder" if told == "encoder" else "predictor"
    places = (f"{told}_layers_cfg.nhead", f"{told}_nhead", f"{ours}.heads")
    sizes = encoder_sizes(published, part, *_LAYERS, heads, flag, places)
    eps = published.told(f"{told}_layers_cfg.layer_norm_eps")
    return sizes if eps is None else {**sizes, "norm_eps": float(eps)}


def _clip_length(published: Published, sizes: Settings, recipe: Settings) -> Settings:
    """Other than the recipe's only where the file's table of positions has another number of tokens."""
    seconds = recipe["data"]["crop_seconds"]
    if "pos_encoding_encoder" not in published.tensors:
        return {}
    sample_rate = arguments(recipe["model"]["front_end"])["sample_rate"]
    with torch.device("meta"):
        front_end = WaveformFrontEnd(
            [tuple(layer) for layer in sizes["conv_layers"]],
            embed_dim=1,
            sample_rate=sample_rate,
            num_channels=sizes["num_channels"],
            separate_channels=sizes["separate_channels"],
        )
    _, num_tokens, _ = published.shape("pos_encoding_encoder", 3)
    if front_end.grid(round(seconds * sample_rate)).num_tokens == num_tokens:
        return {}
    num_time = num_tokens // len(front_end.stacks)
    return {
        "crop_seconds": (front_end.receptive_field + (num_time - 1) * front_end.stride)
        / sample_rate
    }


def _table(encoder: nn.Module, grid: Grid) -> Tensor:
    assert isinstance(encoder, Transformer)
    table = encoder.positions.additive(grid, encoder.embed_dim, torch.device("cpu"))
    assert table is not None  # `check_blocks` has seen to it
    return _channel_major(table, grid)[None].contiguous()


def _channel_major(table: Tensor, grid: Grid) -> Tensor:
    """Published tables go through one ear after the other, ours through both ears of one time after the other."""
    return table.unflatten(0, (grid.num_time, grid.num_freq)).transpose(0, 1).flatten(0, 1)
