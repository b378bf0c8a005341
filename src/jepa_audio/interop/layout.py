"""A published layout: its names for our weights, and how sizes are read from its files."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from jepa_audio.interop.published import Published, WeightsError
from jepa_audio.steps.encoder.positions import Positions
from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.training.jepa import JEPA

Settings = dict[str, Any]


@dataclass(frozen=True)
class SizeHints:
    """Sizes from the user, for files that do not hold them.

    Attributes:
        num_heads: attention heads of the encoder.
        predictor_num_heads: attention heads of the predictor.
        conv_strides: strides of the layers of a convolution stack.
    """

    num_heads: int | None = None
    predictor_num_heads: int | None = None
    conv_strides: tuple[int, ...] | None = None


class Layout(ABC):
    """A published layout of weights.

    Attributes:
        recipe: name of the recipe with all settings that are not sizes.
        names: (pattern, replacement) pairs that turn our name of a weight into the published one;
            the first pattern that matches is used.
        ignored: pattern of published tensors that are not weights.
        formula_names: published tensors that are computed here by a formula.
        prefix: of all names in a written file.
    """

    recipe: ClassVar[str]
    names: ClassVar[tuple[tuple[str, str], ...]]
    ignored: ClassVar[str] = r"$."
    formula_names: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""

    def variant_of_file(self, published: Published) -> Layout:
        """The layout of this family that the file has."""
        return self

    def variant_of_model(self, jepa: JEPA) -> Layout:
        """The layout of this family that can hold the model."""
        return self

    def published_name(self, name: str) -> str:
        """The published name of one of our weights."""
        for pattern, replacement in self.names:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        raise WeightsError(f"{type(self).__name__} has no name for the weight `{name}`")

    @abstractmethod
    def sizes(self, published: Published, hints: SizeHints, recipe: Settings) -> Settings:
        """The settings that the file determines; they replace those of the recipe.

        Raises:
            WeightsError: if a size is neither in the file nor in the hints.
        """

    def formulas(self, jepa: JEPA, num_samples: int) -> Mapping[str, Tensor]:
        """The tensors of `formula_names`, for clips of `num_samples`."""
        return {}

    # Not abstract: a layout without formulas has nothing to check.
    def check_formulas(self, published: Published) -> None:  # noqa: B027
        """Raise `WeightsError` if a published tensor differs from the formula."""

    @abstractmethod
    def config(self, jepa: JEPA) -> Settings:
        """The content of `config.json`, from which all sizes can be read again.

        Raises:
            WeightsError: if the layout cannot express what the model computes.
        """


def arguments(settings: Settings) -> Settings:
    """The arguments of a part, written with or without its class."""
    return settings["init_args"] if "class_path" in settings else settings


def merged(settings: Settings, changes: Settings) -> Settings:
    """Settings with changes at any depth; changes without a class are changes of `init_args`."""
    if "class_path" in settings and not {"init_args", "class_path"} & changes.keys():
        return {**settings, "init_args": merged(settings.get("init_args", {}), changes)}
    nested = {
        name: merged(settings[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(settings.get(name), dict)
    }
    return {**settings, **changes, **nested}


def encoder_sizes(
    published: Published,
    part: str,
    blocks: str,
    mlp_weight: str,
    heads: int | None,
    option: str,
    keys: tuple[str, ...],
) -> Settings:
    """Sizes of a transformer.

    Args:
        published: the file.
        part: prefix of the names of the transformer.
        blocks: name of its list of blocks.
        mlp_weight: weight of a block whose input is as wide as the hidden layer of the MLP.
        heads: see `num_heads`.
        option: see `num_heads`.
        keys: see `num_heads`.
    """
    (width,) = published.shape(f"{part}.norm.weight", 1)
    _, hidden = published.shape(f"{part}.{blocks}.0.{mlp_weight}", 2)
    return {
        "embed_dim": width,
        "depth": published.num_layers(rf"{part}\.{blocks}\.(\d+)\."),
        "num_heads": num_heads(published, heads, option, keys, width),
        "mlp_ratio": hidden / width,
    }


def num_heads(
    published: Published, hint: int | None, option: str, keys: tuple[str, ...], width: int
) -> int:
    """The number of attention heads, which is not in any shape: the hint, else the file's.

    Args:
        published: the file.
        hint: from the user.
        option: of the command, for the error message.
        keys: of the configuration of the file, dotted; the first one found counts.
        width: of the transformer.
    """
    heads = hint if hint is not None else published.config_value(*keys)
    if heads is None:
        raise WeightsError(
            f"{published.path}: the number of attention heads of the transformer of width {width} "
            f"is not in its configuration ({', '.join(keys)}): give `{option} N`"
        )
    if int(heads) < 1 or width % int(heads):
        raise WeightsError(
            f"{published.path}: {heads} attention heads do not divide the width {width}"
        )
    return int(heads)


def first_block(encoder: Transformer) -> Block:
    """The first block; all blocks have the same sizes."""
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    return block


def check_blocks(
    part: str,
    encoder: Transformer,
    *,
    pre_norm: bool,
    gated: bool,
    positions: Positions,
    final_norm_eps: float,
    norm_eps: float | None = None,
) -> None:
    """Raise `WeightsError` if an encoder computes anything that the layout cannot express.

    Args:
        part: name of the encoder, for the message.
        encoder: of the model.
        pre_norm: whether the layout has its norms before attention and MLP.
        gated: whether the MLPs of the layout are SwiGLUs.
        positions: of the layout.
        final_norm_eps: of the norm after the last block.
        norm_eps: of the other norms; `None` if the layout has a place for it.
    """
    block = first_block(encoder)
    differs = {
        "norm": block.pre_norm != pre_norm,
        "mlp": hasattr(block.mlp, "gate_last") != gated,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale": not isinstance(block.scale1, nn.Identity),
        "num_registers": encoder.registers is not None,
        "positions": encoder.positions != positions,
        "norm_eps": norm_eps is not None and block.norm1.eps != norm_eps,
        "final_norm_eps": encoder.norm.eps != final_norm_eps,
    }
    if any(differs.values()):
        settings = ", ".join(f"`{setting}`" for setting, is_other in differs.items() if is_other)
        raise WeightsError(f"the layout has no place for these settings of the {part}: {settings}")
