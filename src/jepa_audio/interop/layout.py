"""What a published layout is: names for our weights, and sizes to be read from its files."""

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
    """What the user says because a file of weights cannot.

    Attributes:
        num_heads: attention heads of the encoder.
        predictor_num_heads: of the predictor.
        conv_strides: of the layers of a convolution stack.
    """

    num_heads: int | None = None
    predictor_num_heads: int | None = None
    conv_strides: tuple[int, ...] | None = None


class Layout(ABC):
    """A published layout of weights.

    Attributes:
        recipe: file in `configs/` with all settings that are no sizes.
        names: (pattern, replacement) pairs that turn our name of a weight into the published one;
            the first one that fits is taken.
        ignored: pattern of published tensors that are no weights.
        formula_names: published tensors that are computed here.
        prefix: of all names in a written file.
    """

    recipe: ClassVar[str]
    names: ClassVar[tuple[tuple[str, str], ...]]
    ignored: ClassVar[str] = r"$."
    formula_names: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""

    def variant_of_file(self, published: Published) -> Layout:
        """The layout of this family that the file is in."""
        return self

    def variant_of_model(self, jepa: JEPA) -> Layout:
        """The layout of this family that holds the model."""
        return self

    def published_name(self, name: str) -> str:
        """The published name of one of our weights."""
        for pattern, replacement in self.names:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        raise WeightsError(
            f"{type(self).__name__} has no place for the weight `{name}` of this model"
        )

    @abstractmethod
    def sizes(self, published: Published, given: SizeHints, recipe: Settings) -> Settings:
        """What the file tells, to be laid over the settings of the recipe.

        Raises:
            WeightsError: if neither file nor user tells one of them.
        """

    def formulas(self, jepa: JEPA, num_samples: int) -> Mapping[str, Tensor]:
        """The tensors of `formula_names`, for clips of `num_samples`."""
        return {}

    def check_formulas(self, published: Published) -> None:  # noqa: B027 (a layout without formulas has none to check)
        """Raise `WeightsError` if a published tensor is not what is computed here."""

    @abstractmethod
    def config(self, jepa: JEPA) -> Settings:
        """What is written beside the weights, so that all sizes can be read back.

        Raises:
            WeightsError: if the layout has no way to say what this model does.
        """


def arguments(settings: Settings) -> Settings:
    """The arguments of a part, whether or not its class is named beside them."""
    return settings["init_args"] if "class_path" in settings else settings


def merged(settings: Settings, changes: Settings) -> Settings:
    """Settings with some changed, at any depth."""
    if "class_path" in settings and "init_args" not in changes and "class_path" not in changes:
        return {**settings, "init_args": merged(settings.get("init_args", {}), changes)}
    deeper = {
        name: merged(settings[name], change)
        for name, change in changes.items()
        if isinstance(change, dict) and isinstance(settings.get(name), dict)
    }
    return {**settings, **changes, **deeper}


def encoder_sizes(
    published: Published,
    part: str,
    blocks: str,
    hidden_by_width: str,
    heads: int | None,
    flag: str,
    told: tuple[str, ...],
) -> Settings:
    """Sizes of a transformer.

    Args:
        published: the file.
        part: prefix of the transformer's names.
        blocks: name of its list of blocks.
        hidden_by_width: in a block, the weight whose input is as wide as the MLP's hidden layer.
        heads: see `number_of_heads`.
        flag: see `number_of_heads`.
        told: see `number_of_heads`.
    """
    (width,) = published.shape(f"{part}.norm.weight", 1)
    _, hidden = published.shape(f"{part}.{blocks}.0.{hidden_by_width}", 2)
    return {
        "embed_dim": width,
        "depth": published.layers(rf"{part}\.{blocks}\.(\d+)\."),
        "num_heads": number_of_heads(published, heads, flag, told, width),
        "mlp_ratio": hidden / width,
    }


def number_of_heads(
    published: Published, given: int | None, flag: str, places: tuple[str, ...], width: int
) -> int:
    """Attention heads, which no shape tells: the user's word, or the file's."""
    heads = given if given is not None else published.told(*places)
    if heads is None:
        raise WeightsError(
            f"{published.path} does not tell how many attention heads its {width} dimensions are divided into "
            f"(looked for {', '.join(places)} in its configuration): give `{flag} N`"
        )
    if int(heads) < 1 or width % int(heads):
        raise WeightsError(
            f"{heads} attention heads do not divide the width {width} of {published.path}"
        )
    return int(heads)


def first_block(encoder: Transformer) -> Block:
    """All blocks have the sizes of the first."""
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    return block


def check_blocks(
    part: str,
    encoder: Transformer,
    *,
    pre_norm: bool,
    gated: bool,
    positions: tuple[Positions, ...],
    final_norm_eps: float,
    norm_eps: float | None = None,
) -> None:
    """Raise `WeightsError` if an encoder computes anything that a layout has no place for.

    Args:
        part: for the message.
        encoder: of the model.
        pre_norm: where the layout has the norms.
        gated: whether its MLPs are SwiGLUs.
        positions: those it knows.
        final_norm_eps: of the norm after the last block.
        norm_eps: of the others; `None` if the layout can say it.
    """
    block = first_block(encoder)
    wrong = {
        "norm": block.pre_norm != pre_norm,
        "mlp": hasattr(block.mlp, "gate_last") != gated,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale": not isinstance(block.scale1, nn.Identity),
        "num_registers": encoder.registers is not None,
        "positions": encoder.positions not in positions,
        "norm_eps": norm_eps is not None and block.norm1.eps != norm_eps,
        "final_norm_eps": encoder.norm.eps != final_norm_eps,
    }
    if any(wrong.values()):
        settings = ", ".join(f"`{setting}`" for setting, is_wrong in wrong.items() if is_wrong)
        raise WeightsError(f"the layout has no place for these settings of the {part}: {settings}")
