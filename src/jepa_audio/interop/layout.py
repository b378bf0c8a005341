"""The interface of a layout: how a published file names its weights and defines the model sizes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
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
    """Sizes that the user gives, because some files do not contain all sizes.

    They replace the sizes in the file.

    Attributes:
        num_heads: number of attention heads of the encoder.
        predictor_num_heads: number of attention heads of the predictor.
        conv_strides: stride of each convolution of the front end.
    """

    num_heads: int | None = None
    predictor_num_heads: int | None = None
    conv_strides: tuple[int, ...] | None = None


class Layout(ABC):
    """The layout of published files: names and shapes of the weights, and the configuration.

    Attributes:
        recipe: name of the recipe with all settings that are not sizes.
        names: (pattern, replacement) pairs that convert the name of a weight in this package to the
            published name; the first pattern that matches is used.
        ignored: pattern of the names of published tensors that are not weights.
        prefix: prefix of all names in an exported file.
        config_name: name of the file with the sizes of the model.
    """

    recipe: ClassVar[str]
    names: ClassVar[tuple[tuple[str, str], ...]]
    # This pattern matches no name.
    ignored: ClassVar[str] = r"$."
    prefix: ClassVar[str] = ""
    config_name: ClassVar[str] = "config.json"

    def variant(self, names: Iterable[str]) -> Layout:
        """The variant of the layout for a published file or a `JEPA` with these weight names."""
        return self

    def published_name(self, name: str) -> str:
        """The published name of a weight of this package."""
        for pattern, replacement in self.names:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        raise WeightsError(f"{type(self).__name__} does not define a name for the weight `{name}`")

    @abstractmethod
    def sizes(self, published: Published, hints: SizeHints, recipe: Settings) -> Settings:
        """The settings that the file determines; they replace those of the recipe.

        Raises:
            WeightsError: if neither the file nor the hints contain a size.
        """

    def formulas(self, jepa: JEPA, num_samples: int) -> Mapping[str, Tensor]:
        """Published tensors that are not weights, for example position tables.

        A formula computes them, for clips of `num_samples`.
        """
        return {}

    # This method is not abstract, because a layout without formulas needs no check.
    def check_formulas(self, published: Published) -> None:  # noqa: B027
        """Raise `WeightsError` if a published tensor differs from its formula."""

    @abstractmethod
    def config(self, jepa: JEPA, num_samples: int) -> Settings:
        """The content of `config_name`, which contains all sizes of the model.

        Args:
            jepa: the model.
            num_samples: length of a training crop.

        Raises:
            WeightsError: if the layout cannot express what the model computes.
        """


def arguments(settings: Settings) -> Settings:
    """The arguments of a part of the model; if there is a `class_path`, they are in `init_args`."""
    return settings.get("init_args", {}) if "class_path" in settings else settings


def merged(settings: Settings, changes: Settings) -> Settings:
    """Apply changes to nested settings and return the result.

    If the settings have a `class_path`, and the changes have neither `class_path` nor `init_args`,
    the changes apply to the `init_args` of the settings.
    """
    if "class_path" in settings and not {"init_args", "class_path"} & changes.keys():
        return {**settings, "init_args": merged(settings.get("init_args", {}), changes)}
    nested = {
        name: merged(settings[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(settings.get(name), dict)
    }
    return {**settings, **changes, **nested}


@dataclass(frozen=True)
class TransformerKeys:
    """Where a published file has a transformer: names of its weights, keys of its configuration.

    Attributes:
        part: prefix of the names of all weights of the transformer.
        blocks: name of the list of blocks.
        mlp_weight: name of the weight of a block that maps the hidden layer of the MLP to D.
        heads: dotted keys of the number of heads; the first key found is used.
        sizes: keys of the width, of the number of blocks and of the hidden width, which the tensors
            determine.
        option: command-line option for the number of heads, for the error message.
    """

    part: str
    blocks: str
    mlp_weight: str
    heads: tuple[str, ...]
    sizes: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    option: str


def transformer_sizes(published: Published, keys: TransformerKeys, heads: int | None) -> Settings:
    """The sizes of a transformer.

    Args:
        published: the file.
        keys: where the file has the transformer.
        heads: number of attention heads from the user; `None` takes it from the configuration of
            the file, because no shape of a tensor depends on it.

    Raises:
        WeightsError: if the number of heads is unknown or impossible, or if the configuration has
            other sizes than the tensors.
    """
    (width,) = published.shape(f"{keys.part}.norm.weight", 1)
    _, hidden = published.shape(f"{keys.part}.{keys.blocks}.0.{keys.mlp_weight}", 2)
    depth = published.num_layers(rf"{re.escape(keys.part)}\.{keys.blocks}\.(\d+)\.")
    for names, size in zip(keys.sizes, (width, depth, hidden), strict=True):
        published.check_value(size, *names)
    num_heads = published.whole_number(*keys.heads) if heads is None else heads
    if num_heads is None:
        raise WeightsError(
            f"{published.path}: the configuration ({', '.join(keys.heads)}) does not contain the "
            f"number of attention heads of the transformer of width {width}: give "
            f"`{keys.option} N`"
        )
    if num_heads < 1 or width % num_heads:
        raise WeightsError(
            f"{published.path}: {num_heads} attention heads do not divide the width {width}"
        )
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": hidden / width,
    }


def first_block(encoder: Transformer) -> Block:
    """The first block of a transformer; all blocks have the same sizes."""
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    return block


def has_qk_norm(encoder: Transformer) -> bool:
    """Whether a transformer normalises its queries and keys."""
    return not isinstance(first_block(encoder).attn.q_norm, nn.Identity)


def check_blocks(
    part: str,
    encoder: Transformer,
    *,
    pre_norm: bool,
    gated: bool,
    qk_norm: bool,
    positions: Positions,
    final_norm_eps: float,
    norm_eps: float | None = None,
) -> None:
    """Raise `WeightsError` if an encoder has settings that the layout cannot express.

    Args:
        part: name of the encoder in the error message.
        encoder: transformer of the model.
        pre_norm: whether the norms of the layout are before attention and MLP.
        gated: whether the MLPs of the layout are SwiGLUs.
        qk_norm: whether the layout has norms of queries and keys.
        positions: the position encoding of the layout.
        final_norm_eps: epsilon of the norm after the last block.
        norm_eps: epsilon of the other norms; `None` if the layout can express any value.
    """
    block = first_block(encoder)
    differs = {
        "norm": block.pre_norm != pre_norm,
        "mlp": hasattr(block.mlp, "gate_last") != gated,
        "qk_norm": has_qk_norm(encoder) != qk_norm,
        "layer_scale": not isinstance(block.scale1, nn.Identity),
        "num_registers": encoder.registers is not None,
        "positions": encoder.positions != positions,
        "norm_eps": norm_eps is not None and block.norm1.eps != norm_eps,
        "final_norm_eps": encoder.norm.eps != final_norm_eps,
    }
    if any(differs.values()):
        settings = ", ".join(f"`{setting}`" for setting, is_other in differs.items() if is_other)
        raise WeightsError(
            f"the model cannot be exported: the layout has other values for these settings of the "
            f"{part}: {settings}"
        )
