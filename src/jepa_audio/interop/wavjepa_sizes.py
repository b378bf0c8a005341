"""The sizes of a published WavJEPA, from its tensors and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jepa_audio.interop.layout import Settings, SizeHints, TransformerKeys, transformer_sizes
from jepa_audio.interop.published import Published, WeightsError, parse_conv_layers, shown

log = logging.getLogger(__name__)


def conv_strides(
    published: Published,
    hints: SizeHints,
    recipe: Settings,
    kernels: list[tuple[int, int]],
    num_samples: float,
    num_time: int | None,
) -> list[int]:
    """The strides of the convolutions `kernels` (channels, kernel).

    They are taken from the hints or the configuration of the file. Lightning checkpoints do not
    contain them. Then the strides of the recipe and those of wav2vec 2.0 (5, then 2) are used, if
    they divide a crop of `num_samples` into the `num_time` positions of the file.
    """
    spec = published.config_value(
        "extractor_config.conv_layers_spec", "conv_layers_spec", "conv_layers"
    )
    if hints.conv_strides is not None:
        if len(hints.conv_strides) != len(kernels):
            raise WeightsError(
                f"`conv_strides` has {len(hints.conv_strides)} values, but {published.path} has "
                f"{len(kernels)} convolutions"
            )
        return list(hints.conv_strides)
    layers = parse_conv_layers(recipe["conv_layers"] if spec is None else spec)
    of_config = [stride for _, _, stride in layers]
    if spec is not None and [layer[:2] for layer in layers] == kernels:
        return of_config
    if spec is not None:
        raise WeightsError(
            f"{published.path}: its tensors give convolutions (channels, kernel) {kernels}, but "
            f"its configuration has {shown(spec)}: they are of different models"
        )
    sizes = [kernel for _, kernel in kernels]
    is_like_recipe = [kernel for _, kernel, _ in layers] == sizes
    for strides in ([of_config] if is_like_recipe else []) + [[5, *[2] * (len(sizes) - 1)]]:
        if num_time in _num_tokens(list(zip(sizes, strides, strict=True)), num_samples):
            log.info("%s does not contain strides; its positions fit %s", published.path, strides)
            return strides
    raise WeightsError(
        f"{published.path} does not contain the strides of its convolutions (channels, kernel) "
        f"{kernels}, and the strides of the recipe do not give its {num_time} positions: give "
        "`--conv_strides [5, 2, ...]`"
    )


def _num_tokens(layers: list[tuple[int, int]], num_samples: float) -> set[int]:
    """Tokens of a crop after convolutions (kernel, stride).

    The published code rounds the number of samples down, this package rounds to the nearest.
    """
    counts = set()
    for length in (int(num_samples), round(num_samples)):
        for kernel, stride in layers:
            length = (length - kernel) // stride + 1  # noqa: PLW2901
        counts.add(length)
    return counts


def transformer(
    published: Published, part: str, group: str, heads: int | None, option: str
) -> Settings:
    """The sizes of the transformer `part`; `group` is the prefix of its configuration keys."""
    # Hugging Face files, the hyper-parameters of Lightning checkpoints.
    layers, stack = (
        (f"{group}_{kind}", f"transformer_{group}_{kind}") for kind in ("layers_cfg", "cfg")
    )
    module = "encoder" if group == "encoder" else "predictor"
    keys = TransformerKeys(
        part,
        "layers",
        "linear2.weight",
        (*(f"{key}.nhead" for key in layers), f"{group}_nhead", f"{module}.heads"),
        (
            tuple(f"{key}.d_model" for key in layers),
            tuple(f"{key}.num_layers" for key in stack),
            tuple(f"{key}.dim_feedforward" for key in layers),
        ),
        option,
    )
    sizes = transformer_sizes(published, keys, heads)
    eps = published.number(*(f"{key}.layer_norm_eps" for key in layers), low=0, high=1)
    if eps is not None:
        sizes["norm_eps"] = float(eps)
    is_pre = published.config_value(*(f"{key}.norm_first" for key in layers))
    if is_pre not in (None, True, False):
        raise WeightsError(
            f"{published.path}: `norm_first` ({shown(is_pre)}) must be true or false"
        )
    if is_pre is not None:
        sizes["norm"] = "pre" if is_pre else "post"
    activation = published.config_value(*(f"{key}.activation" for key in layers))
    if activation is not None and not _is_gelu(activation):
        raise WeightsError(
            f"{published.path}: the layout of WavJEPA has GELU as activation, but the {group} has "
            f"{getattr(activation, 'path', activation)!r}"
        )
    return sizes


def _is_gelu(activation: Any) -> bool:
    """Whether a name, or a module or function that a checkpoint stores, is the exact GELU."""
    path = activation if isinstance(activation, str) else getattr(activation, "path", "")
    state = getattr(activation, "state", None)
    approximate = state.get("approximate", "none") if isinstance(state, Mapping) else "none"
    return path.rpartition(".")[2].lower() == "gelu" and approximate == "none"


def targets(published: Published, recipe: Settings, depth: int) -> Settings:
    """How many blocks of the target encoder are averaged; the published code takes one as it is."""
    top_k = published.whole_number("average_top_k_layers", "top_k", high=depth)
    if top_k is not None:
        return {"top_k": top_k, **({"normalization": "none"} if top_k == 1 else {})}
    top_k = recipe.get("top_k")
    if top_k is not None and top_k > depth:
        log.warning(
            "%s has %d blocks: `targets.top_k` is %d, and not %d as in the recipe",
            *(published.path, depth, depth, top_k),
        )
        return {"top_k": depth}
    return {}


def clip_length(
    published: Published, front_end: Settings, seconds: float, sample_rate: int
) -> Settings:
    """The crop length that gives the number of tokens of the position table.

    `seconds` if this length, or a file without a table, fits.
    """
    if "pos_encoding_encoder" not in published.tensors:
        return {"crop_seconds": seconds}
    _, num_tokens, _ = published.shape("pos_encoding_encoder", 3)
    num_time = num_tokens // (front_end["num_channels"] if front_end["separate_channels"] else 1)
    layers = [(kernel, stride) for _, kernel, stride in front_end["conv_layers"]]
    if num_time in _num_tokens(layers, seconds * sample_rate):
        return {"crop_seconds": seconds}
    num_samples = num_time
    for kernel, stride in reversed(layers):
        num_samples = (num_samples - 1) * stride + kernel
    return {"crop_seconds": num_samples / sample_rate}
