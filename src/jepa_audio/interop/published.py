"""Open published files of weights without running any code in them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import read_json
from jepa_audio.training.load import DamagedCheckpointError, read_torch_file

CONFIG_NAMES = ("config.json", "args.json")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STATE_NAMES = ("state_dict", "model", "model_state_dict")
# The prefixes that torch.compile and DistributedDataParallel add to a part of a name.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod\.|module\.)")


class WeightsError(UserError):
    """Raised for unusable files of weights and for models that a layout cannot express."""


@dataclass(frozen=True)
class Published:
    """The content of a published file.

    Attributes:
        path: the file.
        tensors: the tensors by name; the prefixes of torch.compile, DistributedDataParallel and
            Hugging Face are removed.
        config: the sizes in the file, and those in the `config.json` or `args.json` of its folder.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def num_layers(self, pattern: str) -> int:
        """Number of layers: `pattern` matches the start of a name; its group is the layer."""
        matches = (re.match(pattern, name) for name in self.tensors)
        return len({match[1] for match in matches if match})

    def shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            WeightsError: if the tensor does not exist or has another number of axes.
        """
        if name not in self.tensors:
            raise WeightsError(
                f"{self.path} does not contain `{name}`, whose shape gives a size of the model; "
                f"it contains {shorten(sorted(self.tensors), 5)}"
            )
        shape = tuple(self.tensors[name].shape)
        if len(shape) != num_axes:
            raise WeightsError(
                f"{self.path}: `{name}` must have {num_axes} axes, but has shape {list(shape)}"
            )
        return shape

    def config_value(self, *keys: str) -> Any | None:
        """The value of the first dotted key that the configuration contains, or `None`."""
        for key in keys:
            value: Any = self.config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None


def open_published(path: Path) -> Published:
    """Open a `.safetensors` file, a torch file, or a folder with one of them.

    Raises:
        MissingFileError: if `path` does not exist.
        WeightsError: if the file is not a file of weights, or contains code.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file of weights at {path}")
    file = _find_file(path) if path.is_dir() else path
    read = _read_safetensors if file.suffix == ".safetensors" else _read_torch
    tensors, config = read(file)
    for config_file in (file.with_name(name) for name in CONFIG_NAMES):
        if config_file.is_file():
            values = read_json(config_file)
            if not isinstance(values, dict):
                raise WeightsError(f"{config_file} is not a JSON object")
            config = {**config, **values}
    return Published(file, _remove_prefixes(tensors), config)


def parse_conv_layers(spec: str | list[Any]) -> list[tuple[int, int, int]]:
    """Parse layers (channels, kernel, stride) in the notation of fairseq, without running code.

    An example is `[(512,10,5)] + [(512,3,2)] * 4`.

    Raises:
        WeightsError: if `spec` has another form.
    """
    try:
        layers = _literal_list(ast.parse(spec, mode="eval").body) if isinstance(spec, str) else spec
        return [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError) as error:
        raise WeightsError(
            f"the configuration has conv layers {spec!r}, which are not a list of (channels, "
            "kernel, stride)"
        ) from error


def shorten(names: Iterable[str], max_names: int) -> str:
    """The first `max_names` names as text, and the number of the others."""
    names = list(names)
    more = f", ... and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def _literal_list(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal_list(node.left) + _literal_list(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _literal_list(node.left) * int(ast.literal_eval(node.right))
    return list(ast.literal_eval(node))


def _find_file(folder: Path) -> Path:
    for suffix in SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            raise WeightsError(f"{folder} has {len(files)} files *{suffix}: give one of them")
        if files:
            return files[0]
    raise WeightsError(f"{folder} has no file of weights ({', '.join(SUFFIXES)})")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as content:
            # `content` has `keys()`, but cannot be iterated.
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{file} is not a complete safetensors file: {error}") from error
    return tensors, {name: _parse_json(text) for name, text in metadata.items()}


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = read_torch_file(file)
    except DamagedCheckpointError as error:
        raise WeightsError(str(error)) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{file} must contain a mapping of names to tensors, but contains a "
            f"{type(content).__name__}"
        )
    states = (content[name] for name in _STATE_NAMES if isinstance(content.get(name), Mapping))
    state = next(states, content)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{file} has no tensors, neither at the top level nor in {', '.join(_STATE_NAMES)}"
        )
    config = content.get("hyper_parameters", {})
    return tensors, dict(config) if isinstance(config, Mapping) else {}


def _remove_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    # Hugging Face adds this prefix.
    if all(name.startswith("model.") for name in plain):
        plain = {name.removeprefix("model."): value for name, value in plain.items()}
    return plain


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
