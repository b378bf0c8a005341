"""Open published files of weights without running any code in them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from jepa_audio.errors import MissingFileError
from jepa_audio.files import read_json
from jepa_audio.training.run.load import damage, read_torch_file
from jepa_audio.training.run.stored_objects import StoredObject
from jepa_audio.training.run.weights import WeightsError, checked_tensors, shorten

CONFIG_NAMES = ("config.json", "args.json")
MAX_SIZE = 100_000
MAX_CONV_LAYERS = 100
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_STATE_NAMES = ("state_dict", "model", "model_state_dict")
# The prefixes that torch.compile and DistributedDataParallel add to a part of a name.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod\.|module\.)")


@dataclass(frozen=True)
class Published:
    """The content of a published file.

    Attributes:
        path: the file.
        tensors: the tensors by name; the prefixes of torch.compile, DistributedDataParallel and
            Hugging Face are removed.
        config: the sizes in the file, and those in the `config.json` or `args.json` of its folder.
        used: first names of the keys of `config` that were read.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

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
        return next((value for key in keys if (value := self._value(key)) is not None), None)

    def number(self, *keys: str, low: int | float = -inf, high: int | float = inf) -> Any | None:
        """The number at the first dotted key that the configuration contains, or `None`.

        Raises:
            WeightsError: if the value is not a number in [`low`, `high`].
        """
        key = next((key for key in keys if self._value(key) is not None), None)
        value = None if key is None else self._value(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and isfinite(value) and low <= value <= high):
            raise WeightsError(
                f"{self.path}: `{key}` in its configuration ({shown(value)}) must be a number in "
                f"[{low:g}, {high:g}]"
            )
        return value

    def whole_number(self, *keys: str, high: int = MAX_SIZE) -> int | None:
        """As `number`, but a whole number in [1, `high`]."""
        value = self.number(*keys, low=1, high=high)
        if value is not None and int(value) != value:
            raise WeightsError(f"{self.path}: `{keys[0]}` ({value}) must be a whole number")
        return None if value is None else int(value)

    def check_value(self, value: object, *keys: str) -> None:
        """Check that the configuration has no other value than the tensors at one of the keys.

        Raises:
            WeightsError: if it has another value, so that it is of another model.
        """
        for key in keys:
            if (stated := self._value(key)) not in (None, value):
                raise WeightsError(
                    f"{self.path}: its tensors give {value}, but its configuration has `{key}` "
                    f"{shown(stated)}: they are of different models"
                )

    def unused(self) -> list[str]:
        """The names in the configuration that were not read."""
        return sorted(self.config.keys() - self.used)

    def _value(self, key: str) -> Any | None:
        value: Any = self.config
        self.used.add(key.partition(".")[0])
        for part in key.split("."):
            value = _plain(value).get(part) if isinstance(_plain(value), Mapping) else None
        return _plain(value)


def open_published(path: Path, trust: Sequence[str] = ()) -> Published:
    """Open a `.safetensors` file, a torch file, or a folder with one of them.

    Args:
        path: the file or folder.
        trust: see `read_torch_file`.

    Raises:
        MissingFileError: if `path` does not exist.
        WeightsError: if the file is not a complete file of weights, or contains other objects.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file of weights at {path}")
    file = _find_file(path) if path.is_dir() else path
    if file.suffix == ".safetensors":
        tensors, config = _read_safetensors(file)
    else:
        tensors, config = _read_torch(file, trust)
    for config_file in (file.with_name(name) for name in CONFIG_NAMES):
        if config_file.is_file():
            values = read_json(config_file)
            if not isinstance(values, dict):
                raise WeightsError(f"{config_file} is not a JSON object")
            config = {**config, **values}
    return Published(file, _remove_prefixes(checked_tensors(file, tensors)), config)


def parse_conv_layers(spec: Any) -> list[tuple[int, int, int]]:
    """Parse layers (channels, kernel, stride) in the notation of fairseq, without running code.

    An example is `[(512,10,5)] + [(512,3,2)] * 4`.

    Raises:
        WeightsError: if `spec` has another form, or more than `MAX_CONV_LAYERS` layers.
    """
    try:
        is_text = isinstance(spec, str)
        items = _literal_list(ast.parse(spec[:10_000], mode="eval").body) if is_text else spec
        items = list(items)[: MAX_CONV_LAYERS + 1]
        layers = [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in items]
    except (SyntaxError, TypeError, ValueError, ArithmeticError, MemoryError, RecursionError):
        layers = []
    if 0 < len(layers) <= MAX_CONV_LAYERS and all(
        min(layer) >= 1 and max(layer) <= MAX_SIZE for layer in layers
    ):
        return layers
    raise WeightsError(
        f"the configuration has conv layers {shown(spec)}, which are not a list of (channels, "
        f"kernel, stride) with at most {MAX_CONV_LAYERS} layers and no number above {MAX_SIZE}"
    )


def shown(value: Any) -> str:
    """A value from a file for an error message, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _literal_list(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal_list(node.left) + _literal_list(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        if not isinstance(times, int) or not 0 <= times <= MAX_CONV_LAYERS:
            raise ValueError(times)
        items = _literal_list(node.left)
        return items[: MAX_CONV_LAYERS + 1] * times
    items = ast.literal_eval(node)
    if not isinstance(items, list | tuple):
        raise ValueError(items)
    return list(items)


def _find_file(folder: Path) -> Path:
    for suffix in SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            raise WeightsError(f"{folder} has {len(files)} files *{suffix}: give one of them")
        if files:
            return files[0]
    raise WeightsError(f"{folder} has no file of weights ({', '.join(SUFFIXES)})")


def _read_safetensors(file: Path) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as content:
            # `content` has `keys()`, but cannot be iterated.
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} {damage(file, error)}") from error
    return tensors, {name: _parse_json(text) for name, text in metadata.items()}


def _read_torch(file: Path, trust: Sequence[str]) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    content = read_torch_file(file, trust=trust)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{file} must contain a mapping of names to tensors, but contains a "
            f"{type(content).__name__}"
        )
    states = (content[name] for name in _STATE_NAMES if isinstance(content.get(name), Mapping))
    state = next(states, content)
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"{file} has no tensors, neither at the top level nor in {', '.join(_STATE_NAMES)}"
        )
    config = _plain(content.get("hyper_parameters", {}))
    return state, dict(config) if isinstance(config, Mapping) else {}


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, StoredObject) else value


def _remove_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    # Hugging Face adds this prefix.
    if all(name.startswith("model.") for name in plain):
        plain = {name.removeprefix("model."): value for name, value in plain.items()}
    return plain


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
