"""The published layouts of WavJEPA and WavJEPA-Nat: Lightning and Hugging Face files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.interop.layout import (
    Layout,
    Settings,
    SizeHints,
    arguments,
    check_blocks,
    first_block,
    transformer_sizes,
)
from jepa_audio.interop.published import Published, WeightsError, parse_conv_layers
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
# The published code uses the default epsilon of torch for this norm.
_FINAL_NORM_EPS = 1e-5
_POSITION_TABLES = {"pos_encoding_encoder": "encoder", "pos_encoding_decoder": "predictor.trunk"}
_NAMES = (
    (r"^front_end\.norm\.", "feature_norms."),
    (r"^front_end\.projection\.", "post_extraction_mapper."),
    *(
        (
            rf"^{re.escape(module)}\.blocks\.(\d+)\.{re.escape(part)}",
            rf"{published_module}.layers.\1.{published}",
        )
        for module, published_module in _ENCODERS
        for part, published in _BLOCK
    ),
    *(
        (rf"^{re.escape(module)}\.norm\.", f"{published_module}.norm.")
        for module, published_module in _ENCODERS
    ),
    (r"^predictor\.proj_in\.", "encoder_to_decoder_mapper."),
    (r"^predictor\.proj_out\.", "decoder_to_encoder_mapper."),
    (r"^predictor\.mask_token$", "mask_token"),
)


class WavJEPALayout(Layout):
    """The layout of `labhamlet/wavjepa`; its blocks are `torch.nn.TransformerEncoderLayer`s."""

    recipe = "wavjepa"
    num_stacks = 1
    stack = "cnn"
    positions = SinCosPositions()
    names = (
        (r"^front_end\.stacks\.0\.(\d+)\.0\.", r"extract_audio.cnn.\1.0."),
        (r"^front_end\.stacks\.0\.(\d+)\.1\.", r"extract_audio.cnn.\1.2."),
        *_NAMES,
    )
    # The Hugging Face files have this prefix.
    prefix = "model."
    # Position tables, which `check_formulas` checks, and kernels of torchaudio's transforms, which
    # only the later Lightning checkpoints contain.
    ignored = r"pos_encoding_(en|de)coder$|resampler_\w+\.kernel$"

    @override
    def variant(self, names: Iterable[str]) -> Layout:
        # The names of the second stack in a published file and in a `JEPA`.
        second_stack = ("extract_audio.cnns.1.", "front_end.stacks.1.")
        has_two_stacks = any(name.startswith(second_stack) for name in names)
        return WavJEPANatLayout() if has_two_stacks else WavJEPALayout()

    @override
    def sizes(self, published: Published, hints: SizeHints, recipe: Settings) -> Settings:
        part = "encoder" if "encoder.norm.weight" in published.tensors else "teacher_encoder"
        encoder = _transformer(published, part, "encoder", hints.num_heads, "--num_heads")
        width = encoder["embed_dim"]
        predictor: Settings = {"embed_dim": width}
        if "decoder.norm.weight" in published.tensors:
            heads = hints.predictor_num_heads
            predictor["trunk"] = _transformer(
                published, "decoder", "decoder", heads, "--predictor_num_heads"
            )
        front_end = self._front_end(published, hints, arguments(recipe["model"]["front_end"]))
        return {
            "model": {
                "front_end": {**front_end, "embed_dim": width},
                "encoder": encoder,
                "predictor": predictor,
            },
            "data": _clip_length(published, front_end, recipe),
        }

    def _front_end(self, published: Published, hints: SizeHints, recipe: Settings) -> Settings:
        stack = f"extract_audio.{self.stack}"
        num_layers = max(published.num_layers(rf"{re.escape(stack)}\.(\d+)\.0\.weight"), 1)
        shapes = [published.shape(f"{stack}.{i}.0.weight", 3) for i in range(num_layers)]
        kernels = [(channels, kernel) for channels, _, kernel in shapes]
        strides = _conv_strides(published, hints, recipe, kernels)
        return {
            "conv_layers": [
                [*kernel, stride] for kernel, stride in zip(kernels, strides, strict=True)
            ],
            "bias": f"{stack}.0.0.bias" in published.tensors,
            "num_channels": shapes[0][1] * self.num_stacks,
            "separate_channels": self.num_stacks > 1,
        }

    @override
    def formulas(self, jepa: JEPA, num_samples: int) -> Mapping[str, Tensor]:
        grid = jepa.front_end.grid(num_samples)
        return {
            name: _position_table(jepa.get_submodule(part), grid)
            for name, part in _POSITION_TABLES.items()
        }

    @override
    def check_formulas(self, published: Published) -> None:
        for name in _POSITION_TABLES.keys() & published.tensors.keys():
            _, num_tokens, width = published.shape(name, 3)
            grid = Grid(self.num_stacks, num_tokens // self.num_stacks)
            table = _channel_major(self.positions.additive(grid, width, torch.device("cpu")), grid)
            difference = float((table - published.tensors[name]).abs().max())
            if difference > 1e-5:
                raise WeightsError(
                    f"{published.path}: `{name}` differs from the table of "
                    f"{type(self.positions).__name__} by {difference:.1e}"
                )

    @override
    def config(self, jepa: JEPA) -> Settings:
        # These groups of settings are also in the `config.json` of the Hugging Face files.
        front_end = jepa.front_end
        has_group_norm = any(isinstance(module, nn.GroupNorm) for module in front_end.modules())
        if not isinstance(front_end, WaveformFrontEnd) or not has_group_norm:
            raise WeightsError("the layout of WavJEPA needs a WaveformFrontEnd with `norm: group`")
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
                positions=self.positions,
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
    """WavJEPA-Nat: one stack of convolutions for each ear; the left ear is the first one."""

    recipe = "wavjepa_nat"
    num_stacks = 2
    stack = "cnns.0"
    positions = BinauralPositions()
    names = (
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.0\.", r"extract_audio.cnns.\1.\2.0."),
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.1\.", r"extract_audio.cnns.\1.\2.2."),
        *_NAMES,
    )


def _conv_strides(
    published: Published, hints: SizeHints, recipe: Settings, kernels: list[tuple[int, int]]
) -> list[int]:
    """The strides of the convolutions `kernels` (channels, kernel).

    They are taken from the hints, the configuration of the file, or the recipe, in this order.
    """
    spec = published.config_value(
        "extractor_config.conv_layers_spec", "conv_layers_spec", "conv_layers"
    )
    layers = parse_conv_layers(recipe["conv_layers"] if spec is None else spec)
    if hints.conv_strides is not None:
        strides = list(hints.conv_strides)
    elif [layer[:2] for layer in layers] == kernels:
        strides = [stride for _, _, stride in layers]
    else:
        raise WeightsError(
            f"{published.path} does not contain the strides of its convolutions (channels, kernel) "
            f"{kernels}, and the recipe has other convolutions: give `--conv_strides [5, 2, ...]`"
        )
    if len(strides) != len(kernels):
        raise WeightsError(
            f"`conv_strides` has {len(strides)} values, but {published.path} has {len(kernels)} "
            "convolutions"
        )
    return strides


def _transformer(
    published: Published, part: str, group: str, heads: int | None, option: str
) -> Settings:
    """The sizes of the transformer `part`; `group` is the prefix of its configuration keys."""
    module = "encoder" if group == "encoder" else "predictor"
    keys = (f"{group}_layers_cfg.nhead", f"{group}_nhead", f"{module}.heads")
    sizes = transformer_sizes(published, part, "layers", "linear2.weight", heads, option, keys)
    eps = published.config_value(f"{group}_layers_cfg.layer_norm_eps")
    return sizes if eps is None else {**sizes, "norm_eps": float(eps)}


def _clip_length(published: Published, sizes: Settings, recipe: Settings) -> Settings:
    """The crop length that gives the number of tokens of the position table.

    Empty if the crop length of the recipe gives this number, or if the file has no table.
    """
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
    num_samples = front_end.receptive_field + (num_time - 1) * front_end.stride
    return {"crop_seconds": num_samples / sample_rate}


def _position_table(encoder: nn.Module, grid: Grid) -> Tensor:
    assert isinstance(encoder, Transformer)
    table = encoder.positions.additive(grid, encoder.embed_dim, torch.device("cpu"))
    # `check_blocks` refuses positions without a table.
    assert table is not None
    return _channel_major(table, grid)[None].contiguous()


def _channel_major(table: Tensor, grid: Grid) -> Tensor:
    """Reorder a time-major table to the order of the published tables.

    Time-major: both ears at each time. Published: all times of one ear, then of the other.
    """
    return table.unflatten(0, (grid.num_time, grid.num_freq)).transpose(0, 1).flatten(0, 1)
