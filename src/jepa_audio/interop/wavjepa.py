"""The published layouts of WavJEPA and WavJEPA-Nat: Lightning and Hugging Face files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import MAX_RATE, MAX_SECONDS
from jepa_audio.interop.layout import (
    Layout,
    Settings,
    SizeHints,
    arguments,
    check_blocks,
    first_block,
)
from jepa_audio.interop.published import Published, WeightsError
from jepa_audio.interop.wavjepa_sizes import clip_length, conv_strides, targets, transformer
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
    hub_class = "WavJEPA"
    model_type = "wavjepa-base"
    # The code of the published model, which `from_pretrained(..., trust_remote_code=True)` loads.
    auto_map: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "labhamlet/wavjepa-base--configuration_wavjepa.WavJEPAConfig",
        "AutoModel": "labhamlet/wavjepa-base--modeling_wavjepa.WavJEPAModel",
    }
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
        encoder = transformer(published, part, "encoder", hints.num_heads, "--num_heads")
        width = encoder["embed_dim"]
        predictor: Settings = {"embed_dim": width}
        if "decoder.norm.weight" in published.tensors:
            heads = hints.predictor_num_heads
            predictor["trunk"] = transformer(
                published, "decoder", "decoder", heads, "--predictor_num_heads"
            )
        old = arguments(recipe["model"]["front_end"])
        sample_rate = published.whole_number("resample_sr", high=MAX_RATE) or old["sample_rate"]
        seconds = published.number("process_audio_seconds", low=1e-3, high=MAX_SECONDS)
        crop_seconds = seconds or recipe["data"]["crop_seconds"]
        front_end = self._front_end(published, hints, old, crop_seconds * sample_rate)
        return {
            "model": {
                "front_end": {**front_end, "embed_dim": width, "sample_rate": sample_rate},
                "encoder": encoder,
                "predictor": predictor,
                "targets": targets(published, recipe["model"]["targets"], encoder["depth"]),
            },
            "data": clip_length(published, front_end, crop_seconds, sample_rate),
        }

    def _front_end(
        self, published: Published, hints: SizeHints, recipe: Settings, num_samples: float
    ) -> Settings:
        stack = f"extract_audio.{self.stack}"
        num_layers = max(published.num_layers(rf"{re.escape(stack)}\.(\d+)\.0\.weight"), 1)
        shapes = [published.shape(f"{stack}.{i}.0.weight", 3) for i in range(num_layers)]
        kernels = [(channels, kernel) for channels, _, kernel in shapes]
        table = published.tensors.get("pos_encoding_encoder")
        num_time = None if table is None else table.shape[-2] // self.num_stacks
        strides = conv_strides(published, hints, recipe, kernels, num_samples, num_time)
        num_channels = shapes[0][1] * self.num_stacks
        published.check_value(num_channels, "extractor_config.in_channels")
        return {
            "conv_layers": [
                [*kernel, stride] for kernel, stride in zip(kernels, strides, strict=True)
            ],
            "bias": f"{stack}.0.0.bias" in published.tensors,
            "num_channels": num_channels,
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
    def config(self, jepa: JEPA, num_samples: int) -> Settings:
        # These are the keys and values that the published class writes.
        front_end = jepa.front_end
        has_group_norm = any(isinstance(module, nn.GroupNorm) for module in front_end.modules())
        if not isinstance(front_end, WaveformFrontEnd) or not has_group_norm:
            raise WeightsError("the layout of WavJEPA needs a WaveformFrontEnd with `norm: group`")
        config: dict[str, Any] = {
            "architectures": [f"{self.hub_class}Model"],
            "extractor_config": {
                "conv_bias": "stacks.0.0.0.bias" in front_end.state_dict(),
                "conv_layers_spec": str([tuple(layer) for layer in front_end.conv_layers]),
                "depthwise": False,
                "dropout": 0.0,
                "in_channels": front_end.num_channels,
                "mode": "default",
            },
            "model_type": self.model_type,
            "torch_dtype": str(jepa.predictor.mask_token.dtype).removeprefix("torch."),
            # The published class runs with this version, and fails with version 5.
            "transformers_version": "4.53.2",
        }
        if self.auto_map:
            config["auto_map"] = self.auto_map
        for name, encoder in (("encoder", jepa.encoder), ("decoder", jepa.predictor.trunk)):
            pre_norm = first_block(encoder).pre_norm
            check_blocks(
                name,
                encoder,
                pre_norm=pre_norm,
                gated=False,
                qk_norm=False,
                positions=self.positions,
                final_norm_eps=_FINAL_NORM_EPS,
            )
            config[f"{name}_layers_cfg"] = {
                "batch_first": True,
                "bias": True,
                "d_model": encoder.embed_dim,
                "dim_feedforward": encoder.get_parameter("blocks.0.mlp.fc1.bias").numel(),
                "dropout": 0.0,
                "layer_norm_eps": first_block(encoder).norm1.eps,
                "nhead": encoder.num_heads,
                "norm_first": pre_norm,
            }
            # Otherwise the published class fails on a clip that fills its windows exactly.
            config[f"{name}_cfg"] = {
                "enable_nested_tensor": False,
                "mask_check": True,
                "num_layers": encoder.depth,
            }
        return dict(sorted(config.items()))


class WavJEPANatLayout(WavJEPALayout):
    """WavJEPA-Nat: one stack of convolutions for each ear; the left ear is the first one."""

    recipe = "wavjepa_nat"
    hub_class = "WavJEPANat"
    model_type = "wavjepa-nat-base"
    auto_map: ClassVar[Mapping[str, str]] = {}
    num_stacks = 2
    stack = "cnns.0"
    positions = BinauralPositions()
    names = (
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.0\.", r"extract_audio.cnns.\1.\2.0."),
        (r"^front_end\.stacks\.(\d+)\.(\d+)\.1\.", r"extract_audio.cnns.\1.\2.2."),
        *_NAMES,
    )


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
