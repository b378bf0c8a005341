"""Load weights that fit a model; this module does not import Lightning, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from jepa_audio.errors import UserError


class WeightsError(UserError):
    """Raised for unusable files of weights, and for weights that do not fit a model."""


def checked_tensors(path: Path, values: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state; a shape must not be larger than what the file stores.

    Raises:
        WeightsError: if a tensor repeats its values, which takes memory when the tensor is copied.
    """
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise WeightsError(
                f"{path}: `{name}` has shape {list(tensor.shape)}, but the file does not store as "
                "many values"
            )
    return tensors


def load_state(
    module: nn.Module, path: Path, tensors: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Replace all weights of a module by those `tensors` of a file whose names have a prefix.

    Raises:
        WeightsError: if they do not fit the module; the message lists the differences.
    """
    found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    refuse_differences(path, {name: prefix + name for name in expected}, expected, found)
    module.load_state_dict(
        {name: found[prefix + name].reshape(value.shape) for name, value in expected.items()}
    )


@contextmanager
def limited_parameters(path: Path, limit: int) -> Iterator[None]:
    """Refuse models with more parameters than `limit`, before the parameters take memory."""
    count = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count > limit:
            raise WeightsError(
                f"{path}: its hyper-parameters describe a model with more than the {limit:,} "
                "values in the file"
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def refuse_differences(
    path: Path,
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise `WeightsError` with the names of all `tensors` that do not fit the model.

    `names` maps the names in `expected`, the state of the model, to the names in `tensors`.
    """
    missing = [key for key in names.values() if key not in tensors]
    unknown = sorted(tensors.keys() - set(names.values()))
    misshapen = [
        f"{key} {list(tensors[key].shape)}, not {list(expected[name].shape)}"
        for name, key in names.items()
        if key in tensors and _squeezed(tensors[key]) != _squeezed(expected[name])
    ]
    differences = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    lines = [
        f"\n  {kind} ({len(found)}): {shorten(found, 8)}"
        for kind, found in differences.items()
        if found
    ]
    if lines:
        raise WeightsError(f"the weights of {path} do not fit the model:{''.join(lines)}")


def shorten(names: Iterable[str], max_names: int) -> str:
    """The first `max_names` names as text, and the number of the others."""
    names = list(names)
    more = f", ... and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without leading ones, because the published mask token is `[1, 1, D]`."""
    shape = tuple(tensor.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
