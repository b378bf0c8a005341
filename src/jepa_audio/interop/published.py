"""Files of weights as others publish them: opened without running their code, named plainly."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jepa_audio.errors import MissingFileError, UserError

CONFIG_NAMES = ("config.json", "args.json")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STATE_NAMES = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of DistributedDataParallel


class WeightsError(UserError):
    """A file of weights that cannot be taken, said in one sentence or as a list of differences."""


@dataclass(frozen=True)
class Published:
    """What a published file holds.

    Attributes:
        path: the file.
        tensors: by name, without the wrappers of torch.compile, DistributedDataParallel and Hugging
            Face.
        config: what the file itself and a `config.json` or `args.json` beside it say of sizes;
            nested as found.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def layers(self, pattern: str) -> int:
        """How many different numbers the group of `pattern` finds at the beginning of the names."""
        found = (re.match(pattern, name) for name in self.tensors)
        return len({match[1] for match in found if match})

    def shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Of a tensor; `WeightsError` if there is none of that name, or if it has other than `num_axes` axes."""
        if name not in self.tensors:
            raise WeightsError(
                f"{self.path} holds no `{name}`, which tells a size; it holds {_some(self.tensors)}"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != num_axes:
            raise WeightsError(
                f"`{name}` of {self.path} has the shape {list(shape)}, {num_axes} axes were expected"
            )
        return shape

    def told(self, *places: str) -> Any | None:
        """The first of some dotted places at which the configuration says something, or `None`."""
        for place in places:
            value: Any = self.config
            for key in place.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None


def open_published(path: Path) -> Published:
    """Open a `.safetensors` file, a torch file (weights only: no code of the file is run), or a folder with one.

    Raises:
        UserError: if there is nothing at `path`.
        WeightsError: if it is no such file, or would need more than weights to be unpacked.
    """
    if not path.exists():
        raise MissingFileError(f"no file of weights at {path}")
    file = _only_file(path) if path.is_dir() else path
    tensors, config = (
        _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    )
    for name in CONFIG_NAMES:
        beside = file.with_name(name)
        if beside.is_file():
            try:
                config = {**config, **json.loads(beside.read_text())}
            except (TypeError, ValueError) as error:
                raise WeightsError(f"{beside} is no JSON object: {error}") from error
    return Published(file, _plain_names(tensors), config)


def conv_layers_of(spec: str | list[Any]) -> list[tuple[int, int, int]]:
    """The layers (channels, kernel, stride) of fairseq's way to write them, such as `[(512,10,5)] + [(512,3,2)] * 4`.

    Raises:
        WeightsError: if it is anything else; nothing is ever evaluated.
    """
    try:
        layers = _sum_of_lists(ast.parse(spec, mode="eval").body) if isinstance(spec, str) else spec
        return [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError) as error:
        raise WeightsError(
            f"the configuration's conv layers {spec!r} are no list of (channels, kernel, stride)"
        ) from error


def _sum_of_lists(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sum_of_lists(node.left) + _sum_of_lists(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _sum_of_lists(node.left) * int(ast.literal_eval(node.right))
    return list(ast.literal_eval(node))


def _only_file(folder: Path) -> Path:
    for suffix in SUFFIXES:
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) > 1:
            raise WeightsError(
                f"{folder} holds {len(found)} files {suffix}; name the one that is meant"
            )
        if found:
            return found[0]
    raise WeightsError(f"{folder} holds no file of weights ({', '.join(SUFFIXES)})")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (a handle is no mapping)
            return tensors, {
                name: _json_or_text(text) for name, text in (content.metadata() or {}).items()
            }
    except SafetensorError as error:
        raise WeightsError(f"{file} is no whole safetensors file: {error}") from error


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise WeightsError(
                f"{file} is no whole torch file, or is packed in a way that needs more"
            ) from error
        raise WeightsError(
            f"{file} holds more than weights and would run code of its own ({wanted[1]}) when it is opened. It is "
            "refused; where you trust it, keep its tensors alone: "
            "`torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, OTHER)`"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise WeightsError(
            f"{file} is no whole torch file: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{file} holds a {type(content).__name__}, a mapping of names to tensors was expected"
        )
    state = next(
        (content[name] for name in _STATE_NAMES if isinstance(content.get(name), Mapping)), content
    )
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{file} holds no tensors, neither by themselves nor under {', '.join(_STATE_NAMES)}"
        )
    config = content.get("hyper_parameters", {})
    return tensors, dict(config) if isinstance(config, Mapping) else {}


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {}
    for name, value in tensors.items():
        for wrapper in _WRAPPERS:
            name = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", name)  # noqa: PLW2901
        plain[name] = value
    if plain and all(name.startswith("model.") for name in plain):
        plain = {name.removeprefix("model."): value for name, value in plain.items()}
    return plain


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _some(names: Mapping[str, Tensor], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown
