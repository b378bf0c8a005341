"""Published files → checkpoints of ours, and back."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.cli import instantiate_module
from safetensors.torch import save_file
from torch import Tensor

from jepa_audio.errors import MissingFileError
from jepa_audio.inference.encoder import num_crop_samples
from jepa_audio.interop.layout import Layout, Settings, SizeHints, merged
from jepa_audio.interop.published import Published, WeightsError, open_published
from jepa_audio.interop.pupujepa import PupuJEPALayout
from jepa_audio.interop.wavjepa import WavJEPALayout
from jepa_audio.old_paths import with_current_paths
from jepa_audio.recipes import find_recipe, recipes
from jepa_audio.steps import losses, masking  # noqa: F401
from jepa_audio.steps.encoder import positions  # noqa: F401
from jepa_audio.training import schedules  # noqa: F401 (recipes name their classes shortly)
from jepa_audio.training.checkpointing import AtomicCheckpointIO
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.load import load_jepa

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
    given: SizeHints | None = None,
) -> Path:
    """A published model as a checkpoint of ours, with the configuration to train it further.

    What the file holds is taken to the last bit or refused. A part that it does not hold at all is
    made: a missing encoder or target encoder is a copy of the other one, a missing predictor is
        drawn from the recipe's seed.

    Args:
        layout: a name in `LAYOUTS`.
        source: file or folder, see `open_published`.
        output: folder to write: `checkpoints/last.ckpt` and `config.yaml`.
        recipe: YAML of the settings that are no weights; the layout's own in `configs/` if `None`.
        given: sizes that the file does not tell.

    Returns:
        The checkpoint.

    Raises:
        WeightsError: if the file is damaged, does not tell a size, or holds other weights than the
            model has.
    """
    checkpoint = output / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        raise WeightsError(
            f"{checkpoint} exists and is not overwritten: give another folder with `-o`"
        )
    published = open_published(source)
    rules = _layout(layout).variant_of_file(published)
    recipe_settings = _read_recipe(find_recipe(str(recipe)) if recipe else recipes()[rules.recipe])
    settings = merged(
        recipe_settings, rules.sizes(published, given or SizeHints(), recipe_settings)
    )
    model = settings["model"]
    state = _state(rules, published, model)
    content = {
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": state,
        "hyper_parameters": {**model, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
        "datamodule_hyper_parameters": {"crop_seconds": settings["data"]["crop_seconds"]},
    }
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    further = {**settings, "model": _without_links(model), "weights": str(checkpoint)}
    (output / "config.yaml").write_text(yaml.safe_dump(further, sort_keys=False))
    return checkpoint


def export_weights(layout: str, checkpoint: Path, output: Path) -> Path:
    """A checkpoint of ours as a published model: `model.safetensors` and `config.json` in the folder `output`.

    Args:
        layout: a name in `LAYOUTS`.
        checkpoint: a `.ckpt` of ours.
        output: folder to write.

    Returns:
        The file of weights.

    Raises:
        WeightsError: if the layout cannot say what the model is.
        UserError: if the checkpoint does not tell the length of its crops.
    """
    jepa = load_jepa(checkpoint)
    rules = _layout(layout).variant_of_model(jepa)
    if jepa.target_front_end is not None:
        raise WeightsError(f"{layout}'s layout has no place for `target_front_end: momentum`")
    config = rules.config(jepa)
    tensors = {
        rules.published_name(name): value.contiguous() for name, value in jepa.state_dict().items()
    }
    tensors |= rules.formulas(jepa, num_crop_samples(checkpoint, jepa))
    tensors = {
        name: value.reshape(1, 1, -1) if name.endswith("mask_token") else value
        for name, value in tensors.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / "model.safetensors"
    save_file(
        {f"{rules.prefix}{name}": value for name, value in tensors.items()}, file, {"format": "pt"}
    )
    (output / "config.json").write_text(json.dumps(config, indent=2))
    return file


def load_weights(jepa: JEPA, checkpoint: Path) -> None:
    """Start from the weights of a checkpoint, all of them.

    Raises:
        UserError: if there is no such file.
        WeightsError: if it holds other weights than `jepa` has, with the list of differences.
    """
    if not checkpoint.is_file():
        raise MissingFileError(f"no checkpoint at {checkpoint}")
    published = open_published(checkpoint)
    own = jepa.state_dict()
    _refuse_differences(published.path, {name: name for name in own}, own, published.tensors)
    jepa.load_state_dict(published.tensors)


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise WeightsError(f"'{name}' is no published layout; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _read_recipe(recipe: Path) -> Settings:
    settings = with_current_paths(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    if not isinstance(settings, dict) or not {"model", "data"} <= settings.keys():
        raise WeightsError(f"{recipe} is no recipe: it needs `model` and `data`")
    return settings


def _state(rules: Layout, published: Published, model: Settings) -> dict[str, Tensor]:
    with torch.device("meta"):
        own = _fresh_state(model)
    names = {name: rules.published_name(name) for name in own}
    held = {name.partition(".")[0] for name, theirs in names.items() if theirs in published.tensors}
    if "front_end" not in held or not held & {"encoder", "target_encoder"}:
        raise WeightsError(
            f"{published.path} holds no front end or no encoder in this layout: {sorted(held) or 'none of it'}"
        )
    wanted = {name: theirs for name, theirs in names.items() if name.partition(".")[0] in held}
    rules.check_formulas(published)
    tensors = {
        name: value
        for name, value in published.tensors.items()
        if not re.match(rules.ignored, name)
    }
    _refuse_differences(published.path, wanted, own, tensors, rules.formula_names)
    state = {name: tensors[theirs].reshape(own[name].shape) for name, theirs in wanted.items()}
    return state | _made_up(published.path, own, state, held, model)


def _fresh_state(model: Settings) -> dict[str, Tensor]:
    return instantiate_module(
        JEPA, copy.deepcopy(model)
    ).state_dict()  # the parser writes into what it parses


def _refuse_differences(
    path: Path,
    names: Mapping[str, str],
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    formulas: Collection[str] = (),
) -> None:
    missing = [theirs for theirs in names.values() if theirs not in tensors]
    extra = sorted(tensors.keys() - set(names.values()) - set(formulas))
    misshapen = [
        f"{theirs} {list(tensors[theirs].shape)}, not {list(own[name].shape)}"
        for name, theirs in names.items()
        if theirs in tensors and _squeezed(tensors[theirs]) != _squeezed(own[name])
    ]
    found = {"missing": missing, "not known here": extra, "of another shape": misshapen}
    if any(found.values()):
        lines = [f"  {kind} ({len(what)}): {_listed(what)}" for kind, what in found.items() if what]
        raise WeightsError(f"{path} holds other weights than the model:\n" + "\n".join(lines))


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without leading ones: a mask token is `[D]` here and `[1, 1, D]` there."""
    shape = tuple(tensor.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (
        f", ... and {len(names) - most} more" if len(names) > most else ""
    )


def _made_up(
    path: Path,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    held: set[str],
    model: Settings,
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for part, twin in (("encoder", "target_encoder"), ("target_encoder", "encoder")):
        if part not in held:
            log.warning("%s holds no %s: it starts as a copy of the %s", path, part, twin)
            made |= {
                f"{part}{name.removeprefix(twin)}": value
                for name, value in state.items()
                if name.startswith(f"{twin}.")
            }
    if "predictor" not in held:
        log.warning("%s holds no predictor: it is drawn from `model.seed`", path)
        drawn = _fresh_state(model)
        made |= {name: drawn[name] for name in own if name.startswith("predictor.")}
    return made


def _without_links(model: Settings) -> dict[str, Any]:
    """Without what the command line fills in by itself: the encoder's width."""
    front_end, predictor = model["front_end"], model["predictor"]
    own = {name: value for name, value in front_end["init_args"].items() if name != "embed_dim"}
    return {
        **model,
        "front_end": {**front_end, "init_args": own},
        "predictor": {name: value for name, value in predictor.items() if name != "embed_dim"},
    }
