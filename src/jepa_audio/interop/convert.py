"""Convert published files to checkpoints of this package, and checkpoints to published files."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from jepa_audio.class_paths import check_class_paths, parse_yaml
from jepa_audio.files import write_text
from jepa_audio.inference.load import num_crop_samples
from jepa_audio.interop.layout import Layout, Settings, SizeHints, merged
from jepa_audio.interop.published import Published, open_published
from jepa_audio.interop.pupujepa import PupuJEPALayout
from jepa_audio.interop.wavjepa import WavJEPALayout
from jepa_audio.old_paths import with_current_paths
from jepa_audio.recipes import find_recipe, recipes
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.checkpointing import AtomicCheckpointIO
from jepa_audio.training.run.load import missing_checkpoint
from jepa_audio.training.run.models import build_jepa, load_jepa
from jepa_audio.training.run.weights import (
    WeightsError,
    load_state,
    refuse_differences,
    shorten,
)

log = logging.getLogger(__name__)

LAYOUTS: dict[str, Layout] = {
    "wavjepa": WavJEPALayout(),
    "pupujepa": PupuJEPALayout(),
}


def import_weights(
    layout: str,
    source: Path,
    output: Path,
    *,
    recipe: Path | str | None = None,
    hints: SizeHints | None = None,
    trust: Sequence[str] = (),
) -> Path:
    """Convert a published model to a checkpoint, and write a configuration for further training.

    The checkpoint contains every weight of the file without any change; otherwise the file is
    refused. Missing parts are replaced: a missing encoder or target encoder is a copy of the other
    one, and a missing predictor has initial weights from the seed of the recipe.

    Args:
        layout: a name in `LAYOUTS`.
        source: file or folder, see `open_published`.
        output: folder for `checkpoints/last.ckpt` and `config.yaml`.
        recipe: name or YAML file with the other settings; `None` for the recipe of the layout.
        hints: sizes that the file does not contain.
        trust: modules whose objects the file may contain, and whose classes the recipe may name.

    Returns:
        The path of the checkpoint.

    Raises:
        WeightsError: if the file is damaged, a size is unknown, or the weights do not fit the
            model.
    """
    checkpoint = output / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        raise WeightsError(
            f"{checkpoint} exists and is not overwritten: give another folder with `-o`"
        )
    published = open_published(source, trust)
    variant = _layout(layout).variant(published.tensors)
    file = find_recipe(str(recipe)) if recipe else recipes()[variant.recipe]
    base = _read_recipe(file)
    settings = merged(base, variant.sizes(published, hints or SizeHints(), base))
    model = settings["model"]
    check_class_paths(model, str(file), trust)
    if unused := published.unused():
        log.info("%s: not used, the recipe decides: %s", published.path, shorten(unused, 30))
    content = {
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": _state(variant, published, model),
        "hyper_parameters": {**model, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
        "datamodule_hyper_parameters": {"crop_seconds": settings["data"]["crop_seconds"]},
    }
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    config = {**settings, "model": _without_linked(model), "weights": str(checkpoint)}
    write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    return checkpoint


def export_weights(layout: str, checkpoint: Path, output: Path, trust: Sequence[str] = ()) -> Path:
    """Write a checkpoint of this package in a published layout.

    Args:
        layout: a name in `LAYOUTS`.
        checkpoint: the `.ckpt` file of a run or of an import.
        output: folder for `model.safetensors` and the `config_name` of the layout.
        trust: see `load_jepa`.

    Returns:
        The path of `model.safetensors`.

    Raises:
        WeightsError: if the layout cannot express what the model computes.
        UserError: if the checkpoint does not contain the length of its crops.
    """
    jepa = load_jepa(checkpoint, trust)
    weights = jepa.state_dict()
    state = {name: value for name, value in weights.items() if _part(name) != "distance"}
    variant = _layout(layout).variant(state)
    other = jepa.target_front_end and "momentum"
    if jepa.fixed_front_end is not None:
        other = type(jepa.fixed_front_end).__name__
    if other:
        raise WeightsError(
            f"the model cannot be exported: the layout {layout} has no `target_front_end: {other}`"
        )
    num_samples = num_crop_samples(checkpoint, jepa.front_end.sample_rate, trust)
    config = variant.config(jepa, num_samples)
    if len(state) < len(weights):
        log.info("the layout %s has no weights of the loss: `distance` is not exported", layout)
    tensors = {variant.published_name(name): value.contiguous() for name, value in state.items()}
    tensors |= variant.formulas(jepa, num_samples)
    tensors = {
        f"{variant.prefix}{name}": value.reshape(1, 1, -1) if name.endswith("mask_token") else value
        for name, value in tensors.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    write_text(output / variant.config_name, json.dumps(config, indent=2) + "\n")
    return file


def load_weights(jepa: JEPA, checkpoint: Path) -> None:
    """Replace all weights of a model by the weights of a checkpoint.

    If the checkpoint was trained with another `distance`, the model keeps its own weights there.

    Raises:
        MissingFileError: if the file does not exist.
        WeightsError: if the weights do not fit the model; the message lists the differences.
    """
    if not checkpoint.is_file():
        raise missing_checkpoint(checkpoint)
    published = open_published(checkpoint)
    tensors = dict(published.tensors)
    own, other = _distance_weights(jepa.state_dict()), _distance_weights(tensors)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
        log.warning("%s has other weights of `distance`: those are not used", checkpoint)
        tensors = {k: v for k, v in tensors.items() if k not in other} | own
    load_state(jepa, published.path, tensors)


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise WeightsError(f"'{name}' is not a published layout: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _read_recipe(recipe: Path) -> Settings:
    text = recipe.read_text(encoding="utf-8")
    settings = with_current_paths(parse_yaml(text, str(recipe)))
    if not isinstance(settings, dict) or not {"model", "data"} <= settings.keys():
        raise WeightsError(f"{recipe} is not a recipe: it needs the keys `model` and `data`")
    return settings


def _state(variant: Layout, published: Published, model: Settings) -> dict[str, Tensor]:
    """All weights of the model; see `import_weights` for missing parts."""
    with torch.device("meta"):
        expected = _initial_state(model)
    expected = {name: value for name, value in expected.items() if _part(name) != "distance"}
    names = {name: variant.published_name(name) for name in expected}
    parts = {_part(name) for name, key in names.items() if key in published.tensors}
    if "front_end" not in parts or not parts & {"encoder", "target_encoder"}:
        raise WeightsError(
            f"{published.path} must contain a front end and an encoder in this layout, but "
            f"contains only {sorted(parts) or 'other tensors'}"
        )
    names = {name: key for name, key in names.items() if _part(name) in parts}
    variant.check_formulas(published)
    is_ignored = re.compile(variant.ignored).match
    tensors = {name: value for name, value in published.tensors.items() if not is_ignored(name)}
    refuse_differences(published.path, names, expected, tensors)
    state = {name: tensors[key].reshape(expected[name].shape) for name, key in names.items()}
    return state | _missing_parts(published.path, state, parts, model)


def _part(name: str) -> str:
    return name.partition(".")[0]


def _distance_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if _part(name) == "distance"}


def _initial_state(model: Settings) -> dict[str, Tensor]:
    return build_jepa(model, "the recipe and the sizes of the file").state_dict()


def _missing_parts(
    path: Path, state: Mapping[str, Tensor], parts: set[str], model: Settings
) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part, other in (("encoder", "target_encoder"), ("target_encoder", "encoder")):
        if part not in parts:
            log.warning("%s has no %s: the model gets a copy of the %s", path, part, other)
            weights |= {
                f"{part}{name.removeprefix(other)}": value
                for name, value in state.items()
                if _part(name) == other
            }
    if "predictor" not in parts:
        log.warning("%s has no predictor: its weights are drawn from `model.seed`", path)
    initial = _initial_state(model)
    drawn = {"distance", "fixed_front_end", "predictor"} - parts
    return weights | {name: value for name, value in initial.items() if _part(name) in drawn}


def _without_linked(model: Settings) -> Settings:
    """Settings without the `embed_dim` values that the command line copies from the encoder."""
    model = copy.deepcopy(model)
    model["front_end"]["init_args"].pop("embed_dim", None)
    model["predictor"].pop("embed_dim", None)
    if isinstance(model.get("target_front_end"), dict):
        model["target_front_end"].get("init_args", {}).pop("embed_dim", None)
    return model
